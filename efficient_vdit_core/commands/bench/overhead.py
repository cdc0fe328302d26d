"""evdit bench overhead: what the pack's own work costs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import say

HEARS = ("repeats",)


def add(commands: Any) -> argparse.ArgumentParser:
    overhead = commands.add_parser("overhead", help="what import, patch and index work cost")
    overhead.add_argument("--search", action="store_true", help="instead: what telling heads apart adds to a search")
    return overhead


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.overhead import measure, measure_search

    rows = measure_search(args.repeats) if args.search else measure(args.repeats)
    for r in rows:
        say(f"{r['what']:<50} {r['milliseconds']:>8.2f} ms, limit {r['limit']:g} ms")
    yield rows
