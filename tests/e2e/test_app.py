"""The template that opens as an app: its three inputs are there in words, and a run shows the video; as a graph, a slider."""

import pytest
from comfyui_server import RUN_TIMEOUT
from templates import workflow


@pytest.fixture
def fresh(browser, server, page_class):
    """A page of its own: App Mode would stay for the other tests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    yield page_class(context.new_page(), server)
    context.close()


def test_it_opens_as_an_app_and_runs(fresh):
    fresh.open()
    fresh.template("tiny_app")
    page = fresh.page
    page.wait_for_timeout(2000)
    skip = page.get_by_role("button", name="Skip")  # the page's own tour of apps, once
    if skip.count():
        skip.first.click()
    for label in ("prompt", "reference frames (fewer = faster, changes more)", "frames"):
        page.get_by_text(label, exact=True).first.wait_for()
    page.get_by_role("button", name="Run").last.click()
    page.locator("video").first.wait_for(timeout=1000 * RUN_TIMEOUT)
    fresh.picture("app after the run")


def test_as_a_graph_it_shows_both_clips_under_a_slider(fresh):
    """In Nodes 2.0; the classic canvas says in the node that it draws none."""
    page = fresh.open(Comfy_VueNodes_Enabled=True).page
    if not page.evaluate("!!LiteGraph.registered_node_types.ImageCompare"):
        pytest.skip("this ComfyUI has no ImageCompare")
    graph = workflow("tiny_app")
    del graph["extra"]["linearMode"], graph["extra"]["linearData"]
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.evaluate("app.queuePrompt(0, 1)")
    images = page.get_by_test_id("image-compare-viewport").locator("img")
    page.wait_for_function(
        "[...document.querySelectorAll('[data-testid=image-compare-viewport] img')].filter(i => i.naturalWidth).length === 2",
        timeout=1000 * RUN_TIMEOUT,
    )
    dense, sparse = images.nth(1).get_attribute("src"), images.nth(0).get_attribute("src")
    assert "comfy.compare.a" in dense and "comfy.compare.b" in sparse  # the upper one is cut at the line
    page.evaluate("app.canvas.centerOnNode(app.graph.nodes.find(n => n.type === 'ImageCompare'))")
    page.wait_for_timeout(1000)
    fresh.picture("slider")
