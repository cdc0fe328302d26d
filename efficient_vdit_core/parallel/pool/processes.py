"""Starts and ends processes on this machine: the only file that does.

A process is started with no argument but its script's path; what it is, and every secret, it reads from its standard
input. When the one that started it goes, however it goes, a watcher of its own ends it and removes what it left.
torchrun's agent leaves its ranks behind where it is killed (tests/core/test_library_faults.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .pool_file import remove_pool_file

BOOT = Path(__file__).parents[1] / "boot.py"
LOG_LINES = 8
_STOP_SECONDS = 3.0
_NO_WINDOW = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows alone
# What a start needs in the folder for temporary files: addresses and the first lines of the logs.
_ROOM_BYTES = 2**16


class Processes:
    """Processes that end with this one, in a new ``folder`` of theirs, which holds their logs; it lies in ``within``, or
    in the folder for temporary files.

    ``address_file`` is where they announce themselves as ``pool``; it goes with them, unless it is another pool's by
    then. Raises OSError where there is no room for the folder.
    """

    def __init__(self, pool: str, address_file: Path | None = None, within: str | None = None) -> None:
        self.folder, self.pool = folder_with_room(within), pool
        self.address_file = address_file or self.folder / "pool.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.watcher: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        try:
            # Without the variables and packages of this Python, which it does not need.
            self.watcher = _popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py"))], subprocess.DEVNULL
            )
            about = {"folder": str(self.folder), "address_file": str(self.address_file), "pool": pool}
            _tell(self.watcher, json.dumps(about).encode() + b"\n")
        except OSError:
            self.stop()
            raise

    def start(self, script: Path, told: bytes, environment: dict[str, str]) -> None:
        """Start one more, which finds ``told`` on its standard input; that stays open for as long as this process
        lives. Raises OSError where it cannot be started."""
        try:
            with open(self.log(len(self.processes)), "wb") as log:
                process = _popen([sys.executable, str(script)], log, environment)
            self.processes.append(process)
            assert self.watcher is not None
            _tell(self.watcher, f"{process.pid}\n".encode())
        except OSError:
            self.stop()
            raise
        with contextlib.suppress(BrokenPipeError):  # it has ended already; ``ended`` says how
            _tell(process, told)

    def log(self, number: int) -> Path:
        """Where the output of process ``number`` goes."""
        return self.folder / f"rank-{number}.log"

    def last_lines(self, number: int) -> str:
        """The end of a process's log, or nothing where it cannot be read."""
        try:
            text = self.log(number).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-LOG_LINES:])

    def ended(self) -> dict[int, str]:
        """The processes that have ended, and how."""
        return {number: exit_words(p.returncode) for number, p in enumerate(self.processes) if p.poll() is not None}

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
        if self.watcher is not None:  # the processes are gone: their numbers may soon be others'
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


def folder_with_room(within: str | None) -> Path:
    """A new folder for the processes' files. Raises OSError where the disk is full."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="evdit-workers-", dir=within))
    except OSError as error:
        raise OSError(
            f"No folder for temporary files can be written ({error}). Free some space, or set TMPDIR."
        ) from None
    if not has_room(folder):
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(full(folder.parent))
    return folder


def has_room(folder: Path) -> bool:
    """Whether some more can be written there: the free bytes that a system tells need not be this user's."""
    probe = folder / "room"
    try:
        probe.write_bytes(bytes(_ROOM_BYTES))
        return True
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def full(folder: Path) -> str:
    """What is said where ``folder`` is full."""
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


def environment_of_ranks(ranks: int, peer_to_peer: bool = True) -> dict[str, str]:
    """The variables of a rank, one of ``ranks`` on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "EVDIT_STORE"):
        environment.pop(name, None)
    # ComfyUI asks for an allocator whose memory cannot be shared between processes.
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    environment["USE_LIBUV"] = "0"  # the official Windows builds lack it
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not peer_to_peer:
        environment["NCCL_P2P_DISABLE"] = "1"
    return environment
