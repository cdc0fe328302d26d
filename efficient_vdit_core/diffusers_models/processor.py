"""The attention processor that runs another one and makes its attention sparse.

Shapes: q, k, v (B, H, N, D), as in scaled_dot_product_attention.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import TokenLayout, tile_attention
from ..attention.call_shape import CallShape
from ..attention.hook.override import computed_by
from ..attention.hook.prepare import LayerWork, Preparation
from ..attention.hook.reasons import why_no_pattern
from ..attention.hook.state import ForwardState
from ..attention.report.reason_names import (
    ANOTHER_LENGTH,
    BELOW_MIN_TOKENS,
    DROPOUT_OR_OWN_SCALE,
    MASKED,
    NO_GRID,
    NO_SDPA,
    SHARDED_BY_DIFFUSERS,
)
from ..plan.head_patterns import LayerPattern
from .families import SequenceLayout

Dense = Callable[..., Tensor]


class Patch(Protocol):
    """What a processor asks of the patch that has put it there."""

    preparation: Preparation
    min_tokens: int
    sequence: SequenceLayout | None  # of the present forward, None where it is not known
    entries: tuple[ForwardState, ...]  # what it tells each entry of the batch; one where all are alike

    def remove(self) -> None: ...


class _ChosenAttention:
    """Plain attention on the backend that was chosen in diffusers, for the processor ``original`` or for all; a
    `DenseAttention`."""

    precise, previous = False, None

    def __init__(self, original: Any, options: dict[str, Any]) -> None:
        self.original, self.options = original, options

    @property
    def name(self) -> str:
        """Tells it from others of diffusers' where backends are measured beside it."""
        if not hasattr(self.original, "_attention_backend"):
            return "sdpa"
        from diffusers.models import attention_dispatch

        chosen = self.original._attention_backend
        # Nothing public tells the one for all.
        registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
        if chosen is None and registry is not None:
            chosen = registry.get_active_backend()[0]
        name = getattr(chosen, "value", chosen) or "for all"
        return "sdpa" if name == "native" else f"diffusers {name}"

    @property
    def identity(self) -> str:
        return self.name

    @property
    def function(self) -> Dense | None:
        """PyTorch's, where it computes this: what ``parts`` asks, which wants the log-sum-exp too."""
        return F.scaled_dot_product_attention if self.name == "sdpa" else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        options = {**self.options, **options}
        if not hasattr(self.original, "_attention_backend"):
            return F.scaled_dot_product_attention(q, k, v, **options)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # diffusers has (B, N, H, D)
        return dispatch_attention_fn(q, k, v, backend=self.original._attention_backend, **options).transpose(1, 2)


class TiledProcessor:
    """Stands in the place of ``original``; made by ``tiled``, which gives it the original's call signature."""

    def __init__(self, original: Any, patch: Patch, layer: int) -> None:
        self.original, self.patch, self.layer = original, patch, layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Asked by ``copy.deepcopy`` of a transformer, as for an average of its weights."""
        raise TypeError(
            "This transformer is under a tile plan, and a copy would share the plan's state with it. Call remove() of the plan's "
            "handle, copy the transformer, and apply the plan to both."
        )

    @property
    def _attention_backend(self) -> Any:
        """Read and set by diffusers where the processor has one: the backend that was chosen for it."""
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """Likewise: set where diffusers shards the sequence over devices."""
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result, its attention sparse where nothing speaks against it."""
        report, sequence = self.patch.preparation.report, self.patch.sequence
        work = [self.patch.preparation.layer(state, self.layer) for state in self.patch.entries]
        reason = self._why_dense(sequence, work)
        if reason or sequence is None:
            report.add_dense(reason)
            return self.original(*args, **kwargs)
        mode = _AnswerAttention(functools.partial(self._answer, sequence, work))
        with mode:
            out = self._on_torch()(*args, **kwargs)
        if not mode.asked:
            report.add_dense(NO_SDPA)
        return out

    def _why_dense(self, sequence: SequenceLayout | None, work: list[LayerWork]) -> str:
        """The reason why this call stays dense, or an empty text where it may become sparse."""
        if sequence is None:
            return NO_GRID
        self.patch.preparation.tell(work[0])
        if reason := why_no_pattern(self.patch.entries[0], sequence.entries[0], None) or work[0].reason:
            return reason
        if getattr(self.original, "_parallel_config", None) is not None:
            return SHARDED_BY_DIFFUSERS
        return BELOW_MIN_TOKENS if sequence.tokens < self.patch.min_tokens else ""

    def _on_torch(self) -> Any:
        """The original, asking PyTorch for its attention whatever backend was chosen: there it can be answered."""
        if not hasattr(self.original, "_attention_backend"):
            return self.original
        from diffusers.models.attention_dispatch import AttentionBackendName

        asking = copy.copy(self.original)
        asking._attention_backend = AttentionBackendName.NATIVE
        return asking

    def _answer(
        self,
        sequence: SequenceLayout,
        work: list[LayerWork],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Stands for ``scaled_dot_product_attention``, with its arguments and their names. ``work`` is that of each entry
        of the batch, or one."""
        q, k, v, report = query, key, value, self.patch.preparation.report
        dense = _ChosenAttention(self.original, {"dropout_p": dropout_p, "is_causal": is_causal, **options})
        reason = ""
        if q.shape != k.shape or q.shape[2] != sequence.tokens or len(work) not in (1, q.shape[0]):
            reason = ANOTHER_LENGTH
        elif is_causal or (attn_mask is not None and not sequence.masked):
            reason = MASKED
        elif dropout_p or options.get("scale") not in (None, q.shape[3] ** -0.5):
            reason = DROPOUT_OR_OWN_SCALE
        if reason:
            report.add_dense(reason)
            return dense(q, k, v, attn_mask=attn_mask)
        rows = [(q, k, v)] if len(work) == 1 else zip(q.split(1), k.split(1), v.split(1), strict=True)
        found = [
            self._sparse(*qkv, entry, of_entry.pattern, dense)
            for qkv, entry, of_entry in zip(rows, sequence.entries, work, strict=True)
        ]
        computed = " and ".join(dict.fromkeys(name for _, name in found))
        report.add_sparse(sum(of_entry.density for of_entry in work) / len(work), computed)
        return found[0][0] if len(found) == 1 else torch.cat([out for out, _ in found])

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, entry: TokenLayout, pattern: LayerPattern, dense: _ChosenAttention
    ) -> tuple[Tensor, str]:
        """Attention of all but the padding behind ``entry``, and what computed it. The rows of padding, which no token
        ever reads, are zero."""
        padding = q.shape[2] - entry.tokens
        q, k, v = (x[:, :, : entry.tokens] for x in (q, k, v))
        shape = CallShape.of(q, k, v)
        backends = self.patch.preparation.choices.settle(shape, entry, pattern, dense)
        out = tile_attention(q, k, v, entry, pattern, dense=dense, backend=backends)
        if padding:  # without any, too, F.pad would copy
            out = F.pad(out, (0, 0, 0, padding))
        return out, computed_by(pattern, shape, backends, entry.grid.t, dense)


def tiled(original: Any, patch: Patch, layer: int) -> TiledProcessor:
    """A processor for the place of ``original``. diffusers reads which arguments a processor takes from its
    signature."""
    return _tiled_class(type(original))(original, patch, layer)


def not_compiled(function: Callable[..., Any]) -> Any:
    """``function`` kept out of torch.compile: it counts calls and reads timesteps, and each new value would compile the model
    anew."""
    said: dict[str, Any] = {"reason": "a tile plan counts its calls: compile without fullgraph"}
    known = "reason" in inspect.signature(torch.compiler.disable).parameters  # from PyTorch 2.7 on
    return torch.compiler.disable(function, **said if known else {})


@functools.cache
def _tiled_class(kind: type) -> type[TiledProcessor]:
    attend = not_compiled(TiledProcessor.attend)
    return type(f"Tiled{kind.__name__}", (TiledProcessor,), {"__call__": functools.wraps(kind.__call__)(attend)})


class _AnswerAttention(TorchFunctionMode):
    """While on, answers ``scaled_dot_product_attention`` with ``answer``; PyTorch switches it off inside the answer."""

    def __init__(self, answer: Dense) -> None:
        super().__init__()
        self.answer, self.asked = answer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.asked = True
        return self.answer(*args, **(kwargs or {}))
