"""Sequence Parallel on the page: a run that fell back to one device says so on the node."""

import pytest

GRAPH = """timeout => {
    const [loader, parallel, text] = ['EVDiTModelLoader', 'EVDiTSequenceParallel', 'PreviewAny'].map((kind, i) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        node.pos = [60 + 420 * i, 150];
        return node;
    });
    loader.widgets.find(w => w.name === 'model_name').value = 'tiny (built in)';
    parallel.widgets.find(w => w.name === 'start_timeout').value = timeout;  // else ComfyUI has the result already
    loader.connect(0, parallel, 0);
    parallel.connect(1, text, 0);
    app.queuePrompt(0);
}"""
SHOWN = """(app.graph.nodes.find(n => n.type === 'EVDiTSequenceParallel').widgets ?? [])
    .filter(w => String(w.value).startsWith('The model runs on one device as it was: ')).length"""


@pytest.mark.parametrize("modern", [False, True])
def test_a_run_on_one_device_says_so_on_the_node(comfy, modern):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    page.evaluate(GRAPH, 301 if modern else 300)
    page.wait_for_function(f"{SHOWN} === 1")
    # Preview as Text holds it once more, hidden, on some pages.
    page.get_by_text("The model runs on one device as it was", exact=False).locator("visible=true").first.wait_for()
    comfy.picture(f"sequence_parallel_{'modern' if modern else 'classic'}")
