"""Runs a model's blocks on this rank's tokens: cut at the first block, gathered after the last.

No code of the model is copied. It computes embeddings, text and time on every rank, hands each block its whole tables,
and what belongs to this rank's tokens is cut out of them.

Shapes: B batch, H heads, N tokens, n this rank's tokens, C channels, D head_dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from ...attention import TokenLayout, tile_attention
from ...attention.backends.partial import attend_lse, merge
from ...attention.backends.spans import Span, put, take
from ...attention.dense_call import DenseCall
from ...plan.head_patterns import LayerPattern
from .arguments import WHOLE, BlockArguments, cut_runs, cut_table, spread_to, tokens_of, with_tokens
from .attend import sharded_attention
from .communicator import Communicator, form
from .layout import Shard, Split, choose_shard, within
from .traffic import scheme_of

SHARDED_KEY = "evdit_sharded"
GATHER, KEYS = "gather of hidden states", "partial rows over sharded keys"
SELF, ALL_KEYS = "self-attention", "attention over all keys"

Hook = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class ShardedForward:
    """One forward pass over sharded tokens; lives in its ``transformer_options`` under ``SHARDED_KEY``.

    ``patterns`` holds one pattern for each block, ``heads`` how many a block has (0 = not known), ``weights`` the ranks'
    shares as of ``Split``, ``backend`` as of ``tile_attention`` what Ulysses computes with. ``schemes`` counts which scheme
    the layers took, and ``attended`` holds layer and scheme of each self-attention so far. ``awaits`` is what the next
    attention call is: of a block the first is its self-attention; its length cannot tell, for text may be as long.
    """

    def __init__(
        self,
        layout: TokenLayout,
        patterns: Sequence[LayerPattern],
        comm: Communicator,
        scheme: str = "auto",
        heads: int = 0,
        weights: Sequence[int] = (),
        backend: str = "auto",
    ) -> None:
        self.weights, self.backend = tuple(weights), backend
        self.layout, self.patterns, self.comm, self.scheme, self.heads = layout, tuple(patterns), comm, scheme, heads
        self.schemes: Counter[str] = Counter()
        self.attended: list[tuple[int, str]] = []
        self._shard: Shard | None = None
        self.layer = -1
        self.awaits = ""
        self.streams: dict[tuple[str, ...], dict[str, Span]] = {}
        self.cuts: dict[str, tuple[Any, Any]] = {}

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    @property
    def shard(self) -> Shard:
        """Who holds what; known when the first block has told of which hidden states the sequence is made."""
        assert self._shard is not None, "no block was entered"
        return self._shard

    @property
    def spans(self) -> tuple[Span, ...]:
        """What this rank holds of the sequence."""
        return self.shard.spans[self.comm.rank]

    def begin(self, layer: int | None) -> None:
        """The next attention call is the self-attention of ``layer``; None = of the layer before, once more."""
        self.check_done()
        self.layer, self.awaits = self.layer if layer is None else layer, SELF

    def check_done(self) -> None:
        """Raises ValueError where a block has attended without telling: it saw this rank's tokens alone."""
        if self.awaits:
            raise ValueError(
                f"Block {self.layer} made no attention call that the ranks could share: another node computes it or leaves it "
                "out. Remove that node, or bypass EVDiTSequenceParallel."
            )

    def enter(self, args: dict[str, Any], about: BlockArguments) -> dict[str, Any]:
        """A block's arguments for this rank's tokens; hidden states that are its rows already stay."""
        whole = sum(tokens_of(args[name]).shape[-2] for name in about.hidden) == self.tokens
        streams = self._streams(args, about.hidden, whole) | {WHOLE: (0, self.tokens)}
        mine = {name: within(self.spans, *span) for name, span in streams.items()}
        cut: dict[str, Callable[[Any], Any]] = {}
        for name, stream in about.tables.items():
            start, stop = streams[stream]
            cut[name] = partial(cut_table, tokens=stop - start, spans=mine[stream], name=name)
        cut |= {name: partial(spread_to, tokens=self.tokens, spans=self.spans) for name in about.spread}
        cut |= {name: partial(cut_runs, spans=mine[stream]) for name, stream in about.runs.items()}
        cut |= {name: partial(rows, spans=self.spans) for name, rows in about.rows.items()}
        given = {**args, **{name: self._once(name, args[name], function) for name, function in cut.items()}}
        for name in about.hidden if whole else ():
            x = tokens_of(args[name])
            given[name] = with_tokens(args[name], take(x, mine[name], x.ndim - 2).contiguous())
        return given

    def leave(self, out: dict[str, Any], about: BlockArguments) -> dict[str, Any]:
        """A block's results with the hidden states of all tokens, on every rank."""
        streams = self.streams[about.hidden]
        whole = self._gather([tokens_of(out[name]) for name in about.hidden], [streams[name] for name in about.hidden])
        return {**out, **{name: with_tokens(out[name], x) for name, x in zip(about.hidden, whole, strict=True)}}

    def all_rows(self, x: Tensor) -> Tensor:
        """The hidden state (B, N, C) of all tokens from this rank's rows."""
        return self._gather([x], [(0, self.tokens)])[0]

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a hidden state (B, N, C)."""
        return take(x, self.spans, x.ndim - 2).contiguous()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseCall) -> Tensor:
        """Self-attention of the current block over q, k, v (B, H, n, D); ``dense`` is what single-rank attention would
        call."""
        pattern = self.patterns[self.layer]
        scheme = scheme_of(self.scheme, self.shard, pattern, q.shape[1], q.shape[3], q.element_size())
        self.schemes[scheme] += 1
        self.attended.append((self.layer, scheme))

        def inner(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            followed = pattern.of_heads(first, q.shape[1])
            return tile_attention(q, k, v, self.layout, followed, dense=dense, backend=self.backend)

        return sharded_attention(q, k, v, self.shard, pattern, self.comm, scheme=self.scheme, inner=inner)

    def attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, H, M, D), which every rank holds, over the k, v (B, H, n, D) of all ranks.

        The ranks exchange their partial results, and merge them in one order: the result is the same on each.
        """
        mine = attend_lse(q, k, v)
        parts = self.comm.gather(KEYS, mine, [[form(x, 2, x.shape[2]) for x in mine]] * self.comm.size)
        return merge([(out, lse) for out, lse in parts])[0]

    def _streams(self, args: dict[str, Any], hidden: tuple[str, ...], whole: bool) -> dict[str, Span]:
        """Where each hidden state stands in the sequence, as it was when they were whole."""
        lengths = [tokens_of(args[name]).shape[-2] for name in hidden]
        if whole:
            # Text stands behind the video where the layout has a suffix.
            pairs = list(zip(hidden, lengths, strict=True))
            done, found = 0, {}
            for name, length in reversed(pairs) if self.layout.suffix and len(pairs) > 1 else pairs:
                found[name] = (done, done + length)
                done += length
            self.streams[hidden] = found
            if self._shard is None:
                self._shard = self._share_out([start for start, _ in found.values() if start])
        elif self._shard is None or sum(lengths) != self._shard.tokens[self.comm.rank] or hidden not in self.streams:
            raise ValueError(
                f"A block was given hidden states of {' + '.join(map(str, lengths))} tokens, expected {self.tokens} for "
                f"{self.layout}: another node adds or drops tokens. Remove it, or bypass EVDiTSequenceParallel."
            )
        return self.streams[hidden]

    def _share_out(self, borders: list[int]) -> Shard:
        shard = _shared_out(self.layout, self.comm.size, self.patterns, Split(tuple(borders), self.weights))
        if borders and not all(
            within(spans, 0, borders[0]) and within(spans, borders[0], self.tokens) for spans in shard.spans
        ):
            raise ValueError(
                f"The {borders[0]} + {self.tokens - borders[0]} tokens of text and video cannot be shared out over "
                f"{self.comm.size} ranks: one would get nothing of them. Write a longer prompt, the negative one too, or take "
                "fewer devices."
            )
        return shard

    def _gather(self, states: list[Tensor], streams: list[Span]) -> list[Tensor]:
        every = [[within(spans, *stream) for stream in streams] for spans in self.shard.spans]
        forms = [
            [form(x, x.ndim - 2, sum(b - a for a, b in spans)) for x, spans in zip(states, held, strict=True)]
            for held in every
        ]
        parts = self.comm.gather(GATHER, states, forms)
        joined = []
        for number, (x, (start, stop)) in enumerate(zip(states, streams, strict=True)):
            whole = x.new_empty(*x.shape[:-2], stop - start, x.shape[-1])
            for held, part in zip(every, parts, strict=True):
                put(whole, held[number], part[number], x.ndim - 2)
            joined.append(whole)
        return joined

    def _once(self, name: str, value: Any, cut: Callable[[Any], Any]) -> Any:
        """``cut(value)``, kept for the other blocks, which are given the same table."""
        if name not in self.cuts or self.cuts[name][0] is not value:
            self.cuts[name] = value, cut(value)
        return self.cuts[name][1]


@lru_cache(maxsize=32)
def _shared_out(layout: TokenLayout, ranks: int, patterns: tuple[LayerPattern, ...], split: Split) -> Shard:
    return choose_shard(layout, ranks, patterns, split)


def block_hook(
    layer: int | None, *, last: bool, about: BlockArguments | None = None, previous: Hook | None = None
) -> Hook:
    """The hook of a block for ``patches_replace["dit"]``; the ``last`` one of a row of blocks gives whole hidden states.

    ``layer`` is that of ``ShardedForward.begin``; ``previous`` is another node's hook there.
    """
    names = about or BlockArguments()

    def hook(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        run = extra["original_block"] if previous is None else partial(_call, previous, extra)
        state: ShardedForward | None = args["transformer_options"].get(SHARDED_KEY)
        if state is None:
            return run(args)
        given = state.enter(args, names)
        state.begin(layer)
        out = run(given)
        return state.leave(out, names) if last else out

    return hook


def _call(hook: Hook, extra: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    return hook(args, extra)
