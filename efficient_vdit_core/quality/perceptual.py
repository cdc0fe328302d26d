"""LPIPS (Zhang et al. 2018), where its package and the weights of its AlexNet are on this machine. Nothing is
downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What torchvision would otherwise fetch for lpips.LPIPS(net="alex").
_ALEXNET = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class Perceptual:
    """distance: of two frames (H, W, 3) in 0..1, or None where it is not available; note: why not, or what it is."""

    distance: Callable[[Tensor, Tensor], float] | None
    note: str


def find_lpips(device: torch.device) -> Perceptual:
    """LPIPS of AlexNet on ``device``, or the reason why not."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        return Perceptual(None, "not measured: lpips is not installed")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
    if not weights.is_file():
        return Perceptual(None, f"not measured: {_ALEXNET} is not in the hub folder of torch, and is never downloaded")
    model = lpips.LPIPS(net="alex", verbose=False).eval().to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> float:
        x, y = (frame.movedim(-1, 0)[None] * 2 - 1 for frame in (a, b))
        return float(model(x, y))

    return Perceptual(distance, "AlexNet")
