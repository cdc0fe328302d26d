"""Plain dense attention with ComfyUI's calling convention, for running the models outside ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .cpu_halves import attend, suits

OVERRIDE_KEY = "optimized_attention_override"
# In transformer_options, set where a model says itself that a call crosses to the text: its length tells that only where it
# is not the video's.
CROSS_KEY = "evdit_crosses"


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """As ``attention_sdpa``; an override in ``transformer_options`` is asked first, as ComfyUI does."""
    override: Callable[..., Tensor] | None = (kwargs.get("transformer_options") or {}).get(OVERRIDE_KEY)
    if override is not None:
        return override(attention_sdpa, q, k, v, heads, mask=mask, **kwargs)
    return attention_sdpa(q, k, v, heads, mask=mask, **kwargs)


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **_: Any,
) -> Tensor:
    """PyTorch's attention of q over k, v.

    q, k, v are (B, N, heads * D), or (B, heads, N, D) with ``skip_reshape``. Returns (B, N, heads * D), or
    (B, heads, N, D) with ``skip_output_reshape``. ``mask`` is additive or boolean and broadcasts to (B, H, Nq, Nk).
    """
    if not skip_reshape:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = attend(q, k, v, mask) if suits(q, k, v, mask) else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")
