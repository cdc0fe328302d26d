"""A plan: one tile pattern for every layer of a model, with where it came from, as a small JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..assets import preset_names
from ..limits.documents import parse_json, read_text
from ..limits.quote import named, quoted
from ..storage.files import write_text
from ..tiles import TilePattern
from .head_patterns import HeadPatterns, LayerPattern
from .schema import patterns_from_json, patterns_to_json, read_count, read_field, read_ranges
from .text import parse_layers, read_plan, write_layers, write_uniform

ANY_FAMILY = "any"


@dataclass(frozen=True)
class TilePlan:
    """Patterns of a model's layers.

    ``patterns`` has one entry a layer; with ``uniform`` set instead the plan fits any depth, and ``dense_layers``
    (which may hold negative indices, counted from the end) stay full. ``frames`` and ``heads`` say what it was made
    for.
    """

    patterns: tuple[LayerPattern, ...] = ()
    uniform_pattern: TilePattern | None = None
    dense_layers: tuple[tuple[int, int], ...] = ()
    family: str = ANY_FAMILY
    frames: int | None = None
    heads: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.patterns) == (self.uniform_pattern is not None):
            raise ValueError("A plan needs either one pattern a layer or one uniform pattern, and not both.")
        by_head = {len(p.patterns) for p in self.patterns if isinstance(p, HeadPatterns)}
        if by_head - {self.heads}:
            raise ValueError(
                f"The plan has layers of {', '.join(map(str, sorted(by_head)))} heads and says that it is for {self.heads}, "
                "expected the same number. Make the plan anew."
            )

    @classmethod
    def uniform(cls, k: int | None, layers: int | None = None, **about: Any) -> TilePlan:
        """The same k reference frames in every layer (None = full); for any depth unless ``layers`` is given."""
        if layers is None:
            return cls(uniform_pattern=TilePattern(k), **about)
        return cls(patterns=(TilePattern(k),) * layers, **about)

    def pattern(self, layer: int, layers: int | None = None) -> LayerPattern:
        """The pattern of one layer. ``layers`` is the model's depth, needed where dense layers count from the end."""
        depth = len(self.patterns) or layers
        for first, last in self.dense_layers:
            if first < 0 and depth is None:
                continue
            low, high = (i + (depth or 0) if i < 0 else i for i in (first, last))
            if low <= layer <= high:
                return TilePattern(None)
        if self.uniform_pattern is not None:
            return self.uniform_pattern
        if not 0 <= layer < len(self.patterns):
            raise ValueError(
                f"Layer {layer} was asked for, but the plan has {len(self.patterns)} layers: it was made for another "
                "model. Choose a plan of the right depth."
            )
        return self.patterns[layer]

    def with_dense(self, layers: str) -> TilePlan:
        """A copy in which the layers named by e.g. ``0-2,-1`` stay full; an empty text changes nothing."""
        return replace(self, dense_layers=self.dense_layers + parse_layers(layers))

    def check_fits(self, *, family: str | None = None, layers: int | None = None, heads: int | None = None) -> None:
        """Raise ValueError where the plan was made for another model family, depth or head count, or its dense layers are not
        all in the model."""
        if family and self.family not in (ANY_FAMILY, family):
            raise ValueError(
                f"The plan was made for the model family {quoted(self.family)}, but the model is {quoted(family)}. "
                f"Choose a plan for this model{_preset_of(family)}, or a uniform one."
            )
        if layers is not None and self.patterns and len(self.patterns) != layers:
            if len(self.patterns) == 1:
                raise ValueError(
                    f"The plan has a pattern for layer 0 alone, but the model has {layers} layers. A text for all of them begins with "
                    "all:, as all:2:6 does."
                )
            raise ValueError(
                f"The plan has {len(self.patterns)} layers, but the model has {layers}. It was made for another model; "
                "choose a plan of the right depth, or a uniform one."
            )
        if layers is not None:
            self._check_dense_layers(layers)
        if heads is not None and self.heads not in (None, heads):
            raise ValueError(
                f"The plan was made for {self.heads} attention heads, but the model has {heads}. "
                "Choose a plan for this model, or a uniform one."
            )

    def _check_dense_layers(self, depth: int) -> None:
        for edge in {edge for pair in self.dense_layers for edge in pair}:
            if not -depth <= edge < depth:
                raise ValueError(
                    f"dense_blocks or the plan names layer {edge}, but the model has {depth} layers: 0 to {depth - 1}, or -{depth} "
                    "to -1 counted from the end. Correct whichever it is."
                )

    def density(self, frames: int, layers: int | None = None) -> float:
        """Mean share of frame x frame tiles computed over all layers, at ``frames`` latent frames."""
        depth = len(self.patterns) or layers or 1
        return sum(self.pattern(i, depth).density(frames) for i in range(depth)) / depth

    def to_json(self) -> str:
        """The plan as JSON, in the first schema that holds it (``schema``)."""
        patterns = patterns_to_json(self.patterns if self.uniform_pattern is None else self.uniform_pattern)
        values = {
            "schema_version": patterns.pop("schema_version"),
            "family": self.family,
            "frames": self.frames,
            "heads": self.heads,
            **patterns,
            "dense_layers": [list(r) for r in self.dense_layers],
            "provenance": self.provenance,
        }
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TilePlan:
        """Read ``to_json``'s form. Raises ValueError that names the field where it was edited into nonsense."""
        values = parse_json(text, "The plan", advice="Save it again from the node or the CLI.")
        if not isinstance(values, dict):
            raise ValueError(f"The plan is {quoted(values)}, expected an object. It is not a tile plan file.")
        heads = read_count(values.get("heads"), "heads")
        patterns = patterns_from_json(values, heads)
        about: dict[str, Any] = {
            "family": read_field(values, "family", str, ANY_FAMILY) or ANY_FAMILY,
            "frames": read_count(values.get("frames"), "frames"),
            "heads": heads,
            "dense_layers": read_ranges(values.get("dense_layers", [])),
            "provenance": read_field(values, "provenance", dict, {}) or {},
        }
        if isinstance(patterns, TilePattern):
            return cls(uniform_pattern=patterns, **about)
        return cls(patterns=patterns, **about)

    def to_text(self) -> str:
        """One line to share (``text``), such as ``0:full 1-4:2:6 5-31:1:7``.

        Holds the patterns and, in ``k:T-k``, the frames they were made for; not the family or the provenance, and the
        number of heads only where they differ.
        """
        if self.uniform_pattern is not None:
            return write_uniform(self.uniform_pattern, self.dense_layers, self.frames)
        return write_layers([self.pattern(i) for i in range(len(self.patterns))], self.frames)

    @classmethod
    def from_text(cls, text: str) -> TilePlan:
        """Read ``to_text``'s form. Raises ValueError that names the part that cannot be read, is missing or is said
        twice."""
        return cls(**read_plan(text))

    def save(self, path: str | Path) -> None:
        """Write the JSON file; a file of that name is replaced only once the new one is whole."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TilePlan:
        """Read a plan file. Raises ValueError naming the file where it is not one."""
        try:
            return cls.from_json(read_text(path, "The plan"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{named(Path(path).name)} cannot be used as a plan: {error}") from error


def _preset_of(family: str) -> str:
    """The shipped plan of a family, as a part of a sentence; empty where there is none."""
    if family not in preset_names():
        return ""
    return f", such as its preset {family} ('{family} (preset)' in Load Tile Plan)"
