"""The `evdit` command."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import __version__
from .commands import INTERRUPTED
from .commands.arguments import Parser, one_line
from .limits.quote import first_cause, quoted, reason

# name -> its help; each is a module of `commands` with add_arguments(parser) and run(args) -> exit status
COMMANDS = {
    "generate": "make a video for a prompt",
    "demo": "make a short video with the built-in model, in under a minute on a CPU",
    "search": "find out which layers can take a sparse pattern, and write the plan",
    "doctor": "show versions, devices, attention backends and packages",
    "compare": "measure how near two clips of the same seed are to each other",
    "eval": "lay clips out for VBench, a benchmark of video models",
    "bench": "time attention, a step, the overheads; draw the chart",
    "workers": "run a pool of workers that ComfyUI shares a video out to",
    "convert": "turn upstream weights into safetensors",
    "distill": "train a few-step model, or a sparse one, from a model",
    "recipe": "run all three stages, or the tiny world's whole table",
    "tinyworld": "train, evaluate and render the tiny world that the built-in model knows",
}
MISTAKEN_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 where the machine fails, 2 for a mistake of the user, 130 after
    Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if word != "--debug"]  # it may stand before or behind any command
    debug, args = len(words) < len(argv), argparse.Namespace()
    try:
        args = build_parser().parse_args(words)
        with _plain_warnings():
            return int(args.run(args) or 0)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished before stays, and no file is half written", INTERRUPTED)
    except ValueError as error:
        if debug:
            raise
        return _fail(f"error: {error}", 2)
    except OSError as error:
        if debug:
            raise
        return _fail(*_failed_file(error))
    except ImportError as error:
        if debug:
            raise
        return _fail(_failed_import(error), 1)
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, MemoryError) or re.search(
            "out of memory|can't allocate memory", str(error), re.IGNORECASE
        )
        if debug or not memory:
            raise
        advice = "a smaller size, fewer frames or --dtype bfloat16" if "dtype" in args else "fewer or smaller inputs"
        return _fail(f"error: the device ran out of memory; use {advice}", 1)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="evdit", description="Efficient-vDiT: fast video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"evdit {__version__}")
    debug = Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = importlib.import_module(f".commands.{name}", __package__)
        sub = subparsers.add_parser(name, help=text, description=command.__doc__, parents=[debug])
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _failed_import(error: ImportError) -> str:
    cause = first_cause(error)
    lacking = getattr(cause, "name", None) or ""
    if isinstance(cause, ModuleNotFoundError) and lacking.split(".")[0] == __package__:
        return f"error: this build of the pack lacks {lacking}; use a clone of the repository, or install the pack anew"
    return f"error: a package does not load ({reason(cause, 200)}); 'evdit doctor' tells which"


def _failed_file(error: OSError) -> tuple[str, int]:
    """What is said of it, and the exit status."""
    mistaken = isinstance(error, MISTAKEN_PATHS) or error.errno == errno.ENAMETOOLONG
    text = reason(error, 240)
    if error.strerror:
        what = quoted(str(error.filename), 160) if error.filename else "a file"
        advice = "check the path" if mistaken else "check the path and the room there"
        text = f"{what} could not be read or written ({error.strerror}); {advice}"
    return f"error: {text}", 2 if mistaken else 1


def _fail(text: str, status: int) -> int:
    sys.stderr.write(one_line(f"evdit: {text}"))
    return status


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, whether they come from logging or from the warnings module."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"WARNING: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


if __name__ == "__main__":
    sys.exit(main())
