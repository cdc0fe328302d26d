"""Attention of diffusers' transformers handed to an override, through PyTorch's own interception of
``scaled_dot_product_attention`` (a TorchFunctionMode), so that no code of diffusers is replaced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ...attention.autocast import autocast
from ...attention.hook.state import FORWARD_KEY, ForwardState
from ...attention.sdpa import CROSS_KEY

OVERRIDE = "override"


class Intercepted(TorchFunctionMode):
    """Hands each attention call inside it to the options' override; without options it changes nothing."""

    active: ContextVar[Intercepted | None] = ContextVar("active", default=None)

    def __init__(self, options: dict[str, Any] | None) -> None:
        super().__init__()
        self.options, self.crossing = options, False

    def __enter__(self) -> Intercepted:
        self.before = self.active.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.active.reset(self.before)
        super().__exit__(*error)

    def from_here(self) -> Intercepted:
        """The same for what runs again later: its layers are counted on from the present one."""
        if self.options is None:
            return Intercepted(None)
        state: ForwardState = self.options[FORWARD_KEY]
        return Intercepted({**self.options, FORWARD_KEY: replace(state, counter=state.counter.copy())})

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.options is None or func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        # Cast here: backends are chosen, and halves travel between ranks, by what the call is computed in.
        q, k, v = autocast(*(args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))))
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")

        def dense(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: Any) -> Tensor:
            return func(q, k, v, attn_mask=mask)

        shape = {"skip_reshape": True, "skip_output_reshape": True}
        options = {**self.options, CROSS_KEY: True} if self.crossing else self.options
        return self.options[OVERRIDE](dense, q, k, v, q.shape[1], mask=mask, transformer_options=options, **shape)


def crosses(attention: nn.Module) -> None:
    """Has the calls within this module told as cross-attention, which nothing in a call tells where the text is as long as
    the video."""
    attention.register_forward_pre_hook(_begins_to_cross)
    attention.register_forward_hook(_crossed, always_call=True)


def _begins_to_cross(*_: object) -> None:
    if mode := Intercepted.active.get():
        mode.crossing = True


def _crossed(*_: object) -> None:
    if mode := Intercepted.active.get():
        mode.crossing = False


def checkpointed(block: Callable[..., Any], *inputs: Any) -> Any:
    """Gradient checkpointing whose second run, in the backward pass, has its attention intercepted as the first had."""
    mode = Intercepted.active.get()
    again = mode.from_here() if mode else nullcontext()
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
