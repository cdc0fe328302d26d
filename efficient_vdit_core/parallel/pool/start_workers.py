"""Starts and ends worker processes on this machine: the only file that does.

A worker is started with no argument but the script's path; what it is, and the secret, it reads from its standard
input,
which stays open: when the starter goes, however it goes, that pipe ends, and so does the worker.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .messages import new_secret
from .pool_file import PoolAddress, read_pool_file, remove_pool_file
from .settings import Settings

LOG_LINES = 8
_STOP_SECONDS = 3.0
_NO_WINDOW = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows alone


class Workers:
    """The processes of a local pool, one for each of ``devices`` ("cpu" or "cuda:N"), and the folder of their logs."""

    def __init__(
        self, devices: Sequence[str], backend: str, *, address_file: Path | None = None, peer_to_peer: bool = True
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="evdit-workers-"))
        self.address_file = address_file or self.folder / "pool.json"
        self.logs = tuple(str(self.folder / f"rank-{rank}.log") for rank in range(len(devices)))
        self.secret = new_secret()
        self.processes: list[subprocess.Popen[bytes]] = []
        atexit.register(self.stop)
        environment = _environment(len(devices), peer_to_peer)
        try:
            for rank in range(len(devices)):
                self._start(rank, tuple(devices), backend, environment)
        except OSError:
            self.stop()
            raise

    def _start(self, rank: int, devices: tuple[str, ...], backend: str, environment: dict[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).parents[1] / "boot.py")]
        settings = Settings(rank, len(devices), devices[rank], backend, str(self.folder / "store"), self.secret, str(self.address_file),
                            log=self.logs[rank], devices=devices)  # fmt: skip
        with open(self.logs[rank], "wb") as log:
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                creationflags=_NO_WINDOW,
            )
        self.processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; ``wait`` says how
            settings.write(process.stdin)

    def wait(self, seconds: float, poll: Callable[[], None] | None = None) -> PoolAddress:
        """The pool's address once all ranks have met. Raises RuntimeError naming the rank that ended, TimeoutError if
        none did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            address = read_pool_file(self.address_file)
            if address is not None and address.secret == self.secret:
                return address
            for rank, process in enumerate(self.processes):
                if process.poll() is not None:
                    words = self.last_lines(rank)
                    self.stop()
                    raise RuntimeError(
                        f"Rank {rank} ended while it started ({exit_words(process.returncode)}):\n{words}"
                    )
            if poll is not None:
                poll()
            time.sleep(0.05)
        self.stop()
        raise TimeoutError(
            f"The workers were not ready after {seconds:.0f} s. Raise start_timeout, or see what keeps the machine busy."
        )

    def last_lines(self, rank: int) -> str:
        """The end of a rank's log, or nothing where it cannot be read."""
        try:
            return "\n".join(
                Path(self.logs[rank]).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
            )
        except OSError:
            return ""

    def ended(self) -> dict[int, str]:
        """The ranks whose process has ended, and how."""
        return {rank: exit_words(p.returncode) for rank, p in enumerate(self.processes) if p.poll() is not None}

    def stop(self) -> None:
        """End all processes, gently first, and remove the logs."""
        for process in self.processes:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        end = time.monotonic() + _STOP_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.05, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        remove_pool_file(self.address_file, self.secret)
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)


def exit_words(status: int) -> str:
    """An exit status in words: a signal's name, or the number."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _environment(ranks: int, peer_to_peer: bool) -> dict[str, str]:
    environment = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    # ComfyUI asks for an allocator whose memory cannot be shared between processes.
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    # Ranks of one machine talk over the loopback interface alone.
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = loopback
    environment["USE_LIBUV"] = "0"  # the official Windows builds lack it
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not peer_to_peer:
        environment["NCCL_P2P_DISABLE"] = "1"
    return environment
