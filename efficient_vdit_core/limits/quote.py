"""Values, and messages of other libraries, as they stand inside our own: short, on one line, safe on a terminal."""

from __future__ import annotations

import reprlib
from typing import Any

MESSAGE = 400  # characters of a whole message, at most
_VALUE, _REASON = 60, 120  # characters of a quoted value and of another's message
_DIGITS = 40


class _Short(reprlib.Repr):
    """A bounded repr: it looks at the beginning of a long list only, and into a deep one no further than 3 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, _VALUE, _VALUE, _DIGITS
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) < 10**_DIGITS:
            return repr(x)
        return f"{'-' * (x < 0)}10^{int(abs(x).bit_length() * 0.30103)}"  # repr refuses more than 4300 digits


_SHORT = _Short()


def quoted(value: Any, room: int = _VALUE) -> str:
    """``value`` as Python would write it, in at most ``room`` characters, all of which can be printed."""
    if isinstance(value, str):
        return repr(shortened(value, room - 2)) if value.isprintable() else shortened(repr(value[: 4 * room]), room)
    return shortened(printable(_SHORT.repr(value)), room)


def named(name: str, room: int = 80) -> str:
    """The name of a file or a tensor, without quotes."""
    return shortened(printable(shortened(name, room)).replace("\n", "\\n"), room)


def shortened(text: str, room: int) -> str:
    """``text`` itself, or its beginning and its end around three dots: of a path, a sentence, both matter."""
    if len(text) <= room:
        return text
    tail = (room - 3) // 2
    return f"{text[: room - 3 - tail]}...{text[len(text) - tail :]}"


def printable(text: str) -> str:
    """``text`` with an escape for each control character, half surrogate, or other sign that a terminal would obey.
    Lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def message(text: str) -> str:
    """A whole message, as it may leave this package: printable, at most ``MESSAGE`` characters."""
    return shortened(printable(shortened(text, 4 * MESSAGE)), MESSAGE)


def first_cause(error: BaseException) -> BaseException:
    """What was raised first, where others were raised because of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException, room: int = _REASON) -> str:
    """The first line of another library's message, without its full stop; its kind, where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(printable(lines[0]), room).rstrip(".:") if lines else type(error).__name__
