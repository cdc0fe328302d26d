"""What one forward pass tells its attention calls: where the video stands, and which layer each call belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..layout import TokenLayout
from ..report.reason_names import OUTSIDE_THE_WINDOW
from ..report.report import AttentionReport
from .residual import Branch, Place, ResidualForward

FORWARD_KEY = "evdit"

Override = Callable[..., Tensor]


@dataclass(frozen=True)
class FileAttention:
    """The attention functions that a checkpoint asks for in one layer; None = the one that ComfyUI runs with.

    ``video`` is for the self-attention over the video, ``other`` for the rest of the layer's calls.
    """

    video: Override | None = None
    other: Override | None = None


@contextmanager
def computing(state: ForwardState | None) -> Iterator[None]:
    """Within it a call is being computed: an override that its functions ask in turn, ours among them, stands aside."""
    if state is None:
        yield
        return
    state.busy = True
    try:
        yield
    finally:
        state.busy = False


@dataclass
class ForwardState:
    """One forward pass: where its video tokens stand, whether sparsity is on, and how its layers are counted.

    Attributes:
        layout: None where it is not known; ``reason`` then says why.
        reason: why it is off, where ``active`` is False.
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
        calls: self-attentions over the video so far, each over all heads.
        owner: the plan's ``Preparation`` that this is for, None = any. A plan that another node still calls leaves the
            attention alone.
        report: counts this forward's calls, None = the plan's own. A forward beside the run has one of its own.
        busy: a call is being computed; what it calls in turn is no call of the model.
        branches: the prompts of the batch in its order, as of ``residual.Branch``; () = not known.
        steps: how many the sampler takes, 0 = not known.
        whole: how many the whole schedule has, where the sampler takes a part of it; 0 = it takes all.
        later: a forward after this one will be active, where this one is not; what it needs is made ready.
        no_residual: why none is kept, whatever the schedule; "" = one may be.
        residual: what the layers do with the cached residual, None = nothing.
        first_head: of the latest call, among its layer's heads; not 0 where a layer's heads come in several calls.
        ended: the model's forward is over, which is told in training alone: a call that comes still is of a block that is
            computed again by itself.
        visit: of the latest call, how often its layer had attended before it: another stream of the model's.
    """

    layout: TokenLayout | None
    active: bool = True
    reason: str = OUTSIDE_THE_WINDOW
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
    calls: int = 0
    owner: Any = None
    report: AttentionReport | None = None
    busy: bool = False
    seen_heads: int = 0
    first_head: int = 0
    visit: int = 0
    visits: Counter[int] = field(default_factory=Counter)
    branches: tuple[Branch, ...] = ()
    steps: int = 0
    whole: int = 0
    later: bool = False
    no_residual: str = ""
    residual: ResidualForward | None = None
    ended: bool = False

    def again(self, **changes: Any) -> ForwardState:
        """The same forward from its first call on, beside this one or after it."""
        return replace(self, calls=0, seen_heads=0, first_head=0, visit=0, visits=Counter(), ended=False, **changes)

    def next_layer(self, options: Mapping[str, Any], heads: int = 0) -> int | None:
        """The layer of this self-attention over ``heads``: given by the model, else counted. None beyond the last."""
        given, self.first_head = self.given_layer(options), self.seen_heads
        layer = self._counted_layer() if given is None else given
        if layer is not None and not self.first_head:
            self.visit = self.visits[layer]
            self.visits[layer] += 1
        if 0 < heads < self.heads:
            self.seen_heads += heads
        if not self.seen_heads or self.seen_heads >= self.heads:
            self.calls, self.seen_heads = self.calls + 1, 0
        return layer

    def _counted_layer(self) -> int | None:
        if self.order:
            return self.order[self.calls] if self.calls < len(self.order) else None
        return self.calls if self.depth is None or self.calls < self.depth else None

    def count_from(self, layer: int) -> None:
        """The next call is the first of ``layer``, however many blocks before it were left out."""
        self.calls = sum(before < layer for before in self.order) if self.order else layer
        self.seen_heads = 0

    @contextmanager
    def counting_anew(self) -> Iterator[None]:
        """Within it runs the model's forward, which a training step may compute again for its gradients."""
        self.calls = self.seen_heads = self.first_head = self.visit = 0
        self.visits.clear()
        self.ended = False
        try:
            yield
        finally:
            self.ended = True

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
