"""Which backend is fastest here: measured once for each device, dtype and class of shapes, and kept on disk.

The choice is a property of the machine, so the file is thrown away when torch, triton, the driver, a package that dense
attention may run by, or the pack change.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...limits.documents import parse_json, read_text
from ...storage.cache_folder import cache_folder
from ...storage.files import write_text
from ...tiles import TilePattern
from ..call_shape import CallShape
from ..layout import TokenLayout
from .trial import Attend, Choice, trial

log = logging.getLogger("efficient_vdit")

_TRIALS = 4  # what kind of trials they are, and of backends: choices of another kind are made anew
_MOST_BYTES = 2**23  # of the file: an entry has 300, and those of many models and sizes gather
# Whose attention a run may be measured beside, and what compiles ours.
_PACKAGES = (
    "triton", "triton-windows", "sageattention", "sageattn3", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers",
    "comfy-kitchen",
)  # fmt: skip


class ChoiceBook:
    """Choices by shape class, in memory and in ``file``; safe for several threads. Those of a trial in which a candidate failed
    stay in memory alone, as it may run at the next start; where it had too little memory, until `forget_cramped`."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.choices = _read(file)
        self.unwritten: set[str] = set()
        self.cramped: set[str] = set()  # of these

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
            kept = self.choices.get(key)
            if kept is None or not set(kept.milliseconds) <= set(candidates):
                found, had_room = trial(candidates, shape, layout, pattern, otherwise)
                self.choices[key] = found
                if set(found.milliseconds) != set(candidates):
                    self.unwritten.add(key)
                if not had_room:
                    self.cramped.add(key)
                _write(self.file, {k: choice for k, choice in self.choices.items() if k not in self.unwritten})
                if found.milliseconds:
                    log.info(
                        "Efficient-vDiT: %s is fastest for %s (ms of a trial: %s)", found.backend, key, found.times()
                    )
            return self.choices[key]

    def forget_cramped(self) -> None:
        """The next call of a shape class whose trial found too little memory is tried again: there may be more by then."""
        with self.lock:
            for key in self.cramped:
                del self.choices[key]
            self.unwritten -= self.cramped
            self.cramped.clear()


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
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    dtype, heads = str(shape.dtype).removeprefix("torch."), _bucket(shape.batch * shape.heads)
    return (
        f"{device}, {dtype}, {'/'.join(candidates)} with {dense_name}, heads {heads} x {shape.head_dim}, "
        f"frames {pattern.name(layout.grid.t)} x {_bucket(size)}, extra {_bucket(extra)}{threads}"
        f"{', forward and backward' if shape.gradients else ''}"
    )


def _bucket(count: int) -> int:
    return round(2 ** (round(2 * math.log2(count)) / 2)) if count else 0


def _driver_version() -> int:
    # The one number that tells an update of the driver; PyTorch shows it nowhere else.
    return getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()


def _versions() -> dict[str, str]:
    driver = "none"
    if torch.cuda.is_available():
        driver = f"{torch.version.cuda or torch.version.hip}, {_driver_version()}"
    installed = {package: _version(package) for package in _PACKAGES}
    return {
        "pack": __version__,
        "trials": str(_TRIALS),
        "torch": torch.__version__,
        "driver": driver,
        **{package: found for package, found in installed.items() if found},
    }


def _version(package: str) -> str:
    """Empty where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(file: Path) -> dict[str, Choice]:
    try:
        if not file.exists():
            return {}
        what = "What was measured of backends"
        kept = parse_json(read_text(file, what, limit=_MOST_BYTES), what, advice="", limit=_MOST_BYTES)
        if kept["versions"] != _versions():
            return {}
        return {str(key): _choice(value) for key, value in kept["choices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Efficient-vDiT: %s cannot be read (%s); backends are measured anew.", file, error)
        return {}


def _choice(kept: dict[str, Any]) -> Choice:
    """Raises ValueError and the like where no trial has left this."""
    times = {str(name): float(ms) for name, ms in kept["milliseconds"].items()}
    choice = Choice(str(kept["backend"]), times, str(kept.get("size", "")))
    if choice.backend not in times or not set(times) - {"dense"} or min(times.values()) <= 0:
        raise ValueError(f"{choice} is no choice of a trial")
    return choice


def _write(file: Path, choices: dict[str, Choice]) -> None:
    """Adds the choices to those that other processes have written meanwhile."""
    choices = {**_read(file), **choices}
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
