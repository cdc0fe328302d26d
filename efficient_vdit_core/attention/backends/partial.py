"""Dense attention over a part of the keys, with the logarithm of each row's softmax sum, by which parts merge exactly.

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), out (B, H, Nq, D), lse (B, H, Nq) in float32 (float64 for
float64), natural logarithm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..gpu import OUT_OF_MEMORY, one_out_of_memory, too_old
from ..sdpa import attention_sdpa

Partial = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]

log = logging.getLogger("efficient_vdit")

_HALVES = (torch.bfloat16, torch.float16)
# Scores of the plain path, in elements: 64 MiB of float32.
_PLAIN_SCORES = 2**24
# How far the lse and the result of a kernel may be from the definition: quantised ones are, by about a hundredth. A
# logarithm of another base, or rows in another order, are off by more than 1.
_TRUSTED = 0.05


@dataclass(frozen=True)
class PartialAttention:
    """An attention function that tells its lse.

    ``forward`` takes q, k, v and gives (out, lse). ``backward`` takes the gradient of out, q, k, v, out and lse, and
    gives those of q, k and v; with the out and lse of *all* keys it gives what these k and v contribute. None: there is
    no backward.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], Partial]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients] | None = None


def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention of q over k, v, scaled by 1 / sqrt(D), and its lse. No keys: zeros and -inf, which merge as nothing.

    PyTorch's own kernels tell the lse; what none of them takes goes by plain matrix products, a block of rows at a
    time.
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q))
    found = sdpa_partial(q.device, q.dtype, q.shape[-1])
    return found.forward(q, k, v) if found else _plain(q, k, v)


def attend_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """The gradients of q, k and v where that of the result ``out`` is ``dout``. With the out and lse of *all* keys it gives
    what these k and v contribute. By the kernels of ``attend_lse``, or by plain matrix products where they give none."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    found = sdpa_partial(q.device, q.dtype, q.shape[-1])
    backward = found.backward if found and found.backward else _plain_backward
    return backward(dout, q, k, v, out, lse)


def lse_dtype(q: Tensor) -> torch.dtype:
    """In which the log-sum-exp of these queries is kept."""
    return torch.promote_types(q.dtype, torch.float32)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    exact = lse_dtype(q)
    parts = []
    for chunk in q.split(_plain_rows(q, k), dim=2):
        scores = (chunk.to(exact) @ k.to(exact).transpose(-1, -2)) / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp().to(v.dtype) @ v, lse))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _plain_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    exact, scale, rows = lse_dtype(q), 1 / math.sqrt(q.shape[-1]), _plain_rows(q, k)
    keys, values, dq = k.to(exact), v.to(exact), []
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for of_rows in zip(*(x.split(rows, dim=2) for x in (dout, q, out, lse)), strict=True):
        do, queries, o, row_lse = (x.to(exact) for x in of_rows)
        p = (queries @ keys.transpose(-1, -2) * scale - row_lse[..., None]).exp()
        ds = p * (do @ values.transpose(-1, -2) - (do * o).sum(-1, keepdim=True)) * scale
        dq.append((ds @ keys).to(q.dtype))
        dk += ds.transpose(-1, -2) @ queries
        dv += p.transpose(-1, -2) @ do
    return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype)


def _plain_rows(q: Tensor, k: Tensor) -> int:
    return max(1, _PLAIN_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def sdpa_partial(device: torch.device, dtype: torch.dtype, dim: int) -> PartialAttention | None:
    """The kernel of ``scaled_dot_product_attention`` that tells its lse, for head_dim ``dim``; None where none does.

    The one that PyTorch would choose comes first. Each is tried on a few tokens before it is trusted; the answer is
    kept. The meta device has no values to try: there it is a GPU's, whose memory and FLOPs are asked for.
    """
    if device.type == "meta":
        return _OF_TORCH["flash"]
    return _kept("sdpa", device, dtype, dim)


def _kept(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> PartialAttention | None:
    # A plain dict: torch.compile reads it while it traces, and would trace through a cache of functools.
    key = (name, device, dtype, dim)
    if key not in _TRIED:
        every = [_OF_PACKAGES[name]] if name != "sdpa" else [_OF_TORCH[x] for x in kernels_for(device, dtype, dim)]
        try:
            tried = (trusted(found, device, dtype, dim) for found in every)
            _TRIED[key] = next((x for x in tried if x is not None), None)
        except OUT_OF_MEMORY:  # says nothing about the kernel: the next call asks again
            return None
    return _TRIED[key]


def kernels_for(device: torch.device, dtype: torch.dtype, dim: int) -> list[str]:
    """``cpu``: flash attention for any float and head_dim. ``cudnn``: where PyTorch prefers it. ``flash``: halves,
    head_dim divisible by 8 up to 256, from Ampere on.

    ``efficient``: head_dim divisible by 4, no float64, bfloat16 from Ampere on.
    """
    if device.type == "cpu":
        return ["cpu"]
    if device.type != "cuda":
        return []
    old, found = bool(too_old(device)), []
    if dtype in _HALVES and dim % 8 == 0 and dim <= 256 and not old:
        found += ["cudnn", "flash"] if _prefers_cudnn(device, dtype, dim) else ["flash"]
    if dim % 4 == 0 and dtype != torch.float64 and not (old and dtype == torch.bfloat16):
        found.append("efficient")
    return found


def _prefers_cudnn(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    sample = torch.empty(1, 1, 1024, dim, dtype=dtype, device=device)
    return torch._fused_sdp_choice(sample, sample, sample) == SDPBackend.CUDNN_ATTENTION.value


def trusted(partial: PartialAttention, device: torch.device, dtype: torch.dtype, dim: int) -> PartialAttention | None:
    """``partial`` where it runs here and its result and lse are those of the definition, without its backward where its
    gradients are not; else None. Waits for the device."""
    generator, lengths = torch.Generator().manual_seed(0), (131, 197, 197, 131)  # which end inside every block
    drawn = (torch.randn(1, n, 2, dim, generator=generator).to(device, dtype) for n in lengths)
    q, k, v, dout = (x.transpose(1, 2) for x in drawn)
    want, want_lse, gradients = _definition(*(x.double() for x in (q, k, v, dout)))
    done: list[Partial] = []

    def forward() -> dict[str, float]:
        done.append(partial.forward(q, k, v))
        (out, lse), *_ = done
        return {"its result": _max_abs_error(out, want), "its log-sum-exp": _max_abs_error(lse, want_lse)}

    def backward() -> dict[str, float]:
        assert partial.backward is not None
        # Rows that are gathered lie in another order than those of a kernel's own result.
        found = partial.backward(dout, q, k, v, done[0][0].contiguous(), done[0][1])
        return {
            f"the gradient of {name}": _max_abs_error(a, b) / float(b.abs().max())
            for name, a, b in zip("qkv", found, gradients, strict=True)
        }

    with torch.no_grad():
        if wrong := _what_is_wrong(forward):
            log.info("Efficient-vDiT: %s is not used in parts: %s", partial.name, wrong)
            return None
        if partial.backward is not None and (wrong := _what_is_wrong(backward)):
            log.info("Efficient-vDiT: %s is not trained with in parts: %s", partial.name, wrong)
            return replace(partial, backward=None)
    return partial


def _definition(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Gradients]:
    """The result, its lse, and the gradients of q, k and v where the result's is ``dout``."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-1, -2) * scale
    p = scores.softmax(-1)
    out, lse = p @ v, scores.logsumexp(-1)
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale
    return out, lse, (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout)


def _max_abs_error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).abs().max())


def _what_is_wrong(run: Callable[[], dict[str, float]]) -> str:
    """In words; "" where all that ``run`` finds is close to the definition."""
    try:
        with one_out_of_memory():
            return " and ".join(f"{name} is off by {off:.3g}" for name, off in run().items() if not off <= _TRUSTED)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # packages and compilers of others raise anything
        return f"{type(error).__name__}: {error}"


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over all keys from attentions over disjoint parts of them: sum_p out_p exp(lse_p - lse), in the
    precision of the lse."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num_()[..., None]  # -inf - -inf: rows without any key
    total = parts[0][0].to(lse.dtype) * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out.to(lse.dtype), weight)
    return total.to(parts[0][0].dtype), lse


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _cpu_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    # It reads the lse as it writes it: in the order of (B, N, H).
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    nothing = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of a dropout that there is none of
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, nothing, nothing
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(q.shape[:3])  # it comes with a last dimension of one


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[:, :, : q.shape[2]]  # padded to whole warps


def _efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    nothing = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of a dropout that there is none of
    # It takes the result's rows to be those of (B, N, H, D), and on NVIDIA's cards the lse of whole warps.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = lse.contiguous() if torch.version.hip else F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, nothing, nothing, 0.0, [True, True, True, False]
    )[:3]


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, _ = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), return_attn_probs=True)
    return out.transpose(1, 2), lse


def _sage_forward(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    # As ComfyUI calls it.
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=False, return_lse=True)


_OF_TORCH = {
    "cpu": PartialAttention("PyTorch's attention on the CPU", _cpu_forward, _cpu_backward),
    "flash": PartialAttention("PyTorch's flash attention", _flash_forward, _flash_backward),
    # Flash attention's backward takes the same result and lse, of any strides.
    "cudnn": PartialAttention("cuDNN's attention", _cudnn_forward, _flash_backward),
    "efficient": PartialAttention("PyTorch's memory-efficient attention", _efficient_forward, _efficient_backward),
}
# By the name of ComfyUI's function that calls it.
_OF_PACKAGES = {
    "attention_flash": PartialAttention("flash-attn", _flash_attn_forward),
    "attention_sage": PartialAttention("SageAttention", _sage_forward),
}
_COMFYUI = "comfy.ldm.modules.attention"
_CALLS_TORCH = ((_COMFYUI, "attention_pytorch"), (attention_sdpa.__module__, attention_sdpa.__name__))
_TRIED: dict[tuple[str, torch.device, torch.dtype, int], PartialAttention | None] = {}


def computes_precisely(function: Callable[..., Tensor]) -> bool:
    """Whether this is ComfyUI's function for SageAttention, which calls PyTorch's where full precision is asked for."""
    return (getattr(function, "__module__", ""), getattr(function, "__name__", "")) == (_COMFYUI, "attention_sage")


def partial_of(
    function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, dim: int
) -> PartialAttention | None:
    """What computes the same as a dense attention ``function`` and tells its lse: PyTorch's own, or ComfyUI's for
    flash-attn and SageAttention. None for others, whose lse nobody tells."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", "")
    if function is F.scaled_dot_product_attention or (module, name) in _CALLS_TORCH:
        return sdpa_partial(device, dtype, dim)
    # Node packs have functions of the same names, which may call other kernels.
    return _kept(name, device, dtype, dim) if module == _COMFYUI and name in _OF_PACKAGES else None
