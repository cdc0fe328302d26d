"""Pools for the tests: processes that start them, and what the system says of these processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from efficient_vdit_core.parallel.pool.hub import Hub
from efficient_vdit_core.parallel.pool.imports import Host
from efficient_vdit_core.parallel.pool.session import Launch

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "core" / "fault_host"
HOST = Host(str(FAULTS), "host", "Host")
# As the help page has it.
SAFE_TORCHRUN = ("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file")
SAFE_VARIABLES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# Patience with a busy machine; the faults themselves have their own limits.
START = 300.0
X = torch.arange(4.0)  # what a step is given


def launch(devices=("cpu", "cpu"), **changes):
    given = {"key": "model", "opening": {}, "start_timeout": START, "step_timeout": START, "host": HOST, **changes}
    return Launch(devices, **given)


def hub_of(listener, secret, ranks, run_here):
    """A hub in this process, which a fault does not end."""
    hub = Hub(listener, secret, ranks, run_here, str, host=HOST.name, about_pool={}, clean_up=lambda: None)
    hub.end = lambda status: None
    return hub


def alive(pid: int) -> bool:
    """A zombie is none; but a killed process looks like one while its other threads still end and hold its files."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(every, *left, seconds=5.0) -> bool:
    """Whether all these processes are gone in ``seconds``, and the files and folders ``left`` too."""
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in every) or any(path.exists() for path in left):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def until(found, *processes, seconds=START):
    """Wait for ``found()`` while these processes run."""
    end = time.monotonic() + seconds
    while not found():
        assert all(p.poll() is None for p in processes) and time.monotonic() < end, [p.lines[-20:] for p in processes]
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that run."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            about = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(about[1]) == pid and about[0] != "Z":
            found.append(int(entry))
    return found


def ranks_of(pid: int) -> list[int]:
    """The workers among them."""
    return [child for child in children(pid) if "boot" in Path(f"/proc/{child}/cmdline").read_text()]


def listening(every):
    """The addresses that these processes listen on, from the kernel's tables."""
    inodes = set()
    for pid in every:
        links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        inodes |= {os.readlink(link) for link in links if os.path.islink(link)}
    found = []
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                raw = bytes.fromhex(words[1].split(":")[0])
                parts = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]  # each word in the machine's order
                found.append(socket.inet_ntop(family, b"".join(parts)))
    return found


def family_of(pid):
    return [pid, *(other for child in children(pid) for other in family_of(child))]


def is_loopback(address):
    return address.startswith("127.") or address in ("::1",) or address.startswith("::ffff:127.")


class Started:
    """Starts commands of this Python; ``end`` kills them and all that they have started."""

    def __init__(self):
        self.processes = []

    def __call__(self, *command, **variables):
        return self._start([sys.executable, *command], variables)

    def bash(self, path, **variables):
        """A script, in a process group of its own, as a terminal gives it."""
        return self._start(["bash", str(path)], variables, start_new_session=True)

    def _start(self, command, variables, **options):
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        process.lines = []
        threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True).start()
        self.processes.append(process)
        return process

    def torchrun(self, *options, boot=FAULTS / "fault_boot.py", **variables):
        return self("-m", "torch.distributed.run", *options, str(boot), **variables)

    def end(self):
        for process in self.processes:
            every = family_of(process.pid) if process.args[0] == "bash" else []
            process.kill()
            process.wait()
            for pid in every:  # what only a real srun would end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
