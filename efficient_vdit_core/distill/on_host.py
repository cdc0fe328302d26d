"""Frozen parts of a model that stay in the host's memory, where a few rows are computed faster than weights travel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .live_bytes import size_of


class OnHost(nn.Module):
    """Computes ``held`` where its weights are and gives the result where the input was.

    It is no submodule: what moves, shares out, counts or saves a model's weights does not see it.
    """

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self._held = (held.requires_grad_(False),)

    def forward(self, x: Tensor) -> Any:
        (held,) = self._held
        there = next(held.parameters()).device
        return tree_map(lambda out: out.to(x.device), held(x.to(there)))

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return size_of(self._held[0].parameters())


def bytes_on_host(module: nn.Module) -> int:
    return sum(part.size for part in module.modules() if isinstance(part, OnHost))
