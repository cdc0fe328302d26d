"""What a node is given, checked before it runs: programs that write prompts put numbers where sockets are, and NaN into
widgets, which ComfyUI lets through."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from ..efficient_vdit_core.limits.numbers import number, whole
from ..efficient_vdit_core.limits.quote import message, quoted, reason, shortened
from ..efficient_vdit_core.plan import TilePlan

# Lists of files grow, and not every one is read: what reads them says what it did not find.
FILES = ("model_name", "text_encoder_name", "vae_name", "plan_name", "checkpoint")
P = ParamSpec("P")
R = TypeVar("R")


def checked(execute: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A node's ``execute`` behind the checks that its schema implies; stands under ``@classmethod``.

    The node raises ValueError that names the input, what it got and what was expected; every message of the node is
    printable and at most 400 characters long.
    """
    names = inspect.signature(execute)

    @functools.wraps(execute)
    def run(cls: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        bound = names.bind(cls, *args, **kwargs)
        given = bound.arguments
        for spec in (getattr(cls, "SCHEMA", None) or cls.define_schema()).inputs:
            if spec.id in given and not (spec.optional and given[spec.id] is None):
                given[spec.id] = check_input(spec, given[spec.id])
        try:
            return execute(*bound.args, **bound.kwargs)
        except ValueError as error:
            short = message(str(error))
            if short == str(error):
                raise
            raise ValueError(short) from error
        except OSError as error:
            name = f"{quoted(str(error.filename), 120)} " if error.filename else "A file "
            raise ValueError(
                f"{name}could not be read or written ({error.strerror or reason(error)}). Check that it is there, and that "
                "there is room."
            ) from error

    return run


def check_input(spec: Any, value: Any) -> Any:
    """``value`` as the node takes it: numbers of NumPy, and whole ones in a FLOAT where an INT is, become Python's own.

    Raises ValueError where it is nothing that the socket or widget ``spec`` of a schema can carry.
    """
    kind = spec.get_io_type()
    if kind in ("INT", "FLOAT"):
        return _plain_number(spec, kind, value)
    if kind == "COMBO" and spec.id not in FILES and value not in spec.options:
        raise ValueError(not_listed(spec.id, value, spec.options))
    elif kind in _KINDS and not _KINDS[kind](value):
        raise ValueError(
            f"{spec.id} is {quoted(value)}, expected a {kind}. Connect it to the output of a node that gives a {kind}; it "
            "cannot be written into the prompt."
        )
    return value


def _plain_number(spec: Any, kind: str, value: Any) -> int | float:
    """A link from a socket of any kind is not converted by ComfyUI."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if kind == "FLOAT":
        return number(plain, spec.id, spec.min, spec.max, why="Correct the node's value.")
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    return whole(plain, spec.id, spec.min, spec.max, why="Correct the node's value.")


def not_listed(name: str, value: Any, options: Iterable[Any]) -> str:
    """What is said of a ``value`` of the input ``name`` that is none of its list."""
    choices = ", ".join(map(str, options))
    return f"{name} is {quoted(value)}, expected one of {shortened(choices, 200)}. Choose one of the list."


def _is_model(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("clone", "model", "get_model_object"))


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[1], dict) for part in value
    )


def _is_latent(value: Any) -> bool:
    # Models of sound and pictures have several tensors in one, of a class of ComfyUI's own.
    return isinstance(value, dict) and hasattr(value.get("samples"), "shape")


_KINDS: dict[str, Callable[[Any], bool]] = {
    "MODEL": _is_model,
    "CONDITIONING": _is_conditioning,
    "LATENT": _is_latent,
    "EVDIT_PLAN": lambda value: isinstance(value, TilePlan),
    "IMAGE": lambda value: isinstance(value, torch.Tensor) and value.ndim == 4,
    "SIGMAS": lambda value: isinstance(value, torch.Tensor) and value.ndim == 1,
    "STRING": lambda value: isinstance(value, str),
}
