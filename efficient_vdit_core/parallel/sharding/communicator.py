"""The ways in which ranks send one another tensors: an uneven all-to-all that runs while the caller works on, and a
gather of what each has; both are counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]
Form = tuple[Shape, torch.dtype]


class Pending:
    """An exchange under way; ``wait`` gives what each rank sent, as lists of tensors (empty for the caller's own
    rank)."""

    def __init__(
        self, work: Any, sent: Tensor, received: Tensor, forms: Sequence[Sequence[Form]], device: torch.device
    ) -> None:
        # ``sent`` is only kept alive: the transfer reads from it until it is done.
        self.work, self.sent, self.received, self.forms, self.device = work, sent, received, forms, device
        self.sizes = [_size(forms) for forms in self.forms]

    def wait(self) -> list[list[Tensor]]:
        self.work.wait()
        received = self.received.to(self.device)
        return [_unpack(part, forms) for part, forms in zip(received.split(self.sizes), self.forms, strict=True)]


class Communicator:
    """A process group (None: the default one) with a count of the bytes that this rank sent to others, by name.

    Every rank must start the same exchanges in the same order. ``beside`` is a second group of the same ranks for what
    travels while others wait for theirs: exchanges of one group come one after the other. ``timeout``: of the groups that
    ``parts`` makes, default PyTorch's.
    """

    def __init__(self, group: Any = None, beside: Any = None, timeout: timedelta | None = None) -> None:
        self.group, self.beside, self.timeout = group, beside, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # gloo exchanges lie in host memory only.
        self.through_host = dist.get_backend(group) == "gloo"
        self.sent: Counter[str] = Counter()
        self._parts: dict[tuple[int, ...], Communicator | None] = {}  # None: of other ranks

    def part(self, groups: Sequence[tuple[int, ...]]) -> Communicator:
        """The communicator of this rank's group among ``groups``, which part all ranks; its bytes are counted here too.

        The groups are made when they are first asked for: every rank must ask for the same ones in the same order. A communicator
        over the default group only.
        """
        assert self.group is None, "a part of a part"
        if len(groups) == 1:
            return self
        for ranks in groups:
            if ranks not in self._parts:
                group = dist.new_group(list(ranks), timeout=self.timeout)
                self._parts[ranks] = Communicator(group) if self.rank in ranks else None
        mine = next(found for ranks in groups if (found := self._parts[ranks]) is not None)
        mine.sent = self.sent
        return mine

    def start(
        self, name: str, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Form]], device: torch.device
    ) -> Pending:
        """Send ``sends[rank]`` to each rank and await tensors of the forms ``receives[rank]``; both are empty for this
        rank.

        ``name`` is what the bytes are counted under; ``device`` is where the result shall lie.
        """
        where = torch.device("cpu") if self.through_host else device
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        parts = [torch.cat([_bytes(x) for x in tensors]) if tensors else nothing for tensors in sends]
        sizes = [part.numel() for part in parts]
        expected = [_size(forms) for forms in receives]
        self.sent[name] += sum(sizes)
        sent = torch.cat(parts).to(where)
        received = torch.empty(sum(expected), dtype=torch.uint8, device=where)
        work = dist.all_to_all_single(received, sent, expected, sizes, group=self.group, async_op=True)
        return Pending(work, sent, received, receives, device)

    def gather(self, name: str, tensors: Sequence[Tensor], forms: Sequence[Sequence[Form]]) -> list[list[Tensor]]:
        """What every rank has, this one too; ``forms`` are those of each rank's tensors.

        One copy of it, in place of one for each peer; shorter ranks are padded to the longest.
        """
        device = tensors[0].device
        where = torch.device("cpu") if self.through_host else device
        longest = max(_size(every) for every in forms)
        mine = torch.zeros(longest, dtype=torch.uint8, device=where)
        done = 0
        for x in tensors:
            mine[done : done + x.nbytes].copy_(_bytes(x))
            done += x.nbytes
        self.sent[name] += longest * (self.size - 1)
        received = torch.empty(longest * self.size, dtype=torch.uint8, device=where)
        dist.all_gather_into_tensor(received, mine, group=self.group)
        return [_unpack(part, every) for part, every in zip(received.to(device).split(longest), forms, strict=True)]

    def start_gather(self, name: str, part: Tensor, row: Tensor) -> Any:
        """Begin to fill ``row`` with every rank's ``part`` (uint8, of one length), one behind another; its ``wait`` ends
        it. Both must stay until then, and lie in host memory where ``through_host`` is set."""
        self.sent[name] += part.nbytes * (self.size - 1)
        return dist.all_gather_into_tensor(row, part, group=self.beside or self.group, async_op=True)


def _size(forms: Sequence[Form]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms)


def _unpack(received: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The tensors of ``forms`` out of bytes that hold them one behind another, and perhaps more."""
    tensors, done = [], 0
    for shape, dtype in forms:
        size = math.prod(shape) * dtype.itemsize
        part = received[done : done + size]
        if (part.storage_offset() % dtype.itemsize) or not size:
            part = part.clone()  # a view of another dtype must begin at a whole element
        tensors.append(part.view(dtype).view(shape))
        done += size
    return tensors


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def form(x: Tensor, dim: int, size: int) -> Form:
    """The form of a tensor like ``x`` with ``size`` entries along ``dim``."""
    shape = list(x.shape)
    shape[dim] = size
    return tuple(shape), x.dtype
