"""Training with the tokens of a clip shared out over ranks, against one process that has them all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from parallel_ranks import run_ranks  # noqa: E402


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_of_sharded_attention_are_those_of_one_process(ranks):
    """By RB and by Ulysses, for dense layers, arrows, windows and heads that differ; whole frames, uneven ones too, and
    cut ones."""
    for errors in run_ranks("attention_gradients", ranks, "sequence_cases"):
        assert len(errors) == 3 * 8 * 2 * 2
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
