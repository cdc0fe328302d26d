"""Autocast of the arguments, as PyTorch's own attention has it.

On CUDA it leaves what a norm gives in float32 and what a matrix gives in halves: a model's q and k come in another dtype
than its v.
"""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast gives ``scaled_dot_product_attention``; as they are outside of it."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    lower = torch.get_autocast_dtype(device)
    # float64 stays, as everywhere under autocast.
    return tuple(x.to(lower) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
