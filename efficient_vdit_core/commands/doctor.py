"""evdit doctor: what this machine can run."""

from __future__ import annotations

import argparse
import json

from . import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; the status is 1 if the built-in model cannot run here."""
    from ..doctor import examine, format_findings

    findings = examine()
    say(json.dumps(findings, indent=2) if args.json else format_findings(findings))
    return 1 if findings["problems"] else 0
