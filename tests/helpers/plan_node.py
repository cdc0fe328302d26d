"""A workflow with one Tile Plan, for the tests of its chart."""

TITLE = "app.graph.nodes.find(n => n.type === 'EVDiTTilePlan')"
TEXT = f"{TITLE}.widgets.find(w => w.name === 'text').value"
TOLD = "((type, detail) => app.api.dispatchEvent(new CustomEvent(type, { detail })))"  # as if the server had sent it

SET = """([kind, name, value]) => {
    const widget = app.graph.nodes.find(n => n.type === kind).widgets.find(w => w.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
NOTICE = f"(tracker => (tracker.captureCanvasState ?? tracker.checkState).call(tracker))({TRACKER})"  # as the page does after a click


def plan_node(comfy, text: str = "", width: int = 320):
    """Add one to the open workflow; returns the chart's locator."""
    comfy.page.evaluate(
        """([text, width]) => {
            const node = LiteGraph.createNode('EVDiTTilePlan');
            app.graph.add(node);
            node.pos = [300, 150];
            node.setSize([width, node.computeSize()[1]]);
            const widget = node.widgets.find(w => w.name === 'text');
            widget.value = text;
            widget.callback?.(text);
            app.canvas.setDirty(true, true);
        }""",
        [text, width],
    )
    chart = comfy.page.locator(".evdit-plan-chart:visible")
    chart.first.wait_for()
    return chart.first


def queue(page, prompt_id: str):
    """Queue the open tab's workflow; the server's answer names the prompt, and nothing runs."""
    answer = {"prompt_id": prompt_id, "number": 1, "node_errors": {}}
    page.route("**/prompt", lambda route: route.fulfill(json=answer))
    page.evaluate("app.queuePrompt(0, 1)")
    page.unroute("**/prompt")
