"""Runs a model's blocks on this rank's tokens: sliced at the first block, gathered after the last, by ComfyUI's block
hooks.

Nothing of the model is copied or changed. The model computes embeddings, text and time on every rank (a small share),
hands each block its whole tables, and the hooks cut out what belongs to this rank's tokens.

Shapes: B batch, N tokens, n this rank's tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...attention import TokenLayout, tile_attention
from ...attention.spans import put, take
from ...head_patterns import LayerPattern
from .attend import sharded_attention
from .layout import Shard, choose_shard
from .traffic import scheme_of
from .wire import Wire, form

SHARDED_KEY = "evdit_sharded"
GATHER = "gather after the last block"

Hook = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
Override = Callable[..., Tensor]


class ShardedForward:
    """One forward pass over sharded tokens; lives in its ``transformer_options`` under ``SHARDED_KEY``.

    ``patterns`` holds one pattern for each block. ``schemes`` counts which scheme the layers took.
    """

    def __init__(self, layout: TokenLayout, patterns: Sequence[LayerPattern], wire: Wire, scheme: str = "auto") -> None:
        self.patterns, self.wire, self.scheme = tuple(patterns), wire, scheme
        self.shard = _shard(layout, wire.size, self.patterns)
        self.spans = self.shard.spans[wire.rank]
        self.schemes: Counter[str] = Counter()
        self.layer = -1
        # The first attention of a block is its self-attention; its length cannot tell, for text may be as long.
        self.awaits_self_attention = False
        self.cuts: dict[str, tuple[Any, Any]] = {}

    def enter(self, img: Tensor) -> Tensor:
        """This rank's rows of the hidden state (B, N, C)."""
        if img.ndim != 3 or img.shape[1] != self.shard.layout.tokens:
            raise ValueError(
                f"The first block was given a hidden state of shape {tuple(img.shape)}, expected {self.shard.layout.tokens} tokens for "
                f"{self.shard.layout}: another node adds or drops tokens. Remove it, or bypass EVDiTSequenceParallel."
            )
        return take(img, self.spans, 1).contiguous()

    def leave(self, img: Tensor) -> Tensor:
        """The whole hidden state (B, N, C), on every rank, from the ranks' rows."""
        rank, size = self.wire.rank, self.wire.size
        sends = [[img] if other != rank else [] for other in range(size)]
        receives = [[form(img, 1, self.shard.tokens[other])] if other != rank else [] for other in range(size)]
        parts = self.wire.start(GATHER, sends, receives, img.device).wait()
        parts[rank] = [img]
        whole = img.new_empty(img.shape[0], self.shard.layout.tokens, img.shape[2])
        for spans, (part,) in zip(self.shard.spans, parts, strict=True):
            put(whole, spans, part, 1)
        return whole

    def positions(self, pe: Any) -> Any:
        """This rank's part of the position tables (1 or B, N, ...), a tensor or a tuple of them."""
        return self._once("pe", pe, self._cut_positions)

    def modulation(self, vec: Tensor) -> Tensor:
        """The blocks' modulation for this rank: as it is where it holds for all tokens, else spread to its tokens (B,
        n, 6, C)."""
        if vec.ndim < 4 or vec.shape[1] == 1:
            return vec
        return self._once("vec", vec, self._spread)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Self-attention of the current block over q, k, v (B, H, n, D); ``dense`` is what single-rank attention would
        call."""
        self.awaits_self_attention = False
        pattern = self.patterns[self.layer]
        scheme = scheme_of(self.scheme, self.shard, pattern, q.shape[1], q.shape[3], q.element_size())
        self.schemes[scheme] += 1

        def inner(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            return tile_attention(q, k, v, self.shard.layout, pattern.of_heads(first, q.shape[1]), dense=dense)

        return sharded_attention(q, k, v, self.shard, pattern, self.wire, scheme=scheme, inner=inner)

    def _cut_positions(self, pe: Any) -> Any:
        if isinstance(pe, tuple | list):
            return type(pe)(self._cut_positions(part) for part in pe)
        if pe.ndim < 2 or pe.shape[1] != self.shard.layout.tokens:
            raise ValueError(
                f"The position table has shape {tuple(pe.shape)}, expected {self.shard.layout.tokens} tokens on its second axis: "
                "this model's positions cannot be sharded. Bypass EVDiTSequenceParallel."
            )
        return take(pe, self.spans, 1)

    def _spread(self, vec: Tensor) -> Tensor:
        # The models' own rule: each of L vectors holds for an equal run of tokens, rounded up where L does not divide
        # N.
        tokens, count = self.shard.layout.tokens, vec.shape[1]
        repeats = tokens // count if tokens % count == 0 else tokens // count + 1
        index = torch.cat([torch.arange(start, stop, device=vec.device) for start, stop in self.spans])
        return vec[:, index // repeats]

    def _once(self, name: str, value: Any, cut: Callable[[Any], Any]) -> Any:
        """``cut(value)``, kept for the other blocks, which are given the same table."""
        if name not in self.cuts or self.cuts[name][0] is not value:
            self.cuts[name] = value, cut(value)
        return self.cuts[name][1]


@lru_cache(maxsize=32)
def _shard(layout: TokenLayout, ranks: int, patterns: tuple[LayerPattern, ...]) -> Shard:
    return choose_shard(layout, ranks, patterns)


def block_hook(layer: int, layers: int, previous: Hook | None = None) -> Hook:
    """The hook of block ``layer`` of ``layers`` for ``patches_replace["dit"]``; ``previous`` is another node's hook
    there."""

    def hook(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        run = extra["original_block"] if previous is None else partial(_call, previous, extra)
        state: ShardedForward | None = args["transformer_options"].get(SHARDED_KEY)
        if state is None:
            return run(args)
        img = state.enter(args["img"]) if layer == 0 else args["img"]
        state.layer, state.awaits_self_attention = layer, True
        out = run({**args, "img": img, "pe": state.positions(args["pe"]), "vec": state.modulation(args["vec"])})
        return {**out, "img": state.leave(out["img"])} if layer == layers - 1 else out

    return hook


def _call(hook: Hook, extra: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    return hook(args, extra)


def make_sharded_override(previous: Override | None = None) -> Override:
    """The attention override of a sharded forward: a block's first call is its self-attention, the rest stays local."""

    def override(
        func: Override,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **shape: bool) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)
            return func(q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)

        state: ShardedForward | None = (kwargs.get("transformer_options") or {}).get(SHARDED_KEY)
        if state is None or not state.awaits_self_attention:
            return dense(q, k, v, heads, mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        if mask is not None or k.shape != q.shape:
            raise ValueError(
                f"Block {state.layer} masks its self-attention or joins text to it, expected plain self-attention over the video tokens: "
                "this cannot be sharded. Bypass EVDiTSequenceParallel."
            )
        if not skip_reshape:
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        # Ulysses holds a part of the heads, so the local calls say how many; RB's partial results need no backend.
        out = state.attend(
            q, k, v, lambda q, k, v: dense(q, k, v, q.shape[1], None, skip_reshape=True, skip_output_reshape=True)
        )
        return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")

    return override
