"""Muon for a network's matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MUON_ABOVE = 6  # rows and columns; what is narrower has no directions to even out


class Muon(torch.optim.Muon):
    """PyTorch's, which makes a step orthogonal in bfloat16; here in float32 where the weights are on a CPU: one without units
    for bfloat16 takes twenty times as long for that. State is PyTorch's, and steps are sized as by its ``match_rms_adamw``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if closure is not None or any(weight.device.type != "cpu" for weight in weights):
            return super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, **group)
        return None

    def _update(self, weight: nn.Parameter, *, lr: float, weight_decay: float, momentum: float, ns_steps: int,
                ns_coefficients: tuple[float, float, float], eps: float, **_: object) -> None:  # fmt: skip
        assert weight.grad is not None
        past = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        past.lerp_(weight.grad, 1 - momentum)
        direction = orthogonal(weight.grad.lerp(past, momentum).float(), ns_coefficients, ns_steps, eps)
        weight.mul_(1 - lr * weight_decay)
        weight.add_(direction, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """A matrix with its singular values brought near to 1, by ``steps`` of the Newton-Schulz iteration with the polynomial of
    these odd ``coefficients``. Source: Jordan et al., "Muon", 2024."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def is_for_muon(weight: nn.Parameter) -> bool:
    """Whether it is a matrix that is wide enough."""
    return weight.ndim == 2 and min(weight.shape) > MUON_ABOVE


def muon_and_adamw(
    matrices: Iterable[nn.Parameter],
    weights: Iterable[nn.Parameter],
    *,
    rates: tuple[float, float],
    decays: tuple[float, float],
) -> list[torch.optim.Optimizer]:
    """Muon over ``matrices`` and AdamW over those of ``weights`` that are not among them, where there are any.

    ``rates`` and ``decays``: Muon's and AdamW's; Muon's steps are scaled to the size of AdamW's.
    """
    matrices = list(matrices)
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in weights if id(weight) not in taken]
    muon = Muon(matrices, lr=rates[0], weight_decay=decays[0], momentum=0.95, adjust_lr_fn="match_rms_adamw")
    if not rest:
        return [muon]
    return [muon, torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.99), weight_decay=decays[1])]
