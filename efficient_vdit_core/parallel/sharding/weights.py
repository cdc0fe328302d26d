"""Weights shared out: each rank keeps a part of every block, and gathers a block whole ahead of its turn.

PyTorch's FSDP2 does not serve here. Its hooks fail under ``torch.inference_mode``, in which ComfyUI computes ("Inference
tensors do not track version counter"), and it puts DTensors where ComfyUI reads and patches parameters.

Outside its own forward a block has the weights it was given, wherever they lie (a mapped file, the host's memory): who
loads, patches and counts weights sees the model as it was. P is the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .communicator import Communicator
from .weight_bytes import ALIGNMENT, BlockBytes, bytes_of, lay_out, take_apart, weights_of

GATHER_WEIGHTS = "gather of weights"
# The block that computes, and the one that comes.
WHOLE_AT_ONCE = 2

Change = Callable[[], Tensor]


@dataclass(frozen=True)
class WeightMemory:
    """Bytes on one rank's device: ``whole``, what its blocks take whole; ``parts``, its parts of them; ``room``, that of
    the blocks that are whole at once."""

    whole: int
    parts: int
    room: int


def weight_memory(blocks: Sequence[nn.Module], ranks: int) -> WeightMemory:
    """What ``ShardedWeights`` of these blocks will hold on each of ``ranks``."""
    sizes = [lay_out(block).nbytes for block in blocks]
    parts = [_part(size, ranks) for size in sizes]
    return WeightMemory(sum(sizes), sum(parts), WHOLE_AT_ONCE * max(parts, default=0) * ranks)


@dataclass
class _Block:
    """A block's layout and part, how its tensors are built, and the places that are filled while it computes."""

    module: nn.Module
    about: BlockBytes
    part: Tensor
    builds: list[Callable[[Sequence[Tensor]], Tensor]]
    places: list[list[tuple[dict[str, Any], str, bool]]]
    made: dict[int, list[Tensor]] = field(default_factory=dict)
    resting: list[list[Any]] = field(default_factory=list)


@dataclass
class _Arriving:
    number: int
    seat: int
    work: Any


class ShardedWeights:
    """Shares out the weights of ``blocks``, modules of ``root``, whose forward is one pass over them.

    The blocks must not lie in one another, and every rank must run them in the same order; a pass is expected to take that
    of the pass before. ``changed`` gives weights by their names in ``root`` that differ from what the blocks hold (a LoRA
    merged), made when they are needed: no more than one of them is whole at a time while the parts are filled.

    ``order`` remembers which block follows which, and must outlive this object where it may be made anew: one rank may have
    to load a model again that others still hold, and all must expect the same block next.

    ``remove`` takes the hooks and the memory away. Raises ValueError for weights that cannot be taken apart.
    """

    def __init__(
        self,
        root: nn.Module,
        blocks: Sequence[nn.Module],
        comm: Communicator,
        device: torch.device,
        changed: Mapping[str, Change] | None = None,
        order: dict[int | None, int] | None = None,
    ) -> None:
        self.comm, self.device = comm, device
        # What gloo sends lies in the host's memory, and so do the parts there; only the room is the device's.
        self.rests = torch.device("cpu") if comm.through_host else device
        names = {module: name for name, module in root.named_modules()}
        self.blocks = [self._fill(block, f"{names[block]}.", changed or {}) for block in blocks]
        room = max((block.part.numel() for block in self.blocks), default=0) * comm.size
        with torch.inference_mode(False):
            self.seats = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(WHOLE_AT_ONCE)]
        self.landings = self.seats
        if self.rests != device:
            self.landings = [torch.empty(room, dtype=torch.uint8, pin_memory=True) for _ in self.seats]
        self.after = {} if order is None else order
        if not self.after:
            self.after.update({None: 0} | {i: i + 1 for i in range(len(self.blocks) - 1)})
        self.arriving: _Arriving | None = None
        self.inside: tuple[int, int] | None = None  # the block that computes, and its seat
        self.before: int | None = None
        self.most_whole = 0
        self.handles = [
            root.register_forward_pre_hook(lambda *_: self._begin()),
            root.register_forward_hook(lambda *_: self._end(), always_call=True),
        ]
        for number, block in enumerate(blocks):
            self.handles += [
                block.register_forward_pre_hook(lambda *_, number=number: self._enter(number)),
                block.register_forward_hook(lambda *_, number=number: self._leave(number), always_call=True),
            ]

    @property
    def nbytes(self) -> int:
        """Bytes that the parts and the room for whole blocks take."""
        return sum(block.part.nbytes for block in self.blocks) + sum(seat.nbytes for seat in self.seats)

    def remove(self) -> None:
        """Leave the blocks as they were."""
        self._end()
        for handle in self.handles:
            handle.remove()
        self.blocks, self.seats, self.landings, self.handles = [], [], [], []

    def _fill(self, module: nn.Module, prefix: str, changed: Mapping[str, Change]) -> _Block:
        mine = {name[len(prefix) :]: change for name, change in changed.items() if name.startswith(prefix)}
        about, current = lay_out(module, mine), dict(weights_of(module))
        size = _part(about.nbytes, self.comm.size)
        first = size * self.comm.rank
        part, builds, places = torch.zeros(size, dtype=torch.uint8, device=self.rests), [], []
        for weight in about.weights:
            name = weight.names[0]
            parts, build = take_apart(mine[name]() if name in mine else current[name])
            if [(tuple(x.shape), x.dtype) for x in parts] != [(leaf.shape, leaf.dtype) for leaf in weight.leaves]:
                raise ValueError(
                    f"A patch gives {prefix}{name} another shape or precision, which shared out weights cannot take. Remove the patch, "
                    "or set weights to whole."
                )
            for x, leaf in zip(parts, weight.leaves, strict=True):
                start, stop = max(first, leaf.offset), min(first + size, leaf.offset + leaf.nbytes)
                if start < stop:
                    part[start - first : stop - first].copy_(bytes_of(x)[start - leaf.offset : stop - leaf.offset])
            builds.append(build)
            places.append([_place(module, name) for name in weight.names])
        return _Block(module, about, part, builds, places)

    def _begin(self) -> None:
        self._end()
        if self.blocks:
            self._start(self.after[None], 0)

    def _end(self) -> None:
        """After a pass, whole or broken off: nothing is on its way, nothing whole is remembered."""
        if self.arriving is not None:
            self.arriving.work.wait()
        self.arriving = self.inside = self.before = None

    def _start(self, number: int, seat: int) -> None:
        part = self.blocks[number].part
        row = self.landings[seat][: part.numel() * self.comm.size]
        self.arriving = _Arriving(number, seat, self.comm.start_gather(GATHER_WEIGHTS, part, row))

    def _enter(self, number: int) -> None:
        self.after[self.before], self.before = number, number
        if self.arriving is None or self.arriving.number != number:
            seat = 0
            if self.arriving is not None:  # it comes another way than the last time
                self.arriving.work.wait()
                seat = self.arriving.seat
            self._start(number, seat)
        arrived, self.arriving = self.arriving, None
        assert arrived is not None
        arrived.work.wait()
        self._seat(number, arrived.seat)
        following = self.after.get(number)
        if following is not None:
            self._start(following, 1 - arrived.seat)
        self.most_whole = max(self.most_whole, 1 + (self.arriving is not None))

    def _seat(self, number: int, seat: int) -> None:
        """Give the block its whole weights."""
        block, row = self.blocks[number], self.seats[seat]
        if self.landings is not self.seats:
            size = block.part.numel() * self.comm.size
            row[:size].copy_(self.landings[seat][:size])
        if seat not in block.made:
            block.made[seat] = self._make(block, row)
        block.resting = [[held[name] for held, name, _ in places] for places in block.places]
        for x, places in zip(block.made[seat], block.places, strict=True):
            for held, name, _ in places:
                held[name] = x
        self.inside = number, seat

    def _make(self, block: _Block, row: Tensor) -> list[Tensor]:
        """The block's tensors within ``row``."""
        made = []
        with torch.inference_mode(False):
            for weight, build, places in zip(block.about.weights, block.builds, block.places, strict=True):
                x = build([leaf.view(row) for leaf in weight.leaves])
                held, name, is_parameter = places[0]
                # By this mark PyTorch chooses how to multiply, also where no gradient is taken.
                marked = held[name].requires_grad and not held[name].is_inference()
                made.append(nn.Parameter(x, requires_grad=marked) if is_parameter else x)
        return made

    def _leave(self, number: int) -> None:
        """Give the block back what it had; ``number`` has not entered where its gather failed."""
        if self.inside is None or self.inside[0] != number:
            return
        block = self.blocks[number]
        for resting, places in zip(block.resting, block.places, strict=True):
            for x, (held, name, _) in zip(resting, places, strict=True):
                held[name] = x
        block.resting, self.inside = [], None


def _place(root: nn.Module, name: str) -> tuple[dict[str, Any], str, bool]:
    """The dict that holds a weight, its key there, and whether it is a parameter."""
    path, _, last = name.rpartition(".")
    module = root.get_submodule(path)
    is_parameter = last in module._parameters
    return (module._parameters if is_parameter else module._buffers), last, is_parameter


def _part(nbytes: int, ranks: int) -> int:
    """Bytes of each rank's part; the last ones' ends may be empty."""
    return -(-nbytes // (ranks * ALIGNMENT)) * ALIGNMENT
