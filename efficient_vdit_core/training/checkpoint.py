"""A run's state as one file: written whole over the previous one, and checked when it is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from ..limits.quote import named
from ..storage.files import read_torch, write_torch

_KINDS: dict[str, type] = {"model": dict, "ema": dict, "optimizers": list, "generator": Tensor, "step": int}
_OPTIONAL: dict[str, type] = {"watch": Tensor}  # earlier versions wrote none


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Raises ValueError where it cannot be written; a checkpoint that stands there is then kept."""
    try:
        write_torch(file, state)
    except OSError as error:
        kept = "the previous one is kept" if file.exists() else "there is none before it"
        raise ValueError(
            f"The checkpoint of step {state['step']} could not be written to {named(str(file.parent))} ({error}); {kept}. "
            "Make room there and start the same command again."
        ) from error


def read_checkpoint(file: Path, names: Collection[str], *, processes: int, random: int, mmap: bool) -> dict[str, Any]:
    """The state in ``file``.

    Args:
        names: of the weights that the run trains. random: bytes of one generator's state. mmap: read tensors when they
            are used.

    Raises:
        ValueError: it is damaged, of other weights, or of another number of processes.
    """
    shown = named(str(file))
    state = read_torch(file, f"Delete {shown} to train anew.", mmap=mmap)
    if not _is_state(state):
        raise ValueError(f"{shown} is no checkpoint of a training run, or a damaged one. Delete it to train anew.")
    count = state["generator"].numel() // random
    if count != processes:
        raise ValueError(
            f"{shown} was written by {count} processes, but this run has {processes}. Resume with as many, or start a new run."
        )
    if state["model"].keys() != names or state["ema"].keys() != names:
        odd = sorted({*state["model"], *state["ema"]} ^ set(names)) or sorted(names)
        raise ValueError(
            f"{shown} trains other weights than this run ({len(odd)} differ, such as {named(str(odd[0]))}). Choose another folder."
        )
    return state


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    kinds = _KINDS | {name: kind for name, kind in _OPTIONAL.items() if name in state}
    return all(isinstance(state.get(name), kind) for name, kind in kinds.items())
