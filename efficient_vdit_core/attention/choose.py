"""Which backend is fastest here: measured once for each device, dtype and class of shapes, and kept on disk.

The choice is a property of the machine, so the file is thrown away when torch, triton, the driver or the pack change.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..files import write_text
from ..tiles import TilePattern, TokenGrid
from .gpu import OUT_OF_MEMORY
from .layout import TokenLayout

# Over q, k, v under a layout and a TilePattern, or for some backends any LayerPattern.
Attend = Callable[[Tensor, Tensor, Tensor, TokenLayout, Any], Tensor]

log = logging.getLogger("efficient_vdit")

# FLOPs of one dense trial on a CPU, about a tenth of a second on two cores; on a GPU as many as it does in so many seconds,
# by a first try of a few. A tenth of what an H200 does in these, of short frames, picked backends that lost up to 27 %
# at the real size (bench/results/h200).
_TRIAL_FLOPS = 2e10
_PROBE_FLOPS, _TRIAL_SECONDS = 2e12, 0.1
_FEWEST_HEADS = 4  # of long frames, they give every part of a GPU many blocks of rows
_SHORTEST_FRAME = 128
# Calls without a pause in between, as the layers of a model follow one another: while a GPU is at work on one the next is
# handed over.
_CALLS = {"cuda": 2}
_REPEATS, _MOST_SECONDS = 3, 1.0  # rounds of a trial, and when no further one is begun
_TRIALS = 2  # what kind of trials they are: choices of another kind are made anew


@dataclass(frozen=True)
class CallShape:
    """What attention calls look like: (batch, heads, N, head_dim) of a dtype on a device; the layout gives N.

    ``gradients``: whether they are part of a training step, which comes back through them.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    gradients: bool = False

    @classmethod
    def of(cls, q: Tensor, *others: Tensor) -> CallShape:
        """The shape of calls with queries like q (B, H, N, D), and keys and values like ``others``."""
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *others))
        return cls(q.shape[0], q.shape[1], q.shape[3], q.dtype, q.device, gradients)

    def tensors(self, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v (batch, heads, tokens, head_dim) of this kind."""
        size = (self.batch, heads, tokens, self.head_dim)
        q, k, v = (
            torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=self.gradients) for _ in range(3)
        )
        return q, k, v


@dataclass(frozen=True)
class Choice:
    """The fastest backend of a shape class and the median milliseconds of every candidate in the trial.

    ``size``: the heads and tokens of the trial, which may be fewer than those of the calls.
    """

    backend: str
    milliseconds: dict[str, float]
    size: str = ""

    def times(self) -> str:
        """Milliseconds for a person, fastest first, and what took them."""
        ordered = sorted(self.milliseconds.items(), key=lambda entry: entry[1])
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in ordered)
        return f"{times} ({self.size})" if self.size else times

    def sparse(self) -> str:
        """The fastest of those that follow the pattern; the backend itself where nothing was measured."""
        if not self.milliseconds:
            return self.backend
        return min((name for name in self.milliseconds if name != "dense"), key=lambda name: self.milliseconds[name])


class ChoiceBook:
    """Choices by shape class, in memory and in ``file``; safe for several threads. Those of a trial that found too little
    memory stay in memory alone."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.choices = _read(file)
        self.cramped: set[str] = set()

    def choose(
        self,
        candidates: Mapping[str, Attend],
        shape: CallShape,
        layout: TokenLayout,
        pattern: TilePattern,
        dense_name: str,
        otherwise: str = "frames",
    ) -> Choice:
        """The kept choice of this shape class, or a new trial of ``candidates`` on random tensors of a quick size. Where
        that finds no memory it is ``otherwise``, without times."""
        key = shape_class(shape, layout, pattern, dense_name, candidates)
        with self.lock:
            if key not in self.choices:
                found = self.choices[key] = self._tried(key, candidates, shape, layout, pattern, otherwise)
                _write(self.file, {k: choice for k, choice in self.choices.items() if k not in self.cramped})
                log.info("Efficient-vDiT: %s is fastest for %s (ms of a trial: %s)", found.backend, key, found.times())
            return self.choices[key]

    def _tried(
        self,
        key: str,
        candidates: Mapping[str, Attend],
        shape: CallShape,
        layout: TokenLayout,
        pattern: TilePattern,
        otherwise: str,
    ) -> Choice:
        try:
            found, had_room = _trial(candidates, shape, layout, pattern)
        except OUT_OF_MEMORY:
            log.warning(
                "Efficient-vDiT: there is no room to measure backends; the sparse attention runs by %s.", otherwise
            )
            found, had_room = Choice(otherwise, {}), False
        if not had_room:
            self.cramped.add(key)
        return found


def default_book() -> ChoiceBook:
    """The book of this machine: ``$EVDIT_CACHE_DIR`` or the user's cache folder."""
    return _book(cache_folder() / "attention.json")


@lru_cache
def _book(file: Path) -> ChoiceBook:
    return ChoiceBook(file)


def shape_class(
    shape: CallShape, layout: TokenLayout, pattern: TilePattern, dense_name: str, candidates: Mapping[str, Attend]
) -> str:
    """A readable key; sizes within a factor of sqrt(2) share it."""
    size, extra = layout.grid.tokens_per_frame, layout.prefix + layout.suffix
    device = torch.cuda.get_device_name(shape.device) if shape.device.type == "cuda" else shape.device.type
    dtype, heads = str(shape.dtype).removeprefix("torch."), _bucket(shape.batch * shape.heads)
    return (
        f"{device}, {dtype}, {'/'.join(candidates)} with {dense_name}, heads {heads} x {shape.head_dim}, "
        f"frames {pattern.name(layout.grid.t)} x {_bucket(size)}, extra {_bucket(extra)}"
        f"{', forward and backward' if shape.gradients else ''}"
    )


def _bucket(count: int) -> int:
    return round(2 ** (round(2 * math.log2(count)) / 2)) if count else 0


def _trial(
    candidates: Mapping[str, Attend], shape: CallShape, layout: TokenLayout, pattern: TilePattern
) -> tuple[Choice, bool]:
    """The choice, and whether every candidate had the memory it needs."""
    heads, layout = trial_size(shape, layout, _affordable_flops(candidates["dense"], shape, layout, pattern))
    calls = _CALLS.get(shape.device.type, 1)
    with torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
        tensors = shape.tensors(heads, layout.tokens)
        runs = {name: _run(attend, tensors, layout, pattern, shape.gradients) for name, attend in candidates.items()}
        certain = set(runs) if pattern.means else {"dense", "frames"}
        cramped: list[str] = []
        times: dict[str, list[float]] = {n: [] for n, run in runs.items() if _runs(n, run, n in certain, cramped)}
        if cramped and set(times) <= {"dense"}:
            raise OUT_OF_MEMORY("no backend that follows the pattern has room for a trial")
        start = time.perf_counter()
        for done in range(_REPEATS):
            if done and time.perf_counter() - start > _MOST_SECONDS:
                break
            for name, values in times.items():
                values.append(seconds(runs[name], shape.device, calls))
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    size = f"{heads} heads, {layout.grid.t} frames of {layout.grid.tokens_per_frame} tokens"
    return Choice(min(medians, key=lambda name: medians[name]), medians, size), not cramped


def _affordable_flops(dense: Attend, shape: CallShape, layout: TokenLayout, pattern: TilePattern) -> float:
    """FLOPs of dense attention, there, that a trial is for: what the device does in ``_TRIAL_SECONDS``, the way back
    included where gradients are wanted."""
    if shape.device.type != "cuda":
        return _TRIAL_FLOPS
    heads, layout = trial_size(shape, layout, _PROBE_FLOPS)
    with torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
        run = _run(dense, shape.tensors(heads, layout.tokens), layout, pattern, shape.gradients)
        run()  # kernels are chosen and built
        return _TRIAL_SECONDS * _flops(shape, heads, layout) / seconds(run, shape.device, 3)


def _flops(shape: CallShape, heads: int, layout: TokenLayout) -> float:
    return 4.0 * shape.batch * heads * layout.tokens**2 * shape.head_dim


def _run(
    attend: Attend,
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    pattern: TilePattern,
    gradients: bool,
) -> Callable[[], Any]:
    """One call, and with ``gradients`` the way back through it."""
    if not gradients:
        return lambda: attend(*tensors, layout, pattern)
    slope = torch.randn_like(tensors[0])

    def there_and_back() -> Any:
        out = attend(*tensors, layout, pattern)
        if not out.requires_grad:
            raise ValueError(
                "A gradient is wanted, and the dense attention gives none. Hand in a dense function with a backward, or call it "
                "under torch.no_grad()."
            )
        return torch.autograd.grad(out, tensors, slope)

    return there_and_back


def _runs(name: str, run: Callable[[], Any], certain: bool, cramped: list[str]) -> bool:
    """Whether a candidate runs here. The errors of one that has to are the caller's, but for those of memory: it is
    named in ``cramped`` then."""
    try:
        run()
    except OUT_OF_MEMORY:
        cramped.append(name)
        log.warning("Efficient-vDiT: the backend %s has no room for a trial and is left out of it.", name)
        return False
    except Exception as error:  # compilers raise anything
        if certain:
            raise
        kind = type(error).__name__
        log.warning("Efficient-vDiT: the backend %s fails here and is left out: %s: %s", name, kind, error)
        return False
    return True


def trial_size(shape: CallShape, layout: TokenLayout, budget: float) -> tuple[int, TokenLayout]:
    """How many heads and which layout a trial of ``budget`` FLOPs uses: fewer heads first, down to a few that still fill a
    large GPU, then shorter frames, then fewer heads again.

    The frames stay whole where they can: how well kernels do depends on their length, and a trial of short ones is over
    before the host has handed over the calls.
    """

    def affordable(layout: TokenLayout) -> int:
        return int(budget / _flops(shape, 1, layout))

    heads = min(shape.heads, max(_FEWEST_HEADS, affordable(layout)))
    if heads > affordable(layout) and layout.grid.tokens_per_frame > _SHORTEST_FRAME:
        shrink = math.sqrt(budget / _flops(shape, heads, layout))
        size = max(_SHORTEST_FRAME, int(layout.grid.tokens_per_frame * shrink))
        layout = TokenLayout(
            TokenGrid(layout.grid.t, 1, size), int(layout.prefix * shrink), int(layout.suffix * shrink)
        )
    return max(1, min(heads, affordable(layout))), layout


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds of ``run()``, the device's work included: of one among ``calls`` without a pause in between."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / calls


def wait_for(device: torch.device) -> None:
    """Returns when ``device`` has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()


def _driver_version() -> int:
    # The one number that tells an update of the driver; PyTorch shows it nowhere else.
    return getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()


def _versions() -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    driver = "none"
    if torch.cuda.is_available():
        driver = f"{torch.version.cuda or torch.version.hip}, {_driver_version()}"
    return {
        "pack": __version__,
        "trials": str(_TRIALS),
        "torch": torch.__version__,
        "triton": triton,
        "driver": driver,
        "threads": str(torch.get_num_threads()),
    }


def cache_folder() -> Path:
    """Where the pack keeps what it found out about this machine: ``$EVDIT_CACHE_DIR`` or the user's cache folder."""
    if chosen := os.environ.get("EVDIT_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "efficient-vdit"


def _read(file: Path) -> dict[str, Choice]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["versions"] != _versions():
            return {}
        return {
            str(key): Choice(str(c["backend"]), dict(c["milliseconds"]), str(c.get("size", "")))
            for key, c in kept["choices"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Efficient-vDiT: %s cannot be read (%s); backends are measured anew.", file, error)
        return {}


def _write(file: Path, choices: dict[str, Choice]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"versions": _versions(), "choices": {key: asdict(c) for key, c in choices.items()}}, indent=1
        )
        write_text(file, text + "\n")
    except OSError as error:
        log.warning(
            "Efficient-vDiT: the choice of backend could not be kept in %s (%s); it is measured again next time.",
            file,
            error,
        )
