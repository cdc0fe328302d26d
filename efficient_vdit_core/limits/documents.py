"""JSON and TOML that others wrote: plans, recipes, configurations, and what checkpoints and clips say of themselves.

All of it comes through here. A parser alone takes what it is given: 100,000 brackets overflow its stack, a number of
10^400 becomes infinity, a file of gigabytes is read whole.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .packages import install
from .quote import quoted, reason

MAX_BYTES = 2**20  # a plan of 1024 layers has 20,000
MAX_DEPTH = 32
MAX_VALUES = 200_000
# A string, a comment, or a part of a key and the point behind it, if there is one. What does not end is taken to the line's end, so
# that each letter is looked at once.
_TOML_WORD = re.compile(
    r'''"""(?:\\[\s\S]|[^\\])*?(?:"""|\Z)|\'{3}[\s\S]*?(?:\'{3}|\Z)|\#[^\n]*'''
    r"""|(?:[\w-]+|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?)(?P<point>[ \t]*\.[ \t]*)?"""
)


def read_text(path: str | Path, what: str, *, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a file. Raises ValueError, which begins with ``what``, where there is none or it is too
    large."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{what} is not there: {quoted(str(path), 120)} is no file. Check the path.")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    _check_size(len(data), what, limit)
    try:
        return data.decode("utf-8-sig")  # Windows' editors begin such a text with a mark that no parser takes
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no UTF-8 text (at byte {error.start}). Save it as UTF-8.") from None


def parse_json(text: str | bytes, what: str, *, advice: str, limit: int = MAX_BYTES, values: int = MAX_VALUES) -> Any:
    """The value of a JSON text.

    Args:
        what: begins the message: "The plan". advice: ends it: what to do. limit: bytes. values: of all lists and objects.

    Raises:
        ValueError: it is no JSON, too large or too deep, or holds a number that is not finite.
    """
    _check_size(len(text), what, limit)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels. {advice}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not valid JSON (it is no UTF-8). {advice}") from None
    except (json.JSONDecodeError, _Unusable) as error:
        raise ValueError(f"{what} is not valid JSON ({reason(error, 80)}). {advice}") from None
    _check_shape(value, what, advice, values)
    return value


def parse_toml(text: str, what: str, *, advice: str = "Correct the file.") -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError as `parse_json`."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"Python 3.10 reads TOML only with the package 'tomli'. {install('tomli', instead='Use Python 3.11')}"
            ) from error
    _check_size(len(text), what, MAX_BYTES)
    if _key_parts(text) > MAX_DEPTH:  # the parser takes the square of them in steps
        raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels. {advice}")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels. {advice}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{what} is not valid TOML: {reason(error, 80)}. {advice}") from None
    except ValueError:
        raise ValueError(f"{what} is not valid TOML: a number has too many digits. {advice}") from None
    _check_shape(values, what, advice, MAX_VALUES)
    return values


def _key_parts(text: str) -> int:
    """How many points the longest key of a TOML text has, such as 2 of ``a.b.c = 1``."""
    most = count = end = 0
    for word in _TOML_WORD.finditer(text):
        if word.start() != end:
            count = 0
        count = count + 1 if word["point"] else 0
        most, end = max(most, count), word.end()
    return most


class _Unusable(ValueError):
    """A number that Python's parser lets in."""


def _refuse_constant(name: str) -> Any:
    raise _Unusable(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Unusable(f"{text[:20]} is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 400:  # as many digits as the largest float has, and some
        raise _Unusable(f"{text[:20]}... is too large for a number")
    return int(text)


def _check_size(size: int, what: str, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{what} is larger than {limit:,} bytes, which no such file has. Choose another file.")


def _check_shape(value: Any, what: str, advice: str, values: int) -> None:
    """Level by level, without recursion: what is deeper than the parser's own stack allows is seen here too."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        count += len(level)
        if count > values:
            raise ValueError(f"{what} holds more than {values:,} values, which no such file has. {advice}")
        if not level:
            return
    raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels. {advice}")


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
