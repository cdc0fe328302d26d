"""Mean frames: what a frame leaves out seen as few means over time, against the definition written out key by key."""

import itertools
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_vdit_core import tiles
from efficient_vdit_core.assets import preset_path
from efficient_vdit_core.attention import TokenLayout, choose_backend, tile_attention
from efficient_vdit_core.attention.backends.mean_frames import means_of
from efficient_vdit_core.attention.backends.partial import PartialAttention
from efficient_vdit_core.attention.backends.parts import attend_parts
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.dense_call import DenseCall
from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.hook.prepare import Preparation, pattern_for_frames
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.parallel.sharding.layout import by_frames, choose_shard
from efficient_vdit_core.parallel.sharding.traffic import scheme_of
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.search.candidates import parse_candidates
from efficient_vdit_core.search.probe import make_probe_override
from efficient_vdit_core.search.record import ProbeRecord
from efficient_vdit_core.tiles import MAX_MEANS, TilePattern, TokenGrid
from efficient_vdit_core.training.live_bytes import LiveBytes

PATTERNS = [TilePattern(k, window=w, means=m) for k, w, m in itertools.product((0, 1, 3), (0, 1), (1, 2, 3))]
LAYOUT = TokenLayout(TokenGrid(9, 2, 3), 2, 1)


def qkv(layout, dim=8, batch=2, heads=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, layout.tokens, dim, generator=generator).to(dtype) for _ in range(3)]


def definition(q, k, v, layout, pattern):
    """Frame by frame, each mean's keys one behind another, log n added to their scores; in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    frames, size = layout.grid.t, layout.grid.tokens_per_frame
    references, stretch = pattern.reference_frames(frames), math.ceil(frames / pattern.means)

    def frame(x, f):
        return x[:, :, layout.prefix + f * size : layout.prefix + (f + 1) * size]

    def attend(rows, keys, values, bias):
        scores = rows @ torch.cat(keys, 2).mT / math.sqrt(q.shape[-1]) + torch.cat(bias)
        return scores.softmax(-1) @ torch.cat(values, 2)

    out = F.scaled_dot_product_attention(q, k, v).split(1, dim=2)
    for f in set(range(frames)) - set(references):
        shown = [g for g in range(frames) if g in references or abs(g - f) <= pattern.window]
        keys, values = (
            [x[:, :, : layout.prefix], *(frame(x, g) for g in shown), x[:, :, layout.tokens - layout.suffix :]]
            for x in (k, v)
        )
        bias = [torch.zeros(sum(x.shape[2] for x in keys)).double()]
        for first in range(0, frames, stretch):
            hidden = [g for g in range(first, min(first + stretch, frames)) if g not in shown]
            if hidden:
                keys.append(sum(frame(k, g) for g in hidden) / len(hidden))
                values.append(sum(frame(v, g) for g in hidden) / len(hidden))
                bias.append(torch.full((size,), math.log(len(hidden)), dtype=torch.float64))
        rows = attend(frame(q, f), keys, values, bias).split(1, dim=2)
        start = layout.prefix + f * size
        out = (*out[:start], *rows, *out[start + size :])
    return torch.cat(out, 2)


def sparse(pattern, frames):
    return not pattern.is_full(frames)


@pytest.mark.parametrize("grid", [(5, 2, 3), (7, 1, 37), (8, 3, 2), (13, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (5, 0), (4, 7)])
def test_equals_the_definition(grid, prefix, suffix):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = qkv(layout, dtype=torch.float32)
    in_token_order = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for pattern in filter(lambda p: sparse(p, grid[0]), PATTERNS):
        want = definition(*tensors, layout, pattern).float()
        for given, bound in itertools.product((tensors, in_token_order), (1, 20_000, None)):
            out = tile_attention(*given, layout, pattern, max_extra_bytes=bound)
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("dim", [40, 96])
def test_halves(dtype, most, dim):
    layout = TokenLayout(TokenGrid(6, 3, 3), 2, 3)
    tensors = qkv(layout, dim, dtype=dtype)
    pattern = TilePattern(1, window=1, means=2)
    out = tile_attention(*tensors, layout, pattern)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), definition(*tensors, layout, pattern), atol=most, rtol=most)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.short_name)
def test_gradients(pattern):
    tensors = [x.requires_grad_() for x in qkv(LAYOUT)]
    weight, want = torch.randn_like(tensors[0]), definition(*tensors, LAYOUT, pattern)
    theirs = torch.autograd.grad((want * weight).sum(), tensors)
    for bound in (1, None):
        out = tile_attention(*tensors, LAYOUT, pattern, max_extra_bytes=bound)
        for a, b in zip(torch.autograd.grad((out * weight).sum(), tensors), theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_table_made_in_inference_mode_serves_a_training_step():
    layout, pattern = TokenLayout(TokenGrid(11, 1, 4)), TilePattern(1, means=2)
    tensors = qkv(layout)
    with torch.inference_mode():
        tile_attention(*tensors, layout, pattern)
    tensors[1].requires_grad_()
    tile_attention(*tensors, layout, pattern).sum().backward()
    assert tensors[1].grad is not None


# Tensors (B, H, N, D) of the numbers of x, by the order in memory.
ORDERS = {
    "heads, tokens": lambda x: x.contiguous(),
    "tokens, heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens, q k v, heads": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),
    "tokens, heads, q k v": lambda x: torch.stack([x.transpose(1, 2)] * 3, 3)[:, :, :, 1].transpose(1, 2),
    "heads, tokens, q k v": lambda x: torch.stack([x] * 3, 3)[:, :, :, 1],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("heads", [slice(0, 6), slice(2, 5), slice(5, 6)], ids=["all heads", "some", "one"])
def test_keys_are_averaged_as_they_lie(order, heads):
    """Nothing is copied but, in the rarest orders, a head's result into that of all."""
    (means,) = means_of(TilePattern(0, means=1), LAYOUT, 9, 9)
    plain = qkv(LAYOUT, heads=6, batch=1)[0]
    keys, want = order(plain)[0, heads], means.of(plain[0, heads])
    with LiveBytes() as held:
        found = means.of(keys)
    torch.testing.assert_close(found, want)
    assert found.nbytes <= held.peak <= found.nbytes * (1 + 1 / len(keys))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("share", [4, 2, 1])  # 4: a call takes half of the heads
def test_memory_stays_under_the_stated_bound(order, share):
    layout, pattern = TokenLayout(TokenGrid(16, 8, 8)), TilePattern(2, means=2)
    tensors = [order(x) for x in qkv(layout, 64, 1, 8, torch.float32)]

    def nothing_inside(q, k, v):
        return torch.empty(q.shape), torch.empty(q.shape[:3])

    output = 8 * layout.tokens * 64 * 4
    with LiveBytes() as held:
        attend_parts(*tensors, layout, pattern, PartialAttention("nothing", nothing_inside), output // share)
    lse = output // 64
    assert output + lse < held.peak <= output + lse + output // share + lse


class _Products(TorchDispatchMode):
    """Counts the bytes of the keys and values that matrix products read."""

    read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm"):
            self.read += max(x.nbytes for x in args[:2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "frames", "tokens", "heads"),
    [("wan_means", 21, 1560, 40), ("minimax_h3_means", 37, 1008, 56), ("minimax_h3_means", 107, 1008, 56), ("ltx_av_means", 16, 2040, 32)],
)  # fmt: skip
def test_means_cost_few_passes_over_the_keys(preset, frames, tokens, heads):
    """Made for each run of frames of the whole clip they cost up to 130 times the keys' size, more than they save."""
    pattern, _ = pattern_for_frames(TilePlan.load(preset_path(preset)), 5, 40, frames)
    layout = TokenLayout(TokenGrid(frames, 1, tokens))
    # As ComfyUI gives them. Nothing is computed on this device, at the sizes of a real clip.
    q, k, v = torch.empty(3, 1, layout.tokens, heads, 128, dtype=torch.bfloat16, device="meta").transpose(2, 3)

    def nothing_inside(q, k, v):
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    with _Products() as counted:
        attend_parts(q, k, v, layout, pattern, PartialAttention("nothing", nothing_inside))
    assert pattern.means and 2 * q.nbytes < counted.read < 8 * q.nbytes


def test_a_still_video_loses_nothing():
    layout = TokenLayout(TokenGrid(6, 2, 2))
    q, *still = qkv(layout)
    k, v = (x[:, :, :4].repeat(1, 1, 6, 1) for x in still)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(tile_attention(q, k, v, layout, TilePattern(0, means=1)), want)
    assert not torch.allclose(tile_attention(*qkv(layout), layout, TilePattern(0, means=1)), want)


def test_heads_with_and_without():
    tensors = qkv(LAYOUT)
    patterns = [TilePattern(1, means=1), TilePattern(None), TilePattern(0, window=1, means=2)]
    out = tile_attention(*tensors, LAYOUT, by_head(patterns))
    for head, pattern in enumerate(patterns):
        part = [x[:, head : head + 1] for x in tensors]
        want = F.scaled_dot_product_attention(*part) if pattern.k is None else definition(*part, LAYOUT, pattern)
        torch.testing.assert_close(out[:, head : head + 1], want)


def test_torch_compile_traces_it_whole():
    layout, pattern = TokenLayout(TokenGrid(6, 2, 3), 2, 1), TilePattern(2, window=1, means=2)  # each frame is traced
    tensors = qkv(layout, dtype=torch.float32)
    tile_attention(*tensors, layout, pattern)  # as a run is: prepared before its blocks are traced
    compiled = torch.compile(
        lambda *x: tile_attention(*x, layout, pattern, backend="parts"), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*tensors), definition(*tensors, layout, pattern).float(), atol=1e-5, rtol=1e-5)


class TestPattern:
    @pytest.mark.parametrize(
        ("frames", "k", "window", "means"), list(itertools.product((5, 8, 13), (0, 1, 3), (0, 2), (1, 2, 4)))
    )
    def test_a_mean_costs_a_tile_and_stands_for_every_frame_left_out(self, frames, k, window, means):
        pattern, plain = TilePattern(k, window=window, means=means), TilePattern(k, window=window)
        if pattern.is_full(frames):
            return
        seen, averaged = plain.neighbours(frames), pattern.mean_frames(frames)
        for frame, near in seen.items():
            left_out = set(range(frames)) - {*near, *plain.reference_frames(frames)}
            assert sorted(itertools.chain(*averaged[frame])) == sorted(left_out) and len(averaged[frame]) <= means
        tiles = sum(map(len, averaged.values()))
        assert pattern.density(frames) == pytest.approx(plain.density(frames) + tiles / frames**2)
        grid = TokenGrid(frames, 4, 4)
        more = pattern.block_sparsity(grid, 16) - plain.block_sparsity(grid, 16)
        assert more == pytest.approx(-tiles / frames**2)

    def test_the_mean_of_one_frame_leaves_nothing_out(self):
        assert TilePattern(1, means=1).is_full(3) and not TilePattern(1, means=1).is_full(4)
        assert TilePattern(0, means=8).is_full(8) and TilePattern(0, means=8).mean_frames(8) == {}

    def test_it_costs_the_same_for_each_frame_however_long_the_clip(self):
        most = {t: max(map(len, TilePattern(1, window=1, means=2).mean_frames(t).values())) for t in (24, 240)}
        assert most == {24: 2, 240: 2}

    def test_it_has_a_name_and_is_read_back(self):
        pattern = TilePattern(2, window=1, means=3)
        assert pattern.name(12) == "2:10~1+3" and TilePattern.parse("2:10~1+3") == pattern
        assert TilePattern.parse("0+1") == TilePattern(0, means=1) and TilePattern(0, means=1).short_name == "0+1"
        assert TilePattern.parse("2+0") == TilePattern(2)
        assert parse_candidates("1+1, 1,0~1+1") == (
            TilePattern(1),
            TilePattern(1, means=1),
            TilePattern(0, window=1, means=1),
        )

    @pytest.mark.parametrize("means", [-1, True, 1.5, MAX_MEANS + 1])
    def test_impossible_numbers_are_refused(self, means):
        with pytest.raises(ValueError, match="mean frames, expected a whole number from 0"):
            TilePattern(1, means=means)

    @pytest.mark.parametrize(
        ("k", "means", "frames", "expected"),
        [(1, 3, 8, (1, 1)), (2, 3, 17, (2, 3)), (0, 2, 12, (0, 1)), (1, 2, 48, (1, 2))],
    )
    def test_a_shorter_clip_keeps_the_length_of_what_is_averaged(self, k, means, frames, expected):
        scaled = TilePattern(k, means=means).scaled(24, frames)
        assert (scaled.k, scaled.means) == expected

    @pytest.mark.parametrize(
        ("frames", "k", "window", "means"),
        list(itertools.product((2, 5, 9, 14), range(14), (0, 1, 3, 6), (1, 2, 4, 16))),
    )
    def test_it_is_full_where_each_mean_is_of_one_frame(self, frames, k, window, means):
        pattern, length = TilePattern(k, window=window, means=means), -(-frames // means)
        others = sorted(set(range(frames)) - set(pattern._placed(frames)))
        unseen = [[g // length for g in others if abs(g - f) > window] for f in others]
        assert pattern.is_full(frames) == (k >= frames - 1 or all(len(set(u)) == len(u) for u in unseen))

    def test_the_means_themselves_are_made_for_the_attention_alone(self, monkeypatch):
        """They are as many numbers as there are tiles; a plan of a few kB, named and counted, took minutes and gigabytes."""
        monkeypatch.setattr(tiles, "_AVERAGED", {})
        plan = TilePlan.from_text("0:1:499+1 1:[0]200:300~30+16[1]2:498+5 2:490:10~2+3")
        assert TilePlan.from_text(plan.to_text()) == plan and 0 < plan.density(500) < 1
        assert tiles._AVERAGED == {}

    def test_what_is_kept_is_bounded_by_its_size(self, monkeypatch):
        monkeypatch.setattr(tiles, "_AVERAGED", {})
        for k in range(14):
            assert TilePattern(k, means=2).mean_frames(600)
        kept = [mean for averaged in tiles._AVERAGED.values() for means in averaged.values() for mean in means]
        assert kept and sum(map(len, kept)) <= 2**22


class TestPlan:
    PLAN = TilePlan(
        patterns=(by_head([TilePattern(1, means=1), TilePattern(2)]), TilePattern(0, window=1, means=2)),
        frames=8,
        heads=2,
    )

    def test_json_is_of_the_third_schema_and_read_back(self):
        values = json.loads(self.PLAN.to_json())
        assert values["schema_version"] == 3 and values["patterns"][1] == {"k": 0, "window": 1, "means": 2}
        assert TilePlan.from_json(self.PLAN.to_json()) == self.PLAN

    def test_a_line_of_text_holds_them(self):
        assert self.PLAN.to_text() == "0:[0]1:7+1[1]2:6 1:0:8~1+2"
        assert TilePlan.from_text(self.PLAN.to_text()).patterns == self.PLAN.patterns

    @pytest.mark.parametrize("means", [-1, "1", 99, None])
    def test_nonsense_is_refused_by_name(self, means):
        text = json.dumps({"schema_version": 3, "patterns": [{"k": 1, "means": means}]})
        with pytest.raises(ValueError, match=r"patterns\[0\].means"):
            TilePlan.from_json(text)


class TestBackends:
    @pytest.mark.parametrize("backend", ["frames", "triton", "flex"])
    def test_those_that_compute_none_are_refused_before_the_run(self, backend):
        with pytest.raises(ValueError, match="computes no mean frames. Choose auto or parts"):
            tile_attention(*qkv(LAYOUT), LAYOUT, TilePattern(1, means=1), backend=backend)
        with pytest.raises(ValueError, match="computes no mean frames"):
            Preparation(TilePlan(uniform_pattern=TilePattern(1, means=1)), AttentionReport(), backend=backend)

    def test_auto_measures_parts_against_dense(self):
        layout, pattern = TokenLayout(TokenGrid(16, 16, 16)), TilePattern(1, means=1)
        shape = CallShape(1, 1, 32, torch.float32, torch.device("cpu"))
        assert choose_backend(shape, layout, pattern, or_dense=False) == "parts"

    def test_a_dense_attention_that_does_not_tell_its_log_sum_exp(self, caplog):
        """Nothing is amiss then: the log says who computes them, and warns of nothing."""
        caplog.set_level(logging.INFO, "efficient_vdit")

        def attention_xformers(q, k, v, heads, **kwargs):
            return F.scaled_dot_product_attention(q, k, v)

        pattern, report = TilePattern(1, means=1), AttentionReport()
        tensors = qkv(LAYOUT)
        override = make_attention_override(TilePlan(uniform_pattern=pattern), report)
        options = {FORWARD_KEY: ForwardState(layout=LAYOUT, depth=1), "block_index": 0}
        out = override(
            attention_xformers, *tensors, 3, skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )
        torch.testing.assert_close(out, definition(*tensors, LAYOUT, pattern))
        settled = Preparation(TilePlan(uniform_pattern=pattern), report).choices.settle(
            CallShape.of(tensors[0]), LAYOUT, pattern, DenseCall(attention_xformers, None, None, {})
        )
        assert settled == {pattern: "parts"}
        (said,) = [record for record in caplog.records if "mean frames" in record.getMessage()]
        assert said.levelname == "INFO" and "attention_xformers all other calls; nothing to do" in said.getMessage()
        assert not report.warned

    def test_a_scale_of_the_models_own_stays_dense(self):
        report = AttentionReport()
        override = make_attention_override(TilePlan(uniform_pattern=TilePattern(1, means=1)), report)
        options = {FORWARD_KEY: ForwardState(layout=LAYOUT, depth=1), "block_index": 0}

        def scaled(q, k, v, heads, **kwargs):
            return F.scaled_dot_product_attention(q, k, v, scale=kwargs["scale"])

        tensors = qkv(LAYOUT)
        out = override(
            scaled, *tensors, 3, skip_reshape=True, skip_output_reshape=True, scale=0.3, transformer_options=options
        )
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, scale=0.3))
        assert report.dense == {"a scale of its own": 1}


def test_a_search_measures_their_errors():
    tensors, pattern = qkv(LAYOUT), TilePattern(1, means=2)
    record = ProbeRecord((pattern,))
    override = make_probe_override(record)
    options = {FORWARD_KEY: ForwardState(layout=LAYOUT, depth=1), "block_index": 0}

    def dense(q, k, v, heads, **kwargs):
        return F.scaled_dot_product_attention(q, k, v)

    exact = override(dense, *tensors, 3, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    want = definition(*tensors, LAYOUT, pattern)
    assert record.error(0, pattern) == pytest.approx(float((want - exact).norm() / exact.norm()), rel=1e-4)


def test_over_ranks_they_go_by_ulysses_and_ask_for_no_shard_of_their_own():
    layout = TokenLayout(TokenGrid(8, 2, 3))
    shard = by_frames(layout, 2)
    assert scheme_of("rb", shard, TilePattern(1, means=1), 4, 8, 2) == "ulysses"
    assert scheme_of("rb", shard, TilePattern(1), 4, 8, 2) == "rb"
    odd = TokenLayout(TokenGrid(7, 2, 3))
    assert choose_shard(odd, 2, [TilePattern(1, means=1)]) == choose_shard(odd, 2, [TilePattern(None)])
