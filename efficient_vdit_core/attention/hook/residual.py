"""The cached residual: every n-th step a sparse layer computes dense attention as well and keeps the difference, which it
adds in the steps between.

For models that nobody distilled, and for schedules of many steps, whose neighbours see nearly the same. What is kept is
one tensor as large as an attention output for each layer and prompt, until the run ends.

Shapes: B batch, H heads, N tokens, D head_dim.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...limits.memory import free_bytes, in_words
from ...timing import wait_for
from ..call_shape import CallShape
from ..host_memory import HostMemory
from ..report.reason_names import NO_STEP_NUMBERS

log = logging.getLogger("efficient_vdit")

FEWEST_STEPS = 15  # with fewer, neighbouring steps are too far apart
# Of what is free when a run begins: ComfyUI moves weights to the GPU as it goes, and main memory is not ours alone.
_MOST_OF_GPU, _MOST_OF_MAIN = 0.5, 0.75
_MAIN = torch.device("cpu")

Place = tuple[int, int]  # a layer, and which of its calls in a forward
Branch = tuple[Hashable, int]  # what tells a prompt (and context window) from others, and its rows of the batch
Name = tuple[Hashable, int, int]  # of a prompt, with the heads and tokens that its forwards have
Missing = tuple[Name, int, list[Place]]  # a prompt, its rows, and the places of which nothing is kept for it


def why_no_residual(every: int, steps: int, whole: int = 0) -> str:
    """The reason why a run of ``steps`` keeps no residual that is to be renewed ``every`` so many, "" = it does.

    ``whole``: the steps of the whole schedule, where the run takes a part of it; 0 = the run takes all.
    """
    if not steps:
        return NO_STEP_NUMBERS
    whole = whole or steps
    if whole < FEWEST_STEPS:
        part = f", {steps} of them in this sampler" if whole != steps else ""
        return f"the schedule has {whole} steps{part}, expected at least {FEWEST_STEPS}: few steps are too far apart"
    return "" if every < steps else f"it would be renewed every {every} steps, of {steps}"


def work_with(density: float, renewed: float) -> float:
    """The FLOPs of sparse calls of this ``density``, of which the share ``renewed`` computes dense attention as well;
    1 = dense."""
    return density + renewed


def work_of_plan(densities: Sequence[float], every: int, steps: int) -> float:
    """The share of dense attention's FLOPs that a run of ``steps`` computes with a residual; layers of density 1 are
    dense and keep none."""
    renewed = -(-steps // every) / steps
    return sum(1.0 if d == 1.0 else work_with(d, renewed) for d in densities) / len(densities)


@dataclass(frozen=True)
class Room:
    """Where residuals are kept, and how many bytes all of a run's take."""

    device: torch.device
    dtype: torch.dtype
    size: int

    def __str__(self) -> str:
        return f"{in_words(self.size)} on {self.device} ({str(self.dtype).removeprefix('torch.')})"


class ResidualCache:
    """The residuals of one model, for as long as a run takes. Safe for several threads.

    Args:
        every: a residual is renewed when it is so many steps old, from 2.
    """

    def __init__(self, every: int) -> None:
        if every < 2:
            raise ValueError(
                f"residual_every is {every}, expected 0 for none, or 2 or more: 1 is dense attention at a higher price."
            )
        self.every, self.lock = every, threading.Lock()
        self.kept: dict[tuple[Name, Place], Tensor] = {}
        self.main = HostMemory("the cached residual")
        self.renewed: dict[Name, int] = {}  # the step, once a call has: a step cache may skip the forward that was to
        self.taken: Counter[torch.device] = Counter()  # bytes
        self.free: dict[torch.device, int | None] = {}  # bytes, when the run began to take some

    def begin(
        self, branches: Sequence[Branch], places: Sequence[Place], step: int, shape: CallShape, tokens: int
    ) -> ResidualForward:
        """For one forward over ``tokens``, whose calls look like ``shape``: makes room for what is kept at its ``places``.

        Raises ValueError where there is none, with the bytes it takes.
        """
        made = self.reserve(branches, places, shape, tokens)
        names = _names(branches, shape, tokens)
        with self.lock:
            due = [step - self.renewed.get(name, step - self.every) for name in names]
            renew = made or any(not 0 <= age < self.every for age in due)
        rows = [(name, count) for name, (_, count) in zip(names, branches, strict=True)]
        return ResidualForward(self, rows, step, renew)

    def reserve(self, branches: Sequence[Branch], places: Sequence[Place], shape: CallShape, tokens: int) -> bool:
        """Makes room for what is not kept yet, ahead of the first forward that needs it; whether there was any such.

        Raises ValueError as `begin` does.
        """
        with self.lock:
            self.main.used_on(shape.device)
            missing = self._missing(branches, places, shape, tokens)
            if not missing:
                return False
            for device in {_MAIN, shape.device}:
                self.free.setdefault(device, free_bytes(str(device)))
            room = self._room(missing, shape)
            for name, rows, absent in missing:
                for place in absent:
                    size = (rows, shape.heads, tokens, shape.head_dim)
                    self.kept[name, place] = self._zeros(size, room, shape.device)
            self.taken[room.device] = room.size
            prompts = len({name for name, _ in self.kept})
        log.info(
            "Efficient-vDiT: the cached residual takes %s: %d layers, %d prompts or context windows so far.",
            room, len({layer for layer, _ in places}), prompts,
        )  # fmt: skip
        return True

    def room(
        self, branches: Sequence[Branch], places: Sequence[Place], shape: CallShape, tokens: int, beside: int = 0
    ) -> Room:
        """Where `reserve` would keep them, with what is kept there already; nothing is taken.

        ``beside``: bytes that others will have taken by then, where the calls are. Raises ValueError as `begin` does.
        """
        with self.lock:
            return self._room(self._missing(branches, places, shape, tokens), shape, beside)

    def _missing(
        self, branches: Sequence[Branch], places: Sequence[Place], shape: CallShape, tokens: int
    ) -> list[Missing]:
        found = [
            (name, rows, [place for place in places if (name, place) not in self.kept])
            for name, (_, rows) in zip(_names(branches, shape, tokens), branches, strict=True)
        ]
        return [missing for missing in found if missing[2]]

    def _room(self, missing: Sequence[Missing], shape: CallShape, beside: int = 0) -> Room:
        """On the GPU, else in main memory, else there in half precision. All that a run has kept counts together."""
        numbers = (rows * heads * tokens * len(absent) for (_, heads, tokens), rows, absent in missing)
        elements = shape.head_dim * sum(numbers)
        half = shape.dtype if shape.dtype.itemsize <= 2 else torch.bfloat16
        choices = [(_MAIN, shape.dtype), (_MAIN, half)]
        if shape.device.type != "cpu":
            choices.insert(0, (shape.device, shape.dtype))
        refused = ""
        for device, dtype in choices:
            room = Room(device, dtype, self.taken[device] + elements * dtype.itemsize)
            most = self._most(device, beside if device == shape.device else 0)
            if most is None or room.size <= most:
                return room
            refused = f"{in_words(room.size)} of memory, {in_words(most)} may be taken"
        raise ValueError(
            f"The cached residual takes about {refused}: {_MOST_OF_MAIN:.0%} of what is free when a run begins. "
            "Set residual_every to 0, or make more layers dense."
        )

    def _most(self, device: torch.device, beside: int) -> int | None:
        free = self.free[device] if device in self.free else free_bytes(str(device))
        share = _MOST_OF_MAIN if device == _MAIN else _MOST_OF_GPU
        return None if free is None else int(max(0, free - beside) * share)

    def _zeros(self, size: tuple[int, ...], room: Room, calls: torch.device) -> Tensor:
        """Zeros where there is ``room``, for calls on a device."""
        if room.device == _MAIN and calls != _MAIN:
            return self.main.empty(size, room.dtype, calls).zero_()
        return torch.zeros(size, dtype=room.dtype, device=room.device)

    def clear(self) -> None:
        """Lets go of everything, once the devices are done with it."""
        with self.lock:
            self.main.close()
            self.kept.clear()
            self.renewed.clear()
            self.taken.clear()
            self.free.clear()


@dataclass
class ResidualForward:
    """What the forward of a ``step`` does with the cache: ``renew`` its residuals, or add them.

    ``unlike``: calls whose batch or size was not foreseen, which stayed without.
    """

    cache: ResidualCache
    branches: Sequence[tuple[Name, int]]
    step: int
    renew: bool
    unlike: int = field(default=0)

    def attend(
        self, place: Place, first_head: int, sparse: Callable[[], Tensor], dense: Callable[[], Tensor]
    ) -> Tensor:
        """A call's result (B, h, N, D) from both ways to compute it, for heads ``first_head`` on of a layer.

        Padding behind the tokens may be left out, so N may be smaller than was foreseen.
        """
        out = sparse()
        parts = self._parts(place, first_head, out)
        if not parts:
            self.unlike += 1
            return out
        if not self.renew:
            for rows, kept in parts:
                out[rows] += _fetched(kept, out)
            return out
        exact = dense()
        for rows, kept in parts:
            # The copies back come later in the same stream, or in one of another device that works on this one's results.
            kept.copy_(exact[rows] - out[rows], non_blocking=kept.is_contiguous())
        with self.cache.lock:
            self.cache.renewed.update({name: self.step for name, _ in self.branches})
        return exact

    def _parts(self, place: Place, first_head: int, out: Tensor) -> list[tuple[slice, Tensor]]:
        """The rows of each prompt in ``out``, and what is kept for them; nothing where they do not fit."""
        found, at = [], 0
        for name, rows in self.branches:
            kept = self.cache.kept.get((name, place))
            if kept is None or first_head + out.shape[1] > kept.shape[1] or out.shape[3] != kept.shape[3]:
                return []
            if out.shape[2] > kept.shape[2]:
                return []
            found.append((slice(at, at + rows), kept[:, first_head : first_head + out.shape[1], : out.shape[2]]))
            at += rows
        return found if at == out.shape[0] else []


def _names(branches: Sequence[Branch], shape: CallShape, tokens: int) -> list[Name]:
    return [(name, shape.heads, tokens) for name, _ in branches]


def _fetched(kept: Tensor, out: Tensor) -> Tensor:
    """``kept`` where ``out`` is, in its precision. A piece of main memory with gaps is first copied by the CPU, which must
    not read it before the GPU has written it."""
    if kept.device.type == "cpu" and not kept.is_contiguous():
        wait_for(out.device)
    return kept.to(out.device, out.dtype, non_blocking=True)
