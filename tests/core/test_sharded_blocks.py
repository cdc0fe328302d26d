"""What a rank cuts out of a block's arguments, and what it refuses; no process is started."""

from types import SimpleNamespace

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.backends.spans import take
from efficient_vdit_core.parallel.sharding.arguments import BlockArguments, cut_runs, cut_table, numbers_of, spread_to
from efficient_vdit_core.parallel.sharding.blocks import ShardedForward, block_hook
from efficient_vdit_core.parallel.sharding.override import make_sharded_override
from efficient_vdit_core.tiles import TilePattern, TokenGrid

JOINT = BlockArguments(("txt", "img"), spread=())


def forward(layout, ranks=2, rank=0, heads=0):
    comm = SimpleNamespace(rank=rank, size=ranks)
    return ShardedForward(layout, [TilePattern(1)] * 3, comm, heads=heads)


def entries(modulation, tokens):
    """Wan's own rule, for each token."""
    count = modulation.shape[1]
    repeats = 1 if count == 1 else tokens // count if tokens % count == 0 else tokens // count + 1
    return modulation.repeat_interleave(repeats, dim=1)[:, :tokens]


@pytest.mark.parametrize(
    ("count", "spans", "length"),
    [
        (4, [(0, 6), (9, 12)], 3),  # three whole runs of three tokens
        (4, [(0, 6), (8, 12)], 10),  # one of them is cut
        (5, [(0, 6)], 2),  # runs of three, the last one short
        (5, [(9, 12)], 1),
        (1, [(2, 7)], 1),
    ],
)
def test_modulation_is_spread_only_where_a_run_is_cut(count, spans, length):
    modulation = torch.randn(2, count, 6, 4)
    found = spread_to(modulation, 12, spans)
    assert found.shape[1] == length
    tokens = sum(stop - start for start, stop in spans)
    want = entries(modulation, 12) if count > 1 else modulation.expand(-1, 12, -1, -1)
    torch.testing.assert_close(entries(found, tokens).expand(-1, tokens, -1, -1), take(want, spans, 1))


def test_runs_are_counted_in_the_tokens_that_are_held():
    runs = [(0, 5, "a"), (5, 8, "b"), (8, None, "c")]
    assert cut_runs(runs, [(3, 6), (7, 10)]) == [(0, 2, "a"), (2, 3, "b"), (3, 4, "b"), (4, 6, "c")]
    assert cut_runs(None, [(0, 1)]) is None and cut_runs(runs, []) == []


def test_what_a_run_has_for_each_token_is_cut_with_it():
    runs = [(0, 4, 7), (4, 10, torch.arange(4, 10)), (10, None, torch.arange(10, 12))]
    cut = cut_runs(runs, [(2, 5), (8, 12)])
    assert [(start, stop) for start, stop, _ in cut] == [(0, 2), (2, 3), (3, 5), (5, 7)]
    assert [each if isinstance(each, int) else each.tolist() for *_, each in cut] == [7, [4], [8, 9], [10, 11]]


def test_tables_are_cut_on_the_axis_of_the_tokens():
    spans = [(1, 3), (5, 6)]
    for shape, axis in (((1, 6, 2), 1), ((1, 1, 6, 2), 2), ((6, 2), 0)):
        table = torch.randn(shape)
        assert torch.equal(cut_table(table, 6, spans, "pe"), take(table, spans, axis))
    one = torch.randn(2, 1, 4)
    both = cut_table((one, True, None), 6, spans, "pe")
    assert both[0] is one and both[1:] == (True, None)
    with pytest.raises(ValueError, match=r"pe has shape \(2, 5\), expected 6 tokens"):
        cut_table(torch.randn(2, 5), 6, spans, "pe")
    assert numbers_of(spans, torch.device("cpu")).tolist() == [1, 2, 5] and not len(numbers_of([], torch.device("cpu")))


@pytest.mark.parametrize("rank", [0, 1])
def test_text_and_video_are_both_shared_out(rank):
    layout = TokenLayout(TokenGrid(4, 1, 5), prefix=3)
    args = {"txt": torch.randn(1, 3, 2), "img": torch.randn(1, 20, 2), "pe": torch.randn(1, 1, 23, 2)}
    state = forward(layout, rank=rank)
    given = state.enter(args, JOINT)
    assert (given["txt"].shape[1], given["img"].shape[1]) == ((1, 10), (2, 10))[rank]
    whole = torch.cat([args["txt"], args["img"]], 1)
    assert torch.equal(torch.cat([given["txt"], given["img"]], 1), take(whole, state.spans, 1))
    assert torch.equal(given["pe"], take(args["pe"], state.spans, 2))
    again = state.enter({**args, "txt": given["txt"], "img": given["img"]}, JOINT)
    assert again["img"] is given["img"], "rows stay"


def test_a_text_shorter_than_the_ranks_is_refused():
    state = forward(TokenLayout(TokenGrid(4, 1, 5), prefix=1))
    with pytest.raises(ValueError, match=r"The 1 \+ 20 tokens of text and video cannot be shared out over 2 ranks"):
        state.enter({"txt": torch.randn(1, 1, 2), "img": torch.randn(1, 20, 2), "pe": torch.randn(1, 21)}, JOINT)


def test_another_number_of_tokens_is_refused():
    state = forward(TokenLayout(TokenGrid(4, 1, 5)))
    with pytest.raises(ValueError, match="A block was given hidden states of 21 tokens, expected 20"):
        state.enter({"img": torch.randn(1, 21, 2)}, BlockArguments(tables={}, spread=()))


def test_a_block_whose_attention_another_node_computes_is_refused():
    """It would have seen this rank's tokens alone, and nobody would know."""
    state = forward(TokenLayout(TokenGrid(4, 1, 5)))
    about = BlockArguments(tables={}, spread=())
    args = {"img": torch.randn(1, 20, 2), "transformer_options": {"evdit_sharded": state}}
    itself = {"original_block": lambda given: {"img": given["img"] * 2}}
    out = block_hook(0, last=False, about=about)(args, itself)
    with pytest.raises(ValueError, match="Block 0 made no attention call that the ranks could share"):
        block_hook(1, last=False, about=about)({**args, "img": out["img"]}, itself)
    with pytest.raises(ValueError, match="Block 0 made no attention call"):
        state.check_done()


@pytest.mark.parametrize(
    ("heads", "mask", "says"),
    [(2, None, "attends with 2 of its 4 heads at a time"), (4, torch.zeros(10, 10), "masks its attention")],
)
def test_calls_that_cannot_be_shared_are_refused(heads, mask, says):
    state = forward(TokenLayout(TokenGrid(4, 1, 5)), heads=4)
    state.begin(0)
    q = torch.randn(1, heads, 10, 8)
    with pytest.raises(ValueError, match=says):
        make_sharded_override()(
            None, q, q, q, heads, mask=mask, skip_reshape=True, transformer_options={"evdit_sharded": state}
        )
