"""Runs cases in processes that are watched: time, memory, and whether they live. The long form, from the repository's root:

PYTHONPATH=.:tests/helpers python -m fuzz.run --cases 10000 --seed 1 --json tests/core/fuzz_results.json
"""

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SECONDS, BYTES = 10.0, 2 * 2**30  # of the processor's time, which a busy machine does not stretch
PATIENCE = 6.0  # times as long by the clock: a case that waits takes no processor's time
START = 300.0  # a busy machine imports PyTorch slowly
PROGRAM = ["-m", "fuzz.worker"]
_TICK = 0.05


class Worker:
    """One process, started anew after a case that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None  # a process that is killed cannot remove its own

    def run(self, kind: str, seed: int) -> dict[str, Any]:
        """The judged case; "bad" where it took too long or too much, or ended its process."""
        process = self._started()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"kind": kind, "seed": seed}).encode() + b"\n")
        process.stdin.flush()
        start, before = time.monotonic(), processor_time(process.pid)
        while not select.select([process.stdout], [], [], _TICK)[0]:
            worked = processor_time(process.pid) - before
            if worked > SECONDS or time.monotonic() - start > SECONDS * PATIENCE:
                return self._ended(f"more than {SECONDS:g} s")
            if memory(process.pid) > BYTES:
                return self._ended(f"more than {BYTES >> 30} GiB of memory")
        line = process.stdout.readline()
        if not line:
            return self._ended("the process ended")
        return {**json.loads(line), "seconds": round(processor_time(process.pid) - before, 2)}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    pipe.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.process = self.folder = None

    def _ended(self, why: str) -> dict[str, Any]:
        self.stop()
        return {"outcome": "bad", "why": why, "message": ""}

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
            self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": self.folder.name}
            command = [sys.executable, *PROGRAM]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
            )
            assert self.process.stdout
            ready = select.select([self.process.stdout], [], [], START)[0] and self.process.stdout.readline()
            if ready != b"ready\n":
                self.stop()
                raise RuntimeError("The worker of the fuzz test did not start.")
        return self.process


def memory(pid: int) -> int:
    """Bytes that a process and its children hold; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(memory, children(pid)))


def processor_time(pid: int) -> float:
    """Seconds that a process and its children, also those that ended, have worked; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(processor_time, children(pid)))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []


def plan(count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each case with a seed of its own."""
    from .cases import KINDS

    names = list(KINDS)
    return ((names[i % len(names)], seed * 1_000_000 + i) for i in range(count))


def run_cases(cases: list[tuple[str, int]], workers: int = 2) -> list[dict[str, Any]]:
    """How each case ended, in order: kind, seed, outcome (fine, refused, bad), why, message, seconds."""

    def share(number: int) -> list[tuple[int, dict[str, Any]]]:
        worker = Worker()
        try:
            return [(i, worker.run(*cases[i])) for i in range(number, len(cases), workers)]
        finally:
            worker.stop()

    with ThreadPoolExecutor(workers) as pool:
        found = dict(pair for part in pool.map(share, range(workers)) for pair in part)
    return [{"kind": kind, "seed": seed, **found[i]} for i, (kind, seed) in enumerate(cases)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the pack's inputs.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="one kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [case for case in plan(args.cases, args.seed) if args.only in (None, case[0])]
    start = time.monotonic()
    results = run_cases(cases, args.workers)
    bad = [result for result in results if result["outcome"] == "bad"]
    by_kind = {kind: dict(Counter(r["outcome"] for r in results if r["kind"] == kind)) for kind in dict(cases)}
    import torch

    from efficient_vdit_core.bench.machine import describe_machine

    report = {
        "command": f"PYTHONPATH=.:tests/helpers python -m fuzz.run --cases {args.cases} --seed {args.seed}",
        "seed": args.seed,
        "bounds": {"processor_seconds": SECONDS, "bytes": BYTES, "characters": 400},
        "machine": describe_machine(torch.device("cpu")),
        "python": platform.python_version(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "slowest_seconds": max(r.get("seconds", SECONDS) for r in results),
        "longest_message": max(len(r["message"]) for r in results if r["outcome"] == "refused"),
        "cases": len(results),
        "outcomes": dict(Counter(r["outcome"] for r in results)),
        "by_kind": by_kind,
        "bad": bad,
    }
    text = json.dumps(report, indent=1) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    print(text)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
