"""What a block of a model is given that belongs to tokens, by the names of its arguments; and how it is cut to a rank's.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attention.backends.spans import Span, take

WHOLE = ""  # the sequence itself, where one of its streams could be named


@dataclass(frozen=True)
class BlockArguments:
    """How one kind of blocks names what belongs to tokens; the defaults are Wan's.

    Attributes:
        hidden: the hidden states ([B,] N, C) that joined are the sequence, in its order. One may be a tuple: its first
            entry has the tokens, the others (the audio of LTX-2) are whole on every rank.
        tables: what has an entry for each token, such as positions: the argument, and the hidden state whose tokens it
            follows, or WHOLE. One entry holds for all tokens.
        spread: modulation (B, L, 6, C) whose L entries hold for equal runs of tokens; other shapes hold for all.
        runs: lists of (start, stop, ...) in tokens: the argument, and the hidden state that it counts, or WHOLE.
        rows: what is cut in a way of its own, a function of the argument and of ``spans``, this rank's tokens.
    """

    hidden: tuple[str, ...] = ("img",)
    tables: Mapping[str, str] = field(default_factory=lambda: {"pe": WHOLE})
    spread: tuple[str, ...] = ("vec",)
    runs: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def tokens_of(hidden: Any) -> Tensor:
    """The tensor ([B,] N, C) of a hidden state."""
    return hidden[0] if isinstance(hidden, tuple | list) else hidden


def with_tokens(hidden: Any, x: Tensor) -> Any:
    """The hidden state with ``x`` in the place of its tokens."""
    return type(hidden)((x, *hidden[1:])) if isinstance(hidden, tuple | list) else x


def cut_table(table: Any, tokens: int, spans: Sequence[Span], name: str) -> Any:
    """A rank's entries of a table of ``tokens`` entries, or of each such table in a tuple.

    Raises ValueError where no axis has that many.
    """
    if isinstance(table, tuple | list):
        return type(table)(cut_table(part, tokens, spans, name) for part in table)
    if not isinstance(table, Tensor):
        return table
    axes = [axis for axis in (1, 2, 0) if axis < table.ndim and table.shape[axis] == tokens]
    if axes:
        return take(table, spans, axes[0])
    if table.ndim > 1 and table.shape[1] == 1:
        return table
    raise ValueError(
        f"{name} has shape {tuple(table.shape)}, expected {tokens} tokens on one of its first axes: this model's positions "
        "cannot be sharded. Bypass EVDiTSequenceParallel."
    )


def spread_to(modulation: Tensor, tokens: int, spans: Sequence[Span]) -> Tensor:
    """The entries that hold for the tokens of ``spans``: (B, L, 6, C) becomes (B, l, 6, C), one for each run of tokens
    where whole runs are held, else one for each token.

    The models' own rule: each of L entries holds for an equal run of ``tokens``, rounded up where L does not divide it.
    """
    if modulation.ndim < 4 or modulation.shape[1] == 1:
        return modulation
    run = -(-tokens // modulation.shape[1])
    if all(start % run == stop % run == 0 for start, stop in spans):
        return take(modulation, [(start // run, stop // run) for start, stop in spans], 1)
    return modulation[:, numbers_of(spans, modulation.device) // run]


def cut_runs(runs: Any, spans: Sequence[Span]) -> Any:
    """Runs (start, stop, ...) over the tokens of ``spans``, counted in these; stop None is the end.

    A tensor in a run has an entry for each of its tokens, as MiniMax-H3's levels of noise where a mask keeps a part.
    """
    if runs is None:
        return None
    found, done = [], 0
    for first, last in spans:
        for start, stop, *more in runs:
            a, b = max(start, first), last if stop is None else min(stop, last)
            if a < b:
                own = (each[a - start : b - start] if isinstance(each, Tensor) else each for each in more)
                found.append((a - first + done, b - first + done, *own))
        done += last - first
    return found


def numbers_of(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The numbers of the tokens that ``spans`` hold."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in [(0, 0), *spans]])
