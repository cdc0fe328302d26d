"""Distillation on a 2-D mixture whose exact solution is known, in a short form; `evdit bench mixture` is the long
one."""

import torch

from efficient_vdit_core.bench.mixture import MixtureShape, data, exact_clean, run


def test_the_exact_denoiser_is_the_posterior_mean():
    """Against importance weights over a large sample."""
    x = data(200_000, torch.Generator().manual_seed(0)).double()
    a, s = 0.8, 0.6
    for z in ([0.9, 0.1], [0.2, -0.4]):
        z = torch.tensor([z], dtype=torch.float64)
        weight = torch.softmax(-(z - a * x).square().sum(-1) / (2 * s**2), dim=0)
        expected = (weight[:, None] * x).sum(0, keepdim=True)
        got = exact_clean(z, torch.full((1, 1), a, dtype=torch.float64), torch.full((1, 1), s, dtype=torch.float64))
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0)


def test_two_segments_beat_two_steps_of_the_teacher():
    """The long form reaches a third of the teacher's error; so short a training is only asked for the direction."""
    shape = MixtureShape(
        segments=2, teacher_steps=12, width=64, pretraining=150, steps=250, batch=192, rate=3e-3, exact_steps=50
    )
    found = run(shape)
    assert found["distilled"]["endpoint_error"] < 0.8 * found["undistilled"]["endpoint_error"]
