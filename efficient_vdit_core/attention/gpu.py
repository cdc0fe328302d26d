"""Which GPUs the compiled backends can run on."""

from __future__ import annotations

import torch

OLDEST = (8, 0)  # Ampere: the first with bf16 in hardware


def too_old(device: torch.device) -> str:
    """Why a CUDA device is too old for Triton's kernels; an empty text where it is not. AMD's count differently and
    pass."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= OLDEST:
        return ""
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected {OLDEST[0]}.{OLDEST[1]} (Ampere) or later"
