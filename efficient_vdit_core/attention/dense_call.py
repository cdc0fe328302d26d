"""The dense attention that a call asked for, with all that it was called with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .hook.state import FileAttention, Override

# ComfyUI's own way to another attention function for one model; other overrides may do more than call it.
_CHOSEN = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
_LOW_PRECISION = "low_precision_attention"  # a keyword of ComfyUI's attention functions


def function_name(function: Override) -> str:
    """Tells one attention function from another: a closure, as nodes install them, with the function that it holds."""
    name = getattr(function, "__name__", type(function).__name__)
    held = inspect.getclosurevars(function).nonlocals.values() if inspect.isfunction(function) else ()
    inner = sorted(
        {f.__name__ for f in held if inspect.isfunction(f) and f is not getattr(function, "__wrapped__", None)}
    )
    return f"{name} of {', '.join(inner)}" if inner else name


@dataclass(frozen=True)
class DenseCall:
    """The attention that a call asked for: another node's override, or the function that ComfyUI runs with.

    ``previous`` is that override and ``previous_name`` what to call it; ``kwargs`` go along with each call.
    """

    func: Override
    previous: Override | None
    precision: Any
    kwargs: dict[str, Any]
    previous_name: str = ""

    @property
    def name(self) -> str:
        """Tells one dense attention from another where backends are measured against it."""
        own = getattr(self.func, "__name__", type(self.func).__name__)
        name = f"{self.previous_name or function_name(self.previous)} over {own}" if self.previous else own
        return f"{name} in full precision" if self.precise else name

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
        return inspect.getclosurevars(self.previous).nonlocals.get("optimized_attention")

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
