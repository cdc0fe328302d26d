"""Times attention under tile patterns against dense attention: paired runs, medians, error against float32 rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import TokenLayout, available_backends, tile_attention
from ..attention.call_shape import CallShape
from ..attention.gpu import OUT_OF_MEMORY, one_out_of_memory
from ..attention.selection import fits
from ..tiles import TilePattern, TokenGrid
from . import paper
from .calls import calls_alone
from .dense import INEXACT, SDPA, Dense, dense_functions, peak_flops, routed_functions
from .failures import failures
from .machine import peak_extra_bytes
from .minimax_h3 import CLIPS, HEAD_DIM, HEADS
from .turns import medians

SAMPLED_ROWS = 64
CALLS = "calls alone"
Key = tuple[int | None, str]  # reference frames, None = dense, and a backend's or a dense function's name


@dataclass(frozen=True)
class Shape:
    """One sequence and the patterns tried on it: ``frames`` latent frames of ``tokens`` each behind ``prefix`` others,
    ``heads`` x ``head_dim``."""

    frames: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    references: tuple[int, ...]
    prefix: int = 0

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(TokenGrid(self.frames, 1, self.tokens), self.prefix)


def presets() -> dict[str, list[Shape]]:
    """The shapes behind the names that `evdit bench attention --preset` takes."""
    paper_rows = [
        Shape(8, 3600, 24, 96, "bfloat16", (4, 3, 2, 1)),
        Shape(24, 3600, 24, 96, "bfloat16", (12, 8, 6, 4, 3)),
    ]
    wan = [Shape(21, size, 40, 128, "bfloat16", (1, 2, 3, 4, 6)) for size in (1560, 3600)]
    # Open-Sora-Plan's and Wan's head sizes; fewer heads where the sequence is long, since heads are independent.
    cpu = [
        Shape(frames, size, heads, dim, dtype, (1, 2, 3, 4))
        for dtype in ("float32", "bfloat16")
        for size, heads, dim in ((400, 24, 96), (400, 12, 128), (1560, 2, 96), (1560, 2, 128))
        for frames in (8, 21, 24)
    ]
    # 1344x768 at 5, 10 and 15 s, the reference frames of the presets (strides 10 and 5) and one alone.
    h3 = [
        Shape(
            clip.frames,
            clip.tokens,
            HEADS,
            HEAD_DIM,
            "bfloat16",
            (-(-clip.frames // 5), -(-clip.frames // 10), 1),
            clip.prefix,
        )
        for name, clip in CLIPS.items()
        if name.startswith("1344x768")
    ]
    # LTX-2 at 1280x704 and 1920x1088: 121 frames are 16 latent ones, 241 are 31. Sound has a stream of its own.
    ltx = [Shape(t, size, 32, 128, "bfloat16", (4, 2, 1)) for t, size in ((16, 880), (16, 2040), (31, 2040))]
    return {"paper": paper_rows, "wan": wan, "cpu": cpu, "h3": h3, "ltx": ltx}


def measure(
    shape: Shape, device: torch.device, *, repeats: int, seed: int, backends: tuple[str, ...] = (), calls: bool = False
) -> list[dict[str, Any]]:
    """One row for each dense function that is installed, and one for each pattern and backend that runs on ``device``, also
    for others' sparse attention at the pattern's density, which has no error: it computes something else; with ``calls``
    also one of the dense calls alone (`calls_alone`), which has none either: nobody puts them together.

    Every backend takes its turn in each repeat, so that a slow moment of the machine meets all of them. Speed-ups are
    over the fastest exact dense function. What fails here has a row with its ``error`` in place of times. Raises
    RuntimeError where no dense function runs.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = random_tensors(shape, device, seed)
    named = backends or tuple(
        b.name for b in available_backends(device) if b.available and fits(b.name, CallShape.of(q))
    )
    dense = dense_functions(q)
    runs: dict[Key, Callable[[], Tensor]] = {(None, name): lambda run=run: run(q, k, v) for name, run in dense.items()}
    for count in shape.references:
        for name in named:
            runs[count, name] = _call(q, k, v, shape.layout, count, name)
        for name, run in dense.items() if "frames" in named else ():
            if name != SDPA:  # which ``frames`` alone calls
                runs[count, f"frames over {name}"] = _call(q, k, v, shape.layout, count, "frames", run)
    first: dict[Key, tuple[int | None, float | None]] = {}  # the warm-up run tells memory and error

    def warm_up(key: Key) -> None:
        first[key] = _memory_and_error(runs[key], q, k, v, shape, key[0], generator)

    with torch.no_grad():
        failed = failures(runs, warm_up)
        bounds = {
            (count, CALLS): calls_alone(q, k, v, shape.layout, TilePattern(count))
            for count in shape.references
            if calls
        }
        others = {**bounds, **_routed(q, k, v, shape)}
        failed |= failures(others, lambda key: others[key]())
        times = medians({key: run for key, run in {**runs, **others}.items() if key not in failed}, device, repeats)
    compared = [name for name in dense if (None, name) in times]
    if not compared:
        raise RuntimeError(f"No dense attention runs here to compare with: {failed[None, next(iter(dense))]}")
    base = min(times[None, name] for name in [n for n in compared if n not in INEXACT] or compared)
    peak = peak_flops(device, q.dtype)
    nothing = (None, None)
    rows = [_row(shape, key, times[key], base, peak, *first.get(key, nothing)) for key in times]
    return rows + [{**_about(shape, key), "error": why} for key, why in failed.items()]


def _routed(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> dict[Key, Callable[[], Tensor]]:
    """Runs of others' sparse attention, each pattern's density being the share of blocks that they compute."""
    return {
        (count, name): lambda run=run, count=count: run(
            q, k, v, TilePattern(count).flop_density(shape.layout.grid, shape.prefix)
        )
        for name, run in routed_functions(q).items()
        for count in shape.references
    }


def random_tensors(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, v (1, H, N, D), drawn on the device: a long clip's would take a processor half a minute."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, shape.heads, shape.layout.tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    return [torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(3)]


def _memory_and_error(
    run: Callable[[], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    count: int | None,
    generator: torch.Generator,
) -> tuple[int | None, float | None]:
    """The second is None where there is no room for the check beside what it checks."""
    if q.is_cuda:
        run()  # compilers, tuners and libraries take memory of their own at the first call
    kept: list[Tensor] = []
    extra = peak_extra_bytes(lambda: kept.append(run()), q.device)
    try:
        with one_out_of_memory():
            return extra, _error(kept[0], q, k, v, shape, count, generator)
    except OUT_OF_MEMORY:
        return extra, None


def _call(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, count: int, name: str, dense: Dense | None = None
) -> Callable[[], Tensor]:
    return lambda: tile_attention(q, k, v, layout, TilePattern(count), backend=name, dense=dense)


def _row(
    shape: Shape,
    key: Key,
    time: float,
    base: float,
    peak: float | None,
    extra: int | None,
    error: float | None,
) -> dict[str, Any]:
    count, pattern, grid = key[0], TilePattern(key[0]), shape.layout.grid
    density = pattern.flop_density(grid, shape.prefix)
    computed = 1.0 if key[1] == "dense" else density
    flops = 4.0 * shape.heads * shape.head_dim * shape.layout.tokens**2 * computed
    ideal = 1 / density
    return {
        **_about(shape, key),
        "milliseconds": 1000 * time,
        "tflops_per_second": flops / time / 1e12,
        "of_peak_flops": flops / time / peak if peak else None,
        "speedup": base / time,
        "ideal_speedup": ideal,
        "efficiency": base / time / ideal,
        "block_sparsity": pattern.block_sparsity(grid),
        "peak_extra_bytes": extra,
        "max_relative_error": error,
        "paper_speedup": paper.speedup(shape.frames, count) if shape.tokens == 3600 and shape.head_dim == 96 else None,
    }


def _about(shape: Shape, key: Key) -> dict[str, Any]:
    count, backend = key
    return {
        "frames": shape.frames,
        "tokens_per_frame": shape.tokens,
        "prefix": shape.prefix,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
        "pattern": TilePattern(count).name(shape.frames),
        "backend": backend,
    }


def _error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape, count: int | None, generator: torch.Generator
) -> float:
    """Largest error of some random rows against their definition in float32, relative to the largest value there. A head at a
    time: in float32 the keys of all take more room than the attention."""
    owner = (torch.arange(shape.layout.tokens) - shape.prefix).div(shape.tokens, rounding_mode="floor").clamp(min=-1)
    references = torch.tensor([-1, *TilePattern(count).reference_frames(shape.frames)], dtype=torch.long)
    rows = torch.randint(shape.layout.tokens, (SAMPLED_ROWS,), generator=generator)
    live = (
        (owner[rows, None] == owner[None])
        | torch.isin(owner, references)[None]
        | torch.isin(owner[rows], references)[:, None]
    )
    rows, hidden = rows.to(q.device), ~live.to(q.device)
    errors, values = [], []
    for head in range(q.shape[1]):
        q32, k32, v32 = q[:, head, rows].float(), k[:, head].float(), v[:, head].float()
        scores = (q32 @ k32.mT / math.sqrt(shape.head_dim)).masked_fill(hidden, float("-inf"))
        want = scores.softmax(-1) @ v32
        errors.append((out[:, head, rows].float() - want).abs().max())
        values.append(want.abs().max())
    return float(torch.stack(errors).max() / torch.stack(values).max())


def geometric_mean(values: list[float]) -> float:
    """The mean that treats twice as fast and twice as slow alike."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def with_heads(shapes: list[Shape], heads: int | None) -> Iterator[Shape]:
    """The shapes, with another head count where one is given: for machines too small for the whole."""
    for shape in shapes:
        yield replace(shape, heads=heads) if heads else shape
