"""Undo and redo make every node anew. The chart on the page must be the new node's, on the classic canvas and in Nodes 2.0."""

import pytest
from plan_node import NOTICE, TEXT, TITLE, TOLD, TRACKER, plan_node

PROMPT = """app.graphToPrompt().then(({ output }) =>
    Object.values(output).find(n => n.class_type === 'EVDiTTilePlan')?.inputs.text)"""


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def renderer(comfy, request):
    comfy.open(Comfy_VueNodes_Enabled=request.param)
    return "nodes2" if request.param else "classic"


def record(page):
    """What the page does after a click or a key. First Nodes 2.0 measure what is new; changes soon after count as the same."""
    page.wait_for_timeout(500)
    page.evaluate(NOTICE)
    page.wait_for_timeout(200)


def add(page, kind: str):
    """One more node, as a step that can be undone."""
    page.evaluate("kind => void app.canvas.graph.add(LiteGraph.createNode(kind))", kind)
    record(page)


def undo(page, nodes: int = 1, keys: str = "Control+z"):
    """Undo, or redo, to a workflow of so many nodes."""
    page.keyboard.press(keys)
    page.wait_for_function(f"app.graph.nodes.length === {nodes}")
    page.wait_for_timeout(1000)  # drawn


def test_a_click_is_one_step_of_undo(comfy, renderer):
    page = comfy.page
    chart = plan_node(comfy, "0-3:2:6")
    record(page)
    chart.get_by_role("option", name="Layer 1:").click()
    assert page.evaluate(TEXT) == "0:2:6 1:1:7 2-3:2:6"
    page.keyboard.press("Control+z")
    page.wait_for_function(f"{TITLE} && {TEXT} === '0-3:2:6'")
    chart.get_by_text("2:6 × 4").wait_for()
    page.keyboard.press("Control+y")
    page.wait_for_function(f"{TITLE} && {TEXT} === '0:2:6 1:1:7 2-3:2:6'")
    chart.get_by_text("1:7 × 1").wait_for()


def test_a_number_ended_with_enter_is_a_step_of_undo(comfy, renderer):
    page = comfy.page
    chart = plan_node(comfy, "all:2")
    record(page)
    length = chart.get_by_role("spinbutton").first
    length.fill("9")
    length.press("Enter")
    chart.get_by_text("9 latent frames").wait_for()
    kept = f"{TRACKER}.activeState.nodes[0].properties.evdit_preview?.frames"  # what a page that is loaded anew has
    page.wait_for_function(f"{kept} === 9", timeout=10_000)
    page.evaluate(f"{TRACKER}.undo()")
    page.wait_for_function(f"{TITLE} && {TITLE}.properties.evdit_preview === undefined")
    chart.get_by_text("21 latent frames").wait_for()


def test_clicks_after_undo_and_redo_reach_the_prompt(comfy, renderer):
    page = comfy.page
    chart = plan_node(comfy, "0-3:2:6")
    record(page)
    add(page, "SaveVideo")
    undo(page)
    chart.get_by_role("option", name="Layer 1:").click()
    assert page.evaluate(PROMPT) == "0:2:6 1:1:7 2-3:2:6"
    chart.get_by_text("1:7 × 1").wait_for()
    page.keyboard.press("Control+z")
    page.wait_for_function(f"{TITLE} && {TEXT} === '0-3:2:6'")
    undo(page, nodes=1, keys="Control+y")
    page.wait_for_function(f"{TITLE} && {TEXT} === '0:2:6 1:1:7 2-3:2:6'")
    chart.get_by_role("option", name="Layer 3:").click()
    assert page.evaluate(PROMPT) == "0:2:6 1:1:7 2:2:6 3:1:7"
    chart.get_by_text("1:7 × 2").wait_for()
    comfy.picture(f"after undo and redo {renderer}")


def test_a_click_in_a_subgraph_after_undo(comfy, renderer):
    page = comfy.page
    chart = plan_node(comfy, "0-3:2:6")
    page.evaluate(
        f"""() => {{
            const {{ node }} = app.graph.convertToSubgraph(new Set([{TITLE}]));
            app.canvas.openSubgraph(node.subgraph, node);
        }}"""
    )
    page.wait_for_timeout(1000)
    inner = "app.canvas.graph.nodes"
    chart.get_by_role("option", name="Layer 2:").click()  # its node is not the one that the subgraph was made of
    assert page.evaluate(f"{inner}[0].widgets.find(w => w.name === 'text').value") == "0-1:2:6 2:1:7 3:2:6"
    record(page)
    add(page, "SaveVideo")
    page.keyboard.press("Control+z")
    page.wait_for_function(f"{inner}.length === 1 && {inner}[0].type === 'EVDiTTilePlan'")
    page.wait_for_timeout(1000)
    chart.get_by_role("option", name="Layer 1:").click()
    text = page.evaluate(f"{inner}[0].widgets.find(w => w.name === 'text').value")
    assert text == "0:2:6 1-2:1:7 3:2:6"
    chart.get_by_text("1:7 × 2").wait_for()


def test_two_graphs_with_a_plan_under_one_number(comfy, renderer):
    """Of one text, because some pages give the widgets of one number one value."""
    page = comfy.page
    chart = plan_node(comfy, "all:2")
    page.evaluate(f"{TITLE}.properties.evdit_preview = {{ frames: 8, depth: 4 }}")
    page.evaluate(f"void app.graph.convertToSubgraph(new Set([{TITLE}]))")
    page.evaluate(
        """() => {
            const outer = LiteGraph.createNode('EVDiTTilePlan');
            outer.id = app.graph.nodes[0].subgraph.nodes[0].id;
            if (app.graph.getNodeById(outer.id)) throw Error('taken');
            app.graph.add(outer);
            outer.properties.evdit_preview = { frames: 8, depth: 6 };
            const widget = outer.widgets.find(w => w.name === 'text');
            widget.value = 'all:2';
            widget.callback(widget.value);
        }"""
    )
    page.evaluate("(n => app.canvas.openSubgraph(n.subgraph, n))(app.graph.nodes.find(n => n.subgraph))")
    chart.get_by_text("2:6 × 4").wait_for()
    page.evaluate("app.canvas.setGraph(app.graph)")
    chart.get_by_text("2:6 × 6").wait_for()


def test_the_figures_of_the_last_run_outlive_undo(comfy, renderer):
    page = comfy.page
    chart = plan_node(comfy, "0-5:2:6")
    page.evaluate(
        f"(s => {{ app.graph.add(s); {TITLE}.connect(0, s, 1) }})(LiteGraph.createNode('EVDiTSparseAttention'))"
    )
    record(page)
    sparse = "app.graph.nodes.find(n => n.type === 'EVDiTSparseAttention')"
    report = "{ node: String(%s.id), plan: '0-5:2:6', frames: 8, layers: 6, sparse: %d, density: 0.5, seconds: 1, dense: {} }"
    page.evaluate(f"{TOLD}('efficient_vdit.report', {report % (sparse, 11)})")
    chart.get_by_text("11 sparse calls").wait_for()
    add(page, "SaveVideo")
    undo(page, nodes=2)
    chart.get_by_text("11 sparse calls").wait_for()
    # The next run's are shown where the last one's were.
    page.evaluate(f"{TOLD}('efficient_vdit.report', {report % (sparse, 22)})")
    chart.get_by_text("22 sparse calls").wait_for()
    # They are of this plan alone.
    chart.get_by_role("option", name="Layer 1:").click()
    chart.get_by_text("22 sparse calls").wait_for(state="hidden")


def test_a_searched_plan_outlives_undo(comfy, renderer):
    """The server, which has the result, does not run the search again."""
    page = comfy.page
    search = "app.graph.nodes.find(n => n.type === 'EVDiTSearchTilePlan')"
    add(page, "EVDiTSearchTilePlan")
    page.evaluate(f"{TOLD}('executed', {{ node: String({search}.id), output: {{ evdit_plan: ['0-5:2:6'] }} }})")
    chart = page.locator(".evdit-plan-chart:visible").first
    chart.get_by_text("2:6 × 6").wait_for()
    add(page, "EVDiTReport")
    undo(page)
    chart.get_by_text("2:6 × 6").wait_for(timeout=10_000)
    # Under other settings it is not their plan.
    page.evaluate(f"(w => {{ w.value = 0.5; w.callback(0.5) }})({search}.widgets.find(w => w.name === 'threshold'))")
    chart.get_by_text("drawn here after a run").wait_for()


def test_a_run_is_no_step_of_undo(comfy, renderer):
    """But for the room that its figures take in the node, when it is the first."""
    page = comfy.page
    chart = plan_node(comfy, "all:2")
    sparse = page.evaluate(
        f"(s => {{ app.graph.add(s); {TITLE}.connect(0, s, 1); return s.id }})(LiteGraph.createNode('EVDiTSparseAttention'))"
    )
    report = {"node": str(sparse), "plan": "all:2", "sparse": 11, "density": 0.5, "seconds": 1, "dense": {}}

    def run(frames: int, layers: int):
        told = {**report, "frames": frames, "layers": layers}
        page.evaluate(f"detail => {TOLD}('efficient_vdit.report', detail)", told)
        chart.get_by_text(f"2:{frames - 2} × {layers}").wait_for()
        record(page)

    run(frames=9, layers=7)
    before = page.evaluate(f"{TRACKER}.undoQueue.length")
    run(frames=8, layers=6)
    assert page.evaluate(f"{TRACKER}.undoQueue.length") == before
    # The plan's next edit is drawn at the run's length, and at the user's own once there is one.
    chart.get_by_role("option", name="Layer 1:").click()
    chart.get_by_text("2:6 × 5").wait_for()
    length = chart.get_by_role("spinbutton").first
    length.fill("11")
    length.press("Tab")
    chart.get_by_text("2:9 × 5").wait_for()
    assert page.evaluate(f"{TITLE}.properties.evdit_preview") == {"frames": 11, "depth": 6}
