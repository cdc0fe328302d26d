"""The cached residual: every n-th step a sparse layer computes dense attention as well and keeps the difference, which it
adds in the steps between.

For models that nobody distilled, and for schedules of many steps, whose neighbours see nearly the same. What is kept is
one tensor as large as an attention output for each layer and prompt, until the run ends.

Shapes: B batch, H heads, N tokens, D head_dim.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..limits.memory import check_memory, free_bytes, in_words
from .choose import CallShape

log = logging.getLogger("efficient_vdit")

FEWEST_STEPS = 15  # with fewer, neighbouring steps are too far apart
_SHARE_OF_FREE = 2  # of a GPU's free memory at most a half: ComfyUI moves weights there as it goes

Branch = tuple[Hashable, int]  # what tells a prompt (and context window) from others, and its rows of the batch


def why_no_residual(every: int, steps: int) -> str:
    """The reason why a run of ``steps`` keeps no residual that is to be renewed ``every`` so many, "" = it does."""
    if not steps:
        return "steps are not numbered"
    if steps < FEWEST_STEPS:
        return f"the schedule has {steps} steps, expected at least {FEWEST_STEPS}: few steps are too far apart"
    return "" if every < steps else f"it would be renewed every {every} steps, of {steps}"


class ResidualCache:
    """The residuals of one model, for as long as a run takes. Safe for several threads.

    Args:
        every: a residual is renewed when it is so many steps old, from 2.
    """

    def __init__(self, every: int) -> None:
        if every < 2:
            raise ValueError(
                f"The residual would be renewed every {every} steps, expected 2 or more: 1 is dense attention at a higher price."
            )
        self.every, self.lock = every, threading.Lock()
        self.kept: dict[tuple[Hashable, int], Tensor] = {}
        self.renewed: dict[Hashable, int] = {}  # the step, by prompt

    def begin(
        self, branches: Sequence[Branch], layers: Sequence[int], step: int, shape: CallShape, tokens: int
    ) -> ResidualForward:
        """For one forward over ``tokens``, whose calls look like ``shape``: makes room for what its ``layers`` keep.

        Raises ValueError where there is none, with the bytes it takes.
        """
        with self.lock:
            names = [(name, shape.heads, tokens) for name, _ in branches]
            missing = [
                (name, rows)
                for name, (_, rows) in zip(names, branches, strict=True)
                if any((name, layer) not in self.kept for layer in layers)
            ]
            if missing:
                self._make_room(missing, layers, shape, tokens)
            due = [step - self.renewed.get(name, step - self.every) for name in names]
            renew = bool(missing) or any(not 0 <= age < self.every for age in due)
            if renew:
                self.renewed.update(dict.fromkeys(names, step))
        rows = [(name, count) for name, (_, count) in zip(names, branches, strict=True)]
        return ResidualForward(self, rows, renew)

    def _make_room(self, branches: Sequence[Branch], layers: Sequence[int], shape: CallShape, tokens: int) -> None:
        row = len(layers) * shape.heads * tokens * shape.head_dim
        elements = sum(rows for _, rows in branches) * row
        device, dtype = _place(elements, shape)
        for name, rows in branches:
            for layer in layers:
                size = (rows, shape.heads, tokens, shape.head_dim)
                self.kept[name, layer] = _zeros(size, dtype, device, shape.device)
        log.info(
            "Efficient-vDiT: the cached residual takes %s on %s (%s): %d layers, %d prompts.",
            in_words(sum(x.nbytes for x in self.kept.values())), device, str(dtype).removeprefix("torch."), len(layers),
            len({name for name, _ in self.kept}),
        )  # fmt: skip

    def clear(self) -> None:
        """Lets go of everything."""
        with self.lock:
            self.kept.clear()
            self.renewed.clear()


@dataclass
class ResidualForward:
    """What one forward does with the cache: ``renew`` its residuals, or add them.

    ``unlike``: calls whose batch or size was not foreseen, which stayed without.
    """

    cache: ResidualCache
    branches: Sequence[Branch]
    renew: bool
    unlike: int = field(default=0)

    def attend(self, layer: int, first_head: int, sparse: Callable[[], Tensor], dense: Callable[[], Tensor]) -> Tensor:
        """A call's result (B, h, N, D) from both ways to compute it, for heads ``first_head`` on of a layer.

        Padding behind the tokens may be left out, so N may be smaller than was foreseen.
        """
        out = sparse()
        parts = self._parts(layer, first_head, out)
        if not parts:
            self.unlike += 1
            return out
        if not self.renew:
            for rows, kept in parts:
                out[rows] += kept.to(out.device, out.dtype, non_blocking=True)
            return out
        exact = dense()
        for rows, kept in parts:
            kept.copy_(exact[rows] - out[rows], non_blocking=True)
        return exact

    def _parts(self, layer: int, first_head: int, out: Tensor) -> list[tuple[slice, Tensor]]:
        """The rows of each prompt in ``out``, and what is kept for them; nothing where they do not fit."""
        found, at = [], 0
        for name, rows in self.branches:
            kept = self.cache.kept.get((name, layer))
            if kept is None or first_head + out.shape[1] > kept.shape[1] or out.shape[3] != kept.shape[3]:
                return []
            if out.shape[2] > kept.shape[2]:
                return []
            found.append((slice(at, at + rows), kept[:, first_head : first_head + out.shape[1], : out.shape[2]]))
            at += rows
        return found if at == out.shape[0] else []


def _place(elements: int, shape: CallShape) -> tuple[torch.device, torch.dtype]:
    """Where so many elements are kept and in which dtype: on the GPU, else in main memory, else there in half
    precision. Raises ValueError where nothing is large enough."""
    half = shape.dtype if shape.dtype.itemsize <= 2 else torch.bfloat16
    if shape.device.type != "cpu":
        free = free_bytes(str(shape.device))
        if free is None or elements * shape.dtype.itemsize <= free // _SHARE_OF_FREE:
            return shape.device, shape.dtype
    cpu, free = torch.device("cpu"), free_bytes()
    if free is None or elements * shape.dtype.itemsize <= free // _SHARE_OF_FREE:
        return cpu, shape.dtype
    check_memory(elements * half.itemsize, "The cached residual", "Set residual_every to 0, or make more layers dense.")
    return cpu, half


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, calls: torch.device) -> Tensor:
    """Zeros on ``device``; in main memory pinned where the ``calls`` are on a GPU and the system allows as much, so that
    they travel at the bus's full rate."""
    if device.type == "cpu" and calls.type == "cuda":
        try:
            return torch.zeros(size, dtype=dtype, pin_memory=True)
        except RuntimeError:
            pass
    return torch.zeros(size, dtype=dtype, device=device)
