"""Some of a call's heads, by slices."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import runs


def take_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """The ``heads`` (ascending) of x (B, H, N, D); a view where they are neighbours."""
    parts = [x[:, first:last] for _, first, last in runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def put_heads(out: Tensor, heads: tuple[int, ...], done: Tensor) -> None:
    """Writes ``done`` (B, h, N, D) to the ``heads`` (ascending) of ``out`` (B, H, N, D)."""
    for at, first, last in runs(heads):
        out[:, first:last] = done[:, at : at + last - first]
