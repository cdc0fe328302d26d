"""The paper's own figures (Efficient-vDiT, arXiv 2502.06155, Table 1), which charts and tables stand beside ours."""

from __future__ import annotations

# (latent frames, reference frames; None = full) -> milliseconds of one attention call at 720p, 24 heads x 96, 3600
# tokens a frame
MILLISECONDS: dict[tuple[int, int | None], float] = {
    (8, None): 58.36,
    (8, 4): 46.52,
    (8, 3): 40.08,
    (8, 2): 31.35,
    (8, 1): 20.65,
    (24, None): 523.61,
    (24, 12): 397.72,
    (24, 8): 303.90,
    (24, 6): 244.13,
    (24, 4): 179.74,
    (24, 3): 142.77,
}


def speedup(frames: int, k: int | None) -> float | None:
    """The paper's speed-up of a mask over full attention, or None where it prints none."""
    if (frames, k) not in MILLISECONDS:
        return None
    return MILLISECONDS[frames, None] / MILLISECONDS[frames, k]


# Table 3: (video frames, GPUs) -> speed-up of one step by sequence parallelism over one GPU
PARALLEL_SPEEDUP: dict[tuple[int, int], float] = {(29, 2): 1.87, (29, 4): 3.68, (93, 2): 1.95, (93, 4): 3.91}
