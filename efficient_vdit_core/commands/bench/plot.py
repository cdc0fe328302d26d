"""evdit bench plot: a chart of a results file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...limits.documents import parse_json, read_text
from ...limits.quote import named
from ...storage.files import write_text
from .. import say
from ..arguments import check_chart

MAX_RESULTS = 2**26  # bytes


def add(commands: Any) -> None:
    plot = commands.add_parser(
        "plot", help="draw a results file of `evdit bench attention` or `evdit bench gpu` as SVG"
    )
    plot.add_argument("file", type=Path)
    plot.add_argument("--out", type=Path, help="the chart, .svg; default: the results file's name with .svg")
    plot.add_argument(
        "--paper", action="store_true", help="only the rows of the paper's Table 1, the fastest backend of each"
    )


def run(args: argparse.Namespace) -> int:
    from ...bench.plot import draw

    what = named(str(args.file))
    results = parse_json(
        read_text(args.file, what, limit=MAX_RESULTS), what, advice="Make one with --json.", limit=MAX_RESULTS
    )
    out = check_chart(args.out or args.file.with_suffix(".svg"), "--out", args.file)
    try:
        chart = draw(results, only_paper=args.paper)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{what} is no results file of `evdit bench attention`. Make one with --json.") from error
    write_text(out, chart)
    say(f"{out}")
    return 0
