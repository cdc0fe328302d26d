"""The Triton kernels for GPUs that are not here: what the compiler said of them is committed, and asked anew where the
kernels or Triton have changed since."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from efficient_vdit_core.bench.compile_ahead import (
    ARCHITECTURES,
    HEAD_DIMS,
    MAX_SPILL,
    QUICK,
    Case,
    Compiled,
    Outcome,
    cases,
    kernels_hash,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "efficient_vdit_core/bench/results/compiled.json"
TIMEOUT = 600

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked"),
    pytest.mark.skipif(find_spec("triton") is None, reason="SKIPPED THE COMPILE GATE: the package triton is missing"),
]


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def test_every_kernel_compiles_without_spills_where_it_is_used():
    from importlib.metadata import version

    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert all(row["passed"] for row in kept["rows"])
    assert max(config["spill"] for row in kept["rows"] for config in row["configs"]) <= MAX_SPILL
    found = {Case(row["architecture"], row["kernel"], row["head_dim"]) for row in kept["rows"]}
    assert found == set(cases(tuple(ARCHITECTURES), HEAD_DIMS))
    of_now = kept["machine"]["versions"]["triton"] == version("triton")
    if not of_now or any(row["kernels"] != kernels_hash() for row in kept["rows"]):
        done = run("-m", "efficient_vdit_core.cli", "bench", "compile", "--archs", *QUICK)
        assert done.returncode == 0, done.stdout + done.stderr


def test_one_config_with_a_fault_is_one_too_many():
    """The tuning on a card may pick any that is offered."""
    case, good = Case("sm_90", "forward_kernel", 96), Compiled("good")
    assert Outcome(case, [good]).passed
    assert not Outcome(case, [good, Compiled("bad", spill=128, faults=["spills 128 bytes"])]).passed
    assert not Outcome(case, [], "the compiler ended with status -6").passed


def test_a_change_of_a_kernel_or_of_its_launch_is_seen(monkeypatch):
    read, before, hashes = Path.read_bytes, kernels_hash(), set()
    for name in ("arrow_kernels.py", "triton.py", "merge_kernels.py", "merge.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda file, name=name: read(file) + b" " * (file.name == name))
        hashes.add(kernels_hash())
    assert len(hashes - {before}) == 4


BROKEN = """
from efficient_vdit_core.bench import compile_ahead as ahead

ahead._configs = lambda case: [CONFIG]
(outcome,) = ahead.compile_cases([ahead.Case("ARCH", "KERNEL", 96)], 1)
assert not outcome.passed
print(outcome.crash, [c.faults for c in outcome.configs])
"""


@pytest.mark.parametrize(
    ("architecture", "kernel", "config", "fault"),
    [
        ("sm_120", "forward_kernel", {"ROWS": 128, "COLS": 128, "num_warps": 8, "num_stages": 3}, "shared memory"),
        ("sm_90", "key_value_gradient_kernel", {"ROWS": 128, "COLS": 128, "num_warps": 4, "num_stages": 1}, "spills"),
        ("sm_80", "forward_kernel", {"ROWS": 96, "COLS": 64, "num_warps": 4, "num_stages": 1}, "does not compile"),
        # Tiles of 32 rows are too few for Hopper's instruction, and Triton falls to an older one.
        ("sm_90", "forward_kernel", {"ROWS": 32, "COLS": 32, "num_warps": 4, "num_stages": 2}, "no matrix instruction"),
    ],
)
def test_the_gate_sees_what_could_not_run_well(architecture, kernel, config, fault):
    code = BROKEN.replace("CONFIG", repr({"MASKED": False, **config})).replace("ARCH", architecture)
    done = run("-c", code.replace("KERNEL", kernel))
    assert done.returncode == 0 and fault in done.stdout, done.stdout + done.stderr
