"""The dense attention that a call asked for, with all that it was called with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

Override = Callable[..., Tensor]

# ComfyUI's own way to another attention function for one model; other overrides may do more than call it.
_CHOSEN = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
_MOST_HELD = 64  # functions behind a function that are looked at
_LOW_PRECISION = "low_precision_attention"  # a keyword of ComfyUI's attention functions


def function_name(function: Override) -> str:
    """Tells one attention function from another: a closure, as nodes install them, with the function that it holds."""
    name = getattr(function, "__name__", type(function).__name__)
    held = _held(function).values() if inspect.isfunction(function) else ()
    inner = sorted(
        {f.__name__ for f in held if inspect.isfunction(f) and f is not getattr(function, "__wrapped__", None)}
    )
    return f"{name} of {', '.join(inner)}" if inner else name


def function_code(function: Any) -> str:
    """Tells attention functions of one name apart, for those who remember what they took: a factory gives every kernel the
    same name. "" for a function that holds nothing. Numbers do not count: a node may keep its step in one."""
    if inspect.isfunction(function) and not function.__closure__:
        return ""
    return sha256("\n".join(_traits(function, set())).encode()).hexdigest()[:6]


def _traits(thing: Any, seen: set[int]) -> Iterator[str]:
    """Where a function is written, the words that it holds, and the same of the functions that it holds."""
    if id(thing) in seen or len(seen) >= _MOST_HELD:
        return
    seen.add(id(thing))
    place = thing if hasattr(thing, "__qualname__") else type(thing)
    yield f"{place.__module__} {place.__qualname__} {getattr(getattr(thing, '__code__', None), 'co_firstlineno', '')}"
    for name, value in _held(thing).items():
        if isinstance(value, str | bool):
            yield f"{name} {value!r:.80}"
        elif inspect.isroutine(value) or isinstance(value, functools.partial):
            yield name
            yield from _traits(value, seen)


def _held(thing: Any) -> dict[str, Any]:
    """What a closure, a partial call, a method or an object holds; a cell that is empty is left out."""
    if isinstance(thing, functools.partial):
        return {"function": thing.func, **dict(zip("0123456789", thing.args, strict=False)), **thing.keywords}
    if inspect.ismethod(thing):
        return {"function": thing.__func__, **_held(thing.__self__)}
    if not inspect.isfunction(thing):
        return dict(getattr(thing, "__dict__", {}))
    held = {}
    for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
        with suppress(ValueError):
            held[name] = cell.cell_contents
    return held


@dataclass(frozen=True)
class FileAttention:
    """The attention functions that a checkpoint asks for in one layer; None = the one that ComfyUI runs with.

    ``video`` is for the self-attention over the video, ``other`` for the rest of the layer's calls.
    """

    video: Override | None = None
    other: Override | None = None


def name_of(dense: Override | None) -> str:
    """What to call a dense attention; None is PyTorch's."""
    if dense is None or dense is F.scaled_dot_product_attention:
        return "sdpa"
    return getattr(dense, "name", "") or function_name(dense)


def identity_of(dense: Override | None) -> str:
    """What tells a dense attention from others where backends are measured beside it."""
    if dense is None or dense is F.scaled_dot_product_attention:
        return "sdpa"
    return getattr(dense, "identity", "") or f"{name_of(dense)} {function_code(dense)}".strip()


class DenseAttention(Protocol):
    """What backends are chosen beside: (B, H, Nq, D) over (B, H, Nk, D).

    Attributes:
        name, identity: what to call it, and what tells it from others of that name where it was measured.
        function: the attention function that runs in the end, None where that is not known.
        precise: whether it may not compute in lower precision than its tensors'.
        previous: another node's function that it asks, which may fail before the model runs.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def function(self) -> Override | None: ...
    @property
    def precise(self) -> bool: ...
    @property
    def previous(self) -> Override | None: ...
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenseCall:
    """The attention that a call asked for: another node's override, or the function that ComfyUI runs with.

    ``previous`` is that override, ``previous_name`` what to call it and ``previous_code`` its `function_code`; ``kwargs`` go
    along with each call.
    """

    func: Override
    previous: Override | None
    precision: Any
    kwargs: dict[str, Any]
    previous_name: str = ""
    previous_code: str = ""

    @property
    def name(self) -> str:
        """What to call this attention."""
        own = getattr(self.func, "__name__", type(self.func).__name__)
        name = f"{self.previous_name or function_name(self.previous)} over {own}" if self.previous else own
        return f"{name} in full precision" if self.precise else name

    @property
    def identity(self) -> str:
        """Its name, and what tells it from others of that name where backends are measured against it."""
        # ComfyUI gives an override the function itself, and everyone else the one that looks for overrides around it.
        own = function_code(inspect.unwrap(self.func))
        codes = own, self.previous_code or (function_code(self.previous) if self.previous else "")
        return " ".join([self.name, *filter(None, codes)])

    @property
    def precise(self) -> bool:
        """Whether the call forbids ComfyUI's functions to compute in lower precision than its tensors'."""
        return self.kwargs.get(_LOW_PRECISION, True) is False

    def at(self, precise: bool) -> DenseCall:
        """The same attention for calls that ask for full precision, or for those that do not."""
        return self if precise == self.precise else replace(self, kwargs={**self.kwargs, _LOW_PRECISION: not precise})

    @property
    def function(self) -> Override | None:
        """The attention function that runs in the end, where it is known: another node's override may do anything."""
        if self.previous is None:
            return self.func
        if getattr(self.previous, "__qualname__", "") != _CHOSEN or not inspect.isfunction(self.previous):
            return None
        return _held(self.previous).get("optimized_attention")

    def as_the_file_asks(self, asked: FileAttention | None, *, video: bool) -> DenseCall:
        """By the function that the checkpoint asks for in this layer, as where nobody overrides it; another node's override
        comes before both. ``video``: whether this is the self-attention over the video."""
        function = None if asked is None else asked.video if video else asked.other
        return self if function is None or self.previous is not None else replace(self, func=function)

    def call(self, q: Any, k: Any, v: Any, heads: int, mask: Tensor | None, **form: bool) -> Tensor:
        """As asked for; ``form`` is skip_reshape and skip_output_reshape. q, k, v may be containers of ComfyUI's."""
        options = {"mask": mask, "attn_precision": self.precision, **form, **self.kwargs}
        if self.previous is None:
            return self.func(q, k, v, heads, **options)
        if not isinstance(q, Tensor):
            if hasattr(self.previous, "container_function"):
                return self.previous.container_function(q, k, v, heads, **options)
            q, k, v = (x.take() for x in (q, k, v))
        return self.previous(self.func, q, k, v, heads, **options)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, Nq, D) over (B, H, Nk, D), as the backends ask for it."""
        return self.call(q, k, v, q.shape[1], None, skip_reshape=True, skip_output_reshape=True)
