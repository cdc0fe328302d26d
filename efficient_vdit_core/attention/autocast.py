"""Autocast of the arguments, as PyTorch's own attention has it.

On CUDA it leaves what a norm gives in float32 and what a matrix gives in halves: a model's q and k come in another dtype
than its v.
"""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which autocast has ``scaled_dot_product_attention`` compute with x; x's own outside of it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    # float64 stays, as everywhere under autocast.
    return torch.get_autocast_dtype(device) if x.is_floating_point() and x.dtype != torch.float64 else x.dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast gives ``scaled_dot_product_attention``; as they are outside of it."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors)
