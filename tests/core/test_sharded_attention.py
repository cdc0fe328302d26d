"""Attention over 2, 3 and 4 gloo ranks against the masked oracle of one process, and its bytes against the formulas."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from rounding import worst

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.parallel.sharding.layout import Shard, Split, by_frames, by_references, by_tokens, choose_shard
from efficient_vdit_core.parallel.sharding.roles import roles
from efficient_vdit_core.parallel.sharding.traffic import rb_bytes, scheme_of, ulysses_bytes
from efficient_vdit_core.tiles import TilePattern, TokenGrid

sys.path.insert(0, str(Path(__file__).parent))
from parallel_ranks import run_ranks  # noqa: E402

# bytes_sent's shapes: batch 2, 12 heads x 8 in bfloat16, 12 tokens a frame
BATCH, HEADS, DIM, ITEM, SIZE = 2, 12, 8, 2, 12


@pytest.fixture(scope="module", params=[2, 3, 4])
def facts(request):
    return request.param, run_ranks("everything", request.param)


def test_every_layout_and_scheme_equals_the_oracle(facts):
    ranks, results = facts
    errors = {name: max(r["attention_errors"][name] for r in results) for name in results[0]["attention_errors"]}
    assert len(errors) > 150
    assert not {name: error for name, error in errors.items() if error > 1e-5}


def test_heads_that_differ_and_windows_equal_the_oracle(facts):
    """Each rank's heads have their own patterns under Ulysses; where they differ, RB gives way to it."""
    _, results = facts
    errors = {name: max(r["head_errors"][name] for r in results) for name in results[0]["head_errors"]}
    assert len(errors) == 6
    assert not {name: error for name, error in errors.items() if error > 1e-5}


def test_windows_equal_the_oracle_by_rb_and_their_halo_is_counted(facts):
    ranks, results = facts
    for name in results[0]["window_errors"]:
        assert max(r["window_errors"][name]["error"] for r in results) < 1e-5, name
        frames, pattern, kind = name.split()
        grid, (k, window) = TokenGrid(int(frames[2:]), 1, 5), map(int, pattern.split("~"))
        layout = TokenLayout(grid, *{5: (3, 2), 8: (0, 0), 21: (0, 4)}[grid.t])
        pattern = TilePattern(k, window=window)
        shard = choose_shard(layout, ranks, [pattern]) if kind == "auto" else build(kind, layout, ranks, pattern)
        sent = [r["window_errors"][name]["sent"] for r in results]
        assert list(rb_bytes(shard, pattern, 5, 8, 4, 2)) == sent, name
        if kind == "L1" and k == 0 and grid.t == 8 and ranks in (2, 4):
            # Whole frames and no reference: each border between ranks is crossed by a window's frames both ways.
            frame_bytes = 2 * 5 * 5 * 8 * 4 * 2  # keys and values: batch, heads, tokens, head_dim, float32
            assert sum(r["window_errors"][name]["halo"] for r in results) == 2 * (ranks - 1) * window * frame_bytes
    assert len(results[0]["window_errors"]) > 30


def test_bfloat16_payload_is_stated(facts):
    """Ulysses rounds the softmax's weights and the result; RB also what it sends of a row before it is merged."""
    _, results = facts
    assert max(r["half_errors"]["rb"] for r in results) < worst(torch.bfloat16, 3)
    assert max(r["half_errors"]["ulysses"] for r in results) < worst(torch.bfloat16, 2)


def test_the_bytes_are_the_formulas(facts):
    """k S D e (P-1)/P times 4 plus the lse for RB, 4 N D e (P-1)/P^2 for Ulysses, summed over the ranks."""
    ranks, results = facts
    share, row = (ranks - 1) / ranks, HEADS * DIM * ITEM
    for name in results[0]["bytes_sent"]:
        frames, k, layout, scheme = name.split()
        counted = [r["bytes_sent"][name] for r in results]
        total = sum(sum(c.values()) for c in counted) - sum(c.get("rb halo", 0) for c in counted)
        shared = int(k) * SIZE
        rb = ranks * BATCH * share * shared * (4 * row + 4 * HEADS)
        ulysses = ranks * BATCH * 4 * int(frames) * SIZE * row * share / ranks
        assert total == (rb if scheme == "rb" else ulysses), (name, counted)


def test_the_forecast_is_what_was_counted(facts):
    ranks, results = facts
    for name in results[0]["bytes_sent"]:
        frames, k, kind, scheme = name.split()
        pattern = TilePattern(int(k))
        shard = build(kind, TokenLayout(TokenGrid(int(frames), 3, 4)), ranks, pattern)
        shape = (HEADS, DIM, ITEM, BATCH)
        forecast = rb_bytes(shard, pattern, *shape) if scheme == "rb" else ulysses_bytes(shard, *shape)
        assert list(forecast) == [sum(r["bytes_sent"][name].values()) for r in results], name


def test_every_exchange_is_under_way_while_the_rank_works(facts):
    """Each begins before a piece of attention that does not need it, and is awaited behind that."""
    _, results = facts
    for r in results:
        events = r["order"]["rb"]
        for name in ("rb shared queries", "rb shared keys", "rb partial rows"):
            start, wait = events.index(f"start {name}"), events.index(f"wait {name}")
            assert "attend" in events[start:wait], (name, events)
        # Frames to themselves, shared queries to this rank's keys, frames to the shared keys.
        queries, keys = events.index("wait rb shared queries"), events.index("wait rb shared keys")
        assert events[queries:keys].count("attend") == 1 and "start rb partial rows" in events[queries:keys]
        assert events[keys:].count("attend") == 1


def test_half_of_the_heads_travels_while_the_other_half_is_computed(facts):
    """Both begin their way there first, and the first half's way back begins before the second half attends."""
    _, results = facts
    there, back = "ulysses to heads", "ulysses to tokens"
    want = [f"start {there}"] * 2 + [f"wait {there}", "attend", f"start {back}"] * 2 + [f"wait {back}"] * 2
    assert all(r["order"]["ulysses"] == want for r in results)


def test_groups_of_ranks_attend_for_branches_of_their_own(facts):
    """A rank alone sends nothing, and what groups send is counted on the whole communicator."""
    ranks, results = facts
    for r in results:
        found = list(r["group_errors"].values())
        assert len(found) == 4 and max(case["error"] for case in found) < 1e-5
        assert found[1]["size"] == ranks
        counted = [case["sent"] for case in found]
        assert (counted[0] > 0) == (found[0]["size"] > 1) and counted[1] > counted[0]
        assert (counted[2] > counted[1]) == (found[2]["size"] > 1)


def test_a_whole_model_runs_on_sharded_tokens(facts):
    """Every rank gets the whole result; text as long as a rank's tokens is not taken for the video."""
    ranks, results = facts
    for r in results:
        assert len(r["model_errors"]) == 6
        for name, found in r["model_errors"].items():
            assert found["error"] <= 1e-5 * max(1.0, found["scale"]), (name, found)
            assert sum(found["schemes"].values()) == 3
        # Four ranks cut two of the six frames, and RB with their halo sends more.
        assert r["model_errors"]["mixed auto"]["schemes"] == ({"rb": 2, "ulysses": 1} if ranks < 4 else {"ulysses": 3})


def build(kind: str, layout: TokenLayout, ranks: int, pattern: TilePattern) -> Shard:
    return (
        by_frames(layout, ranks)
        if kind == "L1"
        else {"L2": by_references, "L3": by_tokens}[kind](layout, ranks, pattern)
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("frames", [1, 5, 8, 21, 24])
@pytest.mark.parametrize("kind", ["L1", "L2", "L3"])
def test_every_token_has_one_rank_and_shares_are_even(kind, frames, ranks):
    layout = TokenLayout(TokenGrid(frames, 3, 7), prefix=5, suffix=2)
    shard = build(kind, layout, ranks, TilePattern(2))
    held = sorted(token for spans in shard.spans for start, stop in spans for token in range(start, stop))
    assert held == list(range(layout.tokens)) and sum(shard.tokens) == layout.tokens
    assert max(shard.tokens) - min(shard.tokens) <= {"L1": 22, "L2": 22, "L3": 1}[kind]
    for rank, pieces in enumerate(shard.pieces):
        assert [t for p in pieces for t in range(p.start, p.stop)] == [
            t for a, b in shard.spans[rank] for t in range(a, b)
        ]
        assert all(p.frame is None or p.frame == (p.start - 5) // 21 == (p.stop - 6) // 21 for p in pieces)


@pytest.mark.parametrize("weights", [(16, 7), (16, 16, 9), (1, 16)])
@pytest.mark.parametrize("pattern", [TilePattern(2), TilePattern(None)])
def test_unlike_ranks_hold_shares_by_their_weights(weights, pattern):
    layout = TokenLayout(TokenGrid(8, 6, 7), prefix=40)
    shard = choose_shard(layout, len(weights), [pattern], Split((40,), weights))
    for held, weight in zip(shard.tokens, weights, strict=True):
        # Of text, references and the rest each one goes to every rank first, and the others by weight, rounded down.
        assert abs(held - layout.tokens * weight / sum(weights)) <= 3 * 2
    text = [sum(min(b, 40) - min(a, 40) for a, b in spans) for spans in shard.spans]
    assert all(abs(t - 40 * w / sum(weights)) <= 2 for t, w in zip(text, weights, strict=True))
    assert abs(shard.shares_of(24)[0][1] - 24 * weights[0] / sum(weights)) <= 2
    assert all(stop > start for start, stop in shard.shares_of(len(weights))), "where there are enough, none is empty"


LAYOUTS = [(24, 4, 1, "L1"), (8, 2, 2, "L1"), (21, 4, 1, "L2"), (21, 4, 2, "L3"), (5, 4, 0, "L3")]
CHOICES = [
    (24, 4, 1, "rb"),
    (24, 4, 4, "rb"),
    (24, 8, 4, "ulysses"),
    (8, 4, 2, "ulysses"),
    (8, 4, 1, "rb"),
    (8, 2, 8, "ulysses"),
]


@pytest.mark.parametrize(("frames", "ranks", "k", "kind"), LAYOUTS)
def test_the_layout_follows_the_frames(frames, ranks, k, kind):
    layout, pattern = TokenLayout(TokenGrid(frames, 2, 3)), TilePattern(k)
    assert choose_shard(layout, ranks, [pattern, TilePattern(None)]) == build(kind, layout, ranks, pattern)


@pytest.mark.parametrize(("frames", "ranks", "k", "scheme"), CHOICES)
def test_auto_is_rb_where_k_times_p_is_below_t(frames, ranks, k, scheme):
    layout = TokenLayout(TokenGrid(frames, 30, 32))
    assert scheme_of("auto", by_frames(layout, ranks), TilePattern(k), 24, 96, 2) == scheme


@pytest.mark.parametrize("window", [0, 1])
def test_a_halo_goes_to_those_who_see_the_frame_and_to_nobody_else(window):
    pattern = TilePattern(1, window=window)
    shard = by_tokens(TokenLayout(TokenGrid(8, 1, 7)), 3, pattern)
    every = roles(shard, pattern)
    assert any(r.halo for r in every)
    neighbours = pattern.neighbours(8)
    for rank, role in enumerate(every):
        sent = {(piece.frame, peer) for piece, peers in role.halo for peer in peers}
        assert sent == {
            (mine.frame, other)
            for mine, other in itertools.product(shard.pieces[rank], range(3))
            if other != rank and mine.frame in neighbours
            and any(p.frame in neighbours and mine.frame in neighbours[p.frame] for p in shard.pieces[other])
        }  # fmt: skip


def test_a_shard_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="cover the 10 tokens once"):
        Shard(TokenLayout(TokenGrid(2, 1, 5)), (((0, 4),), ((5, 10),)))
