"""ComfyUI's Train LoRA under a plan, where it computes parts of a forward again for their gradients."""

import pytest


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("trained")


@pytest.mark.parametrize("name", ["wan", "cosmos", "cogvideox"])
def test_a_forward_that_is_computed_again_follows_the_same_patterns(facts, name):
    if name not in facts:
        pytest.skip("this ComfyUI has not got the model")
    found = facts[name]
    assert found["whole"] == 0.0 < found["effect"] and found["blocks alike"] == 0.0
    assert not any("more calls than layers" in line for line in found["lines"])


@pytest.mark.parametrize("name", ["wan", "cosmos", "cogvideox"])
def test_single_blocks_of_a_plan_whose_layers_differ_are_refused(facts, name):
    if name not in facts:
        pytest.skip("this ComfyUI has not got the model")
    assert "Set checkpoint_depth to 1" in facts[name]["blocks"]


@pytest.mark.parametrize("name", ["wan", "cosmos", "cogvideox"])
def test_no_residual_is_kept_while_a_model_is_trained(facts, name):
    if name not in facts:
        pytest.skip("this ComfyUI has not got the model")
    assert facts[name]["residual"] == 0.0
