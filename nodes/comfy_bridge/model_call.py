"""One evaluation of a model as ComfyUI's APPLY_MODEL wrappers are given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelCall:
    """What ``BaseModel.apply_model`` was called with, in its order; ``more`` and ``conds`` go along as they are.

    ``executor`` is the rest of the chain, and ``options`` are a copy of the forward's ``transformer_options``.
    """

    executor: Any
    x: Tensor
    t: Tensor
    c_concat: Any
    c_crossattn: Any
    control: Any
    options: dict[str, Any]
    more: tuple[Any, ...]
    conds: dict[str, Any]

    @property
    def model(self) -> Any:
        """ComfyUI's BaseModel."""
        return self.executor.class_obj

    def run(self) -> Any:
        """What the rest of the chain makes of it."""
        own = (self.x, self.t, self.c_concat, self.c_crossattn, self.control, self.options)
        return self.executor(*own, *self.more, **self.conds)


def around_model(act: Callable[[ModelCall], Any]) -> Any:
    """``act`` as a wrapper for APPLY_MODEL."""

    def wrapper(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        *more: Any,
        **conds: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        return act(ModelCall(executor, x, t, c_concat, c_crossattn, control, options, more, conds))

    return wrapper
