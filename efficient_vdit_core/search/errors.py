"""Relative L2 errors against a dense result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """||approximate - exact|| / ||exact|| over all elements of (B, H, ...); inf where anything is not finite."""
    return relative_errors(approximate, exact)[0]


def relative_errors(approximate: Tensor, exact: Tensor) -> tuple[float, np.ndarray]:
    """As ``relative_error``, and the square of each head's part in it (H,); they sum to the square of the first."""
    differences, total = squared_errors(approximate, exact)
    wrong, norm = float(sum(differences)), float(total)
    of_heads = torch.stack(differences).double().cpu().numpy()
    if not (math.isfinite(wrong) and math.isfinite(norm)):
        return math.inf, np.full(len(of_heads), math.inf)
    if not norm:
        return (math.inf if wrong else 0.0), np.where(of_heads > 0, math.inf, 0.0)
    return math.sqrt(max(wrong, 0.0)) / norm**0.5, of_heads / norm


def flat(output: Any) -> Tensor:
    """The tensors of a module's output as one of shape (1, 1, n)."""
    tensors = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
    return torch.cat([t.flatten() for t in tensors])[None, None]


def squared_errors(approximate: Tensor, exact: Tensor) -> tuple[list[Tensor], Tensor]:
    """||approximate - exact||^2 of each head of (B, H, ...), and ||exact||^2 of all."""
    differences, total = [], torch.zeros((), dtype=torch.float32, device=exact.device)
    # A head at a time: the float32 copies stay small.
    for a, e in zip(approximate.unbind(1), exact.unbind(1), strict=True):
        differences.append((a.float() - e.float()).square().sum())
        total = total + e.float().square().sum()
    return differences, total
