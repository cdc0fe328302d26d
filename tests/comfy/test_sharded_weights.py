"""Weights shared out over 2 and 3 CPU ranks in the real ComfyUI: bit for bit what the same ranks make with whole ones."""

import pytest


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("sharded_weights")


@pytest.fixture(params=["2", "3"])
def ranks(request, facts):
    return int(request.param), facts[request.param]


def test_a_rank_holds_its_part_two_blocks_and_what_stands_outside(ranks):
    number, found = ranks[0], ranks[1]["memory"]
    blocks = found["blocks"]
    assert found["shared"] <= sum(blocks) / number + 2 * max(blocks) + 64 * len(blocks)
    assert found["most whole"] == 2
    assert found["counted"] == found["size"] == found["shared"] + found["outside"] < sum(blocks) + found["outside"]


def test_unloading_frees_them(ranks):
    assert ranks[1]["memory"]["unloaded"] == [False, 0]


def test_they_are_loaded_once_and_anew_after_another_clone(ranks):
    """A worker asks for its model in every step; whole weights and other patches replace the parts, as does their end."""
    assert ranks[1]["loads"] == {
        "first": [1, True],
        "whole": [1, False],
        "again": [2, True],
        "other": [3, True],
        "the other is gone": [3, True],
        "and nobody has it": [3, False],
    }


@pytest.mark.parametrize("run", ["1.0", "0.5", "again 1.0", "none"])
def test_a_merged_lora_and_another_strength_of_it(ranks, run):
    assert ranks[1]["loras"][run]


def test_a_bypassed_lora(ranks):
    assert ranks[1]["bypassed"]


def test_two_experts_in_turn(ranks):
    assert ranks[1]["experts"] == {"same": [True] * 4, "differ": True, "both held": True}


def test_a_run_broken_off_leaves_nothing_behind(ranks):
    assert ranks[1]["broken_off"] == {"stopped": True, "another": True, "again": True}


def test_quantised_weights_also_with_a_lora(ranks):
    found = ranks[1]["eight_bits"]
    assert found["same"] and found["merged"]
    if found["class"] != "QuantizedTensor":
        pytest.skip("this ComfyUI has no class for them")


def test_weights_that_are_cast_in_every_forward(ranks):
    assert ranks[1]["another_precision"]


def test_ranks_share_the_pages_of_a_file(ranks):
    """What ComfyUI converts are copies; what it takes from the file as it lies there is mapped anyway."""
    found = ranks[1]["mapped"]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert all(case["same"] and case["dtypes"] for case in found.values())
    assert found["float32"]["copied"] == 0.0 and found["float32"]["kept"] == 1.0
    assert found["converted"]["kept"] == 0.0
    assert found["8 bits"]["kept"] > 0.9


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("strange", "its loader keeps them in a way of its own (Strange)"),
        ("compiled", "the model is compiled"),
        ("wrapped", "another node changes them in every forward pass"),
        ("high", "ComfyUI runs with --highvram or --gpu-only"),
    ],
)
def test_what_cannot_be_shared_out_says_why(ranks, model, why):
    assert f"The weights cannot be shared out: {why}" in ranks[1]["refusals"][model]
