"""Patterns with a window, and layers whose heads differ: against the mask written out, by every backend."""

import itertools
import json

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.attention.autotune.trial import Choice
from efficient_vdit_core.attention.backends import flex
from efficient_vdit_core.attention.backends.head_calls import calls_of
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.dense_call import DenseCall
from efficient_vdit_core.attention.hook import backend_choices as choices_file
from efficient_vdit_core.attention.hook.override import attention_override, make_attention_override
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import HeadPatterns, by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

FULL = TilePattern(None)
WINDOWS = [TilePattern(k, window=w) for k, w in itertools.product((0, 1, 2, 3), (1, 2, 5))]
HEADS = [TilePattern(1, window=1), FULL, TilePattern(2), TilePattern(1, window=1), TilePattern(0, window=2)]


def live_tiles(pattern, frames):
    """The tiles of the definition: (query frame, key frame)."""
    references = set(pattern.reference_frames(frames))
    every = itertools.product(range(frames), repeat=2)
    return {(i, j) for i, j in every if {i, j} & references or abs(i - j) <= pattern.window}


def qkv(layout, heads=2, dim=32, batch=2, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, layout.tokens, dim, generator=generator).to(device, dtype) for _ in range(3)]


def expected(oracle, tensors, layout, patterns):
    """The oracle's result, float64, head by head."""
    grid, out = layout.grid, []
    for head, pattern in enumerate(patterns):
        one = [x[:, head : head + 1] for x in tensors]
        references = [] if pattern.k is None else pattern.reference_frames(grid.t)
        references = range(grid.t) if pattern.k is None else references
        about = (layout.prefix, layout.suffix, pattern.window)
        out.append(oracle(*one, grid.t, grid.tokens_per_frame, list(references), *about))
    return torch.cat(out, 1)


@pytest.mark.parametrize("frames", [1, 2, 4, 7, 13])
@pytest.mark.parametrize("pattern", WINDOWS, ids=lambda p: p.short_name)
def test_a_window_adds_the_tiles_beside_the_diagonal(pattern, frames):
    live = live_tiles(pattern, frames)
    assert pattern.density(frames) == pytest.approx(len(live) / frames**2)
    assert pattern.is_full(frames) == (len(live) == frames**2)
    for frame, seen in pattern.neighbours(frames).items():
        assert {(frame, f) for f in (*seen, *pattern.reference_frames(frames))} == {t for t in live if t[0] == frame}
    grid, block = TokenGrid(frames, 1, 5), 4
    tokens = range(grid.tokens)
    blocks = {(i // block, j // block) for i in tokens for j in tokens if (i // 5, j // 5) in live}
    assert pattern.block_sparsity(grid, block) == pytest.approx(1 - len(blocks) / (-(-grid.tokens // block)) ** 2)


def test_a_window_has_a_name_and_is_read_back():
    pattern = TilePattern(2, window=1)
    assert pattern.name(8) == "2:6~1" and pattern.short_name == "2~1" and FULL.short_name == "full"
    assert TilePattern.parse("2:6~1") == TilePattern.parse(" 2~1 ") == pattern
    assert TilePattern.parse("2:6~0") == TilePattern(2) and TilePattern(1, window=9).name(8) == "full"
    assert pattern.scaled(24, 12) == TilePattern(1, stride=12, window=1)


@pytest.mark.parametrize("window", [-1, 257, True, 1.0, None])
def test_impossible_windows_are_refused(window):
    with pytest.raises(ValueError, match="window"):
        TilePattern(1, window=window)


@pytest.mark.parametrize("grid", [(5, 2, 3), (9, 1, 7), (8, 3, 1), (2, 2, 2)])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (4, 7)])
def test_windows_equal_the_masked_oracle(oracle, grid, prefix, suffix):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = qkv(layout)
    for pattern, bound in itertools.product(WINDOWS, (1, 20_000, None)):
        out = tile_attention(*tensors, layout, pattern, backend="frames", max_extra_bytes=bound)
        torch.testing.assert_close(out.double(), expected(oracle, tensors, layout, [pattern] * 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [HEADS, HEADS[::-1], [HEADS[0]] * 3 + HEADS[1:3]])
def test_heads_that_differ_equal_the_masked_oracle(oracle, order):
    layout = TokenLayout(TokenGrid(7, 2, 3), 2, 3)
    tensors = qkv(layout, heads=5)
    out = tile_attention(*tensors, layout, by_head(order))
    torch.testing.assert_close(out.double(), expected(oracle, tensors, layout, order), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [TilePattern(1, window=1), TilePattern(0, window=2), by_head(HEADS)])
def test_gradients(oracle, pattern):
    layout = TokenLayout(TokenGrid(6, 1, 3), 1, 2)
    tensors = [x.double().requires_grad_() for x in qkv(layout, heads=5, dim=8, batch=1)]
    every = pattern.patterns if isinstance(pattern, HeadPatterns) else [pattern] * 5
    weight = torch.randn_like(tensors[0])
    ours = torch.autograd.grad((tile_attention(*tensors, layout, pattern) * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected(oracle, tensors, layout, every) * weight).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", [(4, 1, 19), (5, 1, 1)])
def test_the_triton_kernel_follows_windows_and_heads(oracle, triton_device, grid):
    layout = TokenLayout(TokenGrid(*grid), 3, 0)
    order = [TilePattern(1, window=1), FULL, TilePattern(0, window=2)]
    tensors = [x.requires_grad_() for x in qkv(layout, heads=3, batch=1, device=triton_device)]
    out = tile_attention(*tensors, layout, by_head(order), backend="triton")
    want = expected(oracle, tensors, layout, order)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    ours, theirs = (torch.autograd.grad(x.sum(), tensors) for x in (out, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_calls_that_groups_of_heads_take():
    """A backend that takes many patterns makes one call of all that it computes; a group that leaves nothing out joins under
    flex, and stays a dense call beside the fused kernel, which is slower at it."""
    one, two, full = TilePattern(1), TilePattern(0, window=1), TilePattern(None)
    pattern = by_head([one, full, two, one, two, full])

    def calls(**backends):
        chosen = {one: backends["one"], two: backends["two"], full: "dense"}
        return {(c.backend, c.heads): c.pattern for c in calls_of(pattern, 6, chosen, frames=4)}

    assert calls(one="triton", two="triton") == {
        ("triton", (0, 2, 3, 4)): by_head([one, two, one, two]),
        ("dense", (1, 5)): full,
    }
    assert calls(one="flex", two="flex") == {("flex", (0, 1, 2, 3, 4, 5)): pattern}
    assert calls(one="parts", two="parts") == {("parts", (0, 3)): one, ("dense", (1, 5)): full, ("parts", (2, 4)): two}
    assert calls(one="flex", two="frames") == {("flex", (0, 3)): one, ("dense", (1, 5)): full, ("frames", (2, 4)): two}
    assert calls(one="dense", two="frames") == {
        ("dense", (0, 1, 3, 5)): by_head([one, full, one, full]),
        ("frames", (2, 4)): two,
    }
    assert calls(one="dense", two="dense") == {("dense", (0, 1, 2, 3, 4, 5)): pattern}
    assert [c.heads for c in calls_of(one, 3, {one: "triton"}, frames=4)] == [(0, 1, 2)]


@pytest.mark.parametrize("sparse", [False, True])
def test_heads_that_stay_dense_are_one_call_whatever_their_patterns(oracle, sparse):
    layout, seen = TokenLayout(TokenGrid(8, 2, 3), 2), []
    order = [FULL, TilePattern(8), TilePattern(1 if sparse else 9), TilePattern(10)]
    tensors = qkv(layout, heads=4)

    def dense(q, k, v):
        seen.append(q.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    out = tile_attention(*tensors, layout, by_head(order), dense=dense, backend="frames")
    torch.testing.assert_close(out.double(), expected(oracle, tensors, layout, order), atol=1e-5, rtol=1e-5)
    assert [heads for heads in seen if heads > 1] == [3 if sparse else 4]  # the sparse head's calls are its own


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_follows_windows_and_heads(oracle, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "flex_status", lambda device: (True, "eager, for the test"))
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr("efficient_vdit_core.attention.dispatch.check_backend", lambda *_: None)
    layout = TokenLayout(TokenGrid(5, 1, 50), 5, 2)
    tensors = qkv(layout, heads=5, dim=64, batch=1)
    out = tile_attention(*tensors, layout, by_head(HEADS), backend="flex")
    torch.testing.assert_close(out.double(), expected(oracle, tensors, layout, HEADS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["frames", "parts"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_window_and_no_further(poison, backend):
    layout, pattern = TokenLayout(TokenGrid(6, 1, 40)), TilePattern(1, window=1)
    q, k, v = qkv(layout, dim=64)
    v[:, :, 120:160] = poison  # frame 3
    out = tile_attention(q, k, v, layout, pattern, backend=backend)
    frames = (~out.isfinite()).any(-1)[0, 0].view(6, 40).any(-1)
    assert frames.tolist() == [True, False, True, True, True, False]


class TestHeadPatterns:
    def test_heads_that_are_alike_are_one_pattern(self):
        assert by_head([TilePattern(2)] * 4) == TilePattern(2)
        assert list(by_head(HEADS).groups.values()) == [(0, 3), (1,), (2,), (4,)]
        assert by_head(HEADS).of_heads(3, 1) == HEADS[3] and TilePattern(2).of_heads(3, 1) == TilePattern(2)
        assert by_head(HEADS).name(8) == "heads: 2 x 1:7~1, 1 x full, 1 x 2:6, 1 x 0:8~2"

    def test_densities_are_means_over_the_heads(self):
        grid = TokenGrid(8, 2, 3)
        assert by_head(HEADS).density(8) == pytest.approx(sum(p.density(8) for p in HEADS) / 5)
        assert by_head(HEADS).flop_density(grid, 9) == pytest.approx(sum(p.flop_density(grid, 9) for p in HEADS) / 5)

    def test_another_number_of_heads_is_refused(self):
        layout = TokenLayout(TokenGrid(5, 1, 3))
        with pytest.raises(ValueError, match="for 5 heads, but its attention has 4"):
            tile_attention(*qkv(layout, heads=4), layout, by_head(HEADS))
        with pytest.raises(ValueError, match="for 5 heads"):
            by_head(HEADS).head_groups(6)


PLAN = TilePlan(
    patterns=(by_head(HEADS), TilePattern(2, window=1), FULL), family="wan", frames=8, heads=5, dense_layers=((-1, -1),)
)


class TestPlans:
    def test_a_plan_by_head_is_read_back(self):
        assert TilePlan.from_json(PLAN.to_json()) == PLAN
        values = json.loads(PLAN.to_json())
        assert values["schema_version"] == 2 and "reference_frames" not in values
        assert values["patterns"][0][0] == {"heads": "0,3", "k": 1, "window": 1}
        uniform = TilePlan(uniform_pattern=TilePattern(1, window=1))
        assert TilePlan.from_json(uniform.to_json()) == uniform

    def test_the_papers_plans_are_written_as_before(self):
        plan = TilePlan(patterns=(TilePattern(2), FULL), frames=8)
        values = json.loads(plan.to_json())
        assert values["schema_version"] == 1 and values["reference_frames"] == [2, None] and "patterns" not in values

    def test_a_line_of_text_holds_windows_and_heads(self):
        assert TilePlan.from_text("0:1~1 1-2:2:6~2").to_text() == "0:1:7~1 1-2:2:6~2"
        assert TilePlan.from_text("all:2~1 -1:full").to_text() == "all:2~1 -1:full"
        assert PLAN.to_text() == "0:[0,3]1:7~1[1]full[2]2:6[4]0:8~2 1:2:6~1 2:full"
        again = TilePlan.from_text(PLAN.to_text())
        assert again.patterns == PLAN.patterns and (again.frames, again.heads) == (8, 5)
        assert TilePlan.from_text("0-1:[0-2]1[3]full").patterns == (by_head([TilePattern(1)] * 3 + [FULL]),) * 2

    def test_heads_that_are_alike_at_the_plan_s_length_are_one_group_of_the_text(self):
        """A search keeps 7 of 8 frames apart from all of them, but both are full: the page reads one plan, not two."""
        whole, some = by_head([TilePattern(7), FULL, TilePattern(8)]), by_head([TilePattern(7), TilePattern(1), FULL])
        text = TilePlan(patterns=(whole, some), frames=8, heads=3).to_text()
        assert text == "0:full 1:[0,2]full[1]1:7"
        assert TilePlan.from_text(text).patterns == (FULL, by_head([FULL, TilePattern(1), FULL]))
        assert TilePlan.from_text(text).to_text() == text

    def test_a_line_of_text_holds_as_many_groups_as_a_plan(self):
        kinds = [TilePattern(k) for k in range(1000)]
        plan = TilePlan(patterns=(by_head([*kinds[:70], FULL]), by_head(kinds[:71])), frames=1001, heads=71)
        assert TilePlan.from_text(plan.to_text()) == plan
        most = TilePlan(patterns=(by_head([*kinds, *kinds[:24]]),), heads=1024)
        assert TilePlan.from_text(most.to_text()) == most

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0:[0-1]1[3]full", "leaves out head 2"),
            ("0:[0-1]1[1]full", "names head 1 twice"),
            ("0:[1-0]1", "heads '1-0'"),
            ("0:[0-9999]1", "below 1024"),
            ("0:[]1", "cannot be read"),
            ("0:[0]1[1]2:6[2]2:7", "8 and of 9 latent frames"),
            ("0:[0]1:7[1]full 1:[0]1:7[1]2:6[2]full", "2 and of 3 heads"),
            ("all:[0]1[1]full", "are alike"),
            ("all:1 0:[0]1[1]full", "must stand first"),
            ("0:1~999", "window"),
            ("0:2 1:1~-1", "'1:1~-1': .* window -1, expected .* from 0"),
            ("0:[0]1:7+-2[1]full", "-2 mean frames"),
        ],
    )
    def test_nonsense_text_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message) as error:
            TilePlan.from_text(text)
        assert len(str(error.value)) < 400

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ([{"heads": "0-3", "k": 1}], "leaves out head 4 of 5"),
            ([{"heads": "0-4", "k": 1}, {"heads": "2", "k": 2}], "names head 2 twice"),
            ([{"heads": "0-5", "k": 1}], "heads from 0 to 4"),
            ([{"heads": "", "k": 1}], "heads from 0 to 4"),
            ([{"heads": 3, "k": 1}], "heads from 0 to 4"),
            ([{"heads": "0-4"}], "expected such as"),
            ([3], "expected such as"),
            ({"k": 1, "window": -1}, "window is -1"),
            ({"k": 1, "window": 1e9}, "window"),
            ({"k": -1}, "k is -1"),
            ([], "leaves out head 0"),
            (2, "expected such as"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, layer, message):
        values = json.loads(PLAN.to_json()) | {"patterns": [layer]}
        with pytest.raises(ValueError, match=message) as error:
            TilePlan.from_json(json.dumps(values))
        assert len(str(error.value)) < 400

    def test_groups_need_the_number_of_heads(self):
        for heads, layer in ((None, [{"heads": "0", "k": 1}]), (0, [])):
            values = json.loads(PLAN.to_json()) | {"heads": heads, "patterns": [layer]}
            with pytest.raises(ValueError, match=f"heads says {heads}"):
                TilePlan.from_json(json.dumps(values))
        with pytest.raises(ValueError, match="layers of 5 heads and says that it is for 4"):
            TilePlan(patterns=(by_head(HEADS),), heads=4)


@pytest.mark.parametrize("at_once", [5, 2])
def test_a_run_gives_each_head_its_pattern(oracle, at_once):
    """In one call a layer, and where a layer's heads come in several calls."""
    layout, report = TokenLayout(TokenGrid(8, 2, 3), 2), AttentionReport()
    plan = TilePlan(patterns=(by_head(HEADS), TilePattern(2)), heads=5, frames=8)
    override = make_attention_override(plan, report)
    state = ForwardState(layout, depth=2, heads=5)
    tensors = qkv(layout, heads=5)

    def dense(q, k, v, heads, **_):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for order in (HEADS, [TilePattern(2)] * 5):
        parts = []
        for first in range(0, 5, at_once):
            part = [x[:, first : first + at_once] for x in tensors]
            form = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {FORWARD_KEY: state}}
            parts.append(override(dense, *part, part[0].shape[1], **form))
        want = expected(oracle, tensors, layout, order)
        torch.testing.assert_close(torch.cat(parts, 1).double(), want, atol=1e-5, rtol=1e-5)
    calls = -(-5 // at_once)
    alone = [p for p in HEADS if p.k is None] if at_once == 1 else []
    assert report.sparse == 2 * calls - len(alone)
    if at_once == 5:
        grid, extra = layout.grid, 2
        want = [p.flop_density(grid, extra) for p in (by_head(HEADS), TilePattern(2))]
        assert report.density_sum == pytest.approx(sum(want))


def test_a_layer_whose_heads_come_in_uneven_parts_is_prepared_for_them():
    """As nodes that save memory have it: 5 heads as 2, 2 and 1, step after step."""
    plan, layout = TilePlan(patterns=(by_head(HEADS),) * 2, heads=5), TokenLayout(TokenGrid(5, 1, 3))
    preparation, tensors = Preparation(plan, AttentionReport()), qkv(layout, heads=5)
    override = attention_override(preparation)
    shape, dense = CallShape.of(tensors[0]), DenseCall(sdpa_attention, None, None, {})
    for step in range(3):
        state = ForwardState(layout, depth=2, heads=5, step=step)
        state = preparation.before_forward(state, shape, lambda _: dense)
        options = {OVERRIDE_KEY: override, FORWARD_KEY: state}
        for _ in range(2):
            parts = [
                sdpa_attention(
                    *of_some,
                    of_some[0].shape[1],
                    skip_reshape=True,
                    skip_output_reshape=True,
                    transformer_options=options,
                )
                for of_some in zip(*(x.split(2, dim=1) for x in tensors), strict=True)
            ]
            want = tile_attention(*tensors, layout, by_head(HEADS))
            torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=1e-5)
    assert sorted((part.heads, first) for part, first, _ in preparation.choices.unforeseen) == [(1, 4), (2, 0), (2, 2)]


def test_the_density_of_a_layer_counts_heads_that_were_measured_faster_dense_as_dense(monkeypatch):
    layout, report = TokenLayout(TokenGrid(8, 2, 3), 2), AttentionReport()
    order = [TilePattern(1), TilePattern(2), TilePattern(2), TilePattern(1)]

    def measured(shape, layout, pattern, *, dense):
        return Choice("dense" if pattern.k == 2 else "frames", {"dense": 1.0, "frames": 1.0})

    monkeypatch.setattr(choices_file, "measured_choice", measured)
    plan = TilePlan(patterns=(by_head(order),), heads=4, frames=8)
    override = make_attention_override(plan, report, decline_slow=True)
    form = {"skip_reshape": True, "transformer_options": {FORWARD_KEY: ForwardState(layout, depth=1, heads=4)}}
    override(sdpa_attention, *qkv(layout, heads=4), 4, **form)
    assert report.sparse == 1
    assert report.density_sum == pytest.approx((TilePattern(1).flop_density(layout.grid, 2) + 1.0) / 2)


def test_a_layer_is_written_with_one_name_for_each_pattern(monkeypatch):
    """A name for each of a thousand heads, in a thousand layers, took minutes."""
    asked, name = [], TilePattern.name
    monkeypatch.setattr(TilePattern, "name", lambda self, frames: asked.append(self) or name(self, frames))
    text = "0:[0-99]7:1[100-1022]2:6[1023]full"
    assert TilePlan.from_text(text).to_text() == "0:[0-99,1023]full[100-1022]2:6" and len(asked) == 3
