"""Weights shared out over 2 and 3 gloo ranks: bit for bit the whole model, and what each rank holds and sends."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from efficient_vdit_core.parallel.sharding.weight_bytes import ALIGNMENT, bytes_of, lay_out, take_apart

sys.path.insert(0, str(Path(__file__).parent))
from parallel_ranks import run_ranks  # noqa: E402


@pytest.fixture(scope="module", params=[2, 3])
def facts(request):
    return request.param, run_ranks("everything", request.param, cases="weight_cases")


@pytest.mark.parametrize("case", ["values", "changes", "broken_off", "loaded_anew"])
def test_every_bit_is_that_of_the_whole_model(facts, case):
    _, results = facts
    for found in results:
        assert all(value is True for name, value in found[case].items() if name != "most whole"), found[case]


def test_a_rank_holds_its_part_and_two_blocks(facts):
    """All is rounded up to ALIGNMENT for each tensor and part; a weight in two places of a block is held once."""
    ranks, results = facts
    for found in (result["memory"] for result in results):
        blocks, slack = found["blocks"], ALIGNMENT * sum(found["weights"])
        whole, parts, room = found["told"]
        assert sum(blocks) <= whole <= sum(blocks) + 2 * slack
        assert found["held"] == parts + room <= sum(blocks) / ranks + 2 * max(blocks) + 4 * slack
        assert found["held"] < sum(blocks)
        assert found["most whole"] == 2 and found["held when removed"] == 0
        assert found["sent"] == parts * (ranks - 1)
        assert found["weights"][0] == 11  # of 12 places


def test_no_more_than_two_blocks_are_whole_whatever_the_order(facts):
    _, results = facts
    assert {found["broken_off"]["most whole"] for found in results} == {2}


def test_a_gather_begins_before_the_block_ahead_of_it_computes(facts):
    """Block 0 comes while the embeddings are computed, block i + 1 while block i is."""
    _, results = facts
    want = ["start", "embeddings", "wait"]
    for number in range(8):
        want += ["start", f"block {number}", "wait"] if number < 7 else [f"block {number}"]
    assert all(found["order"] == want for found in results)


def test_a_class_of_tensors_that_cannot_be_taken_apart_is_named():
    class Strange(torch.Tensor):
        pass

    block = nn.Linear(2, 2)
    block.weight = nn.Parameter(torch.randn(2, 2).as_subclass(Strange), requires_grad=False)
    with pytest.raises(ValueError, match="a weight of class Strange, expected a plain or a quantised tensor"):
        lay_out(block)


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 4, 1), (2, 3, 5)])
def test_a_tensor_comes_back_from_its_bytes_with_its_strides(shape):
    block, x = nn.Module(), torch.randn(shape).permute(tuple(reversed(range(len(shape)))))
    block.register_buffer("x", x)
    about = lay_out(block)
    (leaf,) = about.weights[0].leaves
    row = torch.zeros(about.nbytes, dtype=torch.uint8)
    row[: leaf.nbytes] = bytes_of(take_apart(x)[0][0])
    back = leaf.view(row)
    assert back.shape == x.shape and torch.equal(back, x)
    assert 1 in shape or 0 in shape or back.stride() == x.stride()
