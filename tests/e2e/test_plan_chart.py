"""The chart inside Tile Plan: it shows the plan, edits its text, follows a run, and fits everywhere a node can be."""

import io
import math
import re

import pytest
from PIL import Image
from plan_node import TEXT, TITLE, TOLD, plan_node, queue


def test_a_click_gives_a_layer_its_next_pattern(comfy):
    page = comfy.open().page
    chart = plan_node(comfy)
    chart.get_by_text("6:15", exact=False).first.wait_for()  # reference_frames' default, at 21 latent frames
    chart.get_by_role("option", name="Layer 5:").click()
    assert page.evaluate(TEXT) == "all:6 5:full"
    chart.get_by_role("button", name="edit each layer").click()
    assert page.evaluate(TEXT) == "0-4:6 5:full 6-31:6"
    chart.get_by_role("option", name="Layer 0:").click()
    assert page.evaluate(TEXT) == "0:4 1-4:6 5:full 6-31:6"
    assert page.evaluate("app.graph.serialize().nodes[0].widgets_values") == [6, page.evaluate(TEXT)]


def test_a_click_counts_where_the_chart_is_drawn_anew_meanwhile(comfy):
    """As when another node tells the length between the button's way down and up."""
    page = comfy.open().page
    layer = plan_node(comfy, "all:2").get_by_role("option", name="Layer 5:")
    page.wait_for_timeout(500)  # the node takes its chart's height, which moves what is under the pointer
    layer.hover()
    page.mouse.down()
    page.evaluate("app.graph.nodes[0].onConnectionsChange()")
    page.mouse.up()
    page.wait_for_function(f"{TEXT} === 'all:2 5:full'")


def test_a_node_whose_widgets_hold_no_json_can_be_connected(comfy):
    """Other packs keep elements of the page, nodes and graphs in widgets."""
    page = comfy.open().page
    connected = page.evaluate(
        """() => {
            const [loader, search] = ["EVDiTModelLoader", "EVDiTSearchTilePlan"].map((type) => LiteGraph.createNode(type));
            app.graph.add(loader);
            app.graph.add(search);
            const value = { big: 1n };
            value.self = value;
            loader.addCustomWidget({ name: "an element", type: "custom", value, options: {}, draw() {} });
            loader.connect(0, search, 0);
            const connected = search.isInputConnected(0);
            loader.widgets.pop();  // the page itself could not keep such a workflow
            return connected;
        }"""
    )
    assert connected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-31:22:85", "made for 107 latent frames"),
        ("0-1:1:0", "made for 1 latent frame"),
        ("all:2", "· 21 latent frames"),
    ],
)
def test_the_length_that_a_plan_was_made_for_is_told(comfy, text, said):
    comfy.open()
    chart = plan_node(comfy, text)
    chart.get_by_text(re.compile(f"of attention .*{said}$")).wait_for()


def test_the_keyboard_does_the_same(comfy):
    page = comfy.open().page
    chart = plan_node(comfy, "0-3:2:6")
    chart.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate(TEXT) == "0:2:6 1:1:7 2-3:2:6"
    assert (
        chart.get_by_role("option", name="Layer 1: 1:7, 34 % of its attention").get_attribute("aria-selected") == "true"
    )
    assert page.evaluate("app.graph.nodes.length") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0:2 5-3:2", "“5-3:2” names layers that do not ascend"),
        ("0:2:6 5:1:7", "leaves out layer 1: name each from 0 to 5"),
        ("all:2~99+99", "“all:2~99+99” has 99 mean frames, expected 0 to 16"),
        ("0:two", "cannot be read at “0:two”. Example: all:6 0-1:full -1:full"),
    ],
)
def test_nonsense_is_named_and_the_node_stays(comfy, text, said):
    comfy.open()
    chart = plan_node(comfy, text)
    chart.locator(".wrong", has_text=said).wait_for()


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_it_fits_a_narrow_node(comfy, palette, modern):
    """No text runs over the edge of a node 220 px wide, in any look."""
    page = comfy.open(Comfy_ColorPalette=palette, Comfy_VueNodes_Enabled=modern).page
    if modern and comfy.version() < (1, 28):
        pytest.skip("NODES 2.0 OF THIS FRONTEND DRAW NO PACK'S OWN WIDGETS; the node works without its chart")
    by_head = "32:[0-3,7-9,12,14,16,18]1:23~1[4-6,10-11,13]2:22+1[15]full[17]0:24"
    chart = plan_node(comfy, f"0:full 1-4:8:16 5-12:4:20 13-20:2:22 21-31:1:23 {by_head}", width=220)
    chart.get_by_text("1:23 × 11").wait_for()
    chart.get_by_role("option", name="Layer 32:").hover()
    comfy.picture(f"chart {palette} {'nodes2' if modern else 'classic'}")
    inside = page.evaluate(
        """() => {
            const panel = document.querySelector('.evdit-plan-chart').shadowRoot.querySelector('.panel');
            const edge = panel.getBoundingClientRect();
            return [...panel.querySelectorAll('.body *:not(g *)')].every(e => e.getBoundingClientRect().right <= edge.right + 1);
        }"""
    )
    assert inside
    # Nodes 2.0 have a least width of their own.
    assert modern or page.evaluate(f"{TITLE}.size[0]") <= 221


def test_it_stays_where_the_canvas_is_switched_to_nodes_2_and_back(comfy):
    page = comfy.open(Comfy_VueNodes_Enabled=False).page
    if comfy.version() < (1, 49):
        pytest.skip(
            "THIS FRONTEND'S RIGHT PANEL TAKES THE CHART OF THE CLASSIC CANVAS UNLESS NODES 2.0 LEAVE IT OUT TOO"
        )
    chart = plan_node(comfy, "0-3:2:6")
    for modern in (True, False):
        page.evaluate("modern => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', modern)", modern)
        page.wait_for_function(f"!!LiteGraph.vueNodesMode === {str(modern).lower()}")
        page.wait_for_timeout(2000)
        chart.get_by_text("2:6 × 4").wait_for(timeout=10_000)
    chart.get_by_role("option", name="Layer 1:").click()
    assert page.evaluate(TEXT) == "0:2:6 1:1:7 2-3:2:6"


def test_it_draws_inside_a_subgraph(comfy):
    page = comfy.open().page
    plan_node(comfy, "0-5:2:6")
    page.evaluate(
        f"""() => {{
            const {{ node }} = app.graph.convertToSubgraph(new Set([{TITLE}]));
            app.canvas.openSubgraph(node.subgraph, node);
        }}"""
    )
    chart = page.locator(".evdit-plan-chart:visible").first
    chart.get_by_role("option", name="Layer 2:").click()
    text = page.evaluate(
        "app.canvas.graph.nodes.find(n => n.type === 'EVDiTTilePlan').widgets.find(w => w.name === 'text').value"
    )
    assert text == "0-1:2:6 2:1:7 3-5:2:6"
    comfy.picture("chart in a subgraph")


def test_figures_of_another_plan_are_not_shown(comfy):
    """A run takes its time, and the plan may be another one when it ends."""
    page = comfy.open().page
    chart = plan_node(comfy, "0-5:2:6")
    page.evaluate(
        f"(s => {{ app.graph.add(s); {TITLE}.connect(0, s, 1) }})(LiteGraph.createNode('EVDiTSparseAttention'))"
    )
    sparse = "app.graph.nodes.find(n => n.type === 'EVDiTSparseAttention')"
    report = (
        "{ node: String(%s.id), plan: '%s', frames: 8, layers: 6, sparse: %d, density: 0.5, seconds: 1, dense: {} }"
    )
    page.evaluate(f"{TOLD}('efficient_vdit.report', {report % (sparse, '0-5:1:7', 11)})")
    page.evaluate(f"{TOLD}('efficient_vdit.report', {report % (sparse, '0-5:2:6', 22)})")
    chart.get_by_text("22 sparse calls").wait_for()
    page.evaluate(f"{TOLD}('efficient_vdit.report', {report % (sparse, '0-5:1:7', 11)})")
    assert chart.get_by_text("22 sparse calls").count() == 1


def test_wheel_and_middle_button_move_the_canvas_there_too(comfy):
    page = comfy.open().page
    chart = plan_node(comfy)
    chart.hover()
    before = page.evaluate("[...app.canvas.ds.offset]")
    at = chart.bounding_box()
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    page.mouse.down(button="middle")
    page.mouse.move(x + 30, y + 20)
    page.mouse.move(x + 60, y + 40)
    page.mouse.up(button="middle")
    page.wait_for_function(f"app.canvas.ds.offset[0] >= {before[0]} + 55")
    page.mouse.move(x, y)  # the button is up
    assert page.evaluate("app.canvas.ds.offset[0]") >= before[0] + 55
    scale = page.evaluate("app.canvas.ds.scale")
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"app.canvas.ds.scale > {scale}")


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_a_file_of_the_list_is_drawn_before_it_runs(comfy, modern):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    page.evaluate("void app.graph.add(LiteGraph.createNode('EVDiTLoadTilePlan'))")
    page.evaluate("(w => { w.value = 'wan (preset)'; w.callback(w.value) })(app.graph.nodes[0].widgets[0])")
    chart = page.locator(".evdit-plan-chart:visible").first
    chart.get_by_text("16:45 × 29").wait_for()


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_the_right_panel_has_no_row_for_it(comfy, modern):
    """A second chart could not be there: an element has one place."""
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    if modern and comfy.version() < (1, 49):  # 1.45 does, 1.49 does not
        pytest.skip(
            "THE RIGHT PANEL OF THIS FRONTEND SHOWS A ROW FOR EVERY WIDGET OF NODES 2.0, the chart's too, empty"
        )
    chart = plan_node(comfy, "0-3:2:6", width=400)
    page.evaluate(f"app.canvas.selectNode({TITLE})")
    page.get_by_role("button", name="Toggle properties panel").click()
    panel = page.get_by_test_id("properties-panel")
    panel.get_by_text("reference_frames").wait_for()
    comfy.picture(f"right panel {'nodes2' if modern else 'classic'}")
    assert panel.get_by_text("tile_plan_chart").count() == 0
    assert chart.bounding_box()["width"] == pytest.approx(page.evaluate(f"{TITLE}.size[0]"), abs=30)
    page.get_by_role("button", name="Toggle properties panel").last.click()


def pixels(page, clip):
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB").tobytes()


def test_a_node_is_as_high_as_its_chart(comfy):
    """It grows with the plan that a run gives, and shrinks when that plan is no longer the settings'."""
    page = comfy.open().page
    node = "app.graph.nodes[0]"
    page.evaluate("void app.graph.add(LiteGraph.createNode('EVDiTSearchTilePlan'))")
    chart = page.locator(".evdit-plan-chart:visible").first
    chart.wait_for()
    page.wait_for_timeout(500)
    before = page.evaluate(f"{node}.size[1]")
    page.evaluate(f"{TOLD}('executed', {{ node: String({node}.id), output: {{ evdit_plan: ['0-5:2:6'] }} }})")
    page.wait_for_function(f"{node}.size[1] > {before} + 100")
    page.wait_for_timeout(1000)
    left, bottom, width = page.evaluate(
        f"(() => {{ const n = {node}, [x, y] = app.canvas.convertOffsetToCanvas([n.pos[0], n.pos[1] + n.size[1]]), "
        "c = app.canvas.canvas.getBoundingClientRect(); return [c.left + x, c.top + y, n.size[0] * app.canvas.ds.scale] })()"
    )
    edge = {"x": left, "y": bottom - 12, "width": width, "height": 10}
    seen = pixels(page, edge)
    page.evaluate("app.canvas.setDirty(true, true)")
    page.wait_for_timeout(500)
    assert seen == pixels(page, edge), "the node that is drawn is lower than its chart"
    page.evaluate(f"(w => {{ w.value = 0.5; w.callback(0.5) }})({node}.widgets.find(w => w.name === 'threshold'))")
    page.wait_for_function(f"Math.abs({node}.size[1] - {before}) < 2")


BY_HEAD = "0:full 1:[0-3,7]1:7~1[4-6]full 2:2:6 3:[0-5]1:7+1[6]2:6[7]full"


def test_each_group_of_heads_has_a_map_of_its_own(comfy):
    """Under the pointer and kept by a click, which changes such a layer only where it is in view already."""
    page = comfy.open().page
    chart = plan_node(comfy, BY_HEAD)
    maps = chart.get_by_role("group", name="Layer 1:").get_by_role("img")
    layer = chart.get_by_role("option", name="Layer 1:")
    layer.click()
    assert page.evaluate(TEXT) == BY_HEAD
    assert [m.get_attribute("aria-label") for m in maps.all()] == [
        "heads 0-3, 7: 1:7~1, 53 %. Reference frames 0",
        "heads 4-6: full, 100 %. ",
    ]
    # 8 x 8 tiles: the row and the column of frame 0; of the other 7 x 7 the diagonal and its neighbours.
    tiles = "(m, c) => m.querySelector('path.' + c).getAttribute('d').split('M').length - 1"
    counts = [[m.evaluate(f"m => ({tiles})(m, '{c}')") for c in ("reference", "own", "skipped")] for m in maps.all()]
    assert counts == [[15, 7 + 6 + 6, 30], [64, 0, 0]]
    chart.get_by_role("option", name="Layer 2:").hover()
    assert chart.get_by_role("group", name="Layer 2:").get_by_role("img").count() == 1
    # With the page's own fonts the text takes other lines, and those that it has not used yet are not on their way.
    page.evaluate("Promise.all([...document.fonts].map((font) => font.load()))")
    page.wait_for_timeout(100)
    height = chart.bounding_box()["height"]
    chart.get_by_role("option", name="Layer 3:").hover()
    assert chart.get_by_role("group", name="Layer 3:").get_by_role("img").count() == 3
    assert chart.get_by_text("head 6", exact=True).count() == 1
    assert chart.locator(".legend").inner_text().split("\n")[:2] == ["layers:", "full × 1.5"]
    assert chart.bounding_box()["height"] == height
    comfy.picture("chart by head")
    layer.click()
    page.wait_for_function(f"{TEXT} !== '{BY_HEAD}'")
    assert page.evaluate(TEXT).split()[0] == "0:full" and "1:[" not in page.evaluate(TEXT)


def test_a_long_clip_s_map_covers_each_tile_once_in_few_pieces(comfy):
    """A piece for each of a million tiles took seconds to draw."""
    comfy.open()
    chart = plan_node(comfy, "0-5:8:1016~3")
    found = chart.locator("svg.tiles").first.evaluate(
        """map => Object.fromEntries([...map.querySelectorAll("path")].map(path => {
             const pieces = [...path.getAttribute("d").matchAll(/M\\d+ \\d+h(\\d+)v1h/g)];
             return [path.classList[0], [pieces.length, pieces.reduce((sum, piece) => sum + Number(piece[1]), 0)]];
           }))"""
    )
    refers = {math.floor(i / 128) * 128 for i in range(1024)}
    others = [i for i in range(1024) if i not in refers]
    own = sum(abs(a - b) <= 3 for a in others for b in others)
    tiles = {"reference": 1024**2 - 1016**2, "own": own, "skipped": 1016**2 - own, "mean": 0}
    assert {kind: area for kind, (_, area) in found.items()} == tiles
    assert sum(count for count, _ in found.values()) < 30_000


@pytest.mark.parametrize(
    ("kind", "values", "note"),
    [
        ("EVDiTTilePlan", [2, 5], "cannot be read at “5”"),
        ("EVDiTTilePlan", [2, {"a": 1}], r"cannot be read at “\[object”"),
        ("EVDiTTilePlan", [2, [["all:2"]]], "made for|% of attention"),
        ("EVDiTLoadTilePlan", ["constructor", ""], "constructor is not among the plans"),
        ("EVDiTLoadTilePlan", ["__proto__", ""], "__proto__ is not among the plans"),
    ],
)
def test_a_workflow_whose_values_are_of_another_kind_opens_all_the_same(comfy, kind, values, note):
    """As scripts write them, or lists of values that moved by one; a run names what is wrong."""
    page = comfy.open().page
    node = {"id": 1, "type": kind, "pos": [300, 150], "size": [320, 200], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": values}  # fmt: skip
    graph = {
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "groups": [],
        "config": {},
        "extra": {},
    }
    page.evaluate("graph => app.loadGraphData({ ...graph, version: 0.4 })", graph)
    page.locator(".evdit-plan-chart:visible .summary").get_by_text(re.compile(note)).wait_for()
    assert page.evaluate("app.graph.nodes.map(n => n.type)") == [kind]
    assert page.get_by_text("Loading aborted").count() == 0


def test_a_picture_that_fails_says_so_in_its_place(comfy):
    page = comfy.open().page
    chart = plan_node(comfy, "all:2")
    broken = "{ toString: () => { throw new Error('no picture') } }"
    page.evaluate(f"{TITLE}.widgets.find(w => w.name === 'text').value = {broken}")
    page.evaluate(f"{TITLE}.onConnectionsChange?.()")
    chart.get_by_text("no picture").wait_for()
    assert [error for error in comfy.errors if "no picture" not in error] == []
    comfy.errors.clear()


def test_a_run_is_shown_in_the_tab_that_queued_it_and_in_no_copy(comfy):
    page = comfy.open().page
    chart = plan_node(comfy, "0-5:2:6")
    add = "kind => { const node = LiteGraph.createNode(kind); app.graph.add(node); return node.id }"
    search, sparse = (page.evaluate(add, kind) for kind in ("EVDiTSearchTilePlan", "EVDiTSparseAttention"))
    page.evaluate(f"id => void {TITLE}.connect(0, app.graph.getNodeById(id), 1)", sparse)
    queue(page, "of the first tab")
    # A copy in a second tab, with the same ids of the graph and its nodes: as a template has that is opened twice.
    page.evaluate("app.loadGraphData(app.graph.serialize(), true, true, 'copy')")
    told = f"""() => {{
        const prompt_id = 'of the first tab', told = {TOLD};
        told('executed', {{ prompt_id, node: '{search}', output: {{ evdit_plan: ['0-5:1:7'] }} }});
        told('efficient_vdit.report', {{ prompt_id, node: '{sparse}', plan: '0-5:2:6', frames: 8, layers: 6, sparse: 11,
            density: 0.5, seconds: 1, dense: {{}} }});
    }}"""
    page.evaluate(told)
    page.wait_for_timeout(1000)
    chart.get_by_text("2:6 × 6").wait_for()
    charts = page.locator(".evdit-plan-chart:visible")
    assert charts.get_by_text("11 sparse calls").count() == charts.get_by_text("1:7 × 6").count() == 0
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    charts.get_by_text("11 sparse calls").wait_for()
    charts.get_by_text("1:7 × 6").wait_for()
    page.evaluate("app.extensionManager.command.execute('Workspace.NextOpenedWorkflow')")
    charts.get_by_text("11 sparse calls").wait_for(state="hidden")
    # Its own run is shown there at once.
    queue(page, "of the copy")
    page.evaluate(told.replace("of the first tab", "of the copy"))
    charts.get_by_text("11 sparse calls").wait_for()
