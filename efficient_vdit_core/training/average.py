"""The exponential moving average of weights that gets exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EVERY = 4  # averaging every fourth step costs a quarter and changes nothing that can be measured


class WeightAverage:
    """Keeps ``state``, the average of a state dict under ``decay`` a step, beside the weights or ``on_host``.

    Early on the decay is held down to step / (step + 40), so that the first weights do not linger.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float, *, on_host: bool = False) -> None:
        self.decay, self.on_host = decay, on_host
        self.state = {name: host_copy(v.detach()) if on_host else v.detach().clone() for name, v in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after ``step`` steps; after the first four, only every fourth step counts."""
        if step > EVERY and step % EVERY:  # a run of fewer steps has an average too
            return
        decay = min(self.decay**EVERY, step / (step + 40))
        floating = [name for name, value in state.items() if value.is_floating_point()]
        if self.on_host:
            for name in floating:  # one at a time: the host holds one more of them meanwhile
                self.state[name].lerp_(state[name].to(self.state[name].device), 1 - decay)
        else:
            torch._foreach_lerp_([self.state[n] for n in floating], [state[n] for n in floating], 1 - decay)
        for name in state.keys() - set(floating):
            self.state[name].copy_(state[name])


def host_copy(value: Tensor) -> Tensor:
    """A copy of its own in the host's memory."""
    return value.to("cpu", copy=True)
