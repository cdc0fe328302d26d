"""Nodes that take attention, blocks or the network's class into their own hands: the run is what it is without us, and the
log, the tile map and the search say what stands in the way."""

import pytest

ROUNDING = 3e-6
FIRST = {"wan": "blocks.0.self_attn", "ltx audio": "transformer_blocks.0.attn1", "h3": "blocks.0.attn"}
NONE = "no self-attention call over the video came by: "
NAMED = "another node computes the attention by itself, by own_kernel in place of {}"


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("beside")


def _of(facts, kind, name):
    if name not in facts[kind]:
        pytest.skip(f"this ComfyUI has no {name}")
    return facts[kind][name]


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("name", FIRST)
def test_a_run_names_the_attention_that_asks_nobody(facts, name, order):
    found, says = _of(facts, "own kernel", name)[order], f"{NAMED.format(FIRST[name])} and 2 more."
    assert found["same"] == 0.0
    assert len(found["lines"]) == 1 and NONE + says in found["lines"][0] and "Patch Sage Attention" in found["lines"][0]
    assert says in found["report"] and "WARNING" in found["report"]


@pytest.mark.parametrize("name", FIRST)
def test_a_tile_map_and_a_search_name_it_too(facts, name):
    found, says = _of(facts, "own kernel", name), f"{NAMED.format(FIRST[name])} and 2 more."
    for refused in (found["tile map"], *found["search"]):
        assert says in refused and "latent of several frames" not in refused and "tokens are known" not in refused


def test_a_tile_map_names_what_is_in_the_way_of_its_layers_alone(facts):
    if not facts["layers are named"]:
        pytest.skip("this ComfyUI does not tell an attention which layer it is of")
    fine, refused = facts["one layer"]
    assert fine == "" and "The layers [1]" in refused and f"{NAMED.format('blocks.1.self_attn')}. Leave" in refused


def test_attention_put_into_the_network_by_hand_is_named(facts):
    assert len(facts["by hand"]) == 1 and NAMED.format("blocks.0.self_attn") in facts["by hand"][0]


def test_attention_of_another_class_is_named(facts):
    (line,) = facts["attention of another class"]
    assert "by OwnAttention in place of blocks.0.self_attn and 2 more." in line


def test_another_cross_attention_is_in_nobody_s_way(facts):
    assert facts["cross-attention"] == ["Efficient-vDiT: 6 attention calls sparse at mean density 0.52; dense: none"]


def test_whole_blocks_of_another_node_are_told_of_without_a_name(facts):
    (line,) = facts["whole blocks"]
    assert f"{NONE}another node replaces" in line and "own_" not in line


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize(("name", "counts"), [("ltx", "1 in place of 3"), ("hunyuan", "1 + 3 in place of 2 + 3")])
def test_blocks_that_another_node_replaces_in_a_forward_leave_it_dense(facts, name, counts, order):
    found = _of(facts, "replaced blocks", name)[order]
    assert found["same"] == 0.0
    says = f"the attention stays dense: another node has replaced the model's blocks ({counts}, as First Block Cache does)."
    assert found["lines"][0] == f"Efficient-vDiT: {says}" and "0 attention calls sparse" in found["lines"][-1]


@pytest.mark.parametrize("name", ["ltx", "hunyuan"])
def test_a_tile_map_and_a_search_say_that_blocks_are_replaced(facts, name):
    found = _of(facts, "replaced blocks", name)
    for refused in (found["tile map"], *found["search"]):
        assert "another node has replaced the model's blocks" in refused
    assert found["plain again"] == 0.0


def test_a_network_s_class_is_that_of_the_model_and_not_what_another_left_on_it(facts):
    found = facts["another class"]
    assert found["left behind"] == "OtherWanModel" and found["tile map"] == "" and found["later node"] == []
    assert found["same"] < ROUNDING and "6 attention calls sparse" in found["lines"][-1]


def test_a_model_of_a_class_that_a_node_gives_it_stays_dense(facts):
    (line,) = facts["another class"]["node"]
    assert line.startswith("Efficient-vDiT: OtherWanModel stays dense")


def test_what_stays_dense_says_so_after_each_run(facts):
    """Also once ComfyUI keeps the MODEL and runs the node no more; the report has no counts of it, as before."""
    found = facts["left dense"]
    first, (line,) = found["lines"]
    assert first == [] and line.startswith("Efficient-vDiT: OtherWanModel stays dense: where its video")
    assert len(found["told"]) == 3 and found["report"] and found["same"] == 0.0
    assert all(why.startswith("OtherWanModel: where its video") and layers == 0 for why, layers in found["told"])
