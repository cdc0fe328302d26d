"""Times attention whose heads differ, with and without neighbours and mean frames, against dense attention: what these cost
beyond their FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..attention import TokenLayout, tile_attention
from ..plan.head_patterns import by_head
from ..tiles import TilePattern, TokenGrid
from .turns import medians

NEAR = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 2))  # windows, and mean frames beside them
GROUPS, REFERENCES = (1, 2, 4), (1, 2, 4, 6)
# Latent frames, tokens a frame, heads, head_dim: small enough for two cores.
SHAPES = ((24, 400, 12, 96), (21, 784, 8, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(device: torch.device, *, repeats: int, seed: int, backend: str) -> Iterator[dict[str, Any]]:
    """One row for each dtype, shape, window, means and number of groups; the heads of a group stand apart, the worst case.

    Dense attention is timed beside each, in turn, and medians are compared. ``efficiency`` 1 is all that the FLOPs
    promise.
    """
    for dtype, shape, near, groups in itertools.product(DTYPES, SHAPES, NEAR, GROUPS):
        if near[1] and backend not in ("auto", "parts"):
            continue  # only these compute mean frames
        yield _row(device, dtype, shape, near, groups, repeats, seed, backend)


def _row(
    device: torch.device, dtype: str, shape: tuple[int, int, int, int], near: tuple[int, int], groups: int, repeats: int,
    seed: int, backend: str,
) -> dict[str, Any]:  # fmt: skip
    (window, means), (frames, tokens, heads, head_dim) = near, shape
    layout, generator = TokenLayout(TokenGrid(frames, 1, tokens)), torch.Generator().manual_seed(seed)
    size = (1, heads, layout.tokens, head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for _ in range(3))
    patterns = [TilePattern(k, window=window, means=means) for k in REFERENCES[:groups]]
    pattern = by_head(patterns[head % groups] for head in range(heads))
    runs = {
        "dense": lambda: tile_attention(q, k, v, layout, TilePattern(None)),
        "sparse": lambda: tile_attention(q, k, v, layout, pattern, backend=backend),
    }
    with torch.no_grad():
        for run in runs.values():
            run()
        times = medians(runs, device, repeats)
    dense, sparse = times["dense"], times["sparse"]
    density = pattern.density(frames)
    return {
        "frames": frames, "tokens_per_frame": tokens, "heads": heads, "head_dim": head_dim, "dtype": dtype,
        "backend": backend, "window": window, "means": means, "groups": groups, "density": density, "dense_milliseconds": 1000 * dense,
        "milliseconds": 1000 * sparse, "speedup": dense / sparse, "efficiency": dense / sparse * density,
    }  # fmt: skip
