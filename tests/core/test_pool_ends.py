"""When whoever started a pool is gone, however it went, so are its workers within 5 s, whatever they were doing."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pools import ROOT, SAFE_TORCHRUN, SAFE_VARIABLES, children, gone, launch, ranks_of, until

from efficient_vdit_core.parallel.pool.pool_file import default_pool_file, read_pool_file
from efficient_vdit_core.parallel.pool.session import Session

X = torch.arange(4.0)
# A process with a pool of two ranks, as ComfyUI is one: it says who they are, and does what its last argument says.
STARTER = """
import json, os, sys, threading, time
sys.path[:0] = [{root!r}, {helpers!r}]
import torch
from pools import launch
from efficient_vdit_core.parallel.pool.session import Session
session = Session()
def told():
    if session.workers is not None and len(session.workers.processes) == 2 and not said:
        said.append([p.pid for p in session.workers.processes])
        print(json.dumps([*said[0], str(session.workers.folder)]), flush=True)
said = []
if sys.argv[1] == "fork":  # a child that holds all pipes open, as some packs have
    import multiprocessing
    session.ready(launch())
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,)).start()
session.ready(launch(), told)
told()
if sys.argv[1] == "thread":  # the workers stay where only the thread that started them ends
    session.stop()
    said.clear()
    thread = threading.Thread(target=lambda: session.ready(launch(), told))
    thread.start()
    thread.join()
    time.sleep(1)
    print(json.dumps([p.poll() for p in session.workers.processes]), flush=True)
if sys.argv[1] == "hold":
    step = {{"trouble": "hold", "rank": int(sys.argv[2]), "seconds": 60}}
    session.step(launch(), step, {{"x": torch.arange(4.0)}})
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def starter(start, *what):
    """The process, its ranks and their folder."""
    code = STARTER.format(root=str(ROOT), helpers=str(ROOT / "tests" / "helpers"))
    process = start("-c", code, *what)
    until(lambda: any(line.startswith("[") for line in process.lines), process)
    *ranks, folder = json.loads(process.lines[0])
    return process, ranks, Path(folder)


def nothing_left(process, ranks, folder):
    """Kill the starter; whether all that it had is gone in 5 s."""
    watchers = [child for child in children(process.pid) if "watchdog.py" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(watchers) == 1
    process.kill()
    begin = time.monotonic()
    ended = gone([*ranks, *watchers])
    print(f"all gone after {time.monotonic() - begin:.1f} s")
    return ended and not folder.exists()


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.0])
def test_while_they_start(start, seconds):
    """While they import, while they meet."""
    process, ranks, folder = starter(start, "start")
    time.sleep(seconds)
    assert nothing_left(process, ranks, folder)


def test_while_they_are_idle(start):
    process, ranks, folder = starter(start, "idle")
    until(lambda: (folder / "pool.json").exists(), process)
    assert nothing_left(process, ranks, folder)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_while_one_holds_its_interpreter_and_the_other_waits_for_it(start, rank):
    process, ranks, folder = starter(start, "hold", rank)
    until(lambda: "was asked for hold" in (folder / f"rank-{rank}.log").read_text(), process)
    time.sleep(0.5)
    assert nothing_left(process, ranks, folder)


def test_while_they_stand_still(start):
    process, ranks, folder = starter(start, "idle")
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    assert nothing_left(process, ranks, folder)


def test_while_a_child_of_the_starter_holds_its_pipes(start):
    process, ranks, folder = starter(start, "fork")
    until(lambda: (folder / "pool.json").exists(), process)
    assert nothing_left(process, ranks, folder)


def test_the_end_of_a_thread_ends_nothing(start):
    """ComfyUI may run a prompt in a thread of its own."""
    process, _, _ = starter(start, "thread")
    until(lambda: any("None" in line or "null" in line for line in process.lines), process)
    assert "[null, null]\n" in process.lines


def under_torchrun(start):
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES)
    until(lambda: len(ranks_of(command.pid)) == 2, command)
    return command, ranks_of(command.pid)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 2.5])
def test_under_torchrun_while_they_start(start, seconds):
    command, ranks = under_torchrun(start)
    time.sleep(seconds)
    command.kill()
    assert gone(ranks)


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_while_one_holds_its_interpreter(start, rank):
    command, ranks = under_torchrun(start)
    until(lambda: read_pool_file(default_pool_file()), command)
    step = {"trouble": "hold", "rank": rank, "seconds": 60}

    def ask():
        with contextlib.suppress(RuntimeError):
            Session().step(launch(), step, {"x": X})

    threading.Thread(target=ask, daemon=True).start()
    until(lambda: any("was asked for hold" in line for line in command.lines), command)
    time.sleep(0.5)
    command.kill()
    assert gone(ranks)


def test_a_rank_that_is_hung_when_the_pool_is_stopped_goes_with_what_it_started(tmp_path, monkeypatch):
    """Where Python is a launcher, the process that hangs is a child of the one that was started."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    session = Session()
    ranks = [said["pid"] for said in session.step(launch(), {}, {"x": X})[0]]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    session.stop()
    assert gone(ranks)
