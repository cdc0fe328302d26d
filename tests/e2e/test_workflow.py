"""The shipped workflow as a new user meets it: template browser, Run, help panel, another language."""

from comfyui_server import ENDINGS

TINY = "tiny_text_to_video"


def select(page, kind: str):
    """Select the one node of this class, as a click on it does."""
    page.evaluate("kind => app.canvas.selectNode(app.graph.nodes.find(n => n.type === kind))", kind)


def test_the_template_opens_and_runs(comfy):
    page = comfy.open().page
    comfy.template(TINY)
    assert page.evaluate("app.graph.nodes.every(n => !n.has_errors && window.LiteGraph.registered_node_types[n.type])")
    page.evaluate("app.graph.nodes.forEach(n => { if (n.type === 'EVDiTConsistencySigmas') n.widgets.forEach(w => { w.value = 4 }) })")
    page.evaluate(
        "endings => { window.ended = []; endings.forEach(e => app.api.addEventListener(e, () => window.ended.push(e))) }", list(ENDINGS)
    )
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function("window.ended.length > 0", timeout=90_000)
    comfy.picture("after the run")
    assert page.evaluate("window.ended") == ["execution_success"]
    assert list((comfy.server.base / "output" / "video").glob("*.mp4"))


def test_the_help_panel_shows_the_page(comfy):
    page = comfy.open().page
    comfy.template(TINY)
    select(page, "EVDiTTilePlan")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="Typical values").wait_for()
    comfy.picture("help panel")


def test_the_page_speaks_chinese(comfy):
    page = comfy.open(Comfy_Locale="zh").page
    comfy.template(TINY)
    titles = page.evaluate("app.graph.nodes.filter(n => n.type.startsWith('EVDiT')).map(n => n.title)")
    labels = page.evaluate("app.graph.nodes.find(n => n.type === 'EVDiTTilePlan').widgets.map(w => w.label ?? w.name)")
    assert all(any("一" <= c <= "鿿" for c in text) for text in titles + labels[:1]), titles + labels
    select(page, "EVDiTTilePlan")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="常用值").wait_for()
    comfy.picture("chinese")
