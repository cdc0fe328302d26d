"""3D rotary position embedding of Open-Sora-Plan v1.2: a third of each head for time, height and width.

Within a third, channel j turns with channel j + third/2 ("half-split"). Positions are the integer token indices
divided by the checkpoint's interpolation scale of that axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rope_table(
    grid: tuple[int, int, int],
    scales: tuple[float, float, float],
    head_dim: int,
    *,
    device: torch.device,
    angle_dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (1, t*h*w, 1, 3, head_dim / 3) in fp32, for a (t, h, w) grid of tokens in row-major order,
    whose frames are those from number ``first`` on.

    ``angle_dtype`` bfloat16 rounds the angles first, as the reference model does when it runs in bfloat16.
    """
    third = head_dim // 3
    frequencies = THETA ** -(torch.arange(0, third, 2, device=device, dtype=torch.float32) / third)
    axes = [
        torch.arange(start, start + n, device=device, dtype=torch.float32) / s
        for start, n, s in zip((first, 0, 0), grid, scales, strict=True)
    ]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    angles = (positions[..., None] * frequencies).to(angle_dtype).float()
    angles = torch.cat([angles, angles], dim=-1)[None, :, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (B, N, heads, head_dim); computed in fp32, returned in x's dtype."""
    cos, sin = table
    thirds = x.float().unflatten(-1, (3, -1))
    half = thirds.shape[-1] // 2
    turned = thirds * cos
    turned[..., :half] -= thirds[..., half:] * sin[..., :half]  # in place: in fp32 a copy is twice as large as q
    turned[..., half:] += thirds[..., :half] * sin[..., half:]
    return turned.flatten(-2).to(x.dtype)
