"""All that a GPU can tell about the pack, in one run under a time budget: each part writes its file row by row, so that
a run that is cut keeps what it has.

Needs torch and this repository; ``training`` needs diffusers as well, and ``tests`` pytest and a clone.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..attention import TokenLayout, available_backends, tile_attention
from ..attention.choose import CallShape, ChoiceBook, seconds
from ..attention.dispatch import backend_candidates, fits
from ..files import write_text
from ..tiles import TilePattern
from . import attention, exactness, step
from .attention import Shape
from .dense import INEXACT, dense_functions
from .machine import describe_machine, peak_extra_bytes

PRESETS = ("paper", "wan", "h3")
# Shapes that a processor gets through in a second: they show that the command works, not what it finds.
SMALL = [Shape(8, 96, 2, 64, "float32", (2, 1)), Shape(8, 96, 2, 64, "bfloat16", (1,))]
Rows = Iterator[dict[str, Any]]


@dataclass
class Run:
    """A run's device, seed and time. ``rows`` holds what each part found."""

    device: torch.device
    seed: int
    budget: float
    out: Path
    clock: Callable[[], float] = time.monotonic
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    @property
    def shapes(self) -> list[Shape]:
        return SMALL if self.small else [s for name in PRESETS for s in attention.presets()[name]]


# Each part with the share of the budget by whose end it starts nothing new; what a part leaves over is the next one's.
PARTS: dict[str, tuple[Callable[[Run], Rows], float]] = {}


def part(share: float) -> Callable[[Callable[[Run], Rows]], Callable[[Run], Rows]]:
    def add(function: Callable[[Run], Rows]) -> Callable[[Run], Rows]:
        PARTS[function.__name__] = (function, share)
        return function

    return add


def run_parts(run: Run, names: Iterable[str], say: Callable[[str, dict[str, Any]], None]) -> None:
    """Runs the parts in their order, each into ``<out>/<part>.json``; ``say`` hears of every row.

    ``complete`` is False in the file of a part that was cut, and ``error`` says what ended it where something did.
    """
    about = {"seed": run.seed, "budget_seconds": run.budget, "machine": describe_machine(run.device)}
    for name in names:
        function, share = PARTS[name]
        until, rows = share * run.budget, run.rows.setdefault(name, [])
        state: dict[str, Any] = {"part": name, **about, "complete": False, "rows": rows}
        file = run.out / f"{name}.json"
        _write(file, state)
        begun = run.spent <= run.budget
        try:
            for row in function(run) if begun else ():
                rows.append(row)
                say(name, row)
                _write(file, state)
                if run.spent > until:
                    break
            else:
                state["complete"] = begun
        except Exception as error:  # a part that fails must not cost the parts behind it
            state["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
            say(name, {"error": state["error"]})
        state["ended_after_seconds"] = round(run.spent, 1)
        _write(file, state)
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _write(file: Path, state: dict[str, Any]) -> None:
    write_text(file, json.dumps(state, indent=1) + "\n")


@part(0.02)
def machine(run: Run) -> Rows:
    """The card, the versions, the backends and dense functions that run here."""
    sample = torch.zeros(1, 1, 128, 128, device=run.device, dtype=torch.bfloat16)
    row: dict[str, Any] = {
        "backends": {
            b.name: b.reason if b.available else f"not here: {b.reason}" for b in available_backends(run.device)
        },
        "dense": sorted(dense_functions(sample)),
    }
    if run.device.type == "cuda":
        about = torch.cuda.get_device_properties(run.device)
        row |= {"memory_bytes": about.total_memory, "capability": [about.major, about.minor]}
        row |= {"multiprocessors": about.multi_processor_count}
    yield row


@part(0.17)
def exact(run: Run) -> Rows:
    """Every backend against the definition, there and back."""
    yield from exactness.measure(run.device, seed=run.seed)


@part(0.27)
def tests(run: Run) -> Rows:
    """tests/gpu, where they and pytest are."""
    folder = Path(__file__).parents[2] / "tests" / "gpu"
    try:
        import pytest
    except ImportError:
        yield {"skipped": "pytest is not installed"}
        return
    if not folder.is_dir():
        yield {"skipped": "tests/gpu is not here; use a clone"}
        return
    report = run.out / "tests_gpu.xml"
    code = pytest.main(["-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(folder)])
    yield {"exit_code": int(code), "report": report.name}


@part(0.55)
def attention_alone(run: Run) -> Rows:
    """Each preset's shapes: every dense function, every backend, each in turn."""
    for shape in run.shapes:
        yield from attention.measure(shape, run.device, repeats=3 if run.small else 5, seed=run.seed)


@part(0.68)
def choice(run: Run) -> Rows:
    """What ``auto`` chooses for the shapes above, how long it takes, and how much is lost against the best."""
    with tempfile.TemporaryDirectory() as folder:
        book = ChoiceBook(Path(folder) / "attention.json")
        for shape in run.shapes:
            for count in shape.references:
                yield _choice(run, book, shape, count)


def _choice(run: Run, book: ChoiceBook, shape: Shape, count: int) -> dict[str, Any]:
    layout, pattern = shape.layout, TilePattern(count)
    calls = CallShape(1, shape.heads, shape.head_dim, getattr(torch, shape.dtype), run.device)
    start = time.monotonic()
    found = book.choose(backend_candidates(calls), calls, layout, pattern, "sdpa")
    took = time.monotonic() - start
    alike = [
        r
        for r in run.rows.get("attention_alone", [])
        if _is_of(r, shape) and r["pattern"] in ("full", pattern.name(shape.frames))
    ]
    times = {r["backend"]: r["milliseconds"] for r in alike if r["pattern"] != "full" and " over " not in r["backend"]}
    dense = [r["milliseconds"] for r in alike if r["pattern"] == "full" and r["backend"] not in INEXACT]
    if dense:
        times["dense"] = min(dense)
    best = min(times, key=lambda name: times[name]) if times else None
    return {
        "frames": shape.frames, "tokens_per_frame": shape.tokens, "prefix": shape.prefix, "heads": shape.heads,
        "head_dim": shape.head_dim, "dtype": shape.dtype, "pattern": pattern.name(shape.frames), "chosen": found.backend,
        "trial_milliseconds": found.milliseconds, "trial_seconds": took, "best": best,
        "regret": times[found.backend] / times[best] - 1 if best and found.backend in times else None,
    }  # fmt: skip


def _is_of(row: dict[str, Any], shape: Shape) -> bool:
    names = ("frames", "prefix", "heads", "head_dim", "dtype")
    return all(row[name] == getattr(shape, name) for name in names) and row["tokens_per_frame"] == shape.tokens


@part(0.74)
def memory(run: Run) -> Rows:
    """What a layer holds beside its inputs at its peak, there alone and there and back, against dense attention."""
    shape = SMALL[0] if run.small else Shape(24, 3600, 24, 96, "bfloat16", (2,))
    generator = torch.Generator().manual_seed(run.seed)
    size = (1, shape.heads, shape.layout.tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    q, k, v = (torch.randn(size, generator=generator).to(run.device, dtype) for _ in range(3))
    pattern, calls = TilePattern(2), CallShape.of(q)
    sparse = [b.name for b in available_backends(run.device) if b.available and fits(b.name, calls)]
    for backend in ("dense", *sparse):
        yield {
            "backend": backend,
            "pattern": pattern.name(shape.frames),
            "tensor_bytes": q.numel() * q.element_size(),
            "forward_bytes": _peak(run, backend, (q, k, v), shape.layout, pattern, training=False),
            "training_bytes": _peak(run, backend, (q, k, v), shape.layout, pattern, training=True),
        }


def _peak(
    run: Run, backend: str, tensors: Any, layout: TokenLayout, pattern: TilePattern, *, training: bool
) -> int | None:
    def once() -> None:
        q, k, v = (x.detach().requires_grad_(training) for x in tensors)
        out = tile_attention(q, k, v, layout, pattern, backend=backend)
        if training:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    once()  # compilers and libraries take memory of their own at the first call
    return peak_extra_bytes(once, run.device)


@part(0.9)
def model_step(run: Run) -> Rows:
    """One forward of Open-Sora-Plan with random weights, beside Amdahl's bound."""
    clips = (("29x240p", 1),) if run.small else (("29x720p", 32), ("93x720p", 32))
    for size, depth in clips:
        shape = step.StepShape(size, depth, (2,) if run.small else (4, 2, 1))
        yield from step.measure(shape, run.device, repeats=1 if run.small else 3, seed=run.seed)


@part(1.0)
def training(run: Run) -> Rows:
    """Seconds of a step of the tiny recipe's stages 1 and 3: what further steps add to a run."""
    from ..distill.config import DistillConfig
    from ..distill.trainer import distill

    few, many, batch = (1, 6, 2) if run.small else (10, 60, 32)
    for method in ("consistency", "knowledge"):
        took = []
        for steps in (few, few, many):  # the first one imports, compiles and warms up
            objective = {"guidance": 3.0} if method == "consistency" else {"plan": "1:7", "segments": 8}
            config = DistillConfig.from_dict({
                "method": method, "objective": objective, "model": {"path": "tiny", "device": run.device.type},
                "data": {"source": "tinyworld", "clips": max(8, batch)},
                "training": {"steps": steps, "batch": batch, "save_every": many, "warmup": 0},
            })  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                took.append(
                    seconds(lambda config=config, folder=folder: distill(config, Path(folder) / "run"), run.device)
                )
        yield {
            "stage": method,
            "batch": batch,
            "seconds_a_step": (took[2] - took[1]) / (many - few),
            "setup_seconds": took[1],
        }
