"""300 malformed inputs from a seed: each is refused by a sentence of ours, or served, within 10 s of work and 2 GiB.

The long form, 10,000 cases, is run by hand: `fuzz.run` says how, and `fuzz_results.json` holds its last result.
"""

import json
import os
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("NO PIPES TO WAIT FOR (Windows): the fuzz test did not run", allow_module_level=True)
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("accelerate")

from fuzz import odd, run  # noqa: E402
from fuzz.worker import judge_message  # noqa: E402

CASES, SEED = 300, 20


def test_no_input_without_a_sentence():
    """A failure names kind and seed; `fuzz.worker.run_case` runs one case in this process."""
    results = run.run_cases(list(run.plan(CASES, SEED)))
    bad = [f"{r['kind']} {r['seed']}: {r['why']}: {r['message'][-400:]}" for r in results if r["outcome"] == "bad"]
    assert not bad, "\n".join(bad)
    assert len(results) == CASES and {r["outcome"] for r in results} == {"fine", "refused"}


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ("raise KeyError('x')", "a traceback: KeyError"),
        ("int('x')", "foreign words: invalid literal"),
        ("raise ValueError('no sentence of the core')", "a bare ValueError"),
        ("while True: pass", "more than 1 s"),
        ("import time; time.sleep(60)", "more than 1 s"),
        ("x = bytearray(2**30); import time; time.sleep(60)", "of memory"),
        ("import os; os.abort()", "the process ended"),
    ],
)
def test_the_harness_sees_every_kind_of_fault(tmp_path, monkeypatch, faults, why):
    """By real faults, in a worker whose one kind of case is this one."""
    (tmp_path / "faulty.py").write_text(
        "from fuzz import cases, worker\n"
        f"def fault(rng, folder):\n    def call():\n        {faults}\n    return call\n"
        "cases.KINDS['fault'] = fault\ncases.warm_up = lambda: None\nworker.main()\n"
    )
    monkeypatch.setattr(run, "SECONDS", 1.0 if "1 s" in why else 30.0)
    monkeypatch.setattr(run, "BYTES", 2**30)
    monkeypatch.setattr(run, "PROGRAM", [str(tmp_path / "faulty.py")])
    worker = run.Worker()
    try:
        first, second = worker.run("fault", 0), worker.run("fault", 1)  # it goes on in a new process
    finally:
        worker.stop()
    assert first["outcome"] == second["outcome"] == "bad" and why in first["why"]


@pytest.mark.parametrize(
    "text", ["", "x" * 401, "\x1b[31m", "'utf-8' codec can't decode byte", "'float' object has no attribute 'clone'"]
)
def test_messages_that_tell_a_user_nothing_are_seen(text):
    assert judge_message(text)
    assert not judge_message("frames must be 4k+1, got 30: use 29 or 33.")


def test_a_case_is_the_same_whenever_it_is_made():
    import random

    made = [
        odd.as_json(random.Random(7), odd.spoil(random.Random(7), {"a": [1, {"b": 2}], "c": "x"})) for _ in range(2)
    ]
    assert made[0] == made[1]


def test_the_long_forms_result_is_that_of_ten_thousand_good_cases():
    report = json.loads((Path(__file__).parent / "fuzz_results.json").read_text(encoding="utf-8"))
    assert report["cases"] >= 10_000 and report["bad"] == [] and report["longest_message"] <= 400
