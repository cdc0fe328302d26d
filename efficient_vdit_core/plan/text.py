"""A plan as one line of text, such as ``0:full 1-4:2:6 5-31:1:7~1+1``; ``all:2 -1:full`` where it fits any depth.

A layer whose heads differ names them: ``0:[0-3,7]1:7~1[4-6]full``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..limits.quote import quoted
from ..tiles import PATTERN, TilePattern, read_pattern
from .head_patterns import LayerPattern, from_groups, join_heads

MAX_LAYERS = 1024
MAX_REFERENCE_FRAMES = 1024
ALL = "all"  # every layer
MAX_HEADS = 1024
GROUP = rf"\[([0-9,-]{{1,4000}})\]({PATTERN})"


def write_layers(patterns: Sequence[LayerPattern], frames: int | None) -> str:
    """The line for one pattern a layer, equal neighbours joined."""
    names, parts, start = [_name(pattern, frames) for pattern in patterns], [], 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            parts.append(f"{start}:{names[start]}" if i - start == 1 else f"{start}-{i - 1}:{names[start]}")
            start = i
    return " ".join(parts)


def write_uniform(pattern: TilePattern, dense_layers: Sequence[tuple[int, int]], frames: int | None) -> str:
    """The line for one pattern in any number of layers but the dense ones."""
    dense, written = [], set()  # a file may name a layer more than once
    for first, last in dense_layers:
        layers = [layer for layer in range(first, last + 1) if layer not in written]
        written.update(layers)
        # Layers counted from the end stand alone in a text.
        names = map(str, layers) if first < 0 else filter(None, join_heads(tuple(layers)).split(","))
        dense += [f"{name}:full" for name in names]
    return " ".join([f"{ALL}:{_name(pattern, frames)}", *dense])


def _name(pattern: LayerPattern, frames: int | None) -> str:
    def one(pattern: TilePattern) -> str:
        return pattern.name(frames) if frames else pattern.short_name

    if isinstance(pattern, TilePattern):
        return one(pattern)
    groups: dict[str, list[int]] = {}  # patterns that differ may be one at this length: all that leave nothing out
    for alike, heads in pattern.groups.items():
        groups.setdefault(one(alike), []).extend(heads)
    if len(groups) == 1:
        return next(iter(groups))
    return "".join(f"[{join_heads(tuple(sorted(heads)))}]{name}" for name, heads in groups.items())


def read_plan(text: str) -> dict[str, Any]:
    """The fields of the ``TilePlan`` that a line describes.

    Raises ValueError that names the part that cannot be read, is missing or is said twice.
    """
    words = text.replace("\ufeff", " ").split()  # a byte-order mark, which a text from a file may bring
    if not 1 <= len(words) <= MAX_LAYERS:
        raise ValueError(f"The plan text has {len(words)} parts, expected 1 to {MAX_LAYERS} such as '0:full 1-4:2:6'.")
    return _from_parts([_read_part(part) for part in words])


def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``0-2,5,-1`` as inclusive ranges; negative indices count from the end and stand alone."""
    ranges = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(-?[0-9]{1,4})|([0-9]{1,4})\s*-\s*([0-9]{1,4})", part)
        first, last = (int(match[1] or match[2]), int(match[1] or match[3])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"The layers {quoted(text)} cannot be read at {quoted(part)}, expected a list such as '0-2,-1'. Correct dense_blocks."
            )
        ranges.append((first, last))
    return tuple(ranges)


class Part(NamedTuple):
    """A part of the line: as written, its layers (None: all), their pattern, and the latent frames that it speaks of."""

    text: str
    layers: range | None
    pattern: LayerPattern
    frames: int | None


def _read_part(text: str) -> Part:
    """``0:full``, ``1-4:2:6``, ``5:2~1``, ``-1:full``, ``3:[0-2]1:7[3]full`` or ``all:2``."""
    match = re.fullmatch(
        rf"(all|-?[0-9]{{1,4}}|[0-9]{{1,4}}-[0-9]{{1,4}}):({PATTERN}|(?:{GROUP}){{1,{MAX_HEADS}}})", text.lower()
    )
    if match is None:
        raise ValueError(
            f"The plan text cannot be read at {quoted(text)}, expected parts such as '0:full', '1-4:2:6' or 'all:2'."
        )
    layers, pattern = match[1], _read_pattern(match[2], text)
    if layers == ALL:
        return Part(text, None, *pattern)
    first, last = (int(layers), int(layers)) if layers.lstrip("-").isdigit() else map(int, layers.split("-"))
    if last < first or max(abs(first), abs(last)) >= MAX_LAYERS:
        raise ValueError(
            f"The plan text names the layers {quoted(layers)}, expected ascending ones from 0 to {MAX_LAYERS - 1}."
        )
    return Part(text, range(first, last + 1), *pattern)


def _read_pattern(text: str, part: str) -> tuple[LayerPattern, int | None]:
    """The pattern, and the latent frames that it speaks of."""
    written = re.findall(GROUP, text)
    if not written:
        return _read_one(text, part)
    groups = [(*_read_one(name, part), read_heads(heads)) for heads, name, *_ in written]
    try:
        pattern = from_groups((heads, pattern) for pattern, _, heads in groups)
    except ValueError as error:
        raise ValueError(f"The plan text {error} at {quoted(part)}, expected each head once.") from None
    named = sorted({frames for _, frames, _ in groups if frames})
    if len(named) > 1:
        raise ValueError(f"The plan text speaks of {named[0]} and of {named[1]} latent frames at {quoted(part)}.")
    return pattern, named[0] if named else None


def _read_one(text: str, part: str) -> tuple[TilePattern, int | None]:
    try:
        pattern, frames = read_pattern(text)
    except ValueError as error:
        raise ValueError(f"The plan text cannot be used at {quoted(part)}: {error}") from None
    if max(pattern.k or 0, frames or 0) > MAX_REFERENCE_FRAMES:
        raise ValueError(
            f"The plan text asks for more than {MAX_REFERENCE_FRAMES} frames at {quoted(part)}; no video has as many latent ones."
        )
    return pattern, frames


def read_heads(text: str) -> list[int]:
    """``0-2,5`` as heads. Raises ValueError for anything else, or beyond ``MAX_HEADS``."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MAX_HEADS:
            raise ValueError(f"The heads {quoted(text)} cannot be read, expected such as '0-3,7', below {MAX_HEADS}.")
        found += range(first, last + 1)
    return found


def _from_parts(parts: list[Part]) -> dict[str, Any]:
    lengths = {part.frames for part in parts if part.frames}
    if len(lengths) > 1:
        found = " and of ".join(map(str, sorted(lengths)))
        raise ValueError(f"The plan text speaks of {found} latent frames, expected the same number in all parts.")
    fields = _uniform(parts) if any(part.layers is None for part in parts) else _by_layer(parts)
    return {**fields, "frames": lengths.pop() if lengths else None}


def _uniform(parts: list[Part]) -> dict[str, Any]:
    every, *rest = parts
    dense = [part.layers for part in rest if part.layers is not None and part.pattern == TilePattern(None)]
    if every.layers is not None or len(dense) < len(rest):
        raise ValueError(
            "In a plan text, 'all:...' must stand first and once, and only parts such as '-1:full' may follow."
        )
    if not isinstance(every.pattern, TilePattern):
        raise ValueError(f"In a plan text, the heads of 'all:...' are alike; name the layers in {quoted(every.text)}.")
    return {"uniform_pattern": every.pattern, "dense_layers": tuple((layers[0], layers[-1]) for layers in dense)}


def _by_layer(parts: list[Part]) -> dict[str, Any]:
    layers: dict[int, LayerPattern] = {}
    for part in parts:
        for layer in part.layers or ():
            if layer in layers or layer < 0:
                reason = "counts from the end, which only follows 'all:...'" if layer < 0 else "is named twice"
                raise ValueError(f"In the plan text, layer {layer} of {quoted(part.text)} {reason}.")
            layers[layer] = part.pattern
    missing = next((i for i in range(max(layers) + 1) if i not in layers), None)
    if missing is not None and len(layers) == 1:
        raise ValueError(
            f"The plan text leaves out layer {missing}: {quoted(parts[0].text)} is a pattern for layer {max(layers)} alone. For one "
            f"pattern in all layers write {quoted('all:' + parts[0].text)}."
        )
    if missing is not None:
        raise ValueError(f"The plan text leaves out layer {missing}, expected every layer from 0 to {max(layers)}.")
    heads = {len(p.patterns) for p in layers.values() if not isinstance(p, TilePattern)}
    if len(heads) > 1:
        raise ValueError(
            f"The plan text has layers of {' and of '.join(map(str, sorted(heads)))} heads, expected one number."
        )
    return {"patterns": tuple(layers[i] for i in sorted(layers)), "heads": heads.pop() if heads else None}
