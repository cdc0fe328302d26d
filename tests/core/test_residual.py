"""The cached residual against its definition: dense at every n-th step, sparse plus what was missing then in between."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pinning_driver import GPU, SECOND_GPU, PinningDriver

from efficient_vdit_core.attention import TokenLayout, host_memory, tile_attention
from efficient_vdit_core.attention.autotune.trial import Choice
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.dense_call import DenseCall
from efficient_vdit_core.attention.hook import backend_choices, residual
from efficient_vdit_core.attention.hook.override import attention_override
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.hook.residual import ResidualCache
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import sdpa_attention
from efficient_vdit_core.commands.generate import make_video
from efficient_vdit_core.pipeline import Pipeline
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.search.describe import describe_plan
from efficient_vdit_core.tiles import TilePattern, TokenGrid
from efficient_vdit_core.tinyworld.tables.residual import BY_HEAD, guided_options
from efficient_vdit_core.tinyworld.tables.residual import STEPS as TABLE_STEPS

LAYOUT = TokenLayout(TokenGrid(6, 1, 4), 3)
HEADS, DIM, STEPS = 4, 8, 20
MIXED = by_head([TilePattern(1, window=1), TilePattern(2), TilePattern(2), TilePattern(None)])
PLAN = TilePlan(patterns=(TilePattern(1), MIXED, TilePattern(None)), heads=HEADS)
SHAPE = CallShape(1, HEADS, DIM, torch.float32, torch.device("cpu"))
EIGHT = [(layer, 0) for layer in range(8)]


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_model("tiny")


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

    def forward(self, step, prompts=(0,), *, at_once=HEADS, steps=STEPS, names=None, layers=3, **about):
        branches = tuple((name, 1) for name in names or prompts)
        state = ForwardState(LAYOUT, depth=3, heads=HEADS, step=step, steps=steps, branches=branches, **about)
        state = self.preparation.keep_residual(state, SHAPE)
        found = {}
        for layer in range(layers):
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


def test_a_forward_that_a_cache_skips_renews_nothing():
    """EasyCache leaves out what is within the model, of which the forward has been told by then."""
    run = Run(4)
    check(run.forward(0), 0, 0)
    run.forward(4, layers=0)
    check(run.forward(5), 5, 5)
    check(run.forward(8), 8, 5)


def test_a_window_of_steps_begins_with_dense_attention():
    run = Run(4)
    outside = run.forward(0, reason="outside")
    torch.testing.assert_close(outside[0, 0], F.scaled_dot_product_attention(*qkv(0, 0, 0)))
    check(run.forward(2), 2, 2)


def test_room_is_made_before_the_window_opens_and_only_where_it_will():
    run = Run(4)
    run.forward(0, reason="outside")
    assert not run.preparation.residual.kept
    run.forward(0, reason="outside", later=True)
    assert len(run.preparation.residual.kept) == 2  # layers
    check(run.forward(3), 3, 3)
    check(run.forward(4), 4, 3)


def test_a_run_without_room_is_refused_before_its_window_opens(monkeypatch):
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 1000)
    with pytest.raises(ValueError, match="cached residual takes about"):
        Run(4).forward(0, reason="outside", later=True)


def test_the_report_knows_the_cost():
    run = Run(4, TilePlan.uniform(1))
    for step in range(4):
        run.forward(step)
    density = TilePattern(1).flop_density(LAYOUT.grid, LAYOUT.prefix)
    assert run.report.density_sum / run.report.sparse == pytest.approx(density + 1 / 4)


@pytest.mark.parametrize("every", [2, 3, 6])
def test_a_searched_plan_tells_the_work_that_a_run_then_has(every):
    run = Run(every)
    for step in range(STEPS):
        run.forward(step)
    grid = [LAYOUT.grid.t, LAYOUT.grid.h, LAYOUT.grid.w]
    about = {"grid": grid, "extra_tokens": LAYOUT.prefix, "attention_flop_density": 0.5, "attention_speedup": 2.0}
    about |= {"costs": "flops", "error": "none", "errors": {}, "plan_errors": [0.0] * len(PLAN.patterns)}
    about |= {"not_finite_layers": [], "not_measured_layers": []}
    text = describe_plan(replace(PLAN, frames=LAYOUT.grid.t, provenance=about))
    assert f"{every}: {run.report.snapshot().density:.0%}" in text
    full = replace(PLAN, patterns=(TilePattern(None),), frames=LAYOUT.grid.t, provenance=about)
    assert "residual" not in describe_plan(full)


def test_nothing_is_kept_after_a_run():
    run = Run(4)
    run.forward(0, (0, 1))
    kept = run.preparation.residual.kept
    assert {place for _, place in kept} == {(0, 0), (1, 0)} and all(
        x.shape == (1, HEADS, LAYOUT.tokens, DIM) for x in kept.values()
    )
    run.preparation.forget()
    assert not run.preparation.residual.kept
    check(run.forward(1), 1, 1)  # the next run begins anew


def dense_of(_):
    return DenseCall(sdpa_attention, None, None, {})


def stays_dense(slow):
    """In place of trials: dense attention where ``slow`` says so of the call's shape and pattern."""

    def measured(shape, layout, pattern, **_):
        backend = "dense" if slow(shape, pattern) else "frames"
        return Choice(backend, {"dense": 1.5, "frames": 2.0 if backend == "dense" else 1.0})

    return measured


@pytest.mark.parametrize("later", [False, True])
def test_layers_that_stay_dense_take_no_room_though_the_window_opens_later(monkeypatch, later):
    monkeypatch.setattr(backend_choices, "measured_choice", stays_dense(lambda shape, pattern: True))
    preparation = Preparation(PLAN, AttentionReport(), residual_every=4, decline_slow=True)
    state = ForwardState(LAYOUT, depth=3, heads=HEADS, steps=STEPS, branches=(("a", 1),))
    if later:
        preparation.before_forward(replace(state, reason="outside the step window", later=True), SHAPE, dense_of)
    preparation.before_forward(replace(state, step=4), SHAPE, dense_of)
    assert preparation.residual is not None and not preparation.residual.kept


def test_room_is_made_for_what_is_missing_alone(monkeypatch):
    """4 layers x 4 heads x 1000 tokens x 8 of float32 are 512,000 bytes, and 1,024,000 with 4 layers more."""
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 1_400_000)
    cache = ResidualCache(2)
    cache.begin([("a", 1)], EIGHT[:4], 0, SHAPE, 1000)
    first = cache.kept[("a", HEADS, 1000), EIGHT[0]]
    cache.begin([("a", 1)], EIGHT, 1, SHAPE, 1000)
    assert cache.kept[("a", HEADS, 1000), EIGHT[0]] is first
    assert sum(cache.taken.values()) == sum(x.nbytes for x in cache.kept.values()) == 1_024_000


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
    forward = cache.begin([("a", 1)], [(0, 0)], 0, SHAPE, 10)
    sparse, exact = torch.zeros(1, HEADS, 10, DIM), torch.ones(1, HEADS, 10, DIM)
    assert torch.equal(forward.attend((0, 0), 0, lambda: sparse, lambda: exact), exact)
    for other in (torch.zeros(2, HEADS, 10, DIM), torch.zeros(1, HEADS, 11, DIM), torch.zeros(1, HEADS, 10, 2 * DIM)):
        assert forward.attend((0, 0), 0, lambda other=other: other, lambda: exact) is other
    assert forward.attend((5, 0), 0, lambda: sparse, lambda: exact) is sparse and forward.unlike == 4
    shorter = torch.zeros(1, 2, 7, DIM)  # without padding, and two of the heads
    cache.begin([("a", 1)], [(0, 0)], 1, SHAPE, 10).attend((0, 0), 2, lambda: shorter, lambda: exact)
    assert bool((shorter == 1).all())


@pytest.mark.parametrize(("names", "said"), [("a", 0), ("ab", 1)])
def test_a_call_that_goes_without_says_so_and_no_other_does(caplog, names, said):
    """One prompt at a time, where the forward was of one, and where it was of two."""
    run = Run(2)
    for step in range(2):
        run.forward(step, names=tuple(names))
    assert caplog.text.count("goes without the cached residual") == said


def test_a_part_of_a_schedule_counts_by_the_whole(caplog):
    half = Run(4)
    check(half.forward(0, steps=10, whole=20), 0, 0)
    check(half.forward(1, steps=10, whole=20), 1, 0)
    Run(2).forward(0, steps=4, whole=8)
    assert "the schedule has 8 steps, 4 of them in this sampler, expected at least 15" in caplog.text


def test_what_moves_between_steps_goes_without_and_says_so(caplog):
    run = Run(4)
    run.forward(0, no_residual="the context windows move")
    assert not run.preparation.residual.kept and "no residual is kept: the context windows move." in caplog.text


# 2 prompts x 8 layers x 4 heads x 1000 tokens x 8: 2,048,000 bytes of float32
@pytest.mark.parametrize(("free", "place"), [(2_800_000, torch.float32), (2_700_000, torch.bfloat16)])
def test_it_takes_half_precision_where_memory_is_short(monkeypatch, caplog, free, place):
    monkeypatch.setattr(residual, "free_bytes", lambda *_: free)
    caplog.set_level("INFO", "efficient_vdit")
    cache = ResidualCache(2)
    cache.begin([("a", 1), ("b", 1)], EIGHT, 0, SHAPE, 1000)
    assert {x.dtype for x in cache.kept.values()} == {place}
    assert "cached residual takes" in caplog.text and "8 layers, 2 prompts" in caplog.text


def test_it_is_refused_with_the_number_where_there_is_no_room(monkeypatch):
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 5 * 2**20)
    with pytest.raises(
        ValueError,
        match=r"cached residual takes about 3.9 MiB of memory, 3.8 MiB may be taken: 75% of .* Set residual_every to 0",
    ):
        ResidualCache(2).begin([("a", 1)], EIGHT, 0, SHAPE, 8000)


def test_prompts_and_windows_that_come_one_by_one_count_together(monkeypatch):
    """Main memory is not taken before it is written to, so what is free does not tell what was promised."""
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 4_000_000)
    cache = ResidualCache(2)
    for name in "ab":
        cache.begin([(name, 1)], EIGHT, 0, SHAPE, 1000)
    assert cache.taken == {torch.device("cpu"): 2_048_000}
    cache.begin([("c", 1)], EIGHT, 0, SHAPE, 900)  # 2,969,600 with it
    assert cache.room([("d", 1)], EIGHT[:1], SHAPE, 100).dtype is torch.float32
    with pytest.raises(ValueError, match="about 3.3 MiB of memory, 2.9 MiB may be taken"):
        cache.begin([("d", 1)], EIGHT, 0, SHAPE, 1000)  # 512,000 more in half precision
    cache.clear()
    cache.begin([("d", 1)], EIGHT, 0, SHAPE, 1000)


def test_each_run_has_what_is_free_when_it_begins(monkeypatch):
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 10**7)
    cache = ResidualCache(2)
    cache.begin([("a", 1)], [(0, 0)], 0, SHAPE, 1000)
    cache.clear()
    monkeypatch.setattr(residual, "free_bytes", lambda *_: 1000)
    with pytest.raises(ValueError, match="cached residual takes about"):
        cache.begin([("a", 1)], [(0, 0)], 0, SHAPE, 1000)


def test_what_a_run_has_taken_does_not_count_twice(monkeypatch):
    """128,000 bytes for each prompt, of 300,000 that may be taken when the run begins."""
    cache = ResidualCache(2)
    for name, free in (("a", 400_000), ("b", 272_000)):
        monkeypatch.setattr(residual, "free_bytes", lambda *_, free=free: free)
        cache.begin([(name, 1)], [(0, 0)], 0, SHAPE, 1000)
    assert {kept.dtype for kept in cache.kept.values()} == {torch.float32}


def test_a_gpu_keeps_half_of_what_is_free_and_main_memory_a_quarter(monkeypatch):
    free = {"cuda:0": 2_100_000, "cpu": 1_400_000}
    monkeypatch.setattr(residual, "free_bytes", free.__getitem__)
    shape, cache = CallShape(1, HEADS, DIM, torch.float32, torch.device("cuda:0")), ResidualCache(2)

    def place(beside=0, tokens=1000):
        room = cache.room([("a", 1)], EIGHT, shape, tokens, beside)
        return str(room.device), room.dtype, room.size

    assert place() == ("cuda:0", torch.float32, 1_024_000)
    assert place(beside=60_000) == ("cpu", torch.float32, 1_024_000)
    assert place(tokens=2000) == ("cpu", torch.bfloat16, 1_024_000)
    with pytest.raises(ValueError, match="cached residual"):
        place(tokens=2100)


def test_a_pipeline_states_or_refuses_it_before_anything_long_starts(pipeline, monkeypatch, capsys):
    request = pipeline.request("a red circle", steps=20, sampler="ddim", frames=29, height=64, width=64)
    room = pipeline.residual_room(request, TilePlan.uniform(1), 4)
    config, tokens = pipeline.transformer.config, 8 * 4 * 4
    width = config.num_attention_heads * config.attention_head_dim
    assert room.size == config.num_layers * 2 * tokens * width * 4  # two prompts
    monkeypatch.setattr(pipeline, "generate", lambda *_, **__: None)
    make_video(pipeline, request, TilePlan.uniform(1), residual_every=4)
    assert "the cached residual takes 884736 bytes on cpu (float32)" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(residual, "free_bytes", lambda *_: room.size)
    monkeypatch.setattr(pipeline, "_encode", lambda *_: pytest.fail("the text was encoded"))
    with pytest.raises(ValueError, match="cached residual takes about"):
        pipeline.generate(request, plan=TilePlan.uniform(1), residual_every=4)


@pytest.mark.parametrize(
    ("every", "placement", "message"),
    [(1, "strided", "residual_every is 1, .* 2 or more"), (-3, "strided", "2 or more"), (2, "rotating", "rotating")],
)
def test_what_makes_no_sense_is_refused(every, placement, message):
    with pytest.raises(ValueError, match=message):
        Preparation(PLAN, AttentionReport(), residual_every=every, placement=placement)


def test_the_tiny_model_ends_nearer_to_its_dense_clip(pipeline, monkeypatch):
    about = {"frames": 29, "height": 64, "width": 64, "steps": 20, "sampler": "ddim", "seed": 3}
    # latents, to save the decoding
    monkeypatch.setattr(pipeline, "_decode", lambda z: z[0].permute(1, 2, 3, 0).float().numpy())
    monkeypatch.setattr(pipeline, "_metadata", lambda *_: {})
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


def test_the_tables_plan_by_head_fits_the_tiny_model_and_works_as_much_as_one_reference_frame(pipeline):
    plan, config = TilePlan.from_text(BY_HEAD), pipeline.transformer.config
    plan.check_fits(layers=config.num_layers, heads=config.num_attention_heads)
    grid = TokenGrid(8, 4, 4)
    work = sum(pattern.flop_density(grid) for pattern in plan.patterns) / len(plan.patterns)
    assert work == pytest.approx(TilePattern(1).flop_density(grid), abs=0.01)


@pytest.fixture
def driver(monkeypatch):
    """Of a GPU that is nearly full: the residual goes to main memory."""
    monkeypatch.setattr(host_memory, "_REGISTERED", {})
    monkeypatch.setattr(residual, "free_bytes", lambda device: 1000 if device.startswith("cuda") else 10**7)
    return PinningDriver(monkeypatch)


@pytest.mark.parametrize("tokens", [1000, 1025])
def test_main_memory_holds_what_is_said_and_until_the_run_ends(driver, caplog, tokens):
    """Pinned for the GPU, without what an allocator rounds up to or keeps for later."""
    caplog.set_level("INFO", "efficient_vdit")
    shape, cache = replace(SHAPE, device=GPU), ResidualCache(2)
    for _ in range(2):  # runs
        room = cache.room([("a", 1), ("b", 1)], EIGHT, shape, tokens)
        for name in "ab":
            cache.begin([(name, 1)], EIGHT, 0, shape, tokens)
        assert cache.taken == {torch.device("cpu"): room.size}
        assert room.size == sum(kept.untyped_storage().nbytes() for kept in cache.kept.values())
        assert room.size == sum(driver.pinned.values()) and len(driver.pinned) == 16
        assert not any(kept.any() for kept in cache.kept.values())
        cache.clear()
        assert not driver.pinned and driver.asked[-17:] == [f"wait {GPU}", *["unregister"] * 16]
    assert f"takes {room}" in caplog.text


def test_main_memory_that_cannot_be_pinned_is_taken_as_it_is(driver):
    driver.room = 200_000
    shape, cache = replace(SHAPE, device=GPU), ResidualCache(2)
    cache.begin([("a", 1)], EIGHT, 0, shape, 1000)  # of 128,000 bytes each
    assert len(cache.kept) == 8 and len(driver.pinned) == 1 and driver.pending == 0
    cache.clear()
    assert not driver.pinned


def test_a_forward_on_another_gpu_is_waited_for_too(driver):
    cache = ResidualCache(2)
    for device in (GPU, SECOND_GPU):
        cache.begin([("a", 1)], EIGHT, 0, replace(SHAPE, device=device), 1000)
    cache.clear()
    assert {f"wait {GPU}", f"wait {SECOND_GPU}"} <= set(driver.asked)


def test_a_run_that_is_lost_gives_its_memory_back(driver):
    cache = ResidualCache(2)
    forward = cache.begin([("a", 1)], EIGHT, 0, replace(SHAPE, device=GPU), 1000)
    del cache, forward
    gc.collect()
    assert not driver.pinned and f"wait {GPU}" in driver.asked


@pytest.mark.parametrize(("tokens", "waits"), [(1000, 0), (900, 1)])
def test_the_cpu_reads_a_piece_with_gaps_when_it_is_written(driver, monkeypatch, tokens, waits):
    """Where padding is left out; a whole piece travels behind what wrote it."""
    cache, waited = ResidualCache(2), []
    monkeypatch.setattr(residual, "wait_for", waited.append)
    for step in range(2):
        forward = cache.begin([("a", 1)], EIGHT, step, replace(SHAPE, device=GPU), 1000)
        forward.attend(
            (0, 0), 0, lambda: torch.ones(1, HEADS, tokens, DIM), lambda: torch.full((1, HEADS, tokens, DIM), 3.0)
        )
    assert len(waited) == waits


def test_layers_that_were_measured_faster_dense_keep_nothing(monkeypatch):
    """They would hold memory for what they never compute."""
    for faster, kept in (("dense", 0), ("frames", 2)):
        choice = Choice(faster, {"dense": 2.0, "frames": 2.0, faster: 1.0})
        monkeypatch.setattr(backend_choices, "measured_choice", lambda *_, choice=choice, **__: choice)
        preparation = Preparation(PLAN, AttentionReport(), residual_every=12, decline_slow=True)
        state = ForwardState(LAYOUT, depth=3, heads=HEADS, steps=STEPS, branches=(("a", 1),))
        preparation.before_forward(state, SHAPE, lambda layer: DenseCall(sdpa_attention, None, None, {}))
        assert len(preparation.residual.kept) == kept


@pytest.mark.parametrize(
    ("every", "steps", "decline", "sparse"),
    [
        (2, STEPS, True, []),  # 0.56 and 0.80 of dense attention's work, and half of it for renewing
        (3, STEPS, True, [0]),  # 0.56 + 0.33 lie below nine tenths
        (12, STEPS, True, [0, 1]),
        (2, STEPS, False, [0, 1]),  # as asked
        (2, 8, True, [0, 1]),  # a schedule too short to keep any
    ],
)
def test_layers_that_renewing_makes_dearer_than_dense_ones_stay_dense(every, steps, decline, sparse):
    preparation = Preparation(PLAN, AttentionReport(), residual_every=every, decline_slow=decline)
    state = ForwardState(LAYOUT, depth=3, heads=HEADS, steps=steps, branches=(("a", 1),))
    reasons = [preparation.layer(state, layer).reason for layer in range(2)]
    assert [layer for layer in range(2) if not reasons[layer]] == sparse
    assert {reason for reason in reasons if reason} <= {"too dense to pay with a residual"}
    if len(sparse) == 0:
        (note,) = preparation.layer(state, 1).notes
        assert "every 2 steps brings a layer to 130% of dense attention's work (layer 1)" in note[1]


@pytest.mark.parametrize(("every", "backend"), [(4, "dense"), (6, "frames"), (0, "frames")])
def test_a_trial_counts_what_renewing_takes(monkeypatch, every, backend):
    """0.8 of dense attention's time: a quarter more for renewing is too much, a sixth is not."""
    choice = Choice("frames", {"dense": 1.0, "parts": 0.9, "frames": 0.8})
    monkeypatch.setattr(backend_choices, "measured_choice", lambda *_, **__: choice)
    preparation = Preparation(TilePlan.uniform(1), AttentionReport(), residual_every=every, decline_slow=True)
    state = ForwardState(LAYOUT, depth=3, heads=HEADS, steps=STEPS, branches=(("a", 1),))
    settled = preparation.before_forward(state, SHAPE, dense_of)
    found = preparation.backends_of(settled, SHAPE, LAYOUT, TilePattern(1), dense_of(0))
    assert set(found.values()) == {backend} and len(settled.slow) == (3 if backend == "dense" else 0)


def test_the_table_of_the_tiny_base_model_keeps_prompts_and_clips_apart():
    """Two clips are sampled at once under guidance: a forward with their prompts, then one without, and the next clips begin
    with nothing kept."""
    model = SimpleNamespace(
        options_with=lambda override: lambda z: {FORWARD_KEY: ForwardState(LAYOUT)},
        layers=3, heads=HEADS, config=SimpleNamespace(attention_head_dim=DIM),
    )  # fmt: skip
    preparation = Preparation(TilePlan.uniform(1), AttentionReport(), residual_every=4)
    assert preparation.residual is not None
    options, z = guided_options(model, preparation), torch.zeros(2, 1)
    for _ in range(2):
        for step in range(TABLE_STEPS):
            for branch in range(2):
                state = options(z)[FORWARD_KEY]
                if (step, branch) == (0, 0):
                    assert not any(kept.any() for kept in preparation.residual.kept.values())
                assert (state.step, state.steps, state.branches) == (step, TABLE_STEPS, ((branch, 2),))
                assert state.residual.renew == (step % 4 == 0)
                q = torch.ones(2, HEADS, LAYOUT.tokens, DIM)
                state.residual.attend((0, 0), 0, lambda q=q: q, lambda q=q, b=branch: (2 + b) * q)
        prompts = {
            name[0]: float(kept[0, 0, 0, 0])
            for (name, place), kept in preparation.residual.kept.items()
            if place == (0, 0)
        }
        assert prompts == {0: 1.0, 1: 2.0}


def test_a_second_run_over_the_same_steps_begins_with_dense_attention():
    """Of a sampler that goes back to more noise: what a later step left is not its own."""
    run = Run(4)
    for step, renewed in ((5, 5), (6, 5), (2, 2), (3, 2)):
        check(run.forward(step), step, renewed)
