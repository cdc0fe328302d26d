"""What one forward pass tells its attention calls: where the video stands, and which layer each call belongs to.

The description is settled before the forward; all that moves within it is its ``CallCounter``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..dense_call import FileAttention
from ..layout import TokenLayout
from ..report.report import AttentionReport
from .residual import Branch, Place, ResidualForward

FORWARD_KEY = "evdit"
Around = Callable[[Callable[[], Tensor]], Tensor]  # computes a forward, as often as it likes, and returns what it gives


def once(forward: Callable[[], Tensor]) -> Tensor:
    """Computes a forward as it is."""
    return forward()


class CallPlace(NamedTuple):
    """Which call of a forward it is: its ``layer``, how often that had attended before (``visit``; another stream of the
    model's), and the first of its heads, not 0 where a layer's heads come in several calls."""

    layer: int
    visit: int
    first_head: int


@dataclass
class CallCounter:
    """How far the model has come in a forward.

    Attributes:
        calls: self-attentions over the video so far, each over all heads.
        seen_heads: of the present one, where its heads come in several calls.
        visits: how often each layer has attended.
        busy: a call is being computed; what it calls in turn is no call of the model.
        ended: the model's forward is over, which is told in training alone: a call that comes still is of a block that is
            computed again by itself.
    """

    calls: int = 0
    seen_heads: int = 0
    visits: Counter[int] = field(default_factory=Counter)
    busy: bool = False
    ended: bool = False

    def next(self, layer: int | None, heads: int, of_layer: int) -> CallPlace | None:
        """The place of a call of ``layer`` over ``heads`` of the layer's, 0 = all; None where it is of no layer."""
        first_head = self.seen_heads
        if layer is not None and not first_head:
            self.visits[layer] += 1
        if 0 < heads < of_layer:
            self.seen_heads += heads
        if not self.seen_heads or self.seen_heads >= of_layer:
            self.go_to(self.calls + 1)
        return None if layer is None else CallPlace(layer, self.visits[layer] - 1, first_head)

    def go_to(self, call: int) -> None:
        """The next call begins that of this number."""
        self.calls, self.seen_heads = call, 0

    def copy(self) -> CallCounter:
        """One that counts on from here by itself."""
        return replace(self, visits=Counter(self.visits))

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Within it runs the model's forward, which a training step may compute again for its gradients."""
        self.go_to(0)
        self.visits.clear()
        self.ended = False
        try:
            yield
        finally:
            self.ended = True


@dataclass(frozen=True)
class ForwardState:
    """One forward pass: where its video tokens stand, whether sparsity is on, and how its layers are counted.

    Attributes:
        layout: None where it is not known; ``reason`` then says why.
        reason: why no pattern goes over the video's attention, "" = one may.
        others: lengths of the sequences beside the video (text, audio) that have attention of their own.
        depth: the number of layers, None where the model says it itself.
        heads: the attention heads of a layer, 0 = unknown. A call over fewer is a part of its layer.
        offsets: the first layer of each ``block_type``, where a model restarts ``block_index``.
        order: the layer of each self-attention call in turn; () = one a layer.
        padding: where the text's padding stands in the sequence, which a mask leaves out; empty where nothing is
            masked.
        step: sampling step, 0 = first; moves rotating reference frames.
        file_attention: by layer, what the checkpoint asks for.
        settled: backends were chosen before the forward, and none may be measured within it.
        slow: layers whose pattern was found slower than dense attention then, so that they stay dense.
        owner: the plan's ``Preparation`` that this is for, None = any. A plan that another node still calls leaves the
            attention alone.
        report: counts this forward's calls, None = the plan's own. A forward beside the run has one of its own.
        branches: the prompts of the batch in its order, as of ``residual.Branch``; () = not known.
        steps: how many the sampler takes, 0 = not known.
        whole: how many the whole schedule has, where the sampler takes a part of it; 0 = it takes all.
        later: a forward after this one will be active, where this one is not; what it needs is made ready.
        no_residual: why none is kept, whatever the schedule; "" = one may be.
        residual: what the layers do with the cached residual, None = nothing.
        counter: how far the model has come; shared by all that `replace` makes of this forward.
    """

    layout: TokenLayout | None
    reason: str = ""
    others: frozenset[int] = frozenset()
    depth: int | None = None
    heads: int = 0
    offsets: Mapping[str, int] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    padding: range = range(0)
    step: int = 0
    file_attention: Mapping[int, FileAttention] = field(default_factory=dict)
    settled: bool = False
    slow: frozenset[int] = frozenset()
    owner: Any = None
    report: AttentionReport | None = None
    branches: tuple[Branch, ...] = ()
    steps: int = 0
    whole: int = 0
    later: bool = False
    no_residual: str = ""
    residual: ResidualForward | None = None
    counter: CallCounter = field(default_factory=CallCounter)

    @property
    def active(self) -> bool:
        return not self.reason

    @property
    def renews(self) -> bool:
        """Whether its sparse layers compute dense attention as well, to renew the cached residual."""
        return self.residual is not None and self.residual.renew

    def again(self, **changes: Any) -> ForwardState:
        """The same forward from its first call on, beside this one or after it."""
        return replace(self, counter=CallCounter(), **changes)

    def next_call(self, options: Mapping[str, Any], heads: int = 0) -> CallPlace | None:
        """The place of this self-attention over ``heads``: its layer given by the model, else counted. None beyond the
        last."""
        given = self.given_layer(options)
        layer = self._layer_of(self.counter.calls) if given is None else given
        return self.counter.next(layer, heads, self.heads)

    def _layer_of(self, call: int) -> int | None:
        if self.order:
            return self.order[call] if call < len(self.order) else None
        return call if self.depth is None or call < self.depth else None

    def count_from(self, layer: int) -> None:
        """The next call is the first of ``layer``, however many blocks before it were left out."""
        self.counter.go_to(sum(before < layer for before in self.order) if self.order else layer)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it a call is being computed: an override that its functions ask in turn, ours among them, stands
        aside."""
        self.counter.busy = True
        try:
            yield
        finally:
            self.counter.busy = False

    def places(self, layers: Iterable[int]) -> list[Place]:
        """Every call of these layers in a forward."""
        calls = Counter(self.order or range(self.depth or 0))
        return [(layer, visit) for layer in layers for visit in range(calls[layer])]

    def given_layer(self, options: Mapping[str, Any]) -> int | None:
        """The layer that the model names for any of its calls; None where it names none."""
        index = options.get("block_index")
        return None if index is None else index + self.offsets.get(options.get("block_type", ""), 0)

    def named(self, layer: int) -> dict[str, Any]:
        """What the model says of a layer's calls, as `given_layer` reads it."""
        start, kind = max(((first, kind) for kind, first in self.offsets.items() if first <= layer), default=(0, ""))
        return {"block_index": layer - start, "block_type": kind, "total_blocks": self.depth}

    def masks_padding_alone(self, layout: TokenLayout, mask: Tensor) -> bool:
        """Whether this is the mask of the text's padding: one row of keys for all queries."""
        return len(self.padding) > 0 and mask.numel() == mask.shape[-1] == layout.tokens

    def masked(self, mask: Tensor | None) -> range:
        """The tokens that a call with this mask leaves out."""
        return range(0) if mask is None else self.padding
