"""The tile map of a model: pictures and numbers of where its attention goes (Efficient-vDiT, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..plan import TilePlan
from .draw import Panel, draw_panels
from .tile_mass import LEVELS, TileMass, averaged_tiles, kept_tiles


def tile_map(
    measured: Mapping[int, TileMass],
    depth: int,
    plan: TilePlan | None = None,
    other: Mapping[int, TileMass] | None = None,
) -> tuple[np.ndarray, str]:
    """The picture (H, W, 3) in 0..1 and the report of the ``measured`` layers of a model with ``depth`` layers.

    ``other``: the same layers under a second prompt, for the overlap of important positions. Raises ValueError where
    the attention is not finite.
    """
    for layer, mass in [*measured.items(), *(other or {}).items()]:
        if not bool(mass.share.isfinite().all()):
            raise ValueError(
                f"The attention of layer {layer} is not finite: the model overflows in its dtype. Load it as bf16 or fp32."
            )
    panels, lines = [], []
    first = next(iter(measured.values()))
    frames = len(first.share)
    lines.append(f"Measured on {first.rows} query rows of each of {frames} latent frames, all heads.")
    if other:
        rows = len(first.important)
        lines.append(
            f"Overlap of two prompts: 2|A and B| / (|A| + |B|) of the key positions, mean of {rows} query rows, all heads."
        )
    for layer, mass in sorted(measured.items()):
        notes = _notes(layer, mass, depth, plan, other[layer] if other else None)
        pattern = plan.pattern(layer, depth).scaled(plan.frames, frames) if plan else None
        marks = (kept_tiles(pattern, frames), averaged_tiles(pattern, frames)) if pattern else (None, None)
        panels.append(Panel(f"Layer {layer}", mass.share, *marks, notes))
        lines += ["", f"Layer {layer}", *(f"  {note}" for note in notes)]
    subtitle = "Share of each query frame's attention, in percent; colour grows with its square root."
    return draw_panels(panels, "Attention between frames", subtitle), "\n".join(lines)


def _notes(layer: int, mass: TileMass, depth: int, plan: TilePlan | None, other: TileMass | None) -> list[str]:
    frames = len(mass.share)
    ratio = f" ({mass.diagonal / mass.off_diagonal:.1f}x)" if mass.off_diagonal else ""
    notes = [f"own frame {mass.diagonal:.1%}, another frame {mass.off_diagonal:.2%}{ratio}"]
    if float(mass.extra.mean()) > 0:
        notes.append(f"text and other tokens {float(mass.extra.mean()):.1%}")
    if plan is not None:
        pattern = plan.pattern(layer, depth).scaled(plan.frames, frames)
        rest = ", means of the rest" if any(alike.means for alike in pattern.kinds) else ""
        keeps = f"keeps {mass.kept(pattern):.1%} in {pattern.density(frames):.0%} of the tiles{rest}"
        name = pattern.name(frames)
        notes += [f"plan {name} {keeps}"] if len(pattern.kinds) == 1 else [name, f"plan {keeps}"]
    if other is not None:
        levels = "/".join(f"{level:.0%}"[:-1] for level in LEVELS)
        notes.append(f"overlap at {levels} %: " + " / ".join(f"{o:.0%}" for o in mass.overlap(other)))
    return notes
