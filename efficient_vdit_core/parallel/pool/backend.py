"""By what the ranks of a pool exchange their tensors."""

from __future__ import annotations

import torch.distributed as dist


def backend_for(device: str) -> str:
    """``nccl`` between GPUs, where this PyTorch has it: on Windows none does. Else ``gloo``."""
    return "nccl" if device.startswith("cuda") and dist.is_nccl_available() else "gloo"
