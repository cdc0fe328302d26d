"""Noise schedule and segment edges, against diffusers' schedulers and by arithmetic."""

import itertools

import pytest
import torch

from efficient_vdit_core.sampling import DiscreteSchedule, consistency_sigmas, segment_edges

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.fixture(scope="module")
def schedule() -> DiscreteSchedule:
    return DiscreteSchedule()


def test_sigma_max_of_the_reference_model(schedule):
    assert schedule.sigma_max == pytest.approx(157.4073, abs=2e-3)
    assert float(schedule.sigmas[0]) == pytest.approx(0.0100005, rel=1e-5)


def test_sigmas_equal_diffusers_table(schedule):
    """diffusers multiplies alphas in float32, which costs 1e-4 at the first levels."""
    diffusers = pytest.importorskip("diffusers")
    abar = diffusers.DDIMScheduler(**LINEAR).alphas_cumprod.double()
    torch.testing.assert_close(schedule.sigmas, ((1 - abar) / abar).sqrt(), rtol=1e-4, atol=0)


def test_sigma_between_levels_is_close_to_diffusers_euler(schedule):
    """diffusers interpolates sigma, we its logarithm (as ComfyUI does): 3e-4 apart at most."""
    diffusers = pytest.importorskip("diffusers")
    euler = diffusers.EulerAncestralDiscreteScheduler(**LINEAR)
    euler.set_timesteps(100)
    assert float(euler.sigmas[0]) == pytest.approx(157.4073, abs=1e-4)
    assert euler.timesteps[1].item() == pytest.approx(988.909, abs=1e-3)
    torch.testing.assert_close(schedule.sigma(euler.timesteps), euler.sigmas[:-1], rtol=3e-4, atol=0)


def test_timestep_inverts_sigma_at_fractions(schedule):
    t = torch.tensor([0.0, 0.25, 13.37, 249.0, 499.5, 998.999, 999.0])
    torch.testing.assert_close(schedule.timestep(schedule.sigma(t)), t, rtol=1e-4, atol=1e-3)


def test_timestep_clamps_and_keeps_the_shape(schedule):
    t = schedule.timestep(torch.tensor([[0.0, 1e-4], [1e4, 157.41]]))
    assert t.tolist() == [[0.0, 0.0], [999.0, 999.0]]
    assert schedule.sigma(-3.0) == schedule.sigma(0) and schedule.sigma(2000) == schedule.sigma(999)


@pytest.mark.parametrize(
    "segments, expected",
    [
        (1, [999, -1]),
        (2, [999, 499, -1]),
        (4, [999, 749, 499, 249, -1]),
        (5, [999, 799, 599, 399, 199, -1]),
    ],
)
def test_edges_are_equal_pieces_of_diffusion_time(segments, expected):
    assert segment_edges(segments).tolist() == expected


@pytest.mark.parametrize("segments", [1, 2, 4, 5, 8, 10, 20, 100])
def test_edges_equal_diffusers_trailing_timesteps(segments):
    diffusers = pytest.importorskip("diffusers")
    ddim = diffusers.DDIMScheduler(**LINEAR, timestep_spacing="trailing")
    ddim.set_timesteps(segments)
    assert segment_edges(segments)[:-1].tolist() == ddim.timesteps.tolist()


def test_flow_edges_are_those_of_unshifted_time():
    assert segment_edges(4, start=1000, clean=0).tolist() == [1000, 750, 500, 250, 0]
    shift = 5.0
    sigmas = consistency_sigmas(lambda t: shift * t / (1 + (shift - 1) * t), 4, start=1, clean=0)
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.9375, 5 / 6, 0.625, 0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("segments, steps", [(1, 7), (2, 4), (3, 10), (4, 6), (8, 20), (20, 20), (7, 994)])
def test_sub_steps_keep_every_segment_boundary(segments, steps):
    """The trap of few-step samplers: a boundary that moves when steps are added, or differs from training's."""
    edges = segment_edges(segments, steps)
    boundaries = segment_edges(segments)
    assert len(edges) == steps + 1
    assert set(boundaries.tolist()) <= set(edges.tolist())
    where = [edges.tolist().index(b) for b in boundaries.tolist()]
    parts = [b - a for a, b in itertools.pairwise(where)]
    assert max(parts) - min(parts) <= 1 and parts == sorted(parts)
    for first, last in itertools.pairwise(where):
        gaps = edges[first : last + 1].diff()
        torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-9, atol=1e-9)


def test_training_grid_contains_the_sampling_edges():
    """A teacher grid of N steps, N a multiple of S, hits every edge the sampler will use, bit for bit."""
    for segments in (1, 2, 3, 4, 6, 7, 8, 20):
        grid = segment_edges(segments, 3 * segments).tolist()
        assert grid[::3] == segment_edges(segments).tolist()


def test_consistency_sigmas_descend_to_exactly_zero(schedule):
    sigmas = consistency_sigmas(schedule.sigma, 4, 10)
    assert sigmas.shape == (11,) and sigmas.dtype == torch.float32
    assert sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
    assert sigmas[0] == schedule.sigma(999)
    assert schedule.sigma(749) in sigmas


@pytest.mark.parametrize(
    "segments, steps, words",
    [
        (0, 4, "segments must be at least 1"),
        (4, 3, "steps must be at least segments"),
        (1, 1001, "do not fit"),
        (-1, None, "segments must be at least 1"),
    ],
)
def test_bad_counts_are_refused(segments, steps, words):
    with pytest.raises(ValueError, match=words):
        segment_edges(segments, steps)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="does not descend"):
        consistency_sigmas(torch.ones_like, 4)
    with pytest.raises(ValueError, match="must lie above"):
        segment_edges(4, start=0, clean=1000)


def test_more_edges_than_any_schedule_has_are_refused():
    with pytest.raises(ValueError, match="at most"):
        segment_edges(1, 10_001, start=20_000, clean=0)
