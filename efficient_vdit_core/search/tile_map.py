"""The tile map of a model: pictures and numbers of where its attention goes (Efficient-vDiT, Figure 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..plan import TilePlan
from ..plan.head_patterns import LayerPattern, join_heads
from ..tiles import TilePattern
from .describe import OTHER_FRAMES
from .draw import Panel, draw_panels
from .tile_mass import LEVELS, TileMass, averaged_tiles, kept_tiles

MOST_PANELS = 64  # of a picture, 200 to 600 MB; 12 layers with 4 groups of heads each have 60


def check_panels(layers: Iterable[int], depth: int, plan: TilePlan | None) -> None:
    """Raise ValueError where the picture of these ``layers`` would have too many maps."""
    kinds = [len(plan.pattern(layer, depth).kinds) if plan else 1 for layer in layers]
    count = sum(1 if n == 1 else 1 + n for n in kinds)
    if count > MOST_PANELS:
        raise ValueError(
            f"The picture would have {count} maps, one for each layer and each of its groups of heads, expected at most "
            f"{MOST_PANELS}. Choose fewer layers, or a plan with fewer groups of heads in these."
        )


def tile_map(
    measured: Mapping[int, TileMass],
    depth: int,
    plan: TilePlan | None = None,
    other: Mapping[int, TileMass] | None = None,
) -> tuple[np.ndarray, str]:
    """The picture (H, W, 3) in 0..1 and the report of the ``measured`` layers of a model with ``depth`` layers.

    A layer whose heads differ under ``plan`` has a map of all heads, and one for each group of them with its tiles.
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
    lines += _forwards(measured)
    if other:
        rows = len(first.important)
        lines.append(
            f"Overlap of two prompts: 2|A and B| / (|A| + |B|) of the key positions, mean of {rows} query rows, all heads."
        )
    for layer, mass in sorted(measured.items()):
        pattern = plan.pattern(layer, depth).scaled(plan.frames, frames) if plan else None
        panels += _panels(f"Layer {layer}", mass, pattern, other[layer] if other else None)
    for panel in panels:
        lines += ["", panel.title, *(f"  {note}" for note in panel.notes)]
    subtitle = "Share of each query frame's attention, in percent; colour grows with its square root."
    return draw_panels(panels, "Attention between frames", subtitle), "\n".join(lines)


def _forwards(measured: Mapping[int, TileMass]) -> list[str]:
    """What a map is the mean of where a step asks the model several times, and how many forwards it leaves out."""
    masses = measured.values()
    frames, seen = len(next(iter(masses)).share), max(int(mass.seen.max()) for mass in masses)
    left_out = max(mass.left_out for mass in masses)
    lines = [f"Mean over {seen} evaluations of that step: prompts, context windows, guidance."] if seen > 1 else []
    if left_out:
        lines.append(
            f"Forwards left out: {left_out}, over another number of latent frames than {frames}, as the first was. {OTHER_FRAMES}"
        )
    return lines


def _panels(title: str, mass: TileMass, pattern: LayerPattern | None, other: TileMass | None) -> list[Panel]:
    """The map of a layer, and where its heads differ one for each group of them, with its own tiles."""
    notes = _notes(mass, pattern, other)
    if pattern is None or len(pattern.kinds) == 1:
        return [_panel(title, mass, pattern.kinds[0] if pattern else None, notes)]
    panels = [_panel(title, mass, None, notes)]
    for alike, heads in pattern.head_groups(len(mass.of_heads)).items():
        part, noun = mass.of(heads), "head" if len(heads) == 1 else "heads"
        panels.append(_panel(f"{title}, {noun} {join_heads(heads)}", part, alike, _notes(part, alike, None)))
    return panels


def _panel(title: str, mass: TileMass, pattern: TilePattern | None, notes: list[str]) -> Panel:
    frames = len(mass.share)
    marks = (kept_tiles(pattern, frames), averaged_tiles(pattern, frames)) if pattern else (None, None)
    return Panel(title, mass.share, *marks, notes)


def _notes(mass: TileMass, pattern: LayerPattern | None, other: TileMass | None) -> list[str]:
    frames = len(mass.share)
    ratio = f" ({mass.diagonal / mass.off_diagonal:.1f}x)" if mass.off_diagonal else ""
    notes = [f"own frame {mass.diagonal:.1%}, another frame {mass.off_diagonal:.2%}{ratio}"]
    if float(mass.extra.mean()) > 0:
        notes.append(f"text and other tokens {float(mass.extra.mean()):.1%}")
    if pattern is not None:
        rest = ", rest in means" if any(alike.means for alike in pattern.kinds) else ""
        keeps = f"keeps {mass.kept(pattern):.1%} in {pattern.density(frames):.0%} of the tiles{rest}"
        name = pattern.name(frames)
        notes += [f"plan {name} {keeps}"] if len(pattern.kinds) == 1 else [name, f"plan {keeps}"]
    if other is not None:
        levels = "/".join(f"{level:.0%}"[:-1] for level in LEVELS)
        notes.append(f"overlap at {levels} %: " + " / ".join(f"{o:.0%}" for o in mass.overlap(other)))
    return notes
