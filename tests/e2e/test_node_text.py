"""What a run says stands in the nodes that report: Sparse Attention Report and Save Tile Plan."""

import pytest
from plan_node import TOLD, queue

RENDERERS = pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
ADD = "kind => { const node = LiteGraph.createNode(kind); app.graph.add(node); node.pos = [300, 150]; return node.id }"
LOWER_EDGE = """(([node], { ds, canvas }) => {
    return (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale + canvas.getBoundingClientRect().top;
})(app.graph.nodes, app.canvas)"""
SAID = "Self-attention over the video: 30 calls, 30 of them sparse\n  work: 34%" + "\n  more" * 30


def lower(box) -> float:
    """The lower edge of an element, as LOWER_EDGE is the first node's: in pixels of the page."""
    found = box.bounding_box()
    return found["y"] + found["height"]


def tell(page, node, text: str, prompt: str = ""):
    detail = {"prompt_id": prompt, "node": str(node), "output": {"text": [text]}}
    page.evaluate(f"detail => {TOLD}('executed', detail)", detail)


@RENDERERS
@pytest.mark.parametrize(
    ("kind", "name", "height"),
    [("EVDiTReport", "Report of the last run", 120), ("EVDiTSaveTilePlan", "Saved plan", 56)],
)
def test_a_run_s_text_is_shown_and_kept_in_no_workflow(comfy, modern, kind, name, height):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    node = page.evaluate(ADD, kind)
    box = page.get_by_role("textbox", name=name)
    assert box.get_attribute("placeholder") == "The text is shown here after a run."
    saved = "JSON.stringify([app.graph.serialize().nodes[0].widgets_values, {}])"
    before = page.evaluate(saved)
    tell(page, node, SAID)
    page.wait_for_function("text => document.querySelector('.evdit-in-node').value === text", arg=SAID)
    assert box.input_value() == SAID and not box.is_editable()
    page.wait_for_timeout(500)
    assert box.bounding_box()["height"] >= height - 5
    assert page.evaluate("app.graph.nodes[0].size[1]") > height + 40
    assert lower(box) < page.evaluate(LOWER_EDGE)
    comfy.picture(f"text {kind} {'nodes2' if modern else 'classic'}")
    # The text scrolls under the wheel, and the canvas stays.
    scale = page.evaluate("app.canvas.ds.scale")
    box.click()
    page.mouse.wheel(0, 200)
    page.wait_for_function("document.querySelector('.evdit-in-node').scrollTop > 0")
    assert page.evaluate("app.canvas.ds.scale") == scale
    assert page.evaluate(saved) == before
    prompt = page.evaluate("app.graphToPrompt().then(({ output }) => Object.values(output)[0].inputs)")
    assert prompt == ({"filename_prefix": "plan"} if kind == "EVDiTSaveTilePlan" else {})


@RENDERERS
def test_it_outlives_undo_and_belongs_to_the_tab_that_queued_it(comfy, modern):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    node = page.evaluate(ADD, "EVDiTReport")
    queue(page, "of the first tab")
    page.evaluate("app.loadGraphData(app.graph.serialize(), true, true, 'copy')")
    page.wait_for_timeout(500)
    tell(page, node, "said in the first tab", "of the first tab")
    page.wait_for_timeout(500)
    box = page.get_by_role("textbox", name="Report of the last run")
    assert box.input_value() == ""
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    shown = "text => document.querySelector('.evdit-in-node')?.value === text"
    page.wait_for_function(shown, arg="said in the first tab")
    # As undo does: every node anew.
    page.evaluate("app.loadGraphData(app.graph.serialize(), true, true, app.extensionManager.workflow.activeWorkflow)")
    page.wait_for_timeout(1000)
    page.wait_for_function(shown, arg="said in the first tab")
    tell(page, node, "said again")
    page.wait_for_function(shown, arg="said again")
    assert box.input_value() == "said again"


def test_a_text_in_a_subgraph_is_shown_inside(comfy):
    page = comfy.open().page
    page.evaluate(ADD, "EVDiTReport")
    outer = page.evaluate("app.graph.convertToSubgraph(new Set([app.graph.nodes[0]])).node.id")
    inner = page.evaluate("app.graph.nodes[0].subgraph.nodes[0].id")
    page.evaluate("(n => app.canvas.openSubgraph(n.subgraph, n))(app.graph.nodes[0])")
    tell(page, f"{outer}:{inner}", "said inside")
    page.wait_for_function("document.querySelector('.evdit-in-node')?.value === 'said inside'")
