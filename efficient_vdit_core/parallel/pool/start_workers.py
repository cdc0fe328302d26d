"""Starts and ends worker processes on this machine: the only file that does.

A worker is started with no argument but the script's path; what it is, and the secret, it reads from its standard
input. When the starter goes, however it goes, a watcher of its own ends the workers and removes what they left.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .imports import Host
from .pool_file import PoolAddress, read_pool_file, remove_pool_file
from .secret import new_secret
from .settings import Settings

LOG_LINES = 8
_STOP_SECONDS = 3.0
_NO_WINDOW = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows alone
# What a start needs in the folder for temporary files: addresses and the first lines of the logs.
_ROOM_BYTES = 2**16


class Workers:
    """The processes of a local pool, one for each of ``devices`` ("cpu" or "cuda:N"), and the folder of their logs.

    They build models with ``host``, and import from the folders ``imports`` only. Raises OSError where the folder for
    temporary files is full or a process cannot be started.
    """

    def __init__(
        self,
        devices: Sequence[str],
        backend: str,
        host: Host,
        imports: Sequence[str] = (),
        *,
        address_file: Path | None = None,
        peer_to_peer: bool = True,
    ) -> None:
        self.folder = _folder_with_room()
        self.address_file = address_file or self.folder / "pool.json"
        self.logs = tuple(str(self.folder / f"rank-{rank}.log") for rank in range(len(devices)))
        self.secret, self.pool = new_secret(), secrets.token_hex(8)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.watcher: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        environment = _environment(len(devices), peer_to_peer)
        try:
            self.watcher = self._start_watcher()
            for rank in range(len(devices)):
                settings = Settings(rank, len(devices), devices[rank], backend, self.secret, host, tuple(imports), str(self.address_file),
                                    self.pool, str(self.folder), str(self.folder / "meeting.json"), log=self.logs[rank],
                                    devices=tuple(devices), piped=True)  # fmt: skip
                self._start(settings, environment)
        except OSError:
            self.stop()
            raise

    def _start_watcher(self) -> subprocess.Popen[bytes]:
        # Without the variables and packages of this Python, which it does not need.
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watch.py"))]
        watcher = _popen(command, subprocess.DEVNULL)
        about = {"folder": str(self.folder), "address_file": str(self.address_file), "pool": self.pool}
        _tell(watcher, json.dumps(about).encode() + b"\n")
        return watcher

    def _start(self, settings: Settings, environment: dict[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).parents[1] / "boot.py")]
        with open(settings.log, "wb") as log:
            process = _popen(command, log, environment)
        self.processes.append(process)
        assert self.watcher is not None and process.stdin is not None
        _tell(self.watcher, f"{process.pid}\n".encode())
        with contextlib.suppress(BrokenPipeError):  # it has ended already; ``wait`` says how
            settings.write(process.stdin)

    def wait(self, seconds: float, poll: Callable[[], None] | None = None) -> PoolAddress:
        """The pool's address once all ranks have met. Raises RuntimeError naming the rank that ended, TimeoutError if
        none did, OSError where the folder for temporary files has become full."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            address = read_pool_file(self.address_file)
            if address is not None and address.pool == self.pool:
                return address
            for rank, process in enumerate(self.processes):
                if process.poll() is not None:
                    words = self.last_lines(rank)
                    full = not _has_room(self.folder)
                    self.stop()
                    if full:
                        raise OSError(_full(self.folder.parent))
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

    def stop(self, *, gently: bool = True) -> None:
        """End all processes, ``gently`` at first, and remove the logs."""
        for process in self.processes:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        end = time.monotonic() + (_STOP_SECONDS if gently else 0.0)
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
        if self.watcher is not None:  # the workers are gone: their numbers may soon be other processes'
            self.watcher.kill()
            self.watcher.communicate()
        remove_pool_file(self.address_file, self.pool)
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)


def _popen(command: list[str], output: Any, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=environment,
        creationflags=_NO_WINDOW,
        start_new_session=True,  # a group of its own, which can be ended with all that it has started
    )


def _tell(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _folder_with_room() -> Path:
    """A new folder for the workers' files. Raises OSError where the disk is full."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="evdit-workers-"))
    except OSError as error:
        raise OSError(
            f"No folder for temporary files can be written ({error}). Free some space, or set TMPDIR."
        ) from None
    if not _has_room(folder):
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(_full(folder.parent))
    return folder


def _has_room(folder: Path) -> bool:
    """Whether some more can be written there: the free bytes that a system tells need not be this user's."""
    probe = folder / "room"
    try:
        probe.write_bytes(bytes(_ROOM_BYTES))
        return True
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _full(folder: Path) -> str:
    return (
        f"The folder for temporary files, {folder}, is full: the workers cannot start. Free some space there, or set TMPDIR to "
        "another folder before ComfyUI starts."
    )


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
    environment["USE_LIBUV"] = "0"  # the official Windows builds lack it
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not peer_to_peer:
        environment["NCCL_P2P_DISABLE"] = "1"
    return environment
