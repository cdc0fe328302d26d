"""What a run tells is shown in the chart whose plan it used, with the settings that were queued."""

import pytest
from plan_node import SET, TITLE, TOLD, plan_node, queue

ADD = "kind => { const node = LiteGraph.createNode(kind); app.graph.add(node); return node.id }"
CONTROL = "app.graph.nodes[0].widgets.find(w => w.name === 'seed').linkedWidgets[0]"
CHANGED = "app.api.dispatchEvent(new CustomEvent('graphChanged'))"  # as the page says after a click or a key


@pytest.fixture
def page(comfy):
    return comfy.open().page


def shown(page):
    return page.locator(".evdit-plan-chart:visible")


def told_report(page, node, plan: str, calls: int, prompt: str = ""):
    page.evaluate(
        f"detail => {TOLD}('efficient_vdit.report', detail)",
        {
            "prompt_id": prompt,
            "node": str(node),
            "plan": plan,
            "frames": 8,
            "layers": 6,
            "sparse": calls,
            "density": 0.5,
        }
        | {"seconds": 1, "dense": {}},
    )


def told_plan(page, node, plan: str, prompt: str = ""):
    page.evaluate(
        f"detail => {TOLD}('executed', detail)",
        {"prompt_id": prompt, "node": str(node), "output": {"evdit_plan": [plan]}},
    )


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_a_plan_in_a_subgraph_shows_the_run_inside_alone(comfy, modern):
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    plan_node(comfy, "0-5:2:6")
    sparse = page.evaluate(ADD, "EVDiTSparseAttention")
    page.evaluate(f"id => void {TITLE}.connect(0, app.graph.getNodeById(id), 1)", sparse)
    page.evaluate(f"void app.graph.convertToSubgraph(new Set([{TITLE}]))")
    shown(page).first.wait_for(state="hidden")
    assert page.evaluate("app.graph.nodes.flatMap(n => n.widgets ?? []).every(w => w.name !== 'tile_plan_chart')")
    told_report(page, sparse, "0-5:2:6", 11)
    page.evaluate("(n => app.canvas.openSubgraph(n.subgraph, n))(app.graph.nodes.find(n => n.subgraph))")
    shown(page).get_by_text("11 sparse calls").wait_for()


def test_a_run_is_shown_behind_a_reroute_and_in_no_other_chart(comfy, page):
    plan_node(comfy, "all:2")
    other, reroute, sparse = (page.evaluate(ADD, kind) for kind in ("EVDiTTilePlan", "Reroute", "EVDiTSparseAttention"))
    page.evaluate(
        """ids => {
            const [other, reroute, sparse] = ids.map(id => app.graph.getNodeById(id));
            other.pos = [700, 150];
            other.connect(0, reroute, 0);
            reroute.connect(0, sparse, 1);
        }""",
        [other, reroute, sparse],
    )
    told_report(page, sparse, "all:6", 11)
    shown(page).get_by_text("11 sparse calls").wait_for()
    assert shown(page).count() == 2
    assert shown(page).get_by_text("11 sparse calls").count() == 1
    page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", other)
    shown(page).get_by_text("11 sparse calls").wait_for(state="hidden")


def test_a_plan_belongs_to_the_settings_that_were_queued(page):
    search = page.evaluate(ADD, "EVDiTSearchTilePlan")
    sparse = page.evaluate(ADD, "EVDiTSparseAttention")
    page.evaluate("([a, b]) => void app.graph.getNodeById(a).connect(0, app.graph.getNodeById(b), 1)", [search, sparse])
    queue(page, "first")
    page.evaluate(SET, ["EVDiTSearchTilePlan", "threshold", 0.9])
    told_plan(page, search, "0-5:2:6", "first")
    told_report(page, sparse, "0-5:2:6", 11, "first")
    page.wait_for_timeout(1000)
    shown(page).get_by_text("drawn here after a run").wait_for()
    page.evaluate(SET, ["EVDiTSearchTilePlan", "threshold", 0.2])
    shown(page).get_by_text("2:6 × 6").wait_for()
    shown(page).get_by_text("11 sparse calls").wait_for()
    page.evaluate(f"(w => {{ w.value = 'increment'; w.callback?.(w.value) }})({CONTROL})")
    page.wait_for_timeout(500)
    shown(page).get_by_text("11 sparse calls").wait_for()


def test_a_file_is_drawn_as_the_last_run_read_it(page):
    load = page.evaluate(ADD, "EVDiTLoadTilePlan")
    page.evaluate(SET, ["EVDiTLoadTilePlan", "plan_name", "mochi (preset)"])
    told_plan(page, load, "0-5:1:7")
    shown(page).get_by_text("1:7 × 6").wait_for()


def test_a_plan_of_a_number_that_has_changed_is_not_shown(comfy, page):
    plan_node(comfy)
    number = page.evaluate(ADD, "PrimitiveInt")
    page.evaluate(SET, ["PrimitiveInt", "value", 6])
    page.evaluate(
        f"id => void app.graph.getNodeById(id).connect(0, {TITLE}, {TITLE}.inputs.findIndex(i => i.name === 'reference_frames'))",
        number,
    )
    told_plan(page, page.evaluate(f"{TITLE}.id"), "all:6")
    shown(page).get_by_text("6:15 × 32").wait_for()
    page.evaluate(SET, ["PrimitiveInt", "value", 1])
    page.evaluate(CHANGED)
    shown(page).get_by_text("drawn here after a run").wait_for()
    page.evaluate(SET, ["PrimitiveInt", "value", 6])
    page.evaluate(CHANGED)
    shown(page).get_by_text("6:15 × 32").wait_for()


MODEL = "UNETLoader"  # its list is empty here: any name will do
LINK = """([from, to]) => {
    const node = app.graph.getNodeById(to);
    app.graph.getNodeById(from).connect(0, node, node.inputs.findIndex(i => i.name === 'model'));
}"""


def given(page, kind: str, file: str):
    """The model of the loader is another one now."""
    page.evaluate(SET, [kind, "unet_name", file])
    page.evaluate(CHANGED)


@pytest.mark.parametrize(("kind", "file"), [("EVDiTSearchTilePlan", ""), ("EVDiTLoadTilePlan", "the loaded model")])
def test_a_plan_of_another_model_is_not_shown(page, kind, file):
    node, loader = page.evaluate(ADD, kind), page.evaluate(ADD, MODEL)
    page.evaluate(LINK, [loader, node])
    if file:
        page.evaluate(SET, [kind, "plan_name", file])
    given(page, MODEL, "first.safetensors")
    told_plan(page, node, "0-5:2:6")
    shown(page).get_by_text("2:6 × 6").wait_for()
    given(page, MODEL, "second.safetensors")
    shown(page).get_by_text("drawn here after a run").wait_for()
    told_plan(page, node, "0-5:1:7")
    shown(page).get_by_text("1:7 × 6").wait_for()
    given(page, MODEL, "first.safetensors")
    shown(page).get_by_text("2:6 × 6").wait_for()


def test_the_figures_of_a_file_s_plan_stay_where_an_unused_model_changes(page):
    load, loader, sparse = (page.evaluate(ADD, kind) for kind in ("EVDiTLoadTilePlan", MODEL, "EVDiTSparseAttention"))
    page.evaluate(SET, ["EVDiTLoadTilePlan", "plan_name", "mochi (preset)"])
    page.evaluate(LINK, [loader, load])
    page.evaluate("([a, b]) => void app.graph.getNodeById(a).connect(0, app.graph.getNodeById(b), 1)", [load, sparse])
    told_plan(page, load, "0-5:1:7")
    told_report(page, sparse, "0-5:1:7", 11)
    shown(page).get_by_text("11 sparse calls").wait_for()
    given(page, MODEL, "second.safetensors")
    page.wait_for_timeout(500)
    assert shown(page).get_by_text("11 sparse calls").count() == 1


def test_a_text_that_a_run_shows_on_the_way_is_no_setting(page):
    """As that of a node before the prompt, which the same run fills in."""
    search, encode, text = (
        page.evaluate(ADD, kind) for kind in ("EVDiTSearchTilePlan", "CLIPTextEncode", "PreviewAny")
    )
    page.evaluate(
        """([search, encode, text]) => {
            const [a, b, c] = [search, encode, text].map(id => app.graph.getNodeById(id));
            c.connect(0, b, b.inputs.findIndex(i => i.name === 'text'));
            b.connect(0, a, a.inputs.findIndex(i => i.name === 'positive'));
        }""",
        [search, encode, text],
    )
    queue(page, "first")
    shows = "app.graph.nodes.find(n => n.type === 'PreviewAny').widgets.find(w => w.options?.serialize === false)"
    page.evaluate(f"{shows}.value = 'said by the run'")
    told_plan(page, search, "0-5:2:6", "first")
    shown(page).get_by_text("2:6 × 6").wait_for()


def test_a_click_counts_where_a_number_is_linked(comfy):
    """As in the blueprint: the text that it writes takes the number's place in the run, and here."""
    page = comfy.open().page
    page.evaluate(
        """name => app.api.fetchApi('/global_subgraphs').then(r => r.json()).then(all => {
            const id = Object.keys(all).find(id => all[id].name === name);
            return app.api.fetchApi('/global_subgraphs/' + id).then(r => r.json());
        }).then(({ data }) => app.loadGraphData(JSON.parse(data)))""",
        "Faster video model",
    )
    page.evaluate("(n => app.canvas.openSubgraph(n.subgraph, n))(app.graph.nodes.find(n => n.subgraph))")
    plan = "app.canvas.graph.nodes.find(n => n.type === 'EVDiTTilePlan')"
    outer = "app.rootGraph.nodes.find(n => n.subgraph)"
    chart = shown(page).first
    chart.get_by_text("6:15 × 32").wait_for()
    for value, said in ((3, "3:18 × 32"), (6, "6:15 × 32")):
        page.evaluate(f"value => {{ {outer}.widgets.find(w => w.name === 'reference_frames').value = value }}", value)
        page.evaluate(CHANGED)
        chart.get_by_text(said).wait_for()
    page.evaluate(f"app.canvas.ds.reset(); {plan}.pos = [300, 100]; app.canvas.setDirty(true, true)")
    page.wait_for_timeout(1000)
    chart.get_by_role("option", name="Layer 3:").click()
    assert page.evaluate(f"{plan}.widgets.find(w => w.name === 'text').value") == "all:6 3:full"
    chart.get_by_text("6:15 × 31").wait_for()


@pytest.mark.parametrize("kind", ["EVDiTSearchTilePlan", "EVDiTAttentionTileMap"])
def test_what_takes_minutes_keeps_its_seed(page, kind):
    if not page.evaluate("!!LiteGraph.registered_node_types.SeedNode"):
        pytest.skip("THIS COMFYUI KNOWS NO SEED THAT STAYS: new nodes start on randomize")
    page.evaluate(ADD, kind)
    assert page.evaluate(CONTROL + ".value") == "fixed"


NODE_TEXT = "What the last run did"  # the name of the line on Sparse Attention


def link(page, source: int, output: int, target: int, name: str):
    page.evaluate(
        """([from, slot, to, name]) => {
            const node = app.graph.getNodeById(to);
            app.graph.getNodeById(from).connect(slot, node, node.inputs.findIndex(i => i.name === name));
        }""",
        [source, output, target, name],
    )


def prompt_runs(page, name: str, *sampled: int, told=()):
    """The events of a prompt that the open tab queues: what ran in it, and each (node, plan, calls) that was told."""
    queue(page, name)
    about = {"prompt_id": name, "timestamp": 0}
    page.evaluate(f"detail => {TOLD}('execution_start', detail)", about)
    for node in sampled:
        page.evaluate(f"detail => {TOLD}('executing', detail)", str(node))
    for node, plan, calls in told:
        told_report(page, node, plan, calls, name)
    page.evaluate(f"detail => {TOLD}('execution_success', detail)", about)


def lines_of(page, sparse: int) -> str:
    return page.evaluate(
        "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'text_of_run').element.value", sparse
    )


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes2"])
def test_a_run_without_sparse_attention_makes_the_last_one_an_earlier_one(comfy, modern):
    """As behind a node that is bypassed; what comes from the cache leaves the words as they are."""
    page = comfy.open(Comfy_VueNodes_Enabled=modern).page
    plan_node(comfy, "0-5:2:6")
    sparse, sampler, other = (page.evaluate(ADD, kind) for kind in ("EVDiTSparseAttention", "KSampler", "KSampler"))
    page.evaluate(f"id => {{ {TITLE}.connect(0, app.graph.getNodeById(id), 1) }}", sparse)
    page.evaluate("id => { app.graph.getNodeById(id).pos = [700, 150] }", sparse)
    link(page, sparse, 0, sampler, "model")
    assert page.get_by_role("textbox", name=NODE_TEXT).input_value() == ""
    page.wait_for_timeout(500)  # the page gives a new node the height of all that stands in it when it first draws it
    height = page.evaluate("id => app.graph.getNodeById(id).size[1]", sparse)
    prompt_runs(page, "sparse", sampler, told=[(sparse, "0-5:2:6", 11)])
    shown(page).get_by_text("Last run: 11 sparse calls").wait_for()
    assert lines_of(page, sparse) == "11 of 11 calls sparse, 50 % of the attention computed"
    prompt_runs(page, "cached")
    page.evaluate("id => { app.graph.getNodeById(id).mode = 4 }", sparse)
    page.wait_for_timeout(500)
    assert shown(page).get_by_text("Last run: 11 sparse calls").count() == 1
    prompt_runs(page, "bypassed", sampler)
    shown(page).get_by_text("An earlier run: 11 sparse calls").wait_for()
    assert shown(page).get_by_text("Last run").count() == 0
    assert lines_of(page, sparse) == "An earlier run: 11 of 11 calls sparse, 50 % of the attention computed"
    page.evaluate("id => { app.graph.getNodeById(id).mode = 0 }", sparse)
    prompt_runs(page, "again", sampler, told=[(sparse, "0-5:2:6", 12)])
    shown(page).get_by_text("Last run: 12 sparse calls").wait_for()
    # Another sampler has no sparse attention behind it, and what the first one made comes from the cache: it is as it was.
    prompt_runs(page, "beside", other)
    page.wait_for_timeout(500)
    assert shown(page).get_by_text("Last run: 12 sparse calls").count() == 1
    # No sampler takes the model of this node any more.
    page.evaluate("id => { app.graph.getNodeById(id).disconnectInput(0) }", sampler)
    prompt_runs(page, "replaced", sampler)
    shown(page).get_by_text("An earlier run: 12 sparse calls").wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate("id => app.graph.getNodeById(id).size[1]", sparse) == height
    comfy.picture(f"line {'nodes2' if modern else 'classic'}")


def test_each_node_that_follows_a_plan_has_its_line(comfy, page):
    """As two experts have; a prompt that samples one of them leaves the other's words as they are."""
    plan_node(comfy, "0-5:2:6", width=420)
    nodes = []
    for number, title in enumerate(("high", "low")):
        sparse, sampler = (page.evaluate(ADD, kind) for kind in ("EVDiTSparseAttention", "KSampler"))
        page.evaluate(f"id => {{ {TITLE}.connect(0, app.graph.getNodeById(id), 1) }}", sparse)
        page.evaluate("([id, title]) => { app.graph.getNodeById(id).title = title }", [sparse, title])
        link(page, sparse, 0, sampler, "model")
        nodes.append((sparse, sampler))
        if number:
            link(page, nodes[0][1], 0, sampler, "latent_image")
    (high, first), (low, second) = nodes
    prompt_runs(page, "both", first, second, told=[(high, "0-5:2:6", 1), (low, "0-5:2:6", 10)])
    shown(page).get_by_text("high · Last run: 1 sparse calls").wait_for()
    shown(page).get_by_text("low · Last run: 10 sparse calls").wait_for()
    assert [lines_of(page, node).split(",")[0] for node in (high, low)] == [
        "1 of 1 calls sparse",
        "10 of 10 calls sparse",
    ]
    prompt_runs(page, "low alone", second, told=[(low, "0-5:2:6", 12)])
    shown(page).get_by_text("low · Last run: 12 sparse calls").wait_for()
    assert shown(page).get_by_text("high · Last run: 1 sparse calls").count() == 1
    page.evaluate("id => { app.graph.getNodeById(id).mode = 4 }", high)
    prompt_runs(page, "high bypassed", first, second, told=[(low, "0-5:2:6", 13)])
    shown(page).get_by_text("Last run: 13 sparse calls").wait_for()
    assert lines_of(page, high).startswith("An earlier run: 1 of 1")
    assert shown(page).get_by_text("sparse calls").count() == 1


def test_two_samplers_of_one_model_are_two_lines_in_order(page):
    sparse, sampler = (page.evaluate(ADD, kind) for kind in ("EVDiTSparseAttention", "KSampler"))
    link(page, sparse, 0, sampler, "model")
    for prompt in ("first", "second"):
        prompt_runs(page, prompt, sampler, told=[(sparse, "all:2", 11), (sparse, "all:2", 22)])
        page.wait_for_timeout(500)
        lines = lines_of(page, sparse).split("\n")
        assert [line.split(" calls")[0] for line in lines] == ["11 of 11", "22 of 22"]


def test_a_model_that_stays_dense_says_why_on_the_node_and_in_the_chart(comfy, page):
    plan_node(comfy, "all:2")
    sparse = page.evaluate(ADD, "EVDiTSparseAttention")
    page.evaluate(f"id => {{ {TITLE}.connect(0, app.graph.getNodeById(id), 1) }}", sparse)
    why = "PAN2Model: where its video tokens stand is not known"
    found = {
        "prompt_id": "dense",
        "node": str(sparse),
        "plan": "all:2",
        "layers": 0,
        "frames": 0,
        "seconds": 1.5,
        "sparse": 0,
    }
    found |= {
        "calls": 0,
        "density": 0,
        "dense": {},
        "bound": 0,
        "video": 0,
        "dense_step": 0,
        "sparse_step": 0,
        "why": why,
    }
    page.evaluate(f"detail => {TOLD}('efficient_vdit.report', detail)", found)
    shown(page).get_by_text("Last run: nothing became sparse, 1.5 s").wait_for()
    shown(page).get_by_text(f"dense: {why}").wait_for()
    assert lines_of(page, sparse) == f"dense: {why}"
