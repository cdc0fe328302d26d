"""The patterns of a plan as JSON, in three schemas.

Schema 1 holds the paper's patterns: ``reference_frames`` is k, null for a full layer, for each layer or for all.
Schema 2 holds windows and heads that differ: ``patterns`` in its place, each ``{"k": 2, "window": 1}``, or a list of such
groups with ``"heads": "0-3,7"`` for a layer whose heads differ. Schema 3 holds mean frames too: ``"means": 1`` beside the
window. A plan is written in the first schema that holds it, so that older packs read it where they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..limits.quote import quoted
from ..tiles import MAX_MEANS, MAX_WINDOW, TilePattern
from .head_patterns import LayerPattern, from_groups, join_heads
from .text import MAX_LAYERS, MAX_REFERENCE_FRAMES, read_heads

SCHEMA_VERSION = 3
BESIDE = ("schema_version", "family", "frames", "heads", "dense_layers", "provenance")  # the patterns
OF_PATTERN = ("k", "window", "means")


def patterns_to_json(patterns: tuple[LayerPattern, ...] | TilePattern) -> dict[str, Any]:
    """The schema and the field that holds ``patterns``: one a layer, or one for any depth."""
    every = (patterns,) if isinstance(patterns, TilePattern) else patterns
    if all(isinstance(p, TilePattern) and not p.window and not p.means for p in every):
        values = [p.k for p in every if isinstance(p, TilePattern)]
        version, name = 1, "reference_frames"
    else:
        version = 3 if any(kind.means for p in every for kind in p.kinds) else 2
        values, name = [_layer_to_json(p) for p in every], "patterns"
    return {"schema_version": version, name: values[0] if isinstance(patterns, TilePattern) else values}


def _layer_to_json(pattern: LayerPattern) -> Any:
    if isinstance(pattern, TilePattern):
        return _pattern_to_json(pattern)
    return [{"heads": join_heads(heads), **_pattern_to_json(p)} for p, heads in pattern.groups.items()]


def _pattern_to_json(pattern: TilePattern) -> dict[str, Any]:
    return {"k": pattern.k, "window": pattern.window, **({"means": pattern.means} if pattern.means else {})}


def patterns_from_json(values: dict[str, Any], heads: int | None) -> tuple[LayerPattern, ...] | TilePattern:
    """The inverse, for a plan of ``heads``. Raises ValueError that names the field and what is wrong with it."""
    version = _checked_version(values.get("schema_version"))
    name = "reference_frames" if version == 1 else "patterns"
    _check_fields(values, (*BESIDE, name), "plan")
    found = values.get(name, [])
    read = _plain if version == 1 else lambda value, where: _layer(value, where, heads)
    if not isinstance(found, list):
        uniform = read(found, name)
        assert isinstance(uniform, TilePattern)  # groups of heads come as a list
        return uniform
    if not 1 <= len(found) <= MAX_LAYERS:
        raise ValueError(
            f"The plan's {name} has {len(found)} layers, expected 1 to {MAX_LAYERS}. No model has that depth; save the plan again."
        )
    return tuple(read(value, f"{name}[{i}]") for i, value in enumerate(found))


def _plain(value: Any, where: str) -> TilePattern:
    return TilePattern(read_count(value, where))


def _layer(value: Any, where: str, heads: int | None) -> LayerPattern:
    if not isinstance(value, list):
        return _pattern(value, where)
    if not heads:
        raise ValueError(
            f"The plan's {where} has groups of heads, and its heads says {quoted(heads)}, expected how many the model has. "
            "Correct the file."
        )
    groups = []
    for i, group in enumerate(value):
        pattern = _pattern(group, f"{where}[{i}]", ("heads", *OF_PATTERN))
        groups.append((_heads(group.get("heads"), f"{where}[{i}].heads", heads), pattern))
    try:
        return from_groups(groups, heads)
    except ValueError as error:
        raise ValueError(f"The plan's {where} {error}, expected each head once. Correct the file.") from None


def _check_fields(values: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError for any other field: one that is misspelt would change the plan without a word."""
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(
            f"The {where} has a field {quoted(unknown[0])}, expected {', '.join(known)}. Correct its name; notes go into provenance."
        )


def _pattern(value: Any, where: str, fields: Sequence[str] = OF_PATTERN) -> TilePattern:
    if not isinstance(value, dict) or "k" not in value:
        raise ValueError(
            f'The plan\'s {where} is {quoted(value)}, expected such as {{"k": 2, "window": 1}}. Correct the file.'
        )
    _check_fields(value, fields, f"plan's {where}")
    window, means = _small(value, where, "window", MAX_WINDOW), _small(value, where, "means", MAX_MEANS)
    return TilePattern(read_count(value["k"], f"{where}.k"), window=window, means=means)


def _small(value: dict[str, Any], where: str, name: str, most: int) -> int:
    found = value.get(name, 0)
    if type(found) is not int or not 0 <= found <= most:
        raise ValueError(
            f"The plan's {where}.{name} is {quoted(found)}, expected a whole number from 0 to {most}. Correct the file."
        )
    return found


def _heads(value: Any, where: str, heads: int) -> list[int]:
    try:
        found = read_heads(value) if isinstance(value, str) else []
    except ValueError:
        found = []
    if not found or max(found) >= heads:
        raise ValueError(
            f"The plan's {where} is {quoted(value)}, expected heads from 0 to {heads - 1} such as '0-3,7'. Correct the file."
        )
    return found


def _checked_version(version: Any) -> int:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"The plan's schema_version is {quoted(version)}, expected 1 to {SCHEMA_VERSION}. It is not a tile plan file."
        )
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"The plan has schema_version {quoted(version)}, this version reads up to {SCHEMA_VERSION}. Update the node pack."
        )
    return version


def read_field(values: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of that type or null. Raises ValueError that names it."""
    value = values.get(name, default)
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"The plan's {name} is {quoted(value)}, expected a {kind.__name__}. Correct the file or save it again."
        )
    return value


def read_count(value: Any, name: str) -> int | None:
    """A number of frames, heads or reference frames, or null. Raises ValueError that names the field."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (whole and 0 <= value <= MAX_REFERENCE_FRAMES):
        return value
    raise ValueError(
        f"The plan's {name} is {quoted(value)}, expected null or a whole number from 0 to {MAX_REFERENCE_FRAMES}. "
        "Correct the file or save it again."
    )


def read_ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """``dense_layers``. Raises ValueError for anything but ascending pairs."""

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
