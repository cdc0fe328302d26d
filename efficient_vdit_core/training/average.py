"""The exponential moving average of weights that gets exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EVERY = 4  # averaging every fourth step costs a quarter and changes nothing that can be measured


class WeightAverage:
    """Keeps ``state``, the average of a state dict under ``decay`` a step.

    Early on the decay is held down to step / (step + 40), so that the first weights do not linger.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after ``step`` steps; after the first four, only every fourth step counts."""
        if step > EVERY and step % EVERY:  # a run of fewer steps has an average too
            return
        decay = min(self.decay**EVERY, step / (step + 40))
        floating = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[n] for n in floating], [state[n] for n in floating], 1 - decay)
        for name in state.keys() - set(floating):
            self.state[name].copy_(state[name])
