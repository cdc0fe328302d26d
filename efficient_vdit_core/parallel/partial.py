"""Dense attention over a part of the keys, with the logarithm of each row's softmax sum, by which parts merge exactly.

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), out (B, H, Nq, D), lse (B, H, Nq) in float32, natural logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]

_HALVES = (torch.bfloat16, torch.float16)
# Scores of the plain path, in elements: 64 MiB of float32.
_PLAIN_SCORES = 2**24


def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention of q over k, v, scaled by 1 / sqrt(D), and its lse. No keys: zeros and -inf, which merge as nothing.

    On a CPU PyTorch's own flash attention tells the lse: float32, float64, bfloat16 and float16, any head_dim, no mask, no
    dropout. On CUDA flash attention does for halves with a head_dim divisible by 8 up to 256, and memory-efficient
    attention for the rest that is divisible by 4. Anything else takes plain matrix products, a block of rows at a time.
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    aten, dim = torch.ops.aten, q.shape[-1]
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.is_cuda and q.dtype in _HALVES and dim % 8 == 0 and dim <= 256:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.is_cuda and dim % 4 == 0 and q.dtype != torch.float64:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[:, :, : q.shape[2]]  # padded to whole warps
    else:
        out, lse = _plain(q, k, v)
    return out, lse.float()


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    rows = max(1, _PLAIN_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for chunk in q.split(rows, dim=2):
        scores = (chunk.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp().to(v.dtype) @ v, lse))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over all keys from attentions over disjoint parts of them: sum_p out_p exp(lse_p - lse), in float32."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num_()[..., None]  # -inf - -inf: rows without any key
    total = parts[0][0].float() * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out.float(), weight)
    return total.to(parts[0][0].dtype), lse
