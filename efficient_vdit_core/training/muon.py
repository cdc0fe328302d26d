"""Muon for a network's matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

MUON_ABOVE = 6  # rows and columns; what is narrower has no directions to even out


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
    muon = torch.optim.Muon(
        matrices, lr=rates[0], weight_decay=decays[0], momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    if not rest:
        return [muon]
    return [muon, torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.99), weight_decay=decays[1])]
