"""A layer that attends twice in a forward, or is skipped, in ComfyUI's own sampling."""

import pytest


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("uneven_layers")


@pytest.mark.parametrize("name", ["vace", "wan, a layer skipped", "ltx, a layer skipped"])
def test_the_residual_brings_the_clip_nearer_to_the_dense_one(facts, name):
    """The streams of a layer, and the passes of a prompt, keep one each."""
    sparse, with_residual = facts[name]
    assert with_residual < 0.5 * sparse


def test_the_tile_map_is_of_the_video_and_not_of_a_control_stream(facts):
    measured, layers = facts["vace tile map"]
    assert layers == list(range(measured))


def test_what_is_no_numbered_block_is_left_alone(facts):
    assert facts["a key of its own"] == 0.0


def test_layers_are_counted_past_those_that_guidance_skips(facts):
    assert {"wan", "ltx"} <= facts["layer 0 skipped"].keys()
    for name, seen in facts["layer 0 skipped"].items():
        every, rest = [0, 1, 2], [1, 2]
        assert seen in (every + rest, every + every + rest), name


def test_a_block_that_its_replacement_computes_twice_is_one_layer(facts):
    assert {"wan", "ltx"} <= facts["layer 1 twice"].keys()
    for name, seen in facts["layer 1 twice"].items():
        forward = [0, 1, 1, 2]
        assert seen in (forward, forward + forward), name
