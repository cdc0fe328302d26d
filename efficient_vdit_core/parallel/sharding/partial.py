"""Dense attention over a part of the keys, with the logarithm of each row's softmax sum, by which parts merge exactly.

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), out (B, H, Nq, D), lse (B, H, Nq) in float32, natural logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...attention.gpu import too_old

Partial = tuple[Tensor, Tensor]

_HALVES = (torch.bfloat16, torch.float16)
# Scores of the plain path, in elements: 64 MiB of float32.
_PLAIN_SCORES = 2**24


def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention of q over k, v, scaled by 1 / sqrt(D), and its lse. No keys: zeros and -inf, which merge as nothing.

    PyTorch's own kernels tell the lse; what none of them takes goes by plain matrix products, a block of rows at a
    time.
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    aten, kernel = torch.ops.aten, kernel_for(q)
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif kernel == "efficient":
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[:, :, : q.shape[2]]  # padded to whole warps
    else:
        out, lse = _plain(q, k, v)
    return out, lse.float()


def kernel_for(q: Tensor) -> str:
    """``cpu``: flash attention for any float and head_dim. ``flash``: halves, head_dim divisible by 8 up to 256, from
    Ampere on.

    ``efficient``: head_dim divisible by 4, no float64, bfloat16 from Ampere on. ``plain``: the rest.
    """
    dim, old = q.shape[-1], q.is_cuda and bool(too_old(q.device))
    if q.device.type == "cpu":
        return "cpu"
    if q.is_cuda and q.dtype in _HALVES and dim % 8 == 0 and dim <= 256 and not old:
        return "flash"
    if q.is_cuda and dim % 4 == 0 and q.dtype != torch.float64 and not (old and q.dtype == torch.bfloat16):
        return "efficient"
    return "plain"


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    rows = max(1, _PLAIN_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for chunk in q.split(rows, dim=2):
        scores = (chunk.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp().to(v.dtype) @ v, lse))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over all keys from attentions over disjoint parts of them: sum_p out_p exp(lse_p - lse), in
    float32."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num_()[..., None]  # -inf - -inf: rows without any key
    total = parts[0][0].float() * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out.float(), weight)
    return total.to(parts[0][0].dtype), lse
