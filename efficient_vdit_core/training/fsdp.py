"""Weights that FSDP2 (PyTorch's ``fully_shard``) spread over the processes: gathered for files, cut again when read.

So a file looks the same whether plain, data-parallel or sharded processes wrote it. A sharded tensor is a DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharding(accelerator: Any) -> bool:
    """Whether accelerate's Accelerator, or None, spreads the weights of what it prepares."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def gathered(state: Any, *, keep: bool) -> Any:
    """``state`` (nested dicts and lists) with whole tensors on the CPU in place of sharded ones.

    Every process calls it with the same names in the same order; where ``keep`` is False what was gathered is dropped
    at once.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, Mapping):
        return {name: gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor().detach()
    return whole.cpu() if keep else None


def cut(whole: Tensor, layout: Tensor) -> Tensor:
    """``whole`` as ``layout`` is spread over the processes, each of which holds all of it; else ``whole`` itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(layout, DTensor) or whole.shape != layout.shape:
        return whole
    # Without a source rank nothing is sent: each process keeps its own part.
    return distribute_tensor(whole.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)


def cut_optimizer(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimiser's saved state with everything that has its parameter's shape cut as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # as torch numbers them
    state = {
        index: {
            name: cut(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    return {**saved, "state": state}


def shard_frozen(module: nn.Module, accelerator: Any) -> None:
    """Spread a model that is not trained, block by block, as accelerate spreads the one that is; its precision stays.

    Blocks are those that the model names in ``_no_split_modules``, as Hugging Face models do.
    """
    from torch.distributed.fsdp import fully_shard

    plugin = accelerator.state.fsdp_plugin
    settings = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for block in blocks_of(module):
        fully_shard(block, **settings)
    fully_shard(module, **settings)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a model: modules of the classes that it names in ``_no_split_modules``."""
    names = block_classes(module)
    return [m for m in module.modules() if type(m).__name__ in names]


def block_classes(module: nn.Module) -> list[str]:
    return list(getattr(module, "_no_split_modules", None) or [])


def run_in_autocast(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Let ``module`` compute in ``dtype`` where that is safe. accelerate does this for the models that it prepares, but for FSDP2's."""
    module.forward = torch.autocast(device, dtype)(module.forward)
