"""Frozen weights that stay in the host's memory: computed there, where a few rows are faster than weights travel, or sent to
the GPU block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...training.fsdp import block_classes, blocks_of
from ...training.live_bytes import size_of


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


def stream_blocks(module: nn.Module, device: torch.device) -> None:
    """Keep a frozen model's weights in the host's memory; those of a block are on ``device`` while it runs, and so are those
    of a layer outside the blocks. Blocks are what the model names in ``_no_split_modules``.
    """
    from accelerate import cpu_offload

    cpu_offload(module, execution_device=device, preload_module_classes=block_classes(module))


def largest_block(module: nn.Module) -> int:
    """Bytes that `stream_blocks` has on the device at most."""
    blocks = blocks_of(module)
    inside = {id(part) for block in blocks for part in block.modules()}
    sizes = [size_of(block.parameters()) for block in blocks]
    sizes += [size_of(m.parameters(recurse=False)) for m in module.modules() if id(m) not in inside]
    return max(sizes)
