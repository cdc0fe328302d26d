"""Every backend against the mask written out, in float64, at sizes where blocks, frames and texts do not fit together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import TokenLayout, available_backends, simplest_backend, tile_attention
from ..attention.call_shape import CallShape
from ..attention.selection import fits
from ..plan.head_patterns import HeadPatterns, LayerPattern
from ..tiles import TilePattern, TokenGrid
from .failures import brief

# Frames that end inside a block of 128 behind a prefix, two whole blocks, and far shorter ones beside a long text.
LAYOUTS = (
    TokenLayout(TokenGrid(5, 9, 37), 3, 5),
    TokenLayout(TokenGrid(8, 16, 16)),
    TokenLayout(TokenGrid(24, 7, 11), 0, 226),
)
SMALL_LAYOUTS = (TokenLayout(TokenGrid(5, 3, 7), 3, 5), TokenLayout(TokenGrid(8, 4, 4)))
HEADS = 2
PATTERNS: tuple[LayerPattern, ...] = (
    TilePattern(1),
    TilePattern(3),
    TilePattern(1, window=1),
    HeadPatterns((TilePattern(0, window=2), TilePattern(2))),
    TilePattern(1, window=1, means=2),
)
KINDS = (("bfloat16", 128), ("bfloat16", 96), ("float16", 64), ("float32", 96))
# The largest error relative to the largest value: four steps of the format's last bit, which sums of rounded weights
# and a merge of rounded parts stay under; float32 kernels may sum in TF32's ten bits.
MOST = {"bfloat16": 4 * 2**-8, "float16": 4 * 2**-11, "float32": 2**-10}


def measure(device: torch.device, *, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Rows for each kind of tensors, pattern and layout, one a backend: the errors of the result and of the gradients.

    On a CPU the layouts are small. A backend that raises gets its message in ``error``; ``passed`` is False then.
    """
    layouts = LAYOUTS if device.type == "cuda" else SMALL_LAYOUTS
    # ``flex`` comes last: it compiles for so long that what follows it would find no time.
    for late, (dtype, dim), pattern, layout in itertools.product((False, True), KINDS, PATTERNS, layouts):
        if late and not _worth("flex", layout is layouts[0], pattern, dim):
            continue
        tensors = _tensors(layout, dtype, dim, device, seed)
        want, gradients = _definition(tensors, layout, pattern)
        shape = CallShape.of(*tensors)
        about = {"frames": layout.grid.t, "tokens_per_frame": layout.grid.tokens_per_frame, "prefix": layout.prefix,
                 "suffix": layout.suffix, "pattern": pattern.name(layout.grid.t), "dtype": dtype, "head_dim": dim}  # fmt: skip
        named = [b.name for b in available_backends(device) if b.available and fits(b.name, shape)]
        yield [
            {**about, "backend": name, **_errors(name, tensors, layout, pattern, want, gradients, MOST[dtype])}
            for name in named
            if (name == "flex") == late
            and _worth(name, layout is layouts[0], pattern, dim)
            and _computes(name, pattern)
        ]


def _worth(backend: str, first: bool, pattern: LayerPattern, dim: int) -> bool:
    """``flex`` compiles for seconds for each length, pattern and head size: one layout tells, and two sizes."""
    return backend != "flex" or (first and pattern in PATTERNS[1:3] and dim in (64, 96))


def _computes(backend: str, pattern: LayerPattern) -> bool:
    return all(not alike.means or backend == simplest_backend(alike) for alike in pattern.kinds)


def _tensors(layout: TokenLayout, dtype: str, dim: int, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (1, HEADS, layout.tokens, dim)
    made = [torch.randn(size, generator=generator).to(device, getattr(torch, dtype)) for _ in range(3)]
    return [x.requires_grad_() for x in made]


def _definition(tensors: list[Tensor], layout: TokenLayout, pattern: LayerPattern) -> tuple[Tensor, list[Tensor]]:
    """The result in float64, and the gradients of its sum of squares."""
    q, k, v = (x.detach().double().requires_grad_() for x in tensors)
    heads = []
    for head, alike in enumerate(_by_head(pattern)):
        of_head = (x[:, head] for x in (q, k, v))
        heads.append(_attend(*of_head, *(x.to(q.device) for x in _sight(layout, alike))))
    out = torch.stack(heads, dim=1)
    return out.detach(), list(torch.autograd.grad(out.square().sum(), (q, k, v)))


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """(B, N, D), over the keys (M, N) made of k, the scores (N, M) moved by ``bias``."""
    return (q @ (keys @ k).mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ (keys @ v)


def _sight(layout: TokenLayout, pattern: TilePattern) -> tuple[Tensor, Tensor]:
    """What queries see, all tokens and then the mean frames: as rows of weights of the tokens (M, N), and what is added to
    the scores (N, M), -inf where a query does not see it."""
    size, live = layout.grid.tokens_per_frame, _live(layout, pattern)
    keys = [torch.eye(layout.tokens).double()]
    bias = [torch.zeros_like(keys[0]).masked_fill(~live, float("-inf"))]
    for frame, means in pattern.mean_frames(layout.grid.t).items():
        for mean in means:
            parts, seen = torch.zeros(size, layout.tokens).double(), torch.full((layout.tokens, size), float("-inf"))
            for other in mean:
                parts[:, slice(*layout.span(other, other + 1))] = torch.eye(size).double() / len(mean)
            seen[slice(*layout.span(frame, frame + 1))] = math.log(len(mean))
            keys.append(parts)
            bias.append(seen)
    return torch.cat(keys), torch.cat(bias, dim=1).double()


def _by_head(pattern: LayerPattern) -> list[TilePattern]:
    found: dict[int, TilePattern] = {}
    for alike, heads in pattern.head_groups(HEADS).items():
        found.update(dict.fromkeys(heads, alike))
    return [found[head] for head in range(HEADS)]


def _live(layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """(N, N) bool."""
    owner = torch.arange(layout.grid.t).repeat_interleave(layout.grid.tokens_per_frame)
    references = torch.tensor(pattern.reference_frames(layout.grid.t), dtype=torch.long)
    shared = F.pad(torch.isin(owner, references), (layout.prefix, layout.suffix), value=True)
    owner = F.pad(owner, (layout.prefix, layout.suffix))
    return ((owner[:, None] - owner).abs() <= pattern.window) | shared[:, None] | shared


def _errors(
    backend: str,
    tensors: list[Tensor],
    layout: TokenLayout,
    pattern: LayerPattern,
    want: Tensor,
    gradients: list[Tensor],
    most: float,
) -> dict[str, Any]:
    q, k, v = tensors
    try:
        out = tile_attention(q, k, v, layout, pattern, backend=backend)
        found = torch.autograd.grad(out.double().square().sum(), (q, k, v))
    except Exception as error:  # compilers raise anything, and the other rows are worth having
        return {"passed": False, "error": brief(error)}
    forward = _relative(out, want)
    backward = {name: _relative(a, b) for name, a, b in zip("qkv", found, gradients, strict=True)}
    # The gradient of the squares carries the result's own error and its own.
    passed = forward <= most and all(error <= 4 * most for error in backward.values())
    return {"passed": passed, "forward_error": forward, "gradient_errors": backward, "most": most}


def _relative(found: Tensor, want: Tensor) -> float:
    return float((found.detach().double() - want).abs().max() / want.abs().max())
