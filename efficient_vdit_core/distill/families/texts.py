"""Captions encoded once, kept in one file, so that the text encoder need not stay in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ...limits.documents import parse_json
from ...storage.saving_times import SavingTimes
from ...storage.weight_files import read_state_dict, save_safetensors

AT_ONCE = 32
MAX_LIST = 2**28  # bytes of all captions
SAVE_EVERY = 60.0  # seconds; each time all is written, which may be gigabytes

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


class TextBank:
    """Text states by caption. ``batch`` pads them, to at least ``padding`` rows: (B, L, C) and the mask (B, L), 1 = word."""

    def __init__(self, states: dict[str, Tensor], padding: int = 0) -> None:
        self.states, self.padding = states, padding

    @classmethod
    def build(
        cls, texts: Iterable[str], encoder: Callable[[], Encode], file: Path | None = None, padding: int = 0
    ) -> TextBank:
        """Encode the distinct ``texts`` that ``file`` does not hold yet; ``encoder()`` loads the encoder where it is
        needed."""
        wanted = list(dict.fromkeys(texts))
        states = _read(file) if file is not None and file.is_file() else {}
        missing = [t for t in wanted if t not in states]
        if missing:
            _encode(missing, encoder(), states, file)
        return cls({t: states[t] for t in wanted}, padding)

    def batch(self, texts: list[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        rows = [self.states[t] for t in texts]
        longest = max(self.padding, *map(len, rows))
        context = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            context[i, : len(row)], mask[i, : len(row)] = row, 1
        return context.to(device), mask.to(device)


def _encode(missing: list[str], encode: Encode, states: dict[str, Tensor], file: Path | None) -> None:
    """Put the states of ``missing`` into ``states``, and these into ``file`` from time to time."""
    times = SavingTimes(SAVE_EVERY)
    try:
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            context, mask = encode(part)
            states.update(
                {t: c[: int(m.sum())].clone() for t, c, m in zip(part, context.cpu(), mask.cpu(), strict=True)}
            )
            if file is not None and times.due():
                with times.saving():
                    _write(states, file)
    finally:  # what was encoded before Ctrl-C is not encoded again
        if file is not None and states:
            _write(states, file)


def _write(states: dict[str, Tensor], file: Path) -> None:
    names = list(states)
    save_safetensors(file, {str(i): states[t] for i, t in enumerate(names)}, {"texts": json.dumps(names)})


def _read(file: Path) -> dict[str, Tensor]:
    """What ``build`` wrote. Raises ValueError where that is damaged."""
    try:
        tensors, metadata = read_state_dict(file)
        texts = parse_json(metadata.get("texts", ""), "The list of texts", advice="", limit=MAX_LIST, values=MAX_LIST)
        return {text: tensors[str(i)] for i, text in enumerate(texts)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file.name} in the cache is damaged or half written. Delete it; the same command makes it anew."
        ) from error
