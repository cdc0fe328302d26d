"""Training with the tokens of a clip shared out over ranks, against one process that has them all."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from small_models import opensora_plan, wan

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.runs.sequence_parallel import check_shares, share_out
from efficient_vdit_core.tiles import TokenGrid

sys.path.insert(0, str(Path(__file__).parent))
from parallel_ranks import run_ranks  # noqa: E402


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_of_sharded_attention_are_those_of_one_process(ranks):
    """By RB and by Ulysses, for dense layers, arrows, windows and heads that differ; whole frames, uneven ones too, and
    cut ones."""
    for errors in run_ranks("attention_gradients", ranks, "sequence_cases"):
        assert len(errors) == 3 * 9 * 2 * 2
        assert not {name: error for name, error in errors.items() if not error < 1e-12}


def test_gradients_of_every_family_are_those_of_one_process():
    """Under each objective, with blocks kept and run again, five frames over two ranks."""
    first, second = run_ranks("family_gradients", 2, "sequence_cases")
    assert len(first) == 3 * 3 * 2 + 3 * 2
    for errors in (first, second):
        for case, found in errors.items():
            exact = "linear" in case and "wan" not in case  # Wan's norms and modulation are in float32
            assert found["gradient"] < (1e-10 if exact else 1e-5), (case, found)
            assert found["loss"] < 1e-5, (case, found)


def test_a_rank_holds_half_of_what_waits_for_the_gradient():
    """And, beside it, the shared tokens of both; with blocks that run again, what every rank has whole weighs more."""
    for sizes in run_ranks("held", 2, "sequence_cases"):
        assert len(sizes) == 3 * 2
        for case, (alone, shared) in sizes.items():
            assert shared < (0.6 if case.endswith("True") else 0.52) * alone, (case, alone, shared)


@pytest.mark.parametrize(
    ("family", "processes", "message"),
    [
        (opensora_plan, 3, "is 3, expected at most 2: dense layers share out their heads"),
        (wan, 2, "is 2, expected at most 1: a clip has 1 latent frames"),
    ],
)
def test_clips_that_cannot_be_shared_out_are_refused(family, processes, message, tmp_path):
    values = {
        "method": "knowledge",
        "model": asdict(family(tmp_path)),
        "data": {"frames": 1, "height": 64, "width": 64},
        "training": {"sequence_parallel": processes},
    }
    config = DistillConfig.from_dict(values)
    with pytest.raises(ValueError, match=message):
        check_shares(config, open_model(config.model))


def test_text_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="is 3, expected at most 2: a clip has 2 tokens of text"):
        share_out(TokenLayout(TokenGrid(5, 2, 2), prefix=2), 5, 3)
