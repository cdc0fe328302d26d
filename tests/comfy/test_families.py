"""A tiny model of every native video family, sampled in ComfyUI's own process: sparse against dense and a masked
oracle."""

import re

import pytest
from family_names import FAMILIES, HUNYUAN, KANDINSKY_6

# Token sequences beside the video that attend over themselves.
WITH_OTHERS = [
    *HUNYUAN,
    "ltx audio",
    "ltx 2.5",
    "ltx audio with guides",
    "ltx audio with a voice",
    "kandinsky 5",
    *KANDINSKY_6,
]
CAUSAL = "it makes a few frames at a time over a cache of the earlier ones, and ComfyUI passes no attention hook there"
# What a run and a search say of a model that is left dense.
LEFT_DENSE = {
    "wan causal": (f"CausalWanModel stays dense: {CAUSAL}.", f"CausalWanModel cannot be measured: {CAUSAL}."),
    "wan dancer with images as long as the video": (
        "0 attention calls sparse; dense: 12 text or audio as long as the video, 6 cross-attention",
        "No self-attention over a video was found (6 text or audio as long as the video",
    ),
    "ltx with weaker guides": (
        "0 attention calls sparse; dense: 12 masked, 6 cross-attention; masked: a mask lies over the attention. An LTX guide of "
        "another strength than 1 makes one: set its strength to 1, or place the picture in the latents with LTXVImgToVideoInplace.",
        "No self-attention over a video was found",
    ),
}


@pytest.fixture(scope="module")
def found(in_process):
    return in_process("families")


@pytest.fixture
def facts(found, name):
    facts = found[name]
    assert "failed" not in facts, facts["failed"]
    if "skipped" in facts:
        assert not facts.get("changed"), "left as it was"
        pytest.skip(facts["skipped"])
    return facts


def test_every_case_is_looked_at(found):
    assert sorted(found) == sorted([*FAMILIES, *LEFT_DENSE])


def test_a_family_without_a_hook_says_so(found):
    facts = found["wan s2v"]
    if "skipped" in facts:
        assert (
            facts["lines"] == [f"Efficient-vDiT: WanModel_S2V stays dense: {facts['skipped']}."]
            and facts["changed"] == 0
        )


@pytest.mark.parametrize("name", LEFT_DENSE)
def test_what_is_left_dense_is_named_with_its_reason(facts, name):
    line, refusal = LEFT_DENSE[name]
    assert facts["changed"] == 0 and facts["lines"] == [f"Efficient-vDiT: {line}"]
    assert facts["refused"].startswith(refusal)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_video_stands_where_the_case_says(facts, name):
    """Found by changing one latent frame after another: a version that moves its tokens is noticed here."""
    assert facts["frames stand"]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_self_attention_is_met_once_and_with_its_layer(facts, name):
    assert facts["layers"] and facts["calls"] and facts["sparse calls"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_calls_look_as_was_foreseen(facts, name):
    """Backends are chosen before the first block, for the shape that a family's row foretells."""
    assert facts["unforeseen"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_is_complete_and_warns_of_nothing(facts, name):
    (line,) = facts["lines"]
    assert re.search(
        rf"^Efficient-vDiT: {facts['sparse calls']} attention calls sparse at mean density 0\.\d\d; dense: ", line
    )
    reasons = set(re.findall(r"\d+ ([a-z-][a-z -]*)", line.split("dense: ")[1]))
    assert reasons <= {"cross-attention", "text or audio alone"}
    assert ("text or audio alone" in reasons) == (name in WITH_OTHERS)


@pytest.mark.parametrize("error", ["attention", "block"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_measures_every_layer(facts, name, error):
    found = facts["searched"][error]
    assert len(found) == facts["depth"] and all(value is not None and value > 1e-4 for value in found), found
    assert facts["mapped"] == [0, facts["depth"] - 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_node_s_search_by_head_gives_a_plan_that_runs(facts, name):
    found = facts["by a new node"]
    assert len(found["errors"]) == facts["depth"] and all(error is not None for error in found["errors"])
    # One before it may say what computes mean frames.
    *_, line = found["lines"]
    assert re.search(r"^Efficient-vDiT: [1-9]\d* attention calls sparse at mean density 0\.\d\d; dense: ", line)


def test_the_families_have_heads_that_do_not_divide_by_three_and_take_mean_frames(found):
    plans = [facts["by a new node"] for facts in found.values() if "by a new node" in facts]
    assert any(plan["heads"] % 3 for plan in plans) and any(plan["means"] for plan in plans)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_frames_are_dense(facts, name):
    assert facts["all frames"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_one_frame_is_the_masked_oracle(facts, name):
    assert facts["finite"]
    assert facts["error"] < 2e-5 and facts["effect"] > 100 * facts["error"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_source_model_is_untouched_and_a_bypass_leaves_nothing(facts, name):
    assert facts["weights same"] and facts["options same"] and facts["bypassed"] == 0


def test_the_matrices_that_are_counted_are_those_that_the_video_meets(in_process):
    """A bound by FLOPs, the report's and the forecast's, hangs on them."""
    found = in_process("tokens_met")
    assert len(found) > 15
    assert {name: about for name, about in found.items() if about["counted"] != about["met"] or not about["met"]} == {}


def test_the_table_of_bounds_stands_on_the_real_models(in_process):
    found = in_process("token_weights")
    assert "wan_14b" in found["weights"]
    for name, facts in found["weights"].items():
        assert facts["here"] == facts["table"], name
    for kind, (unknown, why) in found["left"].items():
        assert unknown and why.endswith("no call goes over the whole video"), kind
