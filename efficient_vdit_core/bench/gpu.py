"""All that a GPU can tell about the pack, in one run under a time budget: each part writes its file row by row, so that
a run that is cut keeps what it has.

Needs torch and this repository; `NEEDS` says which parts need more.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..attention import available_backends, tile_attention
from ..attention.autotune.choose import ChoiceBook
from ..attention.call_shape import CallShape
from ..attention.selection import backend_candidates, fits
from ..limits.packages import missing
from ..storage.files import write_text
from ..storage.json_text import json_text
from ..tiles import TilePattern
from ..timing import seconds
from . import attention, exactness, kernels, step
from .attention import Shape
from .dense import INEXACT, dense_functions
from .failures import brief
from .machine import describe_machine, peak_extra_bytes

PRESETS = ("paper", "wan", "h3")
# Shapes that a processor gets through in a second: they show that the command works, not what it finds.
SMALL = [Shape(8, 96, 2, 64, "float32", (2, 1)), Shape(8, 96, 2, 64, "bfloat16", (1,))]
# The modules that a part needs beside torch; the tests need a clone as well.
NEEDS = {
    "stock_steps": ("diffusers",),
    "training": ("accelerate", "transformers", "sentencepiece"),
    "tests": ("pytest",),
}
TESTS = Path(__file__).parents[2] / "tests" / "gpu"
Item = TypeVar("Item")
Rows = Iterator[list[dict[str, Any]]]  # a few at a time: what was found together


@dataclass
class Run:
    """A run's device, seed and time, and the ``command`` that it is for, "" = none. ``rows`` holds what each part found."""

    device: torch.device
    seed: int
    budget: float
    out: Path
    clock: Callable[[], float] = time.monotonic
    command: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)  # parts, and why
    failed: set[str] = field(default_factory=set)  # those of them that raised, the others had no time
    until: float = 0.0  # when the part that runs begins nothing new
    was_cut: bool = False

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"

    @property
    def dtype(self) -> str:
        """That of whole blocks; a CPU without units for bfloat16 would take minutes for one."""
        return "float32" if self.small else "bfloat16"

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    def in_time(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items while the part has time."""
        for item in items:
            if self.spent > self.until:
                self.was_cut = True
                return
            yield item

    @property
    def shapes(self) -> list[Shape]:
        """The quickest first: a slow card comes to clips of each model before its budget is spent."""
        every = SMALL if self.small else [s for name in PRESETS for s in attention.presets()[name]]
        return sorted(every, key=lambda s: s.heads * s.head_dim * s.layout.tokens**2)


# Each part with the share of the budget by whose end it begins nothing new; what a part leaves over is the next one's.
PARTS: dict[str, tuple[Callable[[Run], Rows], float]] = {}


def part(share: float) -> Callable[[Callable[[Run], Rows]], Callable[[Run], Rows]]:
    def add(function: Callable[[Run], Rows]) -> Callable[[Run], Rows]:
        PARTS[function.__name__] = (function, share)
        return function

    return add


def lacking(names: Iterable[str]) -> dict[str, list[str]]:
    """The parts that lack modules here, and which."""
    return {name: modules for name in names if (modules := missing(NEEDS.get(name, ())))}


def run_parts(run: Run, names: Iterable[str], say: Callable[[str, dict[str, Any]], None]) -> None:
    """Runs the parts in their order, each into ``<out>/<part>.json``; ``say`` hears of every row.

    ``complete`` is False in the file of a part that did not come to its end, and ``error`` says why. A file that is there
    stays until the part has rows, or has failed: one without time tells nothing that is worth another run's rows.
    """
    about = {
        "command": run.command,
        "seed": run.seed,
        "budget_seconds": run.budget,
        "machine": describe_machine(run.device),
    }
    for name in names:
        rows = run.rows.setdefault(name, [])
        state: dict[str, Any] = {"part": name, **about, "complete": False, "rows": rows}
        file = run.out / f"{name}.json"
        try:
            for found in _run_part(run, name):
                rows += found
                for row in found:
                    say(name, row)
                _write(file, state)
        except Exception as error:  # a part that fails must not cost the parts behind it
            run.failed.add(name)
            run.incomplete[name] = brief(error, 2000)
        if why := run.incomplete.get(name):
            state["error"] = why
            say(name, {"error": why})
        if rows or name in run.failed or not file.exists():
            _write(file, {**state, "complete": not why, "ended_after_seconds": round(run.spent, 1)})
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _run_part(run: Run, name: str) -> Rows:
    function, share = PARTS[name]
    if lacks := lacking([name]):
        run.incomplete[name] = f"left out: without {' and '.join(lacks[name])}"
        return
    if run.spent > run.budget:
        run.incomplete[name] = "not begun: the budget was spent"
        return
    run.until, run.was_cut = share * run.budget, False
    yield from function(run)
    if run.was_cut:
        run.incomplete[name] = "cut: its share of the budget was spent"


def _write(file: Path, state: dict[str, Any]) -> None:
    write_text(file, json_text(state, indent=1))


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
    yield [row]


@part(0.22)
def exact(run: Run) -> Rows:
    """Every backend against the definition, there and back."""
    yield from run.in_time(exactness.measure(run.device, seed=run.seed))


@part(0.55)
def attention_alone(run: Run) -> Rows:
    """Each preset's shapes: every dense function, and every backend that ``auto`` would try, each in turn."""
    for shape in run.in_time(run.shapes):
        calls = CallShape(1, shape.heads, shape.head_dim, getattr(torch, shape.dtype), run.device)
        tried = tuple(name for name in backend_candidates(calls) if name != "dense")
        yield _or_error(
            lambda shape=shape, tried=tried: attention.measure(
                shape, run.device, repeats=3, seed=run.seed, backends=tried
            ),
            asdict(shape),
        )


@part(0.65)
def choice(run: Run) -> Rows:
    """What ``auto`` chooses for the shapes above, how long it takes, and how much is lost against the best."""
    with tempfile.TemporaryDirectory() as folder:
        book = ChoiceBook(Path(folder) / "attention.json")
        pairs = [(shape, count) for shape in run.shapes for count in shape.references]
        for one, count in run.in_time(pairs):
            about = {**asdict(one), "references": (count,)}
            yield _or_error(lambda one=one, count=count: [_choice(run, book, one, count)], about)


def _choice(run: Run, book: ChoiceBook, shape: Shape, count: int) -> dict[str, Any]:
    layout, pattern = shape.layout, TilePattern(count)
    calls = CallShape(1, shape.heads, shape.head_dim, getattr(torch, shape.dtype), run.device)
    start = time.monotonic()
    found = book.choose(backend_candidates(calls), calls, layout, pattern, "sdpa")
    took = time.monotonic() - start
    alike = [
        r
        for r in run.rows.get("attention_alone", [])
        if "milliseconds" in r and _is_of(r, shape) and r["pattern"] in ("full", pattern.name(shape.frames))
    ]
    ours = {b.name for b in available_backends(run.device)}
    times = {r["backend"]: r["milliseconds"] for r in alike if r["pattern"] != "full" and r["backend"] in ours}
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


@part(0.7)
def memory(run: Run) -> Rows:
    """What a layer holds beside its inputs at its peak, there alone and there and back, against dense attention."""
    shape = SMALL[0] if run.small else Shape(24, 3600, 24, 96, "bfloat16", (2,))
    tensors = attention.random_tensors(shape, run.device, run.seed)
    sparse = [b.name for b in available_backends(run.device) if b.available and fits(b.name, CallShape.of(*tensors))]
    for backend in run.in_time(("dense", *sparse)):
        row = {"backend": backend, "pattern": TilePattern(2).name(shape.frames), "tensor_bytes": tensors[0].nbytes}
        try:
            yield [
                {
                    **row,
                    **{f"{kind}_bytes": _peak(run, backend, tensors, shape, kind) for kind in ("forward", "training")},
                }
            ]
        except Exception as error:  # no room, no way back, or no kernel
            yield [{**row, "error": brief(error)}]


def _peak(run: Run, backend: str, tensors: list[Tensor], shape: Shape, kind: str) -> int | None:
    def once() -> None:
        q, k, v = (x.detach().requires_grad_(kind == "training") for x in tensors)
        out = tile_attention(q, k, v, shape.layout, TilePattern(2), backend=backend)
        if kind == "training":
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    once()  # compilers and libraries take memory of their own at the first call
    return peak_extra_bytes(once, run.device)


@part(0.8)
def stock_steps(run: Run) -> Rows:
    """Blocks of diffusers' MiniMax-H3 (4 of 50) and Wan 14B (4 of 40) with random weights, as many reference frames as the
    presets take."""
    from .timed_models import MEASURES

    if run.small:
        clips = [("minimax_h3", "64x64-tiny", 1, (1,))]
    else:
        clips = [("wan_14b", "832x480-81f", 4, (6, 2)), ("minimax_h3", "1344x768-5s", 4, (8, 4)),
                 ("wan_14b", "1280x720-81f", 4, (6, 2)), ("minimax_h3", "1344x768-10s", 4, (15, 8))]  # fmt: skip
    how: dict[str, Any] = {"dtype": run.dtype, "repeats": 1 if run.small else 3, "seed": run.seed}
    for model, clip, depth, references in run.in_time(clips):
        measure = partial(MEASURES[model], clip, depth, run.device, references=references, **how)
        yield [{"model": model, "clip": clip, **row} for row in _or_error(measure, {})]


@part(0.88)
def model_step(run: Run) -> Rows:
    """One forward of Open-Sora-Plan with random weights, beside Amdahl's bound."""
    clips = (("9x128p", 1),) if run.small else (("29x720p", 32), ("93x720p", 32))
    for size, depth in run.in_time(clips):
        shape = step.StepShape(size, depth, (1,) if run.small else (4, 2, 1), run.dtype)
        repeats = 1 if run.small else 3
        measure = partial(step.measure, shape, run.device, repeats=repeats, seed=run.seed)
        yield _or_error(measure, {"size": size, "depth": depth})


@part(0.93)
def training(run: Run) -> Rows:
    """The tiny recipe's stages: seconds of a step of 1 and 3, what further steps add to a run, and of a caption of 2."""
    few, many, batch = (1, 2, 1) if run.small else (10, 60, 32)
    warm = 0 if run.small else 1  # runs that import and compile, where times are worth something
    for method in run.in_time(("consistency", "knowledge")):
        *_, short, long = (_trained(run, method, steps, batch) for steps in (*[few] * warm, few, many))
        a_step = (long - short) / (many - few)
        yield [{"stage": method, "batch": batch, "seconds_a_step": a_step, "setup_seconds": short - few * a_step}]
    for _ in run.in_time(("search",)):
        *_, short, long = (_searched(run, captions, batch) for captions in (*[batch] * warm, batch, 3 * batch))
        a_caption = (long - short) / (2 * batch)
        setup = short - batch * a_caption
        yield [{"stage": "search", "batch": batch, "seconds_a_caption": a_caption, "setup_seconds": setup}]


def _trained(run: Run, method: str, steps: int, batch: int) -> float:
    """Seconds of a whole run of stage 1 or 3."""
    from ..distill.config import DistillConfig
    from ..distill.runs.trainer import distill

    objective = {"guidance": 3.0} if method == "consistency" else {"plan": "1:7", "segments": 8}
    config = DistillConfig.from_dict({
        "method": method, "objective": objective, "model": {"path": "tiny", "device": _named(run)},
        "data": {"source": "tinyworld", "clips": batch},
        "training": {"steps": steps, "batch": batch, "save_every": steps, "warmup": 0},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: distill(config, Path(folder) / "run"), run.device)


def _named(run: Run) -> str:
    """The run's device as a distillation's configuration says it."""
    return "cpu" if run.small else "auto"


def _searched(run: Run, captions: int, batch: int) -> float:
    """Seconds of stage 2 over so many captions, ``batch`` at once."""
    from ..distill.runs.recipe import RecipeConfig, ThreeStages

    recipe = RecipeConfig.from_dict({
        "model": {"path": "tiny", "device": _named(run)}, "data": {"source": "tinyworld", "clips": batch},
        "consistency": {"segments": 8, "steps": 8}, "consistency_training": {"batch": batch},
        "search": {"captions": captions},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        stages = ThreeStages(recipe, Path(folder))
        return seconds(lambda: stages.plans("plans", ""), run.device)


# Few heavy calls, short frames where a reference frame parts many runs, and a small clip, whose host may be the slower one.
PROFILED = (
    Shape(16, 880, 32, 128, "bfloat16", (2,)),
    Shape(8, 3600, 24, 96, "bfloat16", (4, 1)),
    Shape(37, 1008, 56, 128, "bfloat16", (8, 1), 714),
    Shape(24, 3600, 24, 96, "bfloat16", (4, 1)),
)


@part(0.97)
def profiles(run: Run) -> Rows:
    """Where the time of a call goes: kernels, the host, waiting. Behind all that is timed: a profiler may slow what follows."""
    for shape in run.in_time(SMALL[:1] if run.small else PROFILED):
        yield _or_error(lambda shape=shape: kernels.measure(shape, run.device, seed=run.seed), asdict(shape))


def _or_error(measure: Callable[[], list[dict[str, Any]]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, or one that says why there are none: a card that is too small for one shape has room for others, and a model
    that diffusers does not have yet costs no other."""
    try:
        return measure()
    except Exception as error:  # of other kinds than RuntimeError where a package is too old, or Triton compiles
        found = [{**about, "error": brief(error)}]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # behind the error, whose frames hold tensors
    return found


@part(1.0)
def tests(run: Run) -> Rows:
    """tests/gpu, where they are. They come last: nothing can end them before they are done."""
    import pytest

    if not TESTS.is_dir():
        yield [{"skipped": "tests/gpu is not here; use a clone"}]
        return
    report = run.out / "tests_gpu.xml"
    code = pytest.main(["-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(TESTS)])
    yield [{"exit_code": int(code), "report": report.name}]
