"""Pools that ComfyUI finds running: `evdit workers` on this machine, and torchrun on what stands for two machines."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from efficient_vdit_core.commands.workers import run
from efficient_vdit_core.parallel.pool.messages import listen
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file, read_pool_file
from efficient_vdit_core.parallel.pool.session import Launch, Session, parse_devices

ROOT = Path(__file__).parents[2]
HOST = {"package": str(ROOT / "tests" / "core" / "fault_host"), "module": "host", "name": "Host"}
START = 300.0
X = torch.arange(4.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def start():
    """Starts a command in this environment; all are ended with the test."""
    started = []

    def run(*command, **more):
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        process.lines = []
        threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True).start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def until(found, *processes, seconds=START):
    end = time.monotonic() + seconds
    while not found():
        assert all(p.poll() is None for p in processes) and time.monotonic() < end, [p.lines[-20:] for p in processes]
        time.sleep(0.05)


def launch(devices, **opening):
    return Launch(devices, json.dumps(opening), {"host": HOST, **opening}, START, START)


def use(session, devices, **opening):
    """One step; the ranks' process ids."""
    ranks, tensors = session.step(launch(devices, **opening), {}, {"x": X})
    assert torch.equal(tensors["sum"], 2 * X)
    return [said["pid"] for said in ranks]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def refuses_a_second():
    with pytest.raises(ValueError, match="A pool of workers runs already"):
        run(argparse.Namespace(devices="cpu", start_timeout=START))
    assert default_pool_file().exists()


def torchrun(start, nodes=2):
    """``nodes`` torchruns of one rank each, as the help page says it; they meet on loopback."""
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
    boot = str(ROOT / "efficient_vdit_core" / "parallel" / "boot.py")
    about = ["--nnodes", str(nodes), "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    every = [
        start(
            "torch.distributed.run",
            *about,
            "--node-rank",
            str(n),
            boot,
            EVDIT_LISTEN="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
        )
        for n in range(nodes)
    ]
    until(lambda: read_pool_file(default_pool_file()), *every)
    return every


def test_evdit_workers_is_found_and_mends_its_pool(start):
    command = start("efficient_vdit_core.cli", "workers", "--devices", "cpu,cpu")
    until(lambda: read_pool_file(default_pool_file()), command)
    first = Session()
    assert parse_devices("auto") == ("cpu", "cpu")
    before = use(first, ("cpu", "cpu"))
    assert first.workers is None  # found, not started
    first.stop()
    again = Session()
    refuses_a_second()
    assert use(again, ("cpu", "cpu")) == before  # one ComfyUI after another
    refuses_a_second()  # in use as well
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 ended without a word"):
        use(again, ("cpu", "cpu"))
    until(lambda: "".join(command.lines).count("workers are ready") == 2, command)
    assert "rank 1 ended (killed by SIGKILL)" in "".join(command.lines)
    after = use(again, ("cpu", "cpu"))
    assert again.workers is None and not set(after) & set(before)
    again.stop()
    command.terminate()
    assert command.wait(20) == 0
    assert not any(alive(pid) for pid in [*before, *after]) and not default_pool_file().exists()


def test_torchrun_on_two_nodes_is_one_pool(start, monkeypatch):
    every = torchrun(start)
    devices = parse_devices("auto")
    assert devices == ("rank 0", "rank 1")
    session = Session()
    ranks = use(session, devices)
    lacking = {str(ROOT / "gone.safetensors"): 5}
    with pytest.raises(
        ValueError, match=r"has no .*gone\.safetensors, expected the same paths on every machine.*rank 0 of 2"
    ):
        session.ready(launch(devices, paths=lacking))
    other = {str(ROOT / "LICENSE"): 5}
    with pytest.raises(ValueError, match=r"LICENSE has \d+ bytes on .*, expected 5"):
        session.ready(launch(devices, paths=other))
    assert (
        use(session, devices, paths={str(ROOT): None, str(ROOT / "LICENSE"): (ROOT / "LICENSE").stat().st_size})
        == ranks
    )
    every[0].kill()  # SIGKILL: torchrun cannot end its rank itself
    until(lambda: not any(alive(pid) for pid in ranks), seconds=5.0)
    with pytest.raises(RuntimeError, match="ended without a word"):
        use(session, devices)
    session.stop()
    stale = default_pool_file().read_text()
    with pytest.raises(RuntimeError, match="spanned machines is gone. Start it again"):
        use(session, devices)
    default_pool_file().write_text(stale)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="--devices means cpu, expected two"
    ):  # not the devices of the pool that is gone
        run(argparse.Namespace(devices="auto", start_timeout=START))
