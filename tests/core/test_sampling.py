"""The consistency sampler, against handwritten loops, diffusers' DDIM and models whose answer is known in closed
form."""

import pytest
import torch

from efficient_vdit_core.sampling import Denoiser, DiscreteSchedule, consistency_sigmas, sample_consistency
from efficient_vdit_core.sampling.consistency import fresh_noise

SIGMAS = consistency_sigmas(DiscreteSchedule().sigma, 4, 6)
SHAPE = (2, 4, 3, 5, 5)
DATA_VARIANCE = 0.5


def gaussian(x, sigma, **kwargs):
    """E[x0 | x] of data N(0, DATA_VARIANCE): the perfect denoiser."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return x * DATA_VARIANCE / (DATA_VARIANCE + s**2)


def start(sigmas=SIGMAS):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)) * sigmas[0]


def test_gamma_0_equals_a_handwritten_euler_bit_for_bit():
    x = start()
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        d = (x - gaussian(x, sigma * torch.ones(2))) / sigma
        x = x + d * (sigma_next - sigma)
    assert torch.equal(sample_consistency(gaussian, start(), SIGMAS, gamma=0.0), x)


def test_gamma_1_equals_a_handwritten_lcm_bit_for_bit():
    x = start()
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        x = gaussian(x, sigma * torch.ones(2))
        if sigma_next > 0:
            x = x + sigma_next * fresh_noise(x, 3, float(sigma_next))
    assert torch.equal(sample_consistency(gaussian, start(), SIGMAS, gamma=1.0, noise_seed=3), x)


@pytest.mark.parametrize("gamma", [0.3, 0.75])
def test_gamma_between_jumps_below_and_renoises(gamma):
    x = start()
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        x0, down = gaussian(x, sigma * torch.ones(2)), (1 - gamma) * sigma_next
        x = x0 + down * (x - x0) / sigma
        if sigma_next > 0:
            x = x + (sigma_next**2 - down**2).sqrt() * fresh_noise(x, 3, float(sigma_next))
    out = sample_consistency(gaussian, start(), SIGMAS, gamma=gamma, noise_seed=3)
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


def flow_renoise(sigma, noise, x0):
    return sigma * noise + (1.0 - sigma) * x0


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_flow_models_mix_noise_by_their_noise_to_signal_ratio(gamma):
    """One step of a flow model, jump and re-noise written out: down to ratio (1-gamma) s'/(1-s'), back up to s'."""
    sigmas = torch.tensor([0.9, 0.6])
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    x = flow_renoise(sigmas[0], e, x0)
    ratio = (1 - gamma) * 0.6 / 0.4
    down = ratio / (1 + ratio)
    scale = 0.4 / (1 - down)
    expected = scale * flow_renoise(down, e, x0) + (0.6**2 - (scale * down) ** 2) ** 0.5 * fresh_noise(x, 3, 0.6)
    out = sample_consistency(lambda x, s: x0, x, sigmas, gamma=gamma, renoise=flow_renoise, noise_seed=3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_every_gamma_keeps_the_noise_level(gamma):
    """With the true x0 known, x at sigma' is x0 + sigma' * unit noise whatever the share of fresh noise."""
    x0 = torch.full((1, 200_000), 3.0)
    x = x0 + 10.0 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    out = sample_consistency(lambda x, s: x0, x, torch.tensor([10.0, 4.0, 2.0]), gamma=gamma, noise_seed=5)
    assert float((out - x0).std()) == pytest.approx(2.0, rel=0.01)
    assert float(out.mean()) == pytest.approx(3.0, abs=0.02)


def test_exact_segment_maps_land_on_the_exact_solution():
    """A perfect student of 4 segments needs 4 steps: the ODE of Gaussian data scales x by a known factor."""
    sigmas = consistency_sigmas(DiscreteSchedule().sigma, 4)

    def student(x, sigma):
        s = sigma[0]
        end = sigmas[int((sigmas == s).nonzero()) + 1]
        moved = x * ((DATA_VARIANCE + end**2) / (DATA_VARIANCE + s**2)).sqrt()
        return (moved - end / s * x) / (1 - end / s)

    x = start(sigmas)
    exact = x * (DATA_VARIANCE / (DATA_VARIANCE + sigmas[0] ** 2)) ** 0.5
    torch.testing.assert_close(sample_consistency(student, x, sigmas), exact, rtol=1e-4, atol=1e-5)


def test_many_steps_converge_to_the_exact_solution():
    x = start()
    exact = x * (DATA_VARIANCE / (DATA_VARIANCE + SIGMAS[0] ** 2)) ** 0.5
    errors = []
    for steps in (10, 100, 1000):
        out = sample_consistency(gaussian, x, consistency_sigmas(DiscreteSchedule().sigma, 1, steps))
        errors.append(float((out - exact).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def fake_network(z, t, **kwargs):
    """Any smooth function of latents and time will do."""
    return torch.tanh(z * 0.7 + t.view(-1, *[1] * (z.ndim - 1)) / 1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 20])
def test_gamma_0_equals_diffusers_ddim(prediction_type, steps):
    diffusers = pytest.importorskip("diffusers")
    ddim = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    ddim.set_timesteps(steps)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    z = noise
    for t in ddim.timesteps:
        z = ddim.step(fake_network(z, t.float().expand(2)), t, z).prev_sample
    schedule = DiscreteSchedule()
    sigmas = consistency_sigmas(schedule.sigma, steps)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    out = sample_consistency(Denoiser(fake_network, schedule, prediction_type), x, sigmas)
    torch.testing.assert_close(out, z, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoiser_recovers_x0_from_the_true_target(prediction_type):
    schedule = DiscreteSchedule()
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    sigma = torch.tensor([0.3, 20.0], dtype=torch.float64)
    a = 1 / (1 + sigma**2).sqrt()
    b = sigma * a
    target = noise if prediction_type == "epsilon" else a[:, None] * noise - b[:, None] * x0
    seen = {}

    def network(z, t):
        seen.update(z=z, t=t)
        return target

    out = Denoiser(network, schedule, prediction_type)(x0 + sigma[:, None] * noise, sigma)
    torch.testing.assert_close(out, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen["z"], a[:, None] * x0 + b[:, None] * noise)
    torch.testing.assert_close(schedule.sigma(seen["t"]).double(), sigma, rtol=1e-4, atol=0)
    assert bool((seen["t"].frac() != 0).any()), "timesteps between trained levels stay fractional"


def test_noise_has_its_own_seed_and_stream():
    run = lambda seed: sample_consistency(gaussian, start(), SIGMAS, gamma=1.0, noise_seed=seed)  # noqa: E731
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    state = torch.random.get_rng_state()
    run(0)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


def test_starting_noise_of_the_same_seed_is_not_drawn_again():
    same = torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))
    drawn = []
    sample_consistency(
        lambda x, s: torch.zeros_like(x),
        same,
        torch.tensor([9.0, 1.0]),
        gamma=1.0,
        noise_seed=11,
        renoise=lambda sigma, noise, x0: drawn.append(noise) or x0,
    )
    assert abs(torch.corrcoef(torch.stack([drawn[0].flatten(), same.flatten()]))[0, 1]) < 0.2


@pytest.mark.parametrize("seed", [-1, 0, 2**64 - 1])
def test_any_seed_works(seed):
    assert sample_consistency(gaussian, start(), SIGMAS, gamma=0.5, noise_seed=seed).isfinite().all()


def test_callback_and_extra_args_reach_their_places():
    calls, seen, bar = [], [], []

    def model(x, sigma, *, seed):
        seen.append((seed, sigma.shape))
        return gaussian(x, sigma)

    def trange(n, disable):
        bar.append((n, disable))
        return range(n)

    sample_consistency(model, start(), SIGMAS, {"seed": 9}, calls.append, True, trange=trange)
    assert seen == [(9, (2,))] * 6 and bar == [(6, True)]
    assert [c["i"] for c in calls] == list(range(6))
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} == set(calls[0])
    assert [float(c["sigma"]) for c in calls] == SIGMAS[:-1].tolist()


def test_a_run_may_stop_above_zero():
    whole = sample_consistency(gaussian, start(), SIGMAS)
    half = sample_consistency(gaussian, start(), SIGMAS[:4])
    assert torch.equal(sample_consistency(gaussian, half, SIGMAS[3:]), whole)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_two_experts_add_the_noise_of_one_run(gamma, at):
    """Each runs a part of the steps with the same seed."""
    options = {"gamma": gamma, "noise_seed": 11}
    whole = sample_consistency(gaussian, start(), SIGMAS, **options)
    first = sample_consistency(gaussian, start(), SIGMAS[: at + 1], **options)
    assert torch.equal(sample_consistency(gaussian, first, SIGMAS[at:], **options), whole)


def test_every_level_has_a_noise_of_its_own():
    noises = torch.stack([fresh_noise(start(), 11, float(sigma)).flatten() for sigma in SIGMAS[:-1]])
    alike = torch.corrcoef(noises) - torch.eye(len(noises))
    assert alike.abs().max() < 0.2
    other = torch.nextafter(SIGMAS[1], SIGMAS[0])
    assert torch.equal(fresh_noise(start(), 11, float(other)), fresh_noise(start(), 11, float(SIGMAS[1])))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must lie in 0..1"):
        sample_consistency(gaussian, start(), SIGMAS, gamma=gamma)


def test_bad_sigmas_and_prediction_type_are_refused():
    with pytest.raises(ValueError, match="at least two sigmas"):
        sample_consistency(gaussian, start(), SIGMAS[:1])
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        Denoiser(fake_network, DiscreteSchedule(), "sample")
