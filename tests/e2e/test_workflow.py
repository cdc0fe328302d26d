"""The shipped workflows as a new user meets them: template browser, Run, help panel, another language."""

import re

import pytest
from comfyui_server import ENDINGS, RUN_TIMEOUT
from overlaps import OVERLAPS
from templates import GRAPHS

NAMES = GRAPHS
TINY = "tiny_text_to_video"
ALL_TINY = [name for name in NAMES if name.startswith("tiny")]


def select(page, kind: str):
    """Bring the one node of this class to the middle and select it, as a click on it does."""
    page.evaluate(
        """kind => {
            const node = app.graph.nodes.find(n => n.type === kind);
            app.canvas.centerOnNode(node);
            app.canvas.selectNode(node);
        }""",
        kind,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_template_opens_with_its_chart(comfy, name):
    page = comfy.open().page
    comfy.template(name)
    strangers = page.evaluate("app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert not [kind for kind in strangers if kind.startswith("EVDiT")]
    if strangers:
        pytest.skip(f"this ComfyUI has no {', '.join(strangers)}")
    chart = page.locator(".evdit-plan-chart:visible").first
    if "search" in name:  # its plan is not known before the run
        chart.get_by_text("drawn here after a run").wait_for()
        return
    chart.get_by_role("option").first.wait_for(state="attached")
    assert chart.get_by_text("full ×").count() == (0 if name in ALL_TINY else 1)


FEW = """app.graph.nodes.filter(n => n.type === 'EVDiTConsistencySigmas')
    .forEach(n => n.widgets.filter(w => ['segments', 'steps'].includes(w.name)).forEach(w => { w.value = 2 }))"""
SEED = """seed => app.graph.nodes.filter(n => n.type === 'RandomNoise')
    .forEach(n => { n.widgets.find(w => w.name === 'noise_seed').value = 100 + seed })"""
FIXED = """app.graph.nodes.flatMap(n => n.widgets ?? []).flatMap(w => w.linkedWidgets ?? [])
    .forEach(w => { w.value = 'fixed' })"""
# What the chart tells after the run: 6 layers, 2 steps; with and without the prompt at once, or one after the other.
SPARSE = "(12|24) sparse calls, 53 %"
TOLD = {
    TINY: SPARSE,
    "tiny_dense_beside_sparse": SPARSE,
    "tiny_search_a_plan": r"\d+ sparse calls, \d+ %",
    "tiny_three_stages": "48 sparse calls, 30 %",  # its 8 steps come from the checkpoint
}


def run(page):
    """Queue what is open by a click, and wait for its end."""
    # One page serves all tests, so a listener is added once.
    page.evaluate(
        """endings => {
            if (!window.ended) endings.forEach(e => app.api.addEventListener(e, () => window.ended.push(e)));
            window.ended = [];
        }""",
        list(ENDINGS),
    )
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function("window.ended.length > 0", timeout=1000 * RUN_TIMEOUT)
    assert page.evaluate("window.ended") == ["execution_success"]


@pytest.mark.parametrize("name", ALL_TINY)
def test_the_template_opens_and_runs(comfy, name):
    page = comfy.open().page
    comfy.template(name)
    page.evaluate(FEW)
    # Its own noise: what the run before has computed already would be taken from the server's cache.
    page.evaluate(SEED, ALL_TINY.index(name))
    run(page)
    # The page sets seeds once a prompt is queued; a run may have ended by then.
    page.evaluate(
        "app.graph.nodes.forEach(n => n.widgets?.filter(w => w.name === 'seed').forEach(w => w.callback?.(w.value)))"
    )
    chart = page.locator(".evdit-plan-chart:visible").first
    if name in TOLD:
        chart.get_by_text(re.compile(f"Last run: {TOLD[name]}")).wait_for()
    assert chart.get_by_role("option").count() == 6
    for box in page.get_by_role("textbox", name="Report of the last run").all():
        page.wait_for_function(
            "box => box.value.startsWith('Self-attention over the video: ')", arg=box.element_handle()
        )
    assert page.evaluate(OVERLAPS) == []  # nodes have grown to what they show now
    comfy.picture(f"{name} after the run")
    if name == TINY:
        assert list((comfy.server.base / "output" / "video").glob("*.mp4"))


def test_the_report_of_a_run_stays_where_its_plan_came_from_the_cache(comfy):
    """The page hears of such a plan last."""
    for seed in (50, 51):
        page = comfy.open().page
        comfy.template(TINY)
        page.evaluate(FEW)
        page.evaluate(SEED, seed)
        run(page)
        page.wait_for_timeout(1000)  # whatever comes behind the end of the run
        chart = page.locator(".evdit-plan-chart:visible").first
        chart.get_by_text(re.compile(f"Last run: {SPARSE}")).wait_for()


def test_a_page_that_is_loaded_anew_draws_the_plan_that_comes_from_the_cache(comfy):
    page = comfy.open().page
    comfy.template("tiny_search_a_plan")
    page.evaluate(FEW)
    page.evaluate(FIXED)
    if not comfy.server.get("/object_info/EVDiTSearchTilePlan")["EVDiTSearchTilePlan"].get("has_intermediate_output"):
        pytest.skip(
            "THIS COMFYUI TELLS NO PAGE WHAT IT TAKES FROM ITS CACHE: the chart stays empty until the search runs again"
        )
    run(page)
    chart = page.locator(".evdit-plan-chart:visible").first
    chart.get_by_role("option").first.wait_for()
    plan = chart.get_by_role("option").all_inner_texts()
    comfy.load()
    chart.get_by_text("drawn here after a run").wait_for()
    run(page)
    chart.get_by_role("option").first.wait_for()
    assert chart.get_by_role("option").all_inner_texts() == plan
    comfy.picture("a cached search after a reload")


def test_the_help_panel_shows_the_page(comfy):
    page = comfy.open().page
    comfy.template(TINY)
    select(page, "EVDiTTilePlan")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="Typical values").wait_for()
    # Its picture arrives: the panel resolves names against web/docs/.
    page.wait_for_function(
        "[...document.images].some(i => i.src.includes('/docs/EVDiTTilePlan/') && i.naturalWidth > 0)"
    )
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
