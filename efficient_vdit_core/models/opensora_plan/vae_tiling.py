"""Codes long or large clips in tiles, by the rules of the reference sampling scripts.

Tiled results differ a little from untiled ones, because GroupNorm then averages over a tile: use these tiles to compare
with upstream. Time: chunks overlap by one latent frame, and the doubled first frame is dropped. Space: tiles overlap by
an eighth, cross-faded linearly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .vae import CausalVAE

TIME_FACTOR, SPACE_FACTOR = 4, 8
LATENT_FRAMES = 8
LATENT_SIZE = 64
OVERLAP = 0.125


def latent_chunks(frames: int, size: int = LATENT_FRAMES) -> list[tuple[int, int]]:
    """Latent frame ranges that are decoded together: ``size`` each, at least 2, starting every ``size`` - 1."""
    return _chunks(frames, max(size, 2) - 1)


def pixel_chunks(frames: int, size: int = LATENT_FRAMES) -> list[tuple[int, int]]:
    """Pixel frame ranges that are encoded together: 4 (size - 1) + 1 each, of at least 2 latents, overlapping by one frame."""
    return _chunks(frames, TIME_FACTOR * (max(size, 2) - 1))


def tiled_decode(
    vae: CausalVAE, z: Tensor, *, latent_size: int = LATENT_SIZE, latent_frames: int = LATENT_FRAMES
) -> Tensor:
    """Unscaled latents (B, z, t, h, w) to pixels (B, 3, 4 (t - 1) + 1, 8 h, 8 w)."""
    parts = []
    for start, stop in latent_chunks(z.shape[2], latent_frames):
        pixels = _in_tiles(vae.decode, z[:, :, start:stop], latent_size, 1, SPACE_FACTOR)
        parts.append(pixels if start == 0 else pixels[:, :, 1:])
    return torch.cat(parts, dim=2)


def tiled_encode(
    vae: CausalVAE, x: Tensor, *, latent_size: int = LATENT_SIZE, latent_frames: int = LATENT_FRAMES
) -> Tensor:
    """Pixels (B, 3, 4 n + 1, H, W) in [-1, 1] to mean latents (B, z, n + 1, H / 8, W / 8), unscaled."""
    parts = []
    for start, stop in pixel_chunks(x.shape[2], latent_frames):
        latents = _in_tiles(vae.encode, x[:, :, start:stop], latent_size, SPACE_FACTOR, 1)
        parts.append(latents if start == 0 else latents[:, :, 1:])
    return torch.cat(parts, dim=2)


def _chunks(frames: int, step: int) -> list[tuple[int, int]]:
    starts = list(range(0, frames, step))
    chunks = [(start, successor + 1) for start, successor in zip(starts, starts[1:], strict=False)]
    if not chunks or chunks[-1][1] < frames:
        chunks.append((starts[-1], frames))
    return chunks


def tile_step(latent_size: int) -> int:
    """How far apart tiles of ``latent_size`` begin, in latents: whole ones, so that tiles meet in pixels too."""
    return int(latent_size * (1 - OVERLAP))


def _in_tiles(code: Callable[[Tensor], Tensor], x: Tensor, latent_size: int, before: int, after: int) -> Tensor:
    """``code`` over square tiles of the last two axes, each up to ``latent_size`` latents wide.

    ``before`` and ``after``: how many elements a latent is wide in ``x`` and in the result.
    """
    height, width = x.shape[-2:]
    tile, step = latent_size * before, tile_step(latent_size) * before
    if height <= tile and width <= tile:
        return code(x)
    keep = tile_step(latent_size) * after
    blend = latent_size * after - keep
    rows = []
    for top in range(0, height, step):
        rows.append([code(x[..., top : top + tile, left : left + tile]) for left in range(0, width, step)])
    lines = []
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            if i:
                _cross_fade(rows[i - 1][j], part, blend, axis=-2)
            if j:
                _cross_fade(row[j - 1], part, blend, axis=-1)
        lines.append(torch.cat([part[..., :keep, :keep] for part in row], dim=-1))
    return torch.cat(lines, dim=-2)


def _cross_fade(before: Tensor, after: Tensor, extent: int, axis: int) -> None:
    """Blend the first ``extent`` lines of ``after`` in place with the last ones of ``before``."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    weight = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    weight = weight[:, None] if axis == -2 else weight
    head = after.narrow(axis, 0, extent)
    tail = before.narrow(axis, before.shape[axis] - extent, extent)
    head.copy_(tail * (1 - weight) + head * weight)
