"""The dense attention functions that are installed here: the baseline must not be a straw man."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.backends.frames import Dense

log = logging.getLogger("efficient_vdit")

# Quantised: fast, and a little off. They are timed, and no speed-up is counted against them.
INEXACT = frozenset({"sage", "kitchen int8"})
SDPA = "sdpa"  # PyTorch's choice among its kernels


def dense_functions(q: Tensor) -> dict[str, Dense]:
    """By name, those that take tensors like q (B, H, N, D) on its device, PyTorch's own choice first: what dense attention is
    where nobody chose, and where no other kernel runs."""
    own: dict[str, Dense] = {SDPA: F.scaled_dot_product_attention}
    if q.device.type != "cuda":
        return own
    sample = q[:1, :1, : min(q.shape[2], 256)]
    every = {**_of_torch(), **_of_packages()}
    return own | {name: run for name, run in every.items() if _takes(name, run, sample)}


def _takes(name: str, run: Dense, sample: Tensor) -> bool:
    try:
        return run(sample, sample, sample).shape == sample.shape
    except Exception as error:  # kernels and packages of others raise anything
        log.info("Efficient-vDiT: %s is not timed: %s: %s", name, type(error).__name__, error)
        return False


def _of_torch() -> dict[str, Dense]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def under(kernel: SDPBackend) -> Dense:
        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return dense

    return {
        "cudnn_attention": under(SDPBackend.CUDNN_ATTENTION),
        "flash_attention": under(SDPBackend.FLASH_ATTENTION),
        "efficient_attention": under(SDPBackend.EFFICIENT_ATTENTION),
    }


# FlashAttention's generations: the module that holds each.
_FLASH_ATTENTION = {
    "flash-attn": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


def _of_packages() -> dict[str, Dense]:
    found: dict[str, Dense] = {
        name: lambda q, k, v, module=module: _tokens_first(module, q, k, v)
        for name, module in _FLASH_ATTENTION.items()
        if importlib.util.find_spec(module.split(".")[0])
    }
    if importlib.util.find_spec("sageattention"):
        found["sage"] = _sage
    if importlib.util.find_spec("comfy_kitchen"):
        found["kitchen int8"] = _kitchen
    return found


def _tokens_first(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = importlib.import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module("sageattention").sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, smooth_k=False
    )


def _kitchen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module("comfy_kitchen").int8_attention(q, k, v, scale=None, attn_mask=None)


def routed_functions(q: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]]:
    """By name, the sparse attentions of others that take tensors like q (B, H, N, D) and the share of blocks to compute
    exactly: comfy-kitchen's top-k selection, which ComfyUI's own sparse attention runs on, in its kernel for CUDA. What it
    computes is not the arrow mask, so only its time compares."""
    if q.device.type != "cuda" or not importlib.util.find_spec("comfy_kitchen"):
        return {}
    sample = q[:1, :1, : min(q.shape[2], 256)]
    runs = _takes("kitchen sla", lambda q, k, v: _kitchen_sla(q, k, v, 0.5), sample)
    return {"kitchen sla": _kitchen_sla} if runs else {}


def _kitchen_sla(q: Tensor, k: Tensor, v: Tensor, share: float) -> Tensor:
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    return importlib.import_module("comfy_kitchen").sol_attn(*tokens_first, topk_ratio=share).transpose(1, 2)


# Dense FLOP/s of halves with float32 sums, as the makers print them, by words of the card's name.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209.5e12,
    "MI300X": 1307e12,
}


# Whole words, for an RTX A1000 is no A100; cards that carry the name of a faster one say it behind.
_SLOWER = r"(?! (?:D|NVL|Laptop)\b)"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the card's maker prints, None where it is not known here for this card and dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for words, flops in _PEAKS.items() if re.search(rf"\b{words}\b{_SLOWER}", name)), None)
