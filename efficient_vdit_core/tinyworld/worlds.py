"""The two worlds by name: what draws their clips, says them and judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation.request import TIME
from .crossing import scene as crossing
from .crossing.judge import crossing_figures, read_crossing
from .moving import scene as moving
from .moving.figures import Progress, figures_of_readings
from .moving.reader import read_clip

__all__ = ["CROSSING", "MOVING", "WORLDS", "Progress", "World"]

# In model range, -1 to 1: a pixel this far from the ground shows a shape, further than a ground's own texture goes.
_PLAIN, _TEXTURED = 0.1, 0.4


@dataclass(frozen=True)
class World:
    """A world of captioned clips, uint8 (F, 64, 64, 3).

    Attributes:
        frames, size: of a whole clip, and the pixels of its height and width.
        random_scene, held_out_scenes: scenes of a generator, and so many whose captions are never trained on.
        random_words: a scene for its caption alone, which may be no scene that can be drawn.
        is_held_out: whether a scene is one of those.
        render: the clip of a scene, with ``frames`` and ``first`` a part of it.
        read: what is seen in a clip, as small as can be.
        figures: what clips show of the captions of scenes, by what was read of them: `figures.figures_of_readings` or alike.
        vocabulary: what a caption may name, and ``named`` which of it a scene's does.
        shapes: where clips (B, 3, F, H, W) in model range show shapes: bool (B, 1, F, H, W).
    """

    name: str
    frames: int
    random_scene: Callable[[np.random.Generator], Any]
    random_words: Callable[[np.random.Generator], Any]
    held_out_scenes: Callable[[int], list[Any]]
    is_held_out: Callable[[Any], bool]
    render: Callable[..., np.ndarray]
    read: Callable[[np.ndarray], Any]
    figures: Callable[[Sequence[Any], Sequence[Any]], dict[str, Any]]
    vocabulary: dict[str, tuple[str, ...]]
    named: Callable[[Any], dict[str, str]]
    shapes: Callable[[Tensor], Tensor]
    size: int = 64

    def trained_on(self, draw: Callable[[np.random.Generator], Any], rng: np.random.Generator) -> Any:
        """The next scene of ``draw`` that is not held out."""
        while self.is_held_out(scene := draw(rng)):
            pass
        return scene

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // TIME + 1


def _moving(scene: moving.Scene) -> dict[str, str]:
    return {name: getattr(scene, name) for name in moving.ATTRIBUTES}


def _on_plain_ground(clips: Tensor) -> Tensor:
    return (clips - clips[..., :1, :1]).abs().amax(dim=1, keepdim=True) > _PLAIN


MOVING = World(
    "moving", moving.FRAMES, moving.random_scene, moving.random_scene, moving.held_out_scenes, moving.is_held_out,
    moving.render, read_clip, figures_of_readings,
    {"shape": moving.SHAPES, "color": tuple(moving.COLORS), "direction": tuple(moving.DIRECTIONS), "speed": tuple(moving.SPEEDS),
     "background": tuple(moving.BACKGROUNDS)},
    _moving, _on_plain_ground,
)  # fmt: skip

_ORDER = ("first", "second")
_OF_A_MOVER: dict[str, tuple[str, ...]] = {
    "shape": moving.SHAPES,
    "color": tuple(moving.COLORS),
    "direction": tuple(crossing.DIRECTIONS),
    "speed": tuple(crossing.SPEEDS),
}


def _crossing(scene: crossing.CrossingScene) -> dict[str, str]:
    movers = zip(_ORDER, scene.movers, strict=True)
    of_movers = {f"{which} {name}": getattr(mover, name) for which, mover in movers for name in _OF_A_MOVER}
    return {**of_movers, "ground": scene.ground, "front": _ORDER[scene.front]}


def _on_textured_ground(clips: Tensor) -> Tensor:
    """All that is unlike the median colour beside the bar, and not the bar."""
    beside = torch.from_numpy(crossing.OPEN).to(clips.device)
    ground = clips[..., beside].flatten(2).median(dim=2).values[..., None, None, None]
    return ((clips - ground).abs().amax(dim=1, keepdim=True) > _TEXTURED) & beside


CROSSING = World(
    "crossing", crossing.FRAMES, crossing.random_scene, crossing.random_words,
    crossing.held_out_scenes, crossing.is_held_out, crossing.render, read_crossing, crossing_figures,
    {**{f"{which} {name}": values for which in _ORDER for name, values in _OF_A_MOVER.items()},
     "ground": tuple(crossing.GROUNDS), "front": _ORDER},
    _crossing, _on_textured_ground,
)  # fmt: skip

WORLDS = {found.name: found for found in (MOVING, CROSSING)}
