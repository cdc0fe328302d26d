"""One call of a model's attention, as ComfyUI's attention-override protocol makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from ..call_shape import CallShape
from ..dense_call import DenseCall, Override, function_code, function_name
from ..sdpa import CROSS_KEY
from .padding import as_heads, fill_in
from .state import FORWARD_KEY, ForwardState


@dataclass
class AttentionCall:
    """q, k, v are tensors, or containers that ComfyUI lets a function take them out of: (B, H, N, D) with ``skip_reshape``,
    else (B, N, H * D). ``asked`` is the dense attention that the call asks for."""

    q: Any
    k: Any
    v: Any
    heads: int
    mask: Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    asked: DenseCall

    @property
    def options(self) -> Mapping[str, Any]:
        """The forward's ``transformer_options``."""
        return self.asked.kwargs.get("transformer_options") or {}

    @property
    def state(self) -> ForwardState | None:
        return self.options.get(FORWARD_KEY)

    @property
    def query(self) -> Tensor:
        """The queries as they came, which stay where they are."""
        return _peek(self.q)

    @property
    def tokens(self) -> int:
        """How many queries there are."""
        return self._length(self.q)

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self._length(self.k)

    @property
    def crosses(self) -> bool:
        """Whether the model says so, or the keys are of another shape than the queries."""
        return CROSS_KEY in self.options or self.query.shape != _peek(self.k).shape

    def dense(self, by: DenseCall | None = None) -> Tensor:
        """As it was asked for, or ``by`` another attention."""
        form = {"skip_reshape": self.skip_reshape, "skip_output_reshape": self.skip_output_reshape}
        return (by or self.asked).call(self.q, self.k, self.v, self.heads, self.mask, **form)

    @property
    def shape(self) -> CallShape:
        """What backends are chosen by."""
        q, k, v = (as_heads(_peek(x), self.heads, self.skip_reshape) for x in (self.q, self.k, self.v))
        return CallShape.of(q, k, v)

    def take(self, padding: range = range(0)) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, H, N, D) without padding, out of their containers. Nothing else can be asked of the call then but
        to ``give``."""
        taken = (x if isinstance(x, Tensor) else x.take() for x in (self.q, self.k, self.v))
        self.q = self.k = self.v = None  # so that what is taken can be freed
        q, k, v = (as_heads(x, self.heads, self.skip_reshape, padding) for x in taken)
        return q, k, v

    def give(self, out: Tensor, padding: range = range(0)) -> Tensor:
        """What the call returns, from (B, H, N, D) without padding."""
        out = fill_in(out, padding)  # nothing reads what padding attends to
        return out if self.skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")

    def given(self, out: Tensor, padding: range = range(0)) -> Tensor:
        """The inverse of ``give``."""
        return as_heads(out, self.heads, self.skip_output_reshape, padding)

    def _length(self, x: Any) -> int:
        return _peek(x).shape[2 if self.skip_reshape else 1]


def override_by(answer: Callable[[AttentionCall], Tensor], previous: Override | None = None) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]`` that answers calls by ``answer``; ``previous``
    is another node's, asked for all that is dense. Its ``asked`` gives the dense attention of such calls to those who prepare them."""
    # Once: what another node's function holds may change as it is called.
    name, code = (function_name(previous), function_code(previous)) if previous is not None else ("", "")

    def asked(func: Override, precision: Any, kwargs: dict[str, Any]) -> DenseCall:
        return DenseCall(func, previous, precision, kwargs, name, code)

    # A plain closure: ComfyUI deep-copies model options, and functions survive that as they are.
    def override(
        func: Override,
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        dense = asked(func, attn_precision, kwargs)
        return answer(AttentionCall(q, k, v, heads, mask, skip_reshape, skip_output_reshape, dense))

    answering: Any = override
    answering.asked = asked
    return answering


def _peek(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x.peek()
