"""The cached residual against its definition: dense at every n-th step, sparse plus what was missing then in between."""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.attention import TokenLayout, residual, tile_attention
from efficient_vdit_core.attention.choose import CallShape
from efficient_vdit_core.attention.override import attention_override
from efficient_vdit_core.attention.prepare import Preparation
from efficient_vdit_core.attention.report import AttentionReport
from efficient_vdit_core.attention.residual import ResidualCache
from efficient_vdit_core.attention.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.head_patterns import by_head
from efficient_vdit_core.pipeline import Pipeline
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYOUT = TokenLayout(TokenGrid(6, 1, 4), 3)
HEADS, DIM, STEPS = 4, 8, 20
MIXED = by_head([TilePattern(1, window=1), TilePattern(2), TilePattern(2), TilePattern(None)])
PLAN = TilePlan(patterns=(TilePattern(1), MIXED, TilePattern(None)), heads=HEADS)
SHAPE = CallShape(1, HEADS, DIM, torch.float32, torch.device("cpu"))


def qkv(step, prompt, layer, heads=HEADS):
    """What a layer sees changes a little from step to step."""
    fixed, moving = (
        torch.Generator().manual_seed(seed) for seed in (100 * prompt + layer, 1000 * step + 10 * prompt + layer)
    )
    size = (1, heads, LAYOUT.tokens, DIM)
    return [torch.randn(size, generator=fixed) + 0.1 * torch.randn(size, generator=moving) for _ in range(3)]


def dense(q, k, v, heads, **_):
    return F.scaled_dot_product_attention(q, k, v)


class Run:
    """Forwards of a model of three layers under the plan; each gives {(prompt, layer): output}."""

    def __init__(self, every, plan=PLAN, **settings):
        self.report = AttentionReport()
        self.preparation = Preparation(plan, self.report, residual_every=every, **settings)
        self.override = attention_override(self.preparation)

    def forward(self, step, prompts=(0,), *, at_once=HEADS, steps=STEPS, active=True, names=None):
        branches = tuple((name, 1) for name in names or prompts)
        state = ForwardState(LAYOUT, active, depth=3, heads=HEADS, step=step, steps=steps, branches=branches)
        self.preparation.keep_residual(state, SHAPE)
        found = {}
        for layer in range(3):
            tensors = [torch.cat(x) for x in zip(*(qkv(step, p, layer) for p in prompts), strict=True)]
            parts = []
            for first in range(0, HEADS, at_once):
                part = [x[:, first : first + at_once] for x in tensors]
                form = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {FORWARD_KEY: state}}
                parts.append(self.override(dense, *part, part[0].shape[1], **form))
            out = torch.cat(parts, 1)
            found |= {(prompt, layer): out[i : i + 1] for i, prompt in enumerate(prompts)}
        return found


def wanted(step, renewed, prompt, layer, plan=PLAN):
    """By the definition, from what the step ``renewed`` last saw."""
    pattern = plan.pattern(layer, 3)
    now, then = qkv(step, prompt, layer), qkv(renewed, prompt, layer)
    missing = F.scaled_dot_product_attention(*then) - tile_attention(*then, LAYOUT, pattern, backend="frames")
    return tile_attention(*now, LAYOUT, pattern, backend="frames") + missing


def check(found, step, renewed):
    for (prompt, layer), out in found.items():
        torch.testing.assert_close(out, wanted(step, renewed, prompt, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("at_once", [HEADS, 2])
def test_steps_between_add_what_the_last_dense_one_found(every, at_once):
    run = Run(every)
    for step in range(10):
        check(run.forward(step, at_once=at_once), step, step // every * every)


def test_prompts_are_told_apart_in_any_order_and_batch():
    run = Run(3)
    check(run.forward(0, (0, 1)), 0, 0)
    check(run.forward(1, (1, 0)), 1, 0)
    check(run.forward(2, (1,)), 2, 0)
    check(run.forward(2, (0,)), 2, 0)
    check(run.forward(3, (0,)), 3, 3)
    check(run.forward(3, (1, 0)), 3, 3)  # prompt 1 is due, and a forward renews all of its prompts
    check(run.forward(4, (2,)), 4, 4)  # a new one begins with dense attention


def test_windows_of_a_long_clip_are_told_apart():
    run = Run(4)
    for step in (0, 1):
        for window in (0, 1):
            check(run.forward(step, (window,), names=(("prompt", window),)), step, 0)


def test_steps_that_a_cache_skips_age_the_residual():
    run = Run(4)
    for step, renewed in ((0, 0), (3, 0), (5, 5), (6, 5), (12, 12)):
        check(run.forward(step), step, renewed)


def test_a_window_of_steps_begins_with_dense_attention():
    run = Run(4)
    outside = run.forward(0, active=False)
    torch.testing.assert_close(outside[0, 0], F.scaled_dot_product_attention(*qkv(0, 0, 0)))
    check(run.forward(2), 2, 2)


def test_the_report_knows_the_cost():
    run = Run(4, TilePlan.uniform(1))
    for step in range(4):
        run.forward(step)
    density = TilePattern(1).flop_density(LAYOUT.grid, LAYOUT.prefix)
    assert run.report.density_sum / run.report.sparse == pytest.approx(density + 1 / 4)


def test_nothing_is_kept_after_a_run():
    run = Run(4)
    run.forward(0, (0, 1))
    kept = run.preparation.residual.kept
    assert {layer for _, layer in kept} == {0, 1} and all(
        x.shape == (1, HEADS, LAYOUT.tokens, DIM) for x in kept.values()
    )
    run.preparation.forget()
    assert not run.preparation.residual.kept
    check(run.forward(1), 1, 1)  # the next run begins anew


@pytest.mark.parametrize(
    ("steps", "reason"), [(8, "8 steps, expected at least 15"), (0, "not numbered"), (15, "every 30 steps")]
)
def test_schedules_that_it_is_not_for_stay_as_they_are(caplog, steps, reason):
    run, plain = Run(30 if steps == 15 else 2), Run(0)
    for step in range(3):
        for a, b in zip(run.forward(step, steps=steps).values(), plain.forward(step).values(), strict=True):
            assert torch.equal(a, b)
    assert caplog.text.count("no residual is kept") == 1 and reason in caplog.text
    assert not run.preparation.residual.kept


def test_a_call_of_another_size_stays_without():
    cache = ResidualCache(2)
    forward = cache.begin([("a", 1)], [0], 0, SHAPE, 10)
    sparse, exact = torch.zeros(1, HEADS, 10, DIM), torch.ones(1, HEADS, 10, DIM)
    assert torch.equal(forward.attend(0, 0, lambda: sparse, lambda: exact), exact)
    for other in (torch.zeros(2, HEADS, 10, DIM), torch.zeros(1, HEADS, 11, DIM), torch.zeros(1, HEADS, 10, 2 * DIM)):
        assert forward.attend(0, 0, lambda other=other: other, lambda: exact) is other
    assert forward.attend(5, 0, lambda: sparse, lambda: exact) is sparse and forward.unlike == 4
    shorter = torch.zeros(1, 2, 7, DIM)  # without padding, and two of the heads
    cache.begin([("a", 1)], [0], 1, SHAPE, 10).attend(0, 2, lambda: shorter, lambda: exact)
    assert bool((shorter == 1).all())


@pytest.mark.parametrize(("free", "place"), [(10**9, torch.float32), (3 * 10**6, torch.bfloat16)])
def test_it_takes_half_precision_where_memory_is_short(monkeypatch, caplog, free, place):
    monkeypatch.setattr(residual, "free_bytes", lambda *_: free)
    monkeypatch.setattr("efficient_vdit_core.limits.memory.free_bytes", lambda *_: free)
    caplog.set_level("INFO", "efficient_vdit")
    cache = ResidualCache(2)
    cache.begin([("a", 1), ("b", 1)], range(8), 0, SHAPE, 1000)
    assert {x.dtype for x in cache.kept.values()} == {place}
    assert "cached residual takes" in caplog.text and "8 layers, 2 prompts" in caplog.text


def test_it_is_refused_with_the_number_where_there_is_no_room(monkeypatch):
    for name in ("efficient_vdit_core.attention.residual.free_bytes", "efficient_vdit_core.limits.memory.free_bytes"):
        monkeypatch.setattr(name, lambda *_: 2**20)
    with pytest.raises(
        ValueError, match=r"cached residual takes about 3.9 MiB of memory, 1.0 MiB are free. Set residual_every to 0"
    ):
        ResidualCache(2).begin([("a", 1)], range(8), 0, SHAPE, 8000)


@pytest.mark.parametrize(
    ("every", "placement", "message"),
    [(1, "strided", "2 or more"), (-3, "strided", "2 or more"), (2, "rotating", "rotating")],
)
def test_what_makes_no_sense_is_refused(every, placement, message):
    with pytest.raises(ValueError, match=message):
        Preparation(PLAN, AttentionReport(), residual_every=every, placement=placement)


def test_the_tiny_model_ends_nearer_to_its_dense_clip():
    pipeline = Pipeline.from_model("tiny")
    about = {"frames": 29, "height": 64, "width": 64, "steps": 20, "sampler": "ddim", "seed": 3}
    pipeline._decode = lambda z: z[0].permute(1, 2, 3, 0).float().numpy()  # latents, to save the decoding
    pipeline._metadata = lambda *_: {}
    runs = {
        "dense": (0, None),
        "sparse": (0, TilePlan.uniform(1)),
        4: (4, TilePlan.uniform(1)),
        2: (2, TilePlan.uniform(1)),
    }
    clips = {
        name: torch.from_numpy(
            pipeline.generate("a red circle moving right", plan=plan, residual_every=every, **about).frames
        )
        for name, (every, plan) in runs.items()
    }
    far = {name: float((clip - clips["dense"]).norm()) for name, clip in clips.items()}
    assert far[2] < far[4] < 0.7 * far["sparse"]


@pytest.mark.parametrize("allowed", [True, False])
def test_main_memory_is_pinned_for_a_gpu_where_the_system_allows_it(monkeypatch, allowed):
    asked, original = [], torch.zeros

    def zeros(*size, pin_memory=False, **about):
        asked.append(pin_memory)
        if pin_memory and not allowed:
            raise RuntimeError("cannot pin so much")
        return original(*size, **about)

    monkeypatch.setattr(torch, "zeros", zeros)
    got = residual._zeros((2, 3), torch.float32, torch.device("cpu"), torch.device("cuda"))
    assert got.shape == (2, 3) and asked == ([True] if allowed else [True, False])
