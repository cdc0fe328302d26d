"""The text's padding, which a mask leaves out of the keys: attention runs over the sequence without it.

``padding`` is the range of positions where it stands: inside the prefix or inside the suffix of a layout, or empty.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..layout import TokenLayout


def without_padding(layout: TokenLayout, padding: range) -> TokenLayout:
    """The layout of the tokens that are left."""
    if padding.start < layout.prefix:
        return TokenLayout(layout.grid, layout.prefix - len(padding), layout.suffix)
    return TokenLayout(layout.grid, layout.prefix, layout.suffix - len(padding))


def as_heads(x: Tensor, heads: int, skip_reshape: bool, padding: range = range(0)) -> Tensor:
    """(B, H, N, D) without the tokens of ``padding``, from that form with ``skip_reshape``, else from (B, N, H * D); a view
    where nothing stands behind them."""
    x = x if skip_reshape else rearrange(x, "b n (h d) -> b h n d", h=heads)
    if not padding:
        return x
    before, behind = x[:, :, : padding.start], x[:, :, padding.stop :]
    return torch.cat((before, behind), 2) if behind.shape[2] else before


def fill_in(x: Tensor, padding: range) -> Tensor:
    """(B, H, N, D) with zeros as the tokens of ``padding``, which ``as_heads`` left out."""
    if not padding:
        return x
    zeros = x.new_zeros(*x.shape[:2], len(padding), x.shape[3])
    return torch.cat((x[:, :, : padding.start], zeros, x[:, :, padding.start :]), 2)
