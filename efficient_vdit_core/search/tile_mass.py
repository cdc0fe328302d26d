"""Where attention goes: the share of its mass in every frame x frame tile (Efficient-vDiT, Figure 1), on live q and k.

Query rows are taken in chunks, evenly from every frame, so no N x N matrix is ever held.
Shapes: B batch, H heads, N tokens of which T frames of s are video, D head_dim, c query rows in a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from einops import reduce
from torch import Tensor

from ..attention import TokenLayout
from ..attention.dense_call import Override
from ..attention.hook.attention_call import AttentionCall, override_by
from ..attention.hook.state import CallPlace
from ..limits.quote import quoted
from ..plan.head_patterns import LayerPattern
from ..plan.text import parse_layers
from ..tiles import TilePattern
from .calls import seen_call

LEVELS = (0.90, 0.95, 0.99)
MAX_BYTES = 256 * 2**20
MAX_POSITIONS = 32 * 2**20  # of important positions remembered for one layer, a byte each


@dataclass
class TileMass:
    """One layer's attention.

    of_heads: (H, T, T), row i of a head the mean share of the queries of frame i in each key frame. extra_of_heads:
    (H, T), their share in text and other tokens. rows: query rows measured in each frame.
    important: (R, H, T s) uint8, for a few query rows the smallest of LEVELS whose positions hold a key, len(LEVELS)
    for none. seen: (H,), how many evaluations (prompts, context windows) a head's mean goes over. left_out: forwards over
    another number of frames, over which it does not go.
    """

    of_heads: Tensor
    extra_of_heads: Tensor
    rows: int
    important: Tensor
    seen: Tensor
    left_out: int = 0

    @cached_property
    def share(self) -> Tensor:
        """(T, T), the mean over the heads; each row of it and of ``extra`` sums to 1."""
        return self.of_heads.mean(0)

    @property
    def extra(self) -> Tensor:
        """(T,), the mean over the heads of the share in text and other tokens."""
        return self.extra_of_heads.mean(0)

    def of(self, heads: Sequence[int]) -> TileMass:
        """The attention of some heads alone."""
        at = list(heads)
        return TileMass(self.of_heads[at], self.extra_of_heads[at], self.rows, self.important[:, at], self.seen[at])

    def beside(self, others: TileMass) -> TileMass:
        """The attention of these heads and of ``others`` of the layer behind them."""
        remembered = min(len(self.important), len(others.important))
        return TileMass(
            torch.cat([self.of_heads, others.of_heads]),
            torch.cat([self.extra_of_heads, others.extra_of_heads]),
            self.rows,
            torch.cat([self.important[:remembered], others.important[:remembered]], dim=1),
            torch.cat([self.seen, others.seen]),
            self.left_out,
        )

    def averaged(self, others: TileMass, first_head: int) -> TileMass:
        """With ``others``, what a further forward over as many frames found of the heads from ``first_head`` on, each of its
        evaluations counted alike. The important positions stay the first one's."""
        heads = slice(first_head, first_head + len(others.seen))
        of_heads, extra, seen = self.of_heads.clone(), self.extra_of_heads.clone(), self.seen.clone()
        seen[heads] += others.seen
        weight = others.seen / seen[heads]
        of_heads[heads] = of_heads[heads].lerp(others.of_heads, weight[:, None, None])
        extra[heads] = extra[heads].lerp(others.extra_of_heads, weight[:, None])
        return replace(self, of_heads=of_heads, extra_of_heads=extra, seen=seen)

    @property
    def diagonal(self) -> float:
        """Mean share of a frame's own tile."""
        return float(self.share.diagonal().mean())

    @property
    def off_diagonal(self) -> float:
        """Mean share of one tile of another frame."""
        frames = len(self.share)
        return float(self.share.sum() - self.share.diagonal().sum()) / (frames * (frames - 1)) if frames > 1 else 0.0

    def kept(self, pattern: LayerPattern) -> float:
        """Share of the mass in the tiles that ``pattern`` computes, each head its own, text included, 0 to 1."""
        frames, kept = len(self.share), torch.zeros_like(self.share)
        for alike, heads in pattern.head_groups(len(self.of_heads)).items():
            kept += self.of_heads[list(heads)].sum(0) * kept_tiles(alike, frames) / len(self.of_heads)
        return float(kept.sum(1).mean() + self.extra.mean())

    def overlap(self, other: TileMass) -> tuple[float, ...]:
        """For each of LEVELS, 2 |A and B| / (|A| + |B|) of the key positions that hold that share of a query's video
        mass."""
        found = []
        for level in range(len(LEVELS)):
            a, b = self.important <= level, other.important <= level
            found.append(2.0 * float((a & b).sum()) / float(a.sum() + b.sum()))
        return tuple(found)


@dataclass
class MassRecord:
    """Layers to measure, and what was found: the mean over all forwards of as many ``frames`` as the first, as several
    prompts and context windows come in several. Nothing is measured while ``active`` is False. Safe to fill from several
    threads."""

    layers: tuple[int, ...]
    rows: int = 64
    active: bool = True
    frames: int | None = None
    found: dict[int, TileMass] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def takes(self, place: CallPlace, frames: int) -> bool:
        """Whether a call over so many frames is measured. Counts the forwards that are left out for their frames."""
        if not self.active or place.layer not in self.layers or place.visit:  # the video's stream alone
            return False
        with self.lock:
            self.frames = self.frames or frames
            if frames != self.frames and place.layer in self.found and not place.first_head:
                self.found[place.layer].left_out += 1
            return frames == self.frames

    def add(self, place: CallPlace, found: TileMass) -> None:
        """What a call found of a layer's heads: a node may have them attend a few at a time."""
        with self.lock:
            known = self.found.get(place.layer)
            if known is None:
                self.found[place.layer] = found
            elif place.first_head == len(known.seen):
                self.found[place.layer] = known.beside(found)
            else:
                self.found[place.layer] = known.averaged(found, place.first_head)


def make_mass_override(
    record: MassRecord, *, progress: Callable[[int], None] | None = None, previous: Override | None = None
) -> Override:
    """An override that measures the chosen layers' tile mass into ``record`` and leaves the attention as it is.

    ``progress`` is told the layer of each self-attention over the video; what it raises ends the run.
    """

    def answer(call: AttentionCall) -> Tensor:
        seen, out = seen_call(call), call.dense()
        if isinstance(seen, str):
            record.reasons.add(seen)
            return out
        place, layout, padding = seen
        if record.takes(place, layout.grid.t):
            q, k, _ = call.take(padding)
            record.add(place, tile_mass(q, k, layout, record.rows))
        if progress is not None:
            progress(place.layer)
        return out

    return override_by(answer, previous)


def tile_mass(q: Tensor, k: Tensor, layout: TokenLayout, rows: int = 64, max_bytes: int = MAX_BYTES) -> TileMass:
    """Measure q, k (B, H, N, D), N = ``layout.tokens``, over ``rows`` evenly spaced query rows of each frame.

    The mean goes over batch, heads and rows; important positions are those of the first batch entry.
    """
    grid, start = layout.grid, layout.prefix
    rows = min(rows, grid.tokens_per_frame)
    inside = torch.arange(rows, device=q.device) * grid.tokens_per_frame // rows
    chunk = max(1, max_bytes // (3 * 4 * q.shape[0] * q.shape[1] * q.shape[2]))
    remembered = _remembered_rows(rows, grid.t, q.shape[1] * grid.tokens)
    share, extra, important = [], [], []
    for frame in range(grid.t):
        at = start + frame * grid.tokens_per_frame + inside
        of_heads, elsewhere = (torch.zeros(q.shape[1], *last, device=q.device) for last in ((grid.t,), ()))
        for begin in range(0, rows, chunk):
            weights = _softmax_rows(q[:, :, at[begin : begin + chunk]], k)
            video = weights[..., start : start + grid.tokens]
            of_heads += reduce(video, "b h c (t s) -> h t", "sum", t=grid.t)
            elsewhere += weights.sum((0, 2, 3)) - video.sum((0, 2, 3))
            wanted = [r - begin for r in remembered if begin <= r < begin + chunk]
            important += [_levels(video[0, :, r]) for r in wanted]
        share.append(of_heads.cpu() / (rows * q.shape[0]))
        extra.append(elsewhere.cpu() / (rows * q.shape[0]))
    seen = torch.full((q.shape[1],), q.shape[0])
    return TileMass(torch.stack(share, 1), torch.stack(extra, 1), rows, torch.stack(important), seen)


def kept_tiles(pattern: TilePattern, frames: int) -> Tensor:
    """(T, T) bool: the tiles that heads of that ``pattern`` compute."""
    kept = torch.zeros(frames, frames, dtype=torch.bool)
    references = list(pattern.reference_frames(frames))
    kept[references, :] = True
    kept[:, references] = True
    for frame, seen in pattern.neighbours(frames).items():
        kept[frame, list(seen)] = True
    return kept


def averaged_tiles(pattern: TilePattern, frames: int) -> Tensor:
    """(T, T) bool: the tiles that heads of that ``pattern`` see in a mean frame, and do not compute."""
    averaged = torch.zeros(frames, frames, dtype=torch.bool)
    for frame, means in pattern.mean_frames(frames).items():
        averaged[frame, [g for mean in means for g in mean]] = True
    return averaged & ~kept_tiles(pattern, frames)


def choose_layers(text: str, depth: int, most: int) -> tuple[int, ...]:
    """Read ``0,5,-1`` or ``0-3`` for a model of ``depth`` layers. Raises ValueError for others, none, or over
    ``most``."""
    try:
        ranges = parse_layers(text)
    except ValueError:
        raise ValueError(
            f"The layers {quoted(text)} cannot be read, expected a list such as '0,5,-1' or '0-3'."
        ) from None
    chosen = [
        i
        for first, last in ranges
        # Beyond the model one is enough to be refused, however many were asked for.
        for i in ((first + depth,) if first < 0 else range(first, max(first, min(last, depth)) + 1))
    ]
    if not chosen or not all(0 <= i < depth for i in chosen) or len(set(chosen)) > most:
        raise ValueError(
            f"The layers are {quoted(text)}, expected 1 to {most} of the model's {depth}: 0 to {depth - 1}, or -1 for the last."
        )
    return tuple(sorted(set(chosen)))


def _softmax_rows(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, c, N) float32 attention weights."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float().softmax(-1)


def _remembered_rows(rows: int, frames: int, positions: int) -> Iterable[int]:
    """Evenly spaced rows of each frame whose important positions are kept, at least one."""
    count = min(rows, max(1, MAX_POSITIONS // (frames * positions)), 8)
    return [i * rows // count for i in range(count)]


def _levels(weights: Tensor) -> Tensor:
    """(H, N) weights to uint8: 0 where a key is among those that hold LEVELS[0] of the mass, and so on."""
    ordered, index = weights.sort(-1, descending=True)
    before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)
    codes = sum((before >= level).to(torch.uint8) for level in LEVELS)
    return torch.empty_like(index, dtype=torch.uint8).scatter_(-1, index, codes).cpu()  # pyright: ignore[reportArgumentType]
