"""Runs a network down the segment edges, many videos at once: fixed-seed samples, data-free training data,
evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sampling.path import NoisePath, ddim_step, half_a_step_on, predict_x0
from ...sampling.schedule import segment_edges

Predict = Callable[[Tensor, Tensor, Any], Tensor]


def guided(predict: Predict, condition: Any, negative: Any, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """network(z, time) -> raw output under classifier-free guidance; ``guidance`` 1 asks for ``condition`` alone."""

    def network(z: Tensor, time: Tensor) -> Tensor:
        out = predict(z, time, condition).float()
        if guidance == 1.0:
            return out
        without = predict(z, time, negative).float()
        return without + guidance * (out - without)

    return network


@torch.no_grad()
def roll_down(
    network: Callable[[Tensor, Tensor], Tensor],
    path: NoisePath,
    prediction: str,
    noise: Tensor,
    *,
    segments: int,
    steps: int | None = None,
) -> Tensor:
    """Clean latents from unit noise (B, ...) by deterministic jumps along ``segment_edges``."""
    *_, (_, z) = trajectory(network, path, prediction, noise, segments=segments, steps=steps)
    return z


@torch.no_grad()
def trajectory(
    network: Callable[[Tensor, Tensor], Tensor],
    path: NoisePath,
    prediction: str,
    noise: Tensor,
    *,
    segments: int,
    steps: int | None = None,
    order: int = 1,
) -> Iterator[tuple[float, Tensor]]:
    """Yields (timestep, z) after each jump; the last z is clean. ``order`` 2, for steps that are equally long, is
    `half_a_step_on`'s."""
    times = segment_edges(segments, steps, start=path.start, clean=path.clean)
    levels = list(zip(*(c.tolist() for c in path.coefficients(times)), strict=True))
    z, before = noise, None
    for i, (here, there) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        (a, s), (a_to, s_to) = ((noise.new_tensor(v) for v in pair) for pair in (here, there))
        out = network(z, path.network_time(times[i : i + 1]).to(z.device).expand(len(z)))
        x = predict_x0(prediction, z, out, a, s)
        z = ddim_step(z, half_a_step_on(x, before), a, s, a_to, s_to)
        before = x if order == 2 else None
        yield float(times[i + 1]), z
