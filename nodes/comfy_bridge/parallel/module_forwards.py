"""What stands around the forwards of modules that ComfyUI has no hook for, on a rank's tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ....efficient_vdit_core.parallel.sharding.blocks import ALL_KEYS, ShardedForward
from .shard_rules import Row, WholeModule


class Seat:
    """Where the forward that runs is found by modules that are told nothing of it."""

    forward: ShardedForward | None = None


def paths(diffusion_model: Any, pattern: str) -> Iterator[str]:
    """The modules of a path with at most one * for each entry of a list."""
    before, star, behind = pattern.partition(".*")
    if not star:
        yield from [pattern] if hasattr(diffusion_model, pattern) else []
        return
    yield from (f"{before}.{i}{behind}" for i in range(len(diffusion_model.get_submodule(before))))


def replace_forward(patched: Any, path: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts ``around`` the forward of a module, as an object patch of ComfyUI's, which it takes back itself."""
    name = f"diffusion_model.{path}.forward"
    patched.add_object_patch(name, around(patched.get_model_object(name)))


def block_forward(kind: type, row: Row, layer: int | None, last: bool, seat: Seat) -> Any:
    """A block that ComfyUI has no hook for: its arguments by name, its results in the order of its own."""
    names = list(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore[reportAttributeAccessIssue]

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            state = seat.forward
            if state is None:
                return forward(*args, **kwargs)
            given = state.enter({**dict(zip(names, args, strict=False)), **kwargs}, row.about)
            state.begin(layer)
            out = forward(**given)
            if not last:
                return out
            if isinstance(out, Tensor):
                return state.all_rows(out)
            # Blocks of two hidden states give the video first, and the text that stands before it behind.
            results = dict(zip(reversed(row.about.hidden), out, strict=True))
            return tuple(state.leave(results, row.about)[name] for name in reversed(row.about.hidden))

        return run

    return around


def whole_forward(module: WholeModule, seat: Seat, itself: Any) -> Any:
    """A module that is given all tokens, and gives this rank's; ``itself`` is the module."""

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            state = seat.forward
            behind = state is not None and x.shape[-2] == state.tokens  # after the last block all tokens are here
            if state is None or behind or not module.acts(itself, x, *args, **kwargs):
                return forward(x, *args, **kwargs)
            return state.own_rows(forward(state.all_rows(x), *args, **kwargs))

        return run

    return around


def all_keys_forward(seat: Seat) -> Any:
    """An attention whose queries every rank has, and whose keys are shared out."""

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if seat.forward is not None:
                seat.forward.awaits = ALL_KEYS
            return forward(*args, **kwargs)

        return run

    return around
