"""The blueprint "Faster video model": found in the search, placed, and sent as two nodes of this pack."""

import pytest

VALUES = "app.graph.nodes[0]?.widgets?.map(w => [w.name, w.value, !!w.disabled])"


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_it_is_found_placed_and_sent(comfy, modern):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    page.wait_for_timeout(2000)  # a page that has just come up does not hear the double click
    page.mouse.dblclick(700, 600, delay=60)  # as a hand does: some pages do not hear two clicks in no time
    page.wait_for_timeout(1500)
    page.keyboard.type("faster video")
    page.get_by_text("Faster video model").first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length === 1")
    page.mouse.click(500, 400)
    page.wait_for_timeout(1000)
    comfy.picture(f"blueprint {'nodes2' if modern else 'classic'}")
    assert page.evaluate(VALUES) == [["reference_frames", 6, False], ["start_percent", 0.2, False]]
    page.evaluate("(w => { w.value = 3; w.callback?.(3) })(app.graph.nodes[0].widgets[0])")
    output = page.evaluate(
        """() => {
            const [node, sampler] = [app.graph.nodes[0], LiteGraph.createNode('KSampler')];
            app.graph.add(sampler);
            node.connect(0, sampler, 0);
            return app.graphToPrompt().then(({ output }) => Object.values(output));
        }"""
    )
    sent = {node["class_type"]: node["inputs"] for node in output}
    assert sent["EVDiTTilePlan"]["reference_frames"] == 3
    assert (
        sent["EVDiTSparseAttention"]["start_percent"] == 0.2
        and sent["EVDiTSparseAttention"]["dense_blocks"] == "0-1,-1"
    )
    assert "model" not in sent["EVDiTSparseAttention"]  # nothing is linked to it yet
