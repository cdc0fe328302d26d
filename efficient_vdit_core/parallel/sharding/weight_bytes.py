"""A block's weights as one row of bytes: any dtype, any class of tensor that PyTorch can take apart, quantised ones too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What PyTorch's own kernels may ask of a tensor's address.
ALIGNMENT = 64

Build = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Leaf:
    """A plain tensor within the row: ``order`` holds its dimensions from the widest stride to the narrowest."""

    offset: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, row: Tensor) -> Tensor:
        """The tensor itself, as it lies in ``row`` (uint8)."""
        flat = row[self.offset : self.offset + self.nbytes].view(self.dtype)
        wide = flat.view([self.shape[dim] for dim in self.order])
        return wide.permute([self.order.index(dim) for dim in range(len(self.order))])


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, with all the places in the block where it stands (several where modules share it)."""

    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class BlockBytes:
    """The weights of one block and the length of its row."""

    weights: tuple[Weight, ...]
    nbytes: int


def lay_out(block: nn.Module, changed: Mapping[str, Any] | None = None) -> BlockBytes:
    """Where each weight of ``block`` lies in its row. Those of ``changed`` are no longer what other places share.

    Raises ValueError for a class of tensors that cannot be taken apart.
    """
    places: dict[Any, tuple[Tensor, list[str]]] = {}
    for name, x in weights_of(block):
        places.setdefault(name if name in (changed or {}) else id(x), (x, []))[1].append(name)
    weights, done = [], 0
    for x, names in places.values():
        leaves = []
        for part in take_apart(x)[0]:
            leaves.append(Leaf(done, tuple(part.shape), _order(part), part.dtype))
            done += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        weights.append(Weight(tuple(names), tuple(leaves)))
    return BlockBytes(tuple(weights), done)


def weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every place of a parameter or buffer, by its dotted name; a shared one comes several times."""
    for kind in (module.named_parameters, module.named_buffers):
        yield from kind(remove_duplicate=False)


def take_apart(x: Tensor) -> tuple[list[Tensor], Build]:
    """The plain tensors that ``x`` is made of, and what makes such a tensor of others like them; that keeps none alive."""
    if is_traceable_wrapper_subclass(x):
        names, about = x.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        inner = [take_apart(getattr(x, name)) for name in names]
        shares = [(name, len(parts), build) for name, (parts, build) in zip(names, inner, strict=True)]
        return [part for parts, _ in inner for part in parts], partial(
            _put_together, type(x), about, x.shape, x.stride(), shares
        )
    if type(x) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"A block holds a weight of class {type(x).__name__}, expected a plain or a quantised tensor that PyTorch can take apart: "
            "such weights cannot be shared out. Set weights to whole, or load another file of the model."
        )
    return [x.detach()], lambda parts: parts[0]


def _put_together(
    kind: Any, about: Any, shape: Any, stride: Any, shares: list[tuple[str, int, Build]], parts: Sequence[Tensor]
) -> Tensor:
    given = iter(parts)
    made = {name: build(list(islice(given, count))) for name, count, build in shares}
    return kind.__tensor_unflatten__(made, about, shape, stride)


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of a plain tensor in the order of ``Leaf``: a view of it where it is dense."""
    return x.permute(_order(x)).contiguous().view(-1).view(torch.uint8)


def _order(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(x.ndim), key=lambda dim: -x.stride(dim) if x.shape[dim] > 1 else 0))
