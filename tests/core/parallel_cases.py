"""What the gloo ranks of the tests compute. Each function takes (rank, ranks) and returns JSON-able facts."""

import itertools
from dataclasses import replace

import torch
from parallel_ranks import neighbour

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.backends.spans import take
from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.models.opensora_plan.config import OSP_29X720P
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.parallel.sharding.attend import sharded_attention
from efficient_vdit_core.parallel.sharding.blocks import SHARDED_KEY, ShardedForward, block_hook
from efficient_vdit_core.parallel.sharding.communicator import Communicator
from efficient_vdit_core.parallel.sharding.division import choose_division
from efficient_vdit_core.parallel.sharding.layout import by_frames, by_references, by_tokens, choose_shard
from efficient_vdit_core.parallel.sharding.override import make_sharded_override
from efficient_vdit_core.parallel.sharding.reference_broadcast import reference_broadcast_attention
from efficient_vdit_core.parallel.sharding.ulysses import ulysses_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

BATCH, HEADS, DIM, GRID = 2, 5, 8, (1, 5)
BUILDS = {
    "L1": lambda layout, ranks, pattern: by_frames(layout, ranks),
    "L2": by_references,
    "L3": by_tokens,
    "auto": lambda layout, ranks, pattern: choose_shard(layout, ranks, [pattern]),
}


def tensors(layout, heads=HEADS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, heads, layout.tokens, DIM, generator=generator).to(dtype) for _ in range(3)]


def wanted(layout, k, qkv, window=0, _cache={}):  # noqa: B006
    """The single-process masked oracle in float64, computed once for each case."""
    key = (layout, k, window, qkv[0].dtype, qkv[0].shape)
    if key not in _cache:
        oracle = neighbour("conftest").masked_attention
        references = list(TilePattern(k).reference_frames(layout.grid.t))
        size = layout.grid.tokens_per_frame
        _cache[key] = oracle(*qkv, layout.grid.t, size, references, layout.prefix, layout.suffix, window)
    return _cache[key]


def attention_errors(rank, ranks):
    """Worst error on this rank's tokens for every (T, k, layout, scheme), with and without prefix and suffix."""
    comm, found = Communicator(), {}
    for frames, (prefix, suffix) in itertools.product((5, 8, 21, 24), ((0, 0), (3, 2))):
        if frames > 8 and prefix:
            continue
        layout = TokenLayout(TokenGrid(frames, *GRID), prefix, suffix)
        qkv = tensors(layout)
        for k in (0, 1, 2, 4, frames):
            pattern = TilePattern(k)
            for name, build in BUILDS.items():
                shard = build(layout, ranks, pattern)
                mine = [take(x, shard.spans[rank], 2) for x in qkv]
                want = take(wanted(layout, k, qkv), shard.spans[rank], 2)
                # Ulysses' exchange knows no pattern, so one sparse and the full one tell all.
                schemes = ("auto",) if name == "auto" else ("rb", "ulysses") if k in (1, frames) else ("rb",)
                for scheme in schemes:
                    if name == "L1" and k > 2:
                        continue  # who holds the references has been seen
                    got = sharded_attention(*mine, shard, pattern, comm, scheme=scheme)
                    found[f"T={frames}+{prefix + suffix} k={k} {name} {scheme}"] = worst(got, want)
                if k == frames:  # full layers go to Ulysses; RB is exact there too
                    found[f"T={frames} k={k} {name} plain rb"] = worst(
                        reference_broadcast_attention(*mine, shard, pattern, comm), want
                    )
    return found


def window_errors(rank, ranks):
    """Worst error on this rank's tokens under windows: RB with a halo of keys and values, whole frames and cut ones."""
    found = {}
    for frames, (prefix, suffix) in ((5, (3, 2)), (8, (0, 0)), (21, (0, 4))):
        layout = TokenLayout(TokenGrid(frames, *GRID), prefix, suffix)
        qkv = tensors(layout)
        for (k, window), name in itertools.product(((0, 1), (1, 1), (2, 2), (3, 5)), ("L1", "L2", "L3", "auto")):
            pattern = TilePattern(k, window=window)
            if pattern.is_full(frames):
                continue
            shard, comm = BUILDS[name](layout, ranks, pattern), Communicator()
            mine = [take(x, shard.spans[rank], 2) for x in qkv]
            got = sharded_attention(*mine, shard, pattern, comm, scheme="rb")
            case = f"T={frames} {k}~{window} {name}"
            found[case] = {"error": worst(got, take(wanted(layout, k, qkv, window), shard.spans[rank], 2)),
                           "sent": sum(comm.sent.values()), "halo": comm.sent["rb halo"]}  # fmt: skip
    return found


def head_errors(rank, ranks):
    """Worst error on this rank's tokens for a layer whose heads differ, with neighbours: they go by Ulysses."""
    comm, found = Communicator(), {}
    oracle = neighbour("conftest").masked_attention
    every = [
        TilePattern(1, window=1),
        TilePattern(2),
        TilePattern(1, window=1),
        TilePattern(None),
        TilePattern(0, window=2),
    ]
    pattern = by_head(every)
    for frames, (prefix, suffix) in ((5, (3, 2)), (8, (0, 0)), (21, (0, 4))):
        layout = TokenLayout(TokenGrid(frames, *GRID), prefix, suffix)
        qkv = tensors(layout)
        grid = (frames, layout.grid.tokens_per_frame)
        heads = [[x[:, h : h + 1] for x in qkv] for h in range(HEADS)]
        want = torch.cat([
            oracle(*heads[h], *grid, p.reference_frames(frames), prefix, suffix, p.window) for h, p in enumerate(every)
        ], 1)  # fmt: skip
        shard = choose_shard(layout, ranks, [pattern, TilePattern(2)])
        mine = [take(x, shard.spans[rank], 2) for x in qkv]
        for scheme in ("auto", "rb"):
            got = sharded_attention(*mine, shard, pattern, comm, scheme=scheme)
            found[f"T={frames} by head {scheme}"] = worst(got, take(want, shard.spans[rank], 2))
    return found


def half_errors(rank, ranks):
    """The same in bfloat16, partial rows sent as bfloat16: the worst error of RB beside Ulysses', in units of the largest
    value."""
    comm, found = Communicator(), {}
    layout = TokenLayout(TokenGrid(21, *GRID))
    qkv = tensors(layout, dtype=torch.bfloat16)
    shard = by_tokens(layout, ranks, TilePattern(2))
    mine, want = [take(x, shard.spans[rank], 2) for x in qkv], take(wanted(layout, 2, qkv), shard.spans[rank], 2)
    for scheme in ("rb", "ulysses"):
        got = sharded_attention(*mine, shard, TilePattern(2), comm, scheme=scheme)
        found[scheme] = worst(got, want) / float(want.abs().max())
    return found


def bytes_sent(rank, ranks):
    """Counted bytes of one layer, for shapes where the closed formulas hold."""
    found = {}
    for frames, k, name in (
        (24, 1, "L1"),
        (24, 2, "L1"),
        (24, 4, "L2"),
        (8, 2, "L2"),
        (24, 1, "L3"),
        (21, 2, "L3"),
        (24, 0, "L1"),
    ):
        layout = TokenLayout(TokenGrid(frames, 3, 4))
        pattern = TilePattern(k)
        shard = BUILDS[name](layout, ranks, pattern)
        mine = [take(x, shard.spans[rank], 2) for x in tensors(layout, heads=12, dtype=torch.bfloat16)]
        for scheme in ("rb", "ulysses"):
            comm = Communicator()
            sharded_attention(*mine, shard, pattern, comm, scheme=scheme)
            found[f"{frames} {k} {name} {scheme}"] = dict(comm.sent)
    return found


def order(rank, ranks):
    """The events of one layer by RB, with a cut frame, and by Ulysses: exchanges begin before the work that hides them."""
    from efficient_vdit_core.parallel.sharding import reference_broadcast as rb

    events, plain = [], rb.attend_lse

    class Watched(Communicator):
        def start(self, name, *rest):
            events.append(f"start {name}")
            pending = super().start(name, *rest)
            wait = pending.wait
            pending.wait = lambda: events.append(f"wait {name}") or wait()
            return pending

    def attend(q, k, v):
        events.append("attend")
        return plain(q, k, v)

    layout, pattern = TokenLayout(TokenGrid(8, *GRID)), TilePattern(1)
    shard = by_tokens(layout, ranks, pattern)
    mine = [take(x, shard.spans[rank], 2) for x in tensors(layout)]
    rb.attend_lse = attend
    try:
        rb.reference_broadcast_attention(*mine, shard, pattern, Watched())
    finally:
        rb.attend_lse = plain
    found = {"rb": events.copy()}
    events.clear()
    mine = [take(x, shard.spans[rank], 2) for x in tensors(layout, heads=2 * ranks)]
    ulysses_attention(*mine, shard, Watched(), lambda q, k, v, first: events.append("attend") or q)
    return {**found, "ulysses": events}


def group_errors(rank, ranks):
    """Each group of ranks attends for its own branches of a batch, by groups that change from call to call: the worst
    error of its tokens, and the bytes that the whole communicator has counted."""
    layout, pattern = TokenLayout(TokenGrid(8, *GRID)), TilePattern(1)
    qkv, comm, found = [torch.cat([x, x + 1]) for x in tensors(layout)], Communicator(), {}
    want = neighbour("conftest").masked_attention(*qkv, 8, layout.grid.tokens_per_frame, [0], 0, 0, 0)
    rates = [1.0 + 0.1 * r for r in range(ranks)]
    for asked, branches in (("branches", 4), ("sequence", 4), ("branches", 2), ("branches", 4)):
        division = choose_division(asked, rates, branches, lambda count, group: count / len(group))
        part = comm.part(division.groups)
        start, stop = (4 // branches * end for end in division.parts[division.group_of(rank)])
        shard = choose_shard(layout, part.size, [pattern])
        mine = [take(x[start:stop], shard.spans[part.rank], 2) for x in qkv]
        got = sharded_attention(*mine, shard, pattern, part, scheme="rb")
        found[f"{asked} {branches} {division.text()} {len(found)}"] = {
            "error": worst(got, take(want[start:stop], shard.spans[part.rank], 2)), "size": part.size, "sent": sum(comm.sent.values())
        }  # fmt: skip
    return found


def model_errors(rank, ranks):
    """A small Open-Sora-Plan with text as long as a rank's tokens: sharded by the block hooks against the whole
    forward."""
    layers, found = 3, {}
    config = replace(OSP_29X720P, num_layers=layers, num_attention_heads=3, attention_head_dim=12, caption_channels=16)
    torch.manual_seed(0)
    model = OpenSoraT2V(config).eval()
    layout = TokenLayout(TokenGrid(6, 2, 3))
    x, text = torch.randn(2, 4, 6, 4, 6), torch.randn(2, layout.tokens // ranks, 16)
    plans = {
        "sparse": TilePlan.uniform(1),
        "mixed": TilePlan.uniform(1).with_dense("1"),
        "dense": TilePlan.uniform(None),
    }
    for (name, plan), scheme in itertools.product(plans.items(), ("auto", "ulysses")):
        patterns = [plan.pattern(i, layers) for i in range(layers)]
        sparse = make_attention_override(plan, AttentionReport())
        whole = {"optimized_attention_override": sparse, FORWARD_KEY: ForwardState(layout)}
        state = ShardedForward(layout, patterns, Communicator(), scheme)
        sharded = {
            "optimized_attention_override": make_sharded_override(),
            SHARDED_KEY: state,
            "patches_replace": {
                "dit": {("double_block", i): block_hook(i, last=i == layers - 1) for i in range(layers)}
            },
        }
        want, got = (model(x, torch.tensor([3.0, 700.0]), text, transformer_options=o) for o in (whole, sharded))
        found[f"{name} {scheme}"] = {
            "error": worst(got, want),
            "scale": float(want.abs().max()),
            "schemes": dict(state.schemes),
        }
    return found


def everything(rank, ranks):
    return {
        case.__name__: case(rank, ranks)
        for case in (
            attention_errors,
            window_errors,
            head_errors,
            half_errors,
            bytes_sent,
            order,
            group_errors,
            model_errors,
        )
    }


def worst(got, want) -> float:
    return float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
