"""A plan: one tile pattern for every layer of a model, with where it came from, as a small JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .files import write_text
from .limits.documents import parse_json, read_text
from .limits.quote import named, quoted
from .tiles import TilePattern

SCHEMA_VERSION = 1
MAX_LAYERS = 1024
MAX_REFERENCE_FRAMES = 1024
ANY_FAMILY = "any"
ALL = "all"  # in a plan's text: every layer


@dataclass(frozen=True)
class TilePlan:
    """Patterns of a model's layers.

    ``patterns`` has one entry a layer; with ``uniform`` set instead the plan fits any depth, and ``dense_layers``
    (which may hold negative indices, counted from the end) stay full. ``frames`` and ``heads`` say what it was made
    for.
    """

    patterns: tuple[TilePattern, ...] = ()
    uniform_pattern: TilePattern | None = None
    dense_layers: tuple[tuple[int, int], ...] = ()
    family: str = ANY_FAMILY
    frames: int | None = None
    heads: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.patterns) == (self.uniform_pattern is not None):
            raise ValueError("A plan needs either one pattern a layer or one uniform pattern, and not both.")

    @classmethod
    def uniform(cls, k: int | None, layers: int | None = None, **about: Any) -> TilePlan:
        """The same k reference frames in every layer (None = full); for any depth unless ``layers`` is given."""
        if layers is None:
            return cls(uniform_pattern=TilePattern(k), **about)
        return cls(patterns=(TilePattern(k),) * layers, **about)

    def pattern(self, layer: int, layers: int | None = None) -> TilePattern:
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
        """Raise ValueError where the plan was made for another model family, depth or head count."""
        if family and self.family not in (ANY_FAMILY, family):
            raise ValueError(
                f"The plan was made for the model family {quoted(self.family)}, but the model is {quoted(family)}. "
                "Choose a plan for this model, or a uniform one."
            )
        if layers is not None and self.patterns and len(self.patterns) != layers:
            raise ValueError(
                f"The plan has {len(self.patterns)} layers, but the model has {layers}. It was made for another model; "
                "choose a plan of the right depth, or a uniform one."
            )
        if heads is not None and self.heads not in (None, heads):
            raise ValueError(
                f"The plan was made for {self.heads} attention heads, but the model has {heads}. "
                "Choose a plan for this model, or a uniform one."
            )

    def density(self, frames: int, layers: int | None = None) -> float:
        """Mean share of frame x frame tiles computed over all layers, at ``frames`` latent frames."""
        depth = len(self.patterns) or layers or 1
        return sum(self.pattern(i, depth).density(frames) for i in range(depth)) / depth

    def to_json(self) -> str:
        """The plan as JSON: reference frame counts, null for a full layer."""
        counts = [p.k for p in self.patterns]
        values = {
            "schema_version": SCHEMA_VERSION,
            "family": self.family,
            "frames": self.frames,
            "heads": self.heads,
            "reference_frames": counts if self.uniform_pattern is None else self.uniform_pattern.k,
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
        _check_version(values.get("schema_version"))
        counts = values.get("reference_frames", [])
        about: dict[str, Any] = {
            "family": _typed(values, "family", str, ANY_FAMILY) or ANY_FAMILY,
            "frames": _count(values.get("frames"), "frames"),
            "heads": _count(values.get("heads"), "heads"),
            "dense_layers": _ranges(values.get("dense_layers", [])),
            "provenance": _typed(values, "provenance", dict, {}) or {},
        }
        if not isinstance(counts, list):
            return cls(uniform_pattern=TilePattern(_count(counts, "reference_frames")), **about)
        if not 1 <= len(counts) <= MAX_LAYERS:
            raise ValueError(
                f"The plan's reference_frames has {len(counts)} layers, expected 1 to {MAX_LAYERS}. "
                "No model has that depth; save the plan again."
            )
        patterns = tuple(TilePattern(_count(c, f"reference_frames[{i}]")) for i, c in enumerate(counts))
        return cls(patterns=patterns, **about)

    def to_text(self) -> str:
        """One line to share, such as ``0:full 1-4:2:6 5-31:1:7``; ``all:2 -1:full`` where the plan fits any depth.

        Holds the patterns and, in ``k:T-k``, the frames they were made for; not the family, the heads or the
        provenance.
        """
        frames = self.frames

        def name(pattern: TilePattern) -> str:
            return pattern.name(frames) if frames else "full" if pattern.k is None else str(pattern.k)

        if self.uniform_pattern is not None:
            # Layers counted from the end stand alone in a text.
            ranges = [
                r for a, b in self.dense_layers for r in ([(a, b)] if a >= 0 else [(i, i) for i in range(a, b + 1)])
            ]
            dense = [f"{first}:full" if first == last else f"{first}-{last}:full" for first, last in ranges]
            return " ".join([f"{ALL}:{name(self.uniform_pattern)}", *dense])
        names, parts, start = [name(self.pattern(i)) for i in range(len(self.patterns))], [], 0
        for i in range(1, len(names) + 1):
            if i == len(names) or names[i] != names[start]:
                parts.append(f"{start}:{names[start]}" if i - start == 1 else f"{start}-{i - 1}:{names[start]}")
                start = i
        return " ".join(parts)

    @classmethod
    def from_text(cls, text: str) -> TilePlan:
        """Read ``to_text``'s form. Raises ValueError that names the part that cannot be read, is missing or is said
        twice."""
        return _from_parts([_read_part(part) for part in _words(text)])

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


def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``0-2,5,-1`` as inclusive ranges; negative indices count from the end and stand alone."""
    ranges = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(-?\d{1,4})|(\d{1,4})\s*-\s*(\d{1,4})", part)
        first, last = (int(match[1] or match[2]), int(match[1] or match[3])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"The layers {quoted(text)} cannot be read at {quoted(part)}, expected a list such as '0-2,-1'. Correct dense_blocks."
            )
        ranges.append((first, last))
    return tuple(ranges)


Part = tuple[str, int, int, TilePattern, "int | None"]  # as written, first and last layer, pattern, latent frames


def _words(text: str) -> list[str]:
    words = text.split()
    if not 1 <= len(words) <= MAX_LAYERS:
        raise ValueError(f"The plan text has {len(words)} parts, expected 1 to {MAX_LAYERS} such as '0:full 1-4:2:6'.")
    return words


def _read_part(part: str) -> Part:
    """``0:full``, ``1-4:2:6``, ``5:2``, ``-1:full`` or ``all:2``; all layers are -MAX_LAYERS to MAX_LAYERS."""
    match = re.fullmatch(r"(all|-?\d{1,4}|\d{1,4}-\d{1,4}):(full|\d{1,4}(?::\d{1,4})?)", part.lower())
    if match is None:
        raise ValueError(
            f"The plan text cannot be read at {quoted(part)}, expected parts such as '0:full', '1-4:2:6' or 'all:2'."
        )
    layers, pattern = match[1], TilePattern.parse(match[2])
    frames = sum(map(int, match[2].split(":"))) if ":" in match[2] else None
    if max(pattern.k or 0, frames or 0) > MAX_REFERENCE_FRAMES:
        raise ValueError(
            f"The plan text asks for more than {MAX_REFERENCE_FRAMES} frames at {quoted(part)}; no video has as many latent ones."
        )
    if layers == ALL:
        return part, -MAX_LAYERS, MAX_LAYERS, pattern, frames
    first, last = (int(layers), int(layers)) if layers.lstrip("-").isdigit() else map(int, layers.split("-"))
    if last < first or max(abs(first), abs(last)) >= MAX_LAYERS:
        raise ValueError(
            f"The plan text names the layers {quoted(layers)}, expected ascending ones from 0 to {MAX_LAYERS - 1}."
        )
    return part, first, last, pattern, frames


def _from_parts(parts: list[Part]) -> TilePlan:
    lengths = {frames for *_, frames in parts if frames}
    if len(lengths) > 1:
        found = " and of ".join(map(str, sorted(lengths)))
        raise ValueError(f"The plan text speaks of {found} latent frames, expected the same number in all parts.")
    frames = lengths.pop() if lengths else None
    if any(first == -MAX_LAYERS for _, first, *_ in parts):
        (_, _, _, uniform, _), *rest = parts
        if parts[0][1] != -MAX_LAYERS or any(
            first == -MAX_LAYERS or pattern.k is not None for _, first, _, pattern, _ in rest
        ):
            raise ValueError(
                "In a plan text, 'all:...' must stand first and once, and only parts such as '-1:full' may follow."
            )
        return TilePlan(
            uniform_pattern=uniform, dense_layers=tuple((first, last) for _, first, last, *_ in rest), frames=frames
        )
    layers: dict[int, TilePattern] = {}
    for part, first, last, pattern, _ in parts:
        for layer in range(first, last + 1):
            if layer in layers or layer < 0:
                reason = "counts from the end, which only follows 'all:...'" if layer < 0 else "is named twice"
                raise ValueError(f"In the plan text, layer {layer} of {quoted(part)} {reason}.")
            layers[layer] = pattern
    missing = next((i for i in range(max(layers) + 1) if i not in layers), None)
    if missing is not None:
        raise ValueError(f"The plan text leaves out layer {missing}, expected every layer from 0 to {max(layers)}.")
    return TilePlan(patterns=tuple(layers[i] for i in sorted(layers)), frames=frames)


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"The plan's schema_version is {quoted(version)}, expected {SCHEMA_VERSION}. It is not a tile plan file."
        )
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"The plan has schema_version {quoted(version)}, this version reads up to {SCHEMA_VERSION}. Update the node pack."
        )


def _typed(values: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = values.get(name, default)
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"The plan's {name} is {quoted(value)}, expected a {kind.__name__}. Correct the file or save it again."
        )
    return value


def _count(value: Any, name: str) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (whole and 0 <= value <= MAX_REFERENCE_FRAMES):
        return value
    raise ValueError(
        f"The plan's {name} is {quoted(value)}, expected null or a whole number from 0 to {MAX_REFERENCE_FRAMES}. "
        "Correct the file or save it again."
    )


def _ranges(value: Any) -> tuple[tuple[int, int], ...]:
    def is_range(pair: Any) -> bool:
        """Ascending, both ends counted from the same side."""
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and abs(i) < MAX_LAYERS for i in pair)
        return whole and pair[0] <= pair[1] and (pair[0] < 0) == (pair[1] < 0)

    if not isinstance(value, list) or len(value) > MAX_LAYERS or not all(map(is_range, value)):
        raise ValueError(
            f"The plan's dense_layers is {quoted(value)}, expected at most {MAX_LAYERS} ascending pairs such as "
            "[[0, 2], [-1, -1]]. Correct the file."
        )
    return tuple((first, last) for first, last in value)
