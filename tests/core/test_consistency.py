"""The exact facts of multi-step consistency distillation: no training, float64 oracles written apart from the
engine."""

import dataclasses

import pytest
import torch

from efficient_vdit_core.distill.objectives.consistency import (
    ConsistencyConfig,
    ConsistencyLoss,
    addim,
    blend,
    check_pair,
    example_losses,
    loss_weight,
)
from efficient_vdit_core.distill.objectives.grid import SegmentGrid
from efficient_vdit_core.sampling import Denoiser, DiscreteSchedule, segment_edges
from efficient_vdit_core.sampling.path import FlowPath, VPPath, ddim_step, predict_x0

PATHS = {"vp": VPPath(), "flow": FlowPath(), "flow shift 5": FlowPath(5.0), "flow shift 17": FlowPath(17.0)}
PREDICTION = {"vp": "v_prediction", "flow": "flow", "flow shift 5": "flow", "flow shift 17": "flow"}
DATA_VARIANCE = 0.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def every(grid):
    return grid.at(torch.arange(1, grid.steps + 1))


def ddim(z, x, a, s, a_to, s_to):
    return a_to * x + (s_to / s) * (z - a * x)


def inverse_ddim(z_to, z, a, s, a_to, s_to):
    return (z_to - s_to / s * z) / (a_to - a * s_to / s)


def output_for(prediction, x, z, a, s):
    """The raw output that stands for clean data x."""
    noise = (z - a * x) / s
    return {"epsilon": noise, "v_prediction": a * noise - s * x, "flow": noise - x}[prediction]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ddim_there_and_back(path):
    (a, a_to), (s, s_to) = path.coefficients(torch.tensor([0.7, 0.3]) * path.start)
    z, x = torch.randn(2, 5, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(
        inverse_ddim(ddim_step(z, x, a, s, a_to, s_to), z, a, s, a_to, s_to), x, rtol=1e-10, atol=1e-10
    )
    assert torch.equal(ddim_step(z, x, a, s, a, s), z) or torch.allclose(
        ddim_step(z, x, a, s, a, s), z, rtol=0, atol=1e-15
    )


def test_path_of_the_schedule_keeps_its_levels():
    schedule = DiscreteSchedule()
    times = torch.tensor([999.0, 749.25, 0.5, 0.0, -1.0])
    a, s = VPPath().coefficients(times)
    torch.testing.assert_close((s / a)[:4].float(), schedule.sigma(times[:4]), rtol=1e-6, atol=0)
    torch.testing.assert_close(a**2 + s**2, torch.ones(5, dtype=torch.float64))
    assert (float(a[4]), float(s[4])) == (1.0, 0.0)
    alphas_bar = 1 / (1 + schedule.sigmas**2)
    torch.testing.assert_close(VPPath.from_alphas_bar(alphas_bar).log_sigmas, schedule.log_sigmas)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_jump_is_the_samplers_step(prediction):
    """The same step in variance-preserving and in the sampler's VE coordinates."""
    (a, a_to), (s, s_to) = VPPath().coefficients(torch.tensor([700.0, 450.0]))
    z, out = torch.randn(2, 3, 8, generator=generator(1)).unbind(0)
    mine = ddim_step(
        z, predict_x0(prediction, z, out, a.float(), s.float()), a.float(), s.float(), a_to.float(), s_to.float()
    )
    ve, ve_to = (s / a).float(), (s_to / a_to).float()
    x = z * (1 + ve**2).sqrt()
    x0 = Denoiser(lambda z, t: out, DiscreteSchedule(), prediction)(x, ve.expand(3))
    sampled = x + (x - x0) / ve * (ve_to - ve)
    torch.testing.assert_close(mine, sampled / (1 + ve_to**2).sqrt(), rtol=1e-4, atol=1e-5)


def test_flow_jump_is_eulers_step():
    path = FlowPath(5.0)
    (a, a_to), (s, s_to) = path.coefficients(torch.tensor([700.0, 450.0]))
    z, u = torch.randn(2, 8, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(ddim_step(z, predict_x0("flow", z, u, a, s), a, s, a_to, s_to), z + (s_to - s) * u)
    assert float(path.network_time(torch.tensor([500.0]))) == pytest.approx(1000 * 5 * 0.5 / 3)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("segments", [1, 3, 4, 8])
def test_blend_is_the_papers_target(name, segments):
    """lam x_T + (1 - lam) x_ref against DDIM, DDIM, inverse DDIM in float64."""
    draw = every(SegmentGrid(PATHS[name], segments, 16 * segments))
    x_teacher, x_ref, z = torch.randn(3, len(draw.segment), dtype=torch.float64, generator=generator())
    t, below, end = draw.at, draw.below, draw.end
    z_below = ddim(z, x_teacher, t.a, t.s, below.a, below.s)
    # A step that ends at the data needs no further jump, where DDIM would divide by 0.
    z_end = torch.where(draw.first, z_below, ddim(z_below, x_ref, below.a, below.s.clamp(min=1e-300), end.a, end.s))
    naive = inverse_ddim(z_end, z, t.a, t.s, end.a, end.s)
    lam = blend(draw)
    torch.testing.assert_close(lam * x_teacher + (1 - lam) * x_ref, naive, rtol=1e-7, atol=1e-8)
    assert bool(((lam >= 0) & (lam <= 1)).all())
    assert bool((lam[draw.first] == 1).all())
    assert bool((lam[(draw.segment == 0) & ~draw.first] == 0).all()), "the segment next to the data bootstraps alone"


def test_flow_blend_does_not_depend_on_the_shift():
    lams = [blend(every(SegmentGrid(FlowPath(shift), 4, 64))) for shift in (1.0, 5.0, 17.0)]
    torch.testing.assert_close(lams[0], lams[1])
    torch.testing.assert_close(lams[0], lams[2])
    # In uniform time it is t_end / (t' n), n the sub-step counted from the end.
    at = torch.arange(1, 65)
    end, n = (at - 1) // 16 * 16, (at - 1) % 16 + 1
    expected = torch.where(n == 1, 1.0, end / ((at - 1).clamp(min=1) * n)).double()
    torch.testing.assert_close(lams[0], expected)


def network(target):
    """A predictor whose clean prediction is ``target(z, time)``; it learns a and s from the path."""

    def predict(z, time, condition=None):
        return target(z, time)

    return predict


def loss_for(name, segments, teacher_steps, clean_of, **settings):
    """A ConsistencyLoss whose networks' clean prediction is clean_of(z, a, s)."""
    path, prediction = PATHS[name], PREDICTION[name]

    def predict(z, time, condition):
        # Timesteps from what the network is given: flows get the shifted noise level itself.
        if name == "vp":
            a, s = path.coefficients(time)
        else:
            s = time.double() / path.start
            a = 1 - s
        shape = (-1, *[1] * (z.ndim - 1))
        a, s = a.view(shape), s.view(shape)
        return output_for(prediction, clean_of(z.double(), a, s), z.double(), a, s)

    def teacher(z, time, condition, guidance):
        out = predict(z, time, condition)
        return out, out

    return ConsistencyLoss(
        ConsistencyConfig(segments=segments, teacher_steps=teacher_steps, **settings),
        path,
        prediction,
        student=predict,
        teacher=teacher,
    )


def gaussian(z, a, s):
    """E[x | z] of data N(0, DATA_VARIANCE)."""
    return z * a * DATA_VARIANCE / (a**2 * DATA_VARIANCE + s**2)


@pytest.mark.parametrize("name", ["vp", "flow", "flow shift 5"])
def test_one_step_a_segment_is_teacher_regression(name):
    loss = loss_for(name, 6, 6, gaussian)
    loss.target = None  # the student must not be asked
    draw = every(loss.grid)
    z = torch.randn(6, 4, generator=generator())
    a, s = (c.float()[:, None] for c in (draw.at.a, draw.at.s))
    torch.testing.assert_close(loss.target_of(z, None, draw), gaussian(z, a, s), rtol=1e-4, atol=1e-5)


def test_one_segment_is_a_plain_consistency_model():
    """Its target is the student's own answer one teacher step below."""
    loss = loss_for("vp", 1, 10, gaussian)
    draw = loss.grid.at(torch.arange(2, 11))
    loss.target = lambda z, time, condition: output_for(
        "v_prediction", torch.full_like(z, 7.0), z, *(c[:, None] for c in loss.path.coefficients(time))
    ).float()
    target = loss.target_of(torch.randn(9, 4, generator=generator()), None, draw)
    torch.testing.assert_close(target, torch.full((9, 4), 7.0), rtol=1e-3, atol=1e-3)


def walk_to_the_end(loss, z, index, clean_of):
    """z at the end of the segment of grid point ``index``, by DDIM steps of the teacher alone."""
    a, s = loss.grid.a, loss.grid.s
    for i in range(index, (index - 1) // loss.grid.per_segment * loss.grid.per_segment, -1):
        z = ddim(z, clean_of(z, a[i], s[i]), a[i], s[i], a[i - 1], s[i - 1])
    return z


@pytest.mark.parametrize("name", ["vp", "flow", "flow shift 5"])
@pytest.mark.parametrize("segments", [1, 3, 8])
def test_a_teacher_that_walks_on_is_followed_to_the_segments_end(name, segments):
    """The student's jump lands where the teacher's steps do, which are taken one by one here."""
    loss = loss_for(name, segments, 5 * segments, gaussian, target="teacher")
    loss.target = None  # the student must not be asked
    draw = every(loss.grid)
    z = torch.randn(loss.grid.steps, 4, dtype=torch.float64, generator=generator())
    x = loss.target_of(z, None, draw)
    for i in range(loss.grid.steps):
        here, end = draw.at, draw.end
        landed = ddim(z[i], x[i], here.a[i], here.s[i], end.a[i], end.s[i])
        torch.testing.assert_close(landed, walk_to_the_end(loss, z[i], i + 1, gaussian), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp", "flow", "flow shift 5"])
@pytest.mark.parametrize("segments", [3, 5])
def test_the_target_is_the_exact_ways_end_to_the_teachers_order(name, segments):
    """Of Gaussian data the way is known, z keeps its place in the deviation: twice the sub-steps leave a half of the error, or a
    quarter. Next to the data, where the noise is no smooth function of time (vp), it falls more slowly, and is less from the first."""
    errors = {1: [], 2: []}
    for order, found in errors.items():
        for per_segment in (16, 32, 64):
            loss = loss_for(name, segments, per_segment * segments, gaussian, target="teacher", teacher_order=order)
            draw = loss.grid.beginning(torch.arange(segments))
            z = torch.randn(segments, 4, dtype=torch.float64, generator=generator())
            here, end = ((place.a[:, None], place.s[:, None]) for place in (draw.at, draw.end))
            spread, narrowed = (torch.sqrt(a**2 * DATA_VARIANCE + s**2) for a, s in (here, end))
            landed = ddim(z, loss.target_of(z, None, draw), *here, *end)
            found.append((landed - z * narrowed / spread).abs().amax(1))
    first, second = (torch.stack(found) for found in errors.values())
    for order, found in ((1, first), (2, second)):
        left = (found[:-1] / found[1:])[:, 1:]
        torch.testing.assert_close(left, torch.full_like(left, 2.0**order), rtol=0.12, atol=0)
    assert bool((second[:, 0] < 0.8 * first[:, 0]).all()), (first, second)


@pytest.mark.parametrize("place", range(1, 11))
def test_a_step_of_second_order_goes_by_the_clean_data_half_a_step_on(place):
    """From anywhere in a segment: the first step is DDIM's, and each takes the slope of its own example's step before."""
    loss = loss_for("vp", 2, 10, gaussian, target="teacher", teacher_order=2)
    grid, z = loss.grid, torch.randn(10, 4, dtype=torch.float64, generator=generator())
    target, end = loss.target_of(z, None, every(grid))[place - 1], (place - 1) // 5 * 5
    here, before = z[place - 1], None
    for i in range(place, end, -1):
        x = gaussian(here, grid.a[i], grid.s[i])
        slope = 0 if before is None else (before - x) / (grid.times[i + 1] - grid.times[i])
        middle = x + slope * (grid.times[i - 1] - grid.times[i]) / 2
        here, before = ddim(here, middle, grid.a[i], grid.s[i], grid.a[i - 1], grid.s[i - 1]), x
    landed = ddim(z[place - 1], target, grid.a[place], grid.s[place], grid.a[end], grid.s[end])
    torch.testing.assert_close(landed, here, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_walks_on_is_asked_alike_in_every_process():
    """Those that share a sharded network wait for one another in each call, wherever their examples stand."""
    calls, targets, drawn = {}, {}, ((1,), (4,), (2, 5), (8, 4))
    for alone in (True, False):
        for places in drawn:
            loss = loss_for("flow", 2, 8, gaussian, target="teacher", teacher_order=2)
            loss.alone, teacher, count = alone, loss.teacher, []
            loss.teacher = lambda *args, teacher=teacher, count=count: count.append(len(args[0])) or teacher(*args)
            z = torch.randn(len(places), 3, dtype=torch.float64, generator=generator(7))
            targets[alone, places] = loss.target_of(z, None, loss.grid.at(torch.tensor(places)))
            calls[alone, places] = len(count)
    assert [calls[False, places] for places in drawn] == [4, 4, 4, 4]
    assert [calls[True, places] for places in drawn] == [1, 4, 2, 4]
    assert all(torch.equal(targets[True, places], targets[False, places]) for places in drawn)


def test_guidance_goes_with_its_examples_on_the_way():
    loss = loss_for("flow", 1, 3, gaussian, target="teacher")
    asked, teacher = [], loss.teacher
    loss.teacher = lambda z, time, c, g: asked.append((c.tolist(), g.tolist())) or teacher(z, time, c, g)
    z = torch.randn(3, 2, dtype=torch.float64, generator=generator())
    loss.target_of(z, torch.tensor([10, 20, 30]), loss.grid.at(torch.tensor([3, 1, 2])), torch.tensor([1.0, 2.0, 3.0]))
    assert asked == [([10, 20, 30], [1.0, 2.0, 3.0]), ([10, 30], [1.0, 3.0]), ([10], [1.0])]


@pytest.mark.parametrize("segments", [*range(1, 13), 20, 50])
@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["flow shift 5"]], ids=["vp", "flow"])
def test_training_ends_where_the_sampler_starts(path, segments):
    grid = SegmentGrid(path, segments, 64)
    draw = every(grid)
    sampler = segment_edges(segments, start=path.start, clean=path.clean)
    assert sorted(set(draw.end.time.tolist()), reverse=True) == sampler[1:].tolist()
    assert float(draw.at.time.max()) == float(sampler[0])
    for k, edge in enumerate(sampler[:-1].tolist()):  # k counts from the noisy side
        on_edge = draw.segment[draw.at.time == edge]
        assert on_edge.tolist() == [segments - 1 - k], "an edge belongs to the segment below it"


def test_draws_cover_all_times_evenly():
    grid = SegmentGrid(PATHS["vp"], 4, 32)
    draws = [grid.draw(32, generator(i)) for i in range(5)]
    assert all(len(set(d.at.time.tolist())) == 32 for d in draws)
    more = SegmentGrid(PATHS["vp"], 4, 32, data_side=3.0).draw(60, generator())
    assert torch.bincount(more.segment).tolist() == [30, 10, 10, 10]


@pytest.mark.parametrize("name", ["vp", "flow", "flow shift 5"])
@pytest.mark.parametrize("segments", [1, 4])
def test_the_exact_student_has_a_residual_that_vanishes(name, segments):
    """With Gaussian data the ODE only scales z, so the exact student is known; five times the steps, an eleventh
    (5^1.5) of the residual.

    A wrong sign, segment or weight leaves a residual that does not fall.
    """
    path = PATHS[name]

    def residual(count):
        grid = SegmentGrid(path, segments, count)
        draw = every(grid)
        deviation = lambda p: (p.a**2 * DATA_VARIANCE + p.s**2).sqrt()  # noqa: E731
        z = torch.ones(grid.steps, dtype=torch.float64)
        exact = lambda z, p: inverse_ddim(deviation(draw.end) / deviation(p) * z, z, p.a, p.s, draw.end.a, draw.end.s)  # noqa: E731
        x_teacher = gaussian(z, draw.at.a, draw.at.s)
        z_below = ddim(z, x_teacher, draw.at.a, draw.at.s, draw.below.a, draw.below.s)
        x_ref = torch.where(draw.first, 0.0, exact(z_below, draw.below))
        lam = blend(draw)
        error = (lam * x_teacher + (1 - lam) * x_ref - exact(z, draw.at)) * deviation(draw.at) / draw.at.s
        return float(error.square().mean().sqrt())

    first, second, third = residual(40), residual(200), residual(1000)
    # The table of VP levels ends abruptly above the clean data, which slows the fall on a grid as fine as the table.
    assert (7.0 if name == "vp" else 9.0) < first / second < 13.0
    assert (5.0 if name == "vp" else 9.0) < second / third < 13.0


@pytest.mark.parametrize("name", ["vp", "flow shift 5"])
def test_the_loss_of_a_perfect_pair_falls_with_the_grid(name):
    """Through the class itself: networks that answer for Gaussian data leave only the grid's error."""

    def total(count):
        path, segments = PATHS[name], 4
        loss = loss_for(name, segments, count, gaussian, loss="squared", weight="inverse_variance", max_weight=1e9)
        grid = loss.grid
        deviation = lambda a, s: (a**2 * DATA_VARIANCE + s**2).sqrt()  # noqa: E731

        def exact(z, time, condition):
            a, s = path.coefficients(time) if name == "vp" else (1 - time.double() / 1000, time.double() / 1000)
            index = torch.searchsorted(grid.s, s - 1e-5)
            end = (index - 1) // grid.per_segment * grid.per_segment
            a, s, a_end, s_end = (c[:, None] for c in (a, s, grid.a[end], grid.s[end]))
            x = inverse_ddim(deviation(a_end, s_end) / deviation(a, s) * z, z, a, s, a_end, s_end)
            return output_for(PREDICTION[name], x, z, a, s)

        loss.student = loss.target = exact
        x = torch.randn(count, 8, generator=generator(3)) * DATA_VARIANCE**0.5  # every time of the grid once
        return float(loss(x, None, generator()).total)

    totals = [total(count) for count in (40, 200, 1000)]
    assert totals[0] > 40 * totals[1] > 40**2 * totals[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_low_precision_leaves_a_close_finite_target(dtype):
    loss = loss_for("flow shift 17", 8, 1280 // 2, gaussian)
    draw = loss.grid.draw(256, generator())
    z = torch.randn(256, 16, generator=generator(1))
    exact = loss.target_of(z.double(), None, draw)
    inner = loss.target

    def low(z, time, condition, guidance=None):
        return inner(z.to(dtype), time, condition).to(dtype)

    loss.target, loss.teacher = low, lambda z, time, condition, guidance: (low(z, time, condition),) * 2
    target = loss.target_of(z, None, draw)
    assert target.dtype == torch.float32 and bool(target.isfinite().all())
    assert float((target - exact).square().mean().sqrt()) < (1e-4 if dtype == torch.float32 else 0.02)


def test_addim_restores_the_variance_that_ddim_loses():
    """Data N(0, v I) in many dimensions: the posterior's variance is known, and so is the norm of the exact step."""
    dims = 4096
    draw = SegmentGrid(PATHS["vp"], 4, 16).at(torch.tensor([10, 16]))
    z, x = torch.randn(2, 2, dims, dtype=torch.float64, generator=generator()).unbind(0)
    moved, extra = addim(z, x, draw)
    plain = ddim_step(z, x, *(c[:, None] for c in (draw.at.a, draw.at.s, draw.below.a, draw.below.s)))
    a_t, s_t, a_s, s_s = draw.at.a, draw.at.s, draw.below.a, draw.below.s
    variance = 0.1 / (2 + (a_t / s_t) ** 2)
    noise = (z - a_t[:, None] * x) / s_t[:, None]
    along = (moved - a_s[:, None] * x).square().sum(1) - (plain - a_s[:, None] * x).square().sum(1)
    torch.testing.assert_close(along, dims * (a_s - a_t * s_s / s_t) ** 2 * variance, rtol=2e-4, atol=0.0)
    # The target gains what carries the longer step to the segment's end.
    gain = (moved - plain) * (draw.end.s / s_s)[:, None] / (draw.end.a - a_t * draw.end.s / s_t)[:, None]
    torch.testing.assert_close(extra, gain, rtol=1e-3, atol=1e-6)
    assert noise.shape == moved.shape


def test_addim_on_the_whole_target_equals_the_paper():
    loss = loss_for("vp", 4, 32, gaussian, addim=True)
    draw = every(loss.grid)
    z = torch.randn(32, 64, dtype=torch.float64, generator=generator())
    column = lambda p: (p.a[:, None], p.s[:, None])  # noqa: E731
    x_teacher = gaussian(z, *column(draw.at))
    z_below, _ = addim(z, x_teacher, draw)
    x_ref = gaussian(z_below, *column(draw.below))
    a, s = column(draw.below)
    z_end = torch.where(draw.first[:, None], z_below, ddim(z_below, x_ref, a, s.clamp(min=1e-300), *column(draw.end)))
    papers = inverse_ddim(z_end, z, *column(draw.at), *column(draw.end))
    torch.testing.assert_close(loss.target_of(z, None, draw), papers, rtol=1e-3, atol=1e-3)


def test_zero_terminal_snr_is_finite():
    alphas_bar = torch.linspace(0.9999, 0.0, 1000, dtype=torch.float64)
    path = VPPath.from_alphas_bar(alphas_bar)
    a, s = path.coefficients(torch.tensor([999.0, 998.0, -1.0]))
    assert float(a[0]) == 0.0 and float(s[0]) == 1.0 and bool(a.isfinite().all())
    loss = ConsistencyLoss(
        ConsistencyConfig(segments=4, teacher_steps=8),
        path,
        "v_prediction",
        student=lambda z, t, c: torch.tanh(z),
        teacher=lambda z, t, c, g: (torch.tanh(z),) * 2,
    )
    out = loss(torch.randn(16, 5), None, generator())
    assert bool(out.total.isfinite()) and set(out.parts) == {f"segment {k}" for k in range(4)}
    assert path.describe()["sigma_max"] is None


def test_gradient_reaches_the_student_alone():
    student, teacher = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    asked = []

    def target(z, time, condition):
        asked.append(torch.is_grad_enabled())
        return student(z)

    loss = ConsistencyLoss(
        ConsistencyConfig(segments=2, teacher_steps=8),
        PATHS["vp"],
        "epsilon",
        student=lambda z, t, c: student(z),
        target=target,
        teacher=lambda z, t, c, g: (teacher(z), teacher(z)),
    )
    result = loss(torch.randn(16, 6), None, generator())
    result.total.backward()
    assert student.weight.grad is not None and float(student.weight.grad.abs().sum()) > 0
    assert teacher.weight.grad is None and asked == [False]


@pytest.mark.parametrize(("guidance", "low", "high"), [(None, None, None), (3.0, 3.0, 3.0), ((1.0, 5.0), 1.0, 5.0)])
def test_guidance_is_none_fixed_or_drawn(guidance, low, high):
    seen = []

    def teacher(z, time, condition, guidance):
        seen.append(guidance)
        return z, z

    loss = ConsistencyLoss(
        ConsistencyConfig(segments=2, teacher_steps=4, guidance=guidance),
        PATHS["flow"],
        "flow",
        student=lambda z, t, c: z,
        teacher=teacher,
    )
    loss(torch.randn(32, 3), None, generator())
    if guidance is None:
        assert seen == [None]
    else:
        assert seen[0].shape == (32,) and float(seen[0].min()) >= low and float(seen[0].max()) <= high
        assert (float(seen[0].std()) > 0.5) == (low != high)


def test_the_student_is_asked_with_the_rows_that_count():
    seen = []

    def student(z, time, condition):
        seen.append((len(z), condition))
        return z

    loss = ConsistencyLoss(
        ConsistencyConfig(segments=4, teacher_steps=8),
        PATHS["flow"],
        "flow",
        student=student,
        teacher=lambda z, t, c, g: (z, z),
    )
    rows = torch.arange(8)[:, None]
    loss.target_of(torch.randn(8, 3), (rows, None), every(loss.grid))
    assert [(n, c[0].flatten().tolist(), c[1]) for n, c in seen] == [(4, [1, 3, 5, 7], None)]


def test_losses_and_weights():
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    config = ConsistencyConfig(loss_scale=1e-4)
    torch.testing.assert_close(example_losses(error, config), torch.tensor([12.5**0.5, 0.0]), rtol=1e-3, atol=1e-6)
    for loss, expected in (("squared", 12.5), ("huber", 3.5)):
        losses = example_losses(error, dataclasses.replace(config, loss=loss))
        torch.testing.assert_close(losses, torch.tensor([expected, 0.0]), rtol=1e-3, atol=1e-3)
    place = SegmentGrid(PATHS["vp"], 1, 10).at(torch.tensor([3, 8])).at
    snr = (place.a / place.s) ** 2
    for weight, expected in (
        ("inverse_variance", snr + 1),
        ("inverse_sigma", (snr + 1).sqrt()),
        ("snr", snr),
        ("none", snr**0),
        ("sqrt_snr", snr.sqrt()),
    ):
        torch.testing.assert_close(
            loss_weight(dataclasses.replace(config, weight=weight, max_weight=1e9), place), expected
        )
    assert float(loss_weight(dataclasses.replace(config, max_weight=1.2), place).max()) == 1.2


@pytest.mark.parametrize(("loss", "weight"), [("squared", "snr"), ("norm", "sqrt_snr"), ("huber", "sqrt_snr")])
def test_the_right_weight_of_epsilon_makes_the_loss_that_of_the_output(loss, weight, caplog):
    config = ConsistencyConfig(loss=loss, weight=weight, max_weight=1e9, loss_scale=1e-9)
    check_pair(config, "epsilon")
    place = SegmentGrid(PATHS["vp"], 1, 10).at(torch.tensor([3, 6, 10])).at
    of_output = torch.randn(3, 7, dtype=torch.float64, generator=generator())
    of_x = of_output * (place.s / place.a)[:, None]
    weighted = loss_weight(config, place) * example_losses(of_x, config)
    torch.testing.assert_close(weighted, example_losses(of_output, config), rtol=1e-5, atol=1e-7)
    assert not caplog.records


def test_a_weight_that_does_not_go_with_the_loss_is_refused_or_told(caplog):
    for loss in ("norm", "huber"):
        with pytest.raises(
            ValueError, match='expected "sqrt_snr" for a model that predicts epsilon.*Set weight'
        ) as error:
            check_pair(ConsistencyConfig(loss=loss, weight="snr"), "epsilon")
        assert len(str(error.value)) < 400
    check_pair(ConsistencyConfig(loss="norm", weight="snr"), "v_prediction")
    check_pair(ConsistencyConfig(loss="norm", weight="snr", space="z"), "epsilon")
    assert not caplog.records
    check_pair(ConsistencyConfig(loss="squared", weight="none"), "epsilon")
    assert 'Set weight = "snr"' in caplog.text


def test_the_error_at_the_segments_end():
    """``space="z"`` measures where the jumps land, as phased consistency models do."""
    loss = loss_for("flow shift 5", 4, 16, gaussian, space="z", loss="squared")
    draw = every(loss.grid)
    x, target, z = torch.randn(3, 16, 5, dtype=torch.float64, generator=generator()).unbind(0)
    lands = [ddim(z, y, *(c[:, None] for c in (draw.at.a, draw.at.s, draw.end.a, draw.end.s))) for y in (x, target)]
    torch.testing.assert_close(
        loss.compare(x, target, draw).total, (lands[0] - lands[1]).square().mean(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "l1"},
        {"weight": "snr+1"},
        {"space": "y"},
        {"segments": 0},
        {"segments": 8, "teacher_steps": 4},
        {"max_weight": 0.0},
        {"teacher_order": 2},
        {"teacher_order": 3, "target": "teacher"},
        {"teacher_order": 2, "target": "teacher", "addim": True},
        {"teacher_order": 2, "states": "teacher"},
        {"teacher_order": 2, "target": "teacher", "segments": 4, "teacher_steps": 5},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConsistencyConfig(**wrong)


@pytest.mark.parametrize("shift", [-2.0, 0.0])
def test_a_flow_is_shifted_by_more_than_nothing(shift):
    with pytest.raises(ValueError, match="shift"):
        FlowPath(shift)
