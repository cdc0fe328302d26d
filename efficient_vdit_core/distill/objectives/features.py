"""Losses on a network's features that hold the features of one layer at a time.

The teacher runs first, and each feature that it shows is laid by in the host's memory, in its own precision. The
student's loss of a layer is computed where the layer is, inside its block: with gradient checkpointing it is computed
again in the backward pass, from the same feature fetched anew. So the accelerator holds neither the teacher's features
nor the student's, nor differences of them; the host holds the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.host_memory import HostMemory
from ...parallel.sharding.communicator import Communicator
from ...parallel.sharding.replicated import sum_over_ranks

Listener = Callable[[str, int, Tensor], None]  # name, layer and what the module returned
SMALLEST = 1e-12  # of a squared norm that is divided by


class FeatureTap:
    """Shows a listener what chosen modules return, every time they run while the tap is open.

    ``modules``: by the feature's name, one for each layer.
    """

    def __init__(self, modules: dict[str, Sequence[nn.Module]]) -> None:
        self.modules = modules

    @contextmanager
    def open(self, listener: Listener, names: Collection[str]) -> Iterator[None]:
        """Listen to the features in ``names``; the others cost nothing."""
        tapped = [(name, layer, m) for name in names for layer, m in enumerate(self.modules[name])]
        handles = [m.register_forward_hook(_teller(listener, name, layer)) for name, layer, m in tapped]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _teller(listener: Listener, name: str, layer: int) -> Callable[..., None]:
    def tell(module: nn.Module, args: Any, output: Any) -> None:
        listener(name, layer, output if isinstance(output, Tensor) else output[0])

    return tell


class HostFeatures:
    """The host's memory that a teacher's features wait in: a place for each of them, which every step uses again.

    ``close`` gives it back.
    """

    def __init__(self) -> None:
        self.memory = HostMemory("a teacher's feature")
        self.places: dict[Hashable, Tensor] = {}

    def keep(self, name: Hashable, value: Tensor) -> Tensor:
        """A copy of ``value``, which is good until the next of that ``name``; ``value`` itself where it lies in the host's
        memory.

        The GPU alone reads the copy. What the step before still reads comes earlier in the same stream, so nothing waits.
        """
        if value.device.type == "cpu":
            return value
        kept = self._place(name, value.nbytes, value.device)[: value.nbytes].view(value.dtype).view(value.shape)
        return kept.copy_(value, non_blocking=value.is_cuda)

    def _place(self, name: Hashable, size: int, device: torch.device) -> Tensor:
        """Bytes of the host's memory, ``size`` or more: captions of other lengths come along."""
        place = self.places.pop(name, None)
        if place is not None and place.nbytes < size:
            self.memory.release(place)
            place = None  # before the larger one is taken
        self.places[name] = self.memory.empty((size,), torch.uint8, device) if place is None else place
        return self.places[name]

    def close(self) -> None:
        self.memory.close()
        self.places.clear()


class LayerLosses:
    """The relative square of each layer's feature against the teacher's.

    ``keep`` listens to the teacher, ``compare`` to the student, whose blocks may run again in the backward pass; the
    losses (scalars, float32) are those of the first time. Where processes share out a clip, each sees its own tokens'
    features, and ``comm`` leads to the others: the loss is that of all tokens. The teacher's wait in ``host``, which serves
    one such object at a time.
    """

    def __init__(self, comm: Communicator | None = None, host: HostFeatures | None = None) -> None:
        self.comm, self.host = comm, HostFeatures() if host is None else host
        self.waiting: dict[tuple[str, int], Tensor] = {}
        self.losses: dict[tuple[str, int], Tensor] = {}

    def keep(self, name: str, layer: int, feature: Tensor) -> None:
        self.waiting[name, layer] = self.host.keep((name, layer), feature.detach())

    def compare(self, name: str, layer: int, feature: Tensor) -> None:
        loss = _RelativeSquare.apply(feature, self.waiting[name, layer], self.comm)
        self.losses.setdefault((name, layer), loss)  # pyright: ignore[reportArgumentType]

    def mean(self, name: str) -> Tensor:
        """Over the layers."""
        return torch.stack([loss for (of, _), loss in self.losses.items() if of == name]).mean()


def relative_square(value: Tensor, wanted: Tensor) -> Tensor:
    """|value - wanted|^2 / |wanted|^2 over all elements, in float32; ``wanted`` may lie elsewhere and gets no
    gradient."""
    return _RelativeSquare.apply(value, wanted, None)  # pyright: ignore[reportReturnType]


class _RelativeSquare(torch.autograd.Function):
    """Keeps the value, which a network keeps anyway, and takes the difference a second time for the gradient.

    With a ``comm`` both squares are sums over its ranks, and the gradient is that of the sum of their losses, as
    `parallel.sharding.replicated` has it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, wanted: Tensor, comm: Communicator | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        there = wanted.to(value.device, non_blocking=True)
        squares = torch.stack([_difference(value, there).square_().sum(), there.float().square().sum()])
        if comm is not None:
            sum_over_ranks(squares, comm)
        size = squares[1].clamp(min=SMALLEST)
        ctx.save_for_backward(value)
        ctx.wanted, ctx.size, ctx.losses = wanted, size, 1 if comm is None else comm.size
        return squares[0] / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        there = ctx.wanted.to(value.device, non_blocking=True)
        factor = 2.0 * ctx.losses * grad / ctx.size
        return _difference(value, there).mul_(factor).to(value.dtype), None, None


def _difference(value: Tensor, wanted: Tensor) -> Tensor:
    """A tensor of its own, in float32, with no copy of the value in between."""
    return torch.sub(value, wanted.float())
