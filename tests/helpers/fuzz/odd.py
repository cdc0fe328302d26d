"""Values and texts that break parsers, and ways to spoil documents and bytes."""

import json
import math
import random
from typing import Any

SMALL = [0, 1, -1, 2, 3, 7, 8, 16, 64, 100, 255, 1000, 1024]
NUMBERS = [*SMALL, 10**5, 10**6, 10**9, 10**12, 10**30, -(10**18), 2**31, 2**63, 2**64, 2**64 - 1, -(2**63), 0.5, -0.5, 1e-300, 1e300,
           math.nan, math.inf, -math.inf, 10**400]  # fmt: skip
PIECES = ["a", "a.", "1.", " ", "<a ", "<![", "&amp;", "\x1b[31m", "\0", "\ud800", "猫", "🐈", "\u202e", "[", "{", "../", "%s", "{}", "\n",
          "'", '"', "\\", "http:/", "a.com@", ".png"]  # fmt: skip


def text(rng: random.Random) -> str:
    """Short and mixed, or one piece a hundred thousand times."""
    if rng.random() < 0.3:
        piece = rng.choice(PIECES)
        return piece * rng.choice([1, 10, 300, 100_000 // len(piece)])
    return "".join(rng.choice([*PIECES, "full", "1:7", "all:2", "0-3:", "word "]) for _ in range(rng.randint(0, 12)))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON or TOML could hold, and some that they cannot."""
    choice = rng.random()
    if choice < 0.45:
        return rng.choice(NUMBERS)
    if choice < 0.65:
        return text(rng)[: None if depth < 2 else 100]
    if choice < 0.8 or depth > 3:
        return rng.choice([None, True, False, "", "full", [], {}])
    if choice < 0.9:
        many = rng.choice([1, 1, 1000]) if depth == 0 else 1
        return [value(rng, 4 if many > 1 else depth + 1) for _ in range(rng.randint(0, 4))] * many
    return {text(rng)[:40]: value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def nested(levels: int) -> Any:
    inner: Any = []
    for _ in range(levels):
        inner = [inner]
    return inner


def near(rng: random.Random, old: Any) -> Any:
    """Another value of the same kind, which may well be allowed; or the old one, much too deep."""
    if rng.random() < 0.1:
        return nested(rng.choice([5, 40, 400]))
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice(SMALL)
    if isinstance(old, float):
        return rng.choice([0.0, 0.5, 1.0, 2.0, -1.0, 1e9])
    return old * 2 if isinstance(old, str | list) else old


def spoil(rng: random.Random, document: Any) -> Any:
    """A copy of nested dicts and lists in which one to three places are changed, removed or added."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
                place = place[key]
                continue
            if rng.random() < 0.15:
                del place[key]
            else:
                place[key] = near(rng, place[key]) if rng.random() < 0.5 else value(rng)
            break
        if isinstance(place, dict) and rng.random() < 0.1:
            place[text(rng)[:60]] = value(rng)
    return document


def as_json(rng: random.Random, document: Any) -> str:
    """Its text, now and then no JSON any more."""
    if rng.random() < 0.08:
        return rng.choice(
            ["", "{", "[" * 100_000, "null", "1e400", "NaN", '"a', " " * 3_000_000, "[" + "0," * 400_000 + "0]"]
        )
    return cut_text(rng, json.dumps(document))


def as_toml(rng: random.Random, tables: dict[str, Any]) -> str:
    if rng.random() < 0.08:
        return rng.choice(
            [
                "a = " + "[" * 500 + "]" * 500,
                "a" + ".a" * 3000 + " = 1",
                "[",
                "= 1",
                "a = 1\na = 2",
                "\0",
                "[a]\n[a]",
                "a = 1" + "0" * 5000,
            ]
        )
    lines = [f"{_key(k)} = {_toml(v)}" for k, v in tables.items() if v is not None and not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{_key(name)}]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items() if v is not None)]
    return cut_text(rng, "\n".join(lines) + "\n")


def _key(name: str) -> str:
    return json.dumps(name)


def _toml(item: Any) -> str:
    if isinstance(item, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in item.items()) + "}"
    if isinstance(item, list):
        return "[" + ", ".join(map(_toml, item)) + "]"
    if isinstance(item, float):
        return "nan" if math.isnan(item) else "inf" if item > 1e308 else "-inf" if item < -1e308 else repr(item)
    return '""' if item is None else json.dumps(item)


def cut_text(rng: random.Random, whole: str) -> str:
    return whole[: rng.randrange(len(whole))] if whole and rng.random() < 0.05 else whole


def bruise(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut short, overwritten, doubled, or with a piece taken out."""
    data, way = bytearray(data), rng.random()
    if way < 0.3:
        return bytes(data[: rng.randrange(len(data) + 1)])
    for _ in range(rng.choice([1, 1, 3, 30])):
        at = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(len(data), 64)))
        if way < 0.6:
            data[at : at + rng.choice([1, 2, 4])] = rng.choice([b"\xff\xff\xff\xff", b"\0", b"\x7f", b"garbage"])
        elif way < 0.8:
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randint(1, 40)]
    return bytes(data)
