"""Guidance branches over groups of ranks: who gets what, and when it pays."""

import pytest

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.parallel.sharding.division import DIVISIONS, Division, by_sequence, choose_division, seconds_of
from efficient_vdit_core.parallel.sharding.forecast import GPU_RATES, LayerShape, Rates, forward_seconds, rates_of
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYER = LayerShape(TokenLayout(TokenGrid(24, 45, 80)), 24, 96)
NVLINK, _, SLOW = GPU_RATES


def forecast(each: tuple[float, ...], link: float, gathered: int = 0, pattern: TilePattern | None = None):
    """The seconds of so many branches on a group of ranks of these rates."""

    def seconds(branches: int, group: tuple[int, ...]) -> float:
        rates = Rates("", sum(each[rank] for rank in group) / len(group), link)
        layers = [pattern or TilePattern(1)] * 4
        return forward_seconds(LAYER, layers, len(group), "auto", rates, batch=branches, gathered=gathered)

    return seconds


def chosen(each: tuple[float, ...], branches: int = 2, asked: str = "auto", link: float = SLOW.link, **more) -> str:
    return choose_division(asked, each, branches, forecast(each, link, **more)).text()


@pytest.mark.parametrize("rates", [NVLINK, SLOW])
@pytest.mark.parametrize(("ranks", "groups"), [(2, "ranks 0 and 1"), (4, "ranks 0+1 and 2+3")])
def test_an_even_number_of_like_ranks_takes_a_branch_each(ranks, groups, rates):
    """On every link, so that no run's measurement changes the choice: the work is the same, and less travels."""
    for pattern in (TilePattern(1), TilePattern(None)):
        assert chosen((rates.flops,) * ranks, link=rates.link, pattern=pattern) == groups


def test_an_odd_number_shares_out_the_sequence_unless_the_link_is_very_slow():
    like = (SLOW.flops,) * 3
    assert chosen(like, link=NVLINK.link) == chosen(like) == "ranks 0+1+2"
    assert chosen(like, link=SLOW.link / 50, pattern=TilePattern(None)) == "ranks 0 and 1+2"


def test_unlike_ranks_are_grouped_so_that_the_groups_finish_together():
    fast, slow = 160e12, 70e12
    assert chosen((fast, fast, slow, slow)) == "ranks 0+2 and 1+3"
    assert chosen((2 * slow, slow, slow)) == "ranks 0 and 1+2"
    assert chosen((slow, 2 * slow, slow)) == "ranks 1 and 0+2"
    assert chosen((3 * slow, slow)) == "ranks 0+1", "of two groups the slow one would be waited for"


@pytest.mark.parametrize(
    ("branches", "ranks", "groups"),
    [(3, 3, "ranks 0 and 1 and 2"), (3, 2, "ranks 0+1"), (4, 2, "ranks 0 and 1"), (4, 8, "ranks 0+1 and 2+3 and 4+5 and 6+7")],
)  # fmt: skip
def test_any_number_of_branches(branches, ranks, groups):
    assert chosen((SLOW.flops,) * ranks, branches) == groups


def test_a_choice_can_be_asked_for():
    like = (SLOW.flops,) * 3
    assert chosen(like, asked="branches") == "ranks 0 and 1+2"
    assert chosen((SLOW.flops,) * 2, asked="sequence") == "ranks 0+1"
    for asked in DIVISIONS:  # nothing to divide
        assert chosen(like, 1, asked) == "ranks 0+1+2"


def test_weights_that_all_gather_weigh_the_same_either_way():
    """Where nothing but their gather is waited for, nothing is gained by groups."""
    seconds = forecast((SLOW.flops,) * 2, SLOW.link, gathered=10**14)
    divided = Division(((0,), (1,)), ((0, 1), (1, 2)))
    assert seconds_of(divided, seconds) == pytest.approx(seconds_of(by_sequence(2, 2), seconds), rel=0.01)


def test_two_branches_on_two_ranks_are_twice_as_fast_and_send_nothing():
    seconds = forecast((SLOW.flops,) * 2, SLOW.link)
    alone = seconds(2, (0,))
    assert alone / seconds_of(Division(((0,), (1,)), ((0, 1), (1, 2))), seconds) == pytest.approx(2.0)
    assert 1.0 < alone / seconds_of(by_sequence(2, 2), seconds) < 2.0


def test_rates_to_count_on():
    assert rates_of(["A", "A"], [3.0, 2.0]) == (2.0, 2.0), "the slowest of one kind"
    assert rates_of(["A", "B", "A"], [4.0, 1.0, 2.0]) == (3.0, 1.0, 3.0), "what the shares were made by"


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        (((0,), (0,)), ((0, 1), (1, 2))),
        (((0,), ()), ((0, 1), (1, 2))),
        (((0,), (1,)), ((0, 1), (0, 2))),
        (((0,), (1,)), ((0, 1), (1, 1))),
        (((0,), (1,)), ((0, 2),)),
    ],
)
def test_a_division_that_leaves_something_out_is_refused(groups, parts):
    with pytest.raises(ValueError, match="expected each rank and each branch in one"):
        Division(groups, parts)
