"""Runs a model's blocks again under each candidate, to see the error in the block's output.

A block with its feed-forward costs far more than its attention, so this makes a search several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import flat, relative_error
from .record import BLOCK, ProbeRecord, Replay


@contextmanager
def replay_blocks(blocks: Sequence[nn.Module], record: ProbeRecord) -> Iterator[None]:
    """Within it, each forward of ``blocks`` (layer 0, 1, ...) whose attention is measured adds its block errors to
    ``record``.

    The model must run with ``make_probe_override(record)``. The hooks go away at the end, after an exception as well.
    Memory: two copies of a block's inputs and one output beside the dense run.
    """
    handles = []
    try:
        for layer, block in enumerate(blocks):
            before, after = _hooks(layer, record)
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: int, record: ProbeRecord) -> tuple[Callable[..., None], Callable[..., None]]:
    inputs: list[Any] = []
    measured = 0  # calls of the layer, before its block

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal measured
        measured = record.calls[layer]
        # Some blocks add to their input in place, so what they got has to be kept.
        inputs[:] = [_copied(args, kwargs)]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        (kept,) = inputs
        inputs.clear()
        if record.calls[layer] == measured:
            return
        exact = flat(output)
        for pattern in record.candidates:
            positional, named = _copied(*kept)
            record.replaying = Replay(pattern)
            try:
                approximate = module.forward(*positional, **named)
            finally:
                record.replaying = None
            record.compared(BLOCK, layer, pattern, relative_error(flat(approximate), exact), exact)

    return before, after


def _copied(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_copy(a) for a in args), {name: _copy(a) for name, a in kwargs.items()}


def _copy(value: Any) -> Any:
    """A copy of the tensors, also of those in tuples and lists. Of dictionaries, the options, only the keys are
    copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copy(v) for v in value)
    return dict(value) if type(value) is dict else value
