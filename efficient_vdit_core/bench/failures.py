"""What fails on a machine that nobody has tried, in a line: kernels and compilers of others raise anything, and the rest of
a measurement is worth having."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Key = TypeVar("Key")


def brief(error: Exception, most: int = 300) -> str:
    """Kind and text of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def failures(keys: Iterable[Key], attempt: Callable[[Key], object]) -> dict[Key, str]:
    """Makes every attempt, and says of those that raise what they raised. A ValueError is the caller's: an argument does
    not fit, and is raised."""
    found: dict[Key, str] = {}
    for key in keys:
        try:
            attempt(key)
        except ValueError:
            raise
        except Exception as error:
            found[key] = brief(error)
    return found
