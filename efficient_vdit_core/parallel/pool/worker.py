"""One rank: joins the others, builds the model it is told to, and computes its share of each step until told to end.

The main thread computes; a second one listens, so that the rank can tell where it is and end while the first is busy.
"""

from __future__ import annotations

import datetime
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...attention.gpu import is_out_of_memory
from ..sharding.communicator import Communicator
from .code_version import CODE_VERSION
from .handshake import WrongSecret, connect
from .hub import Hub, Message
from .logs import print_patiently
from .messages import Connection, ConnectionEnded, Tensors, listen
from .placement import fresh_folder
from .pool_file import PoolAddress, hold_lock, remove_pool_file, write_pool_file
from .preflight import check_paths
from .rendezvous import FileRendezvous, StoreRendezvous, joined_file, shared_store
from .secret import secret_file
from .self_test import self_test
from .settings import Settings
from .slurm import settings_from_slurm, started_by_slurm
from .torchrun import settings_from_torchrun, started_by_torchrun

JOIN_SECONDS = 120.0
# A hang is noticed by ComfyUI's step_timeout, which can name the rank; this is only for ranks nobody asks any more.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
LOST_EXIT = 4
TRACE_LINES = 12


class Worker:
    """A rank that has met the others. ``host`` is what builds and runs the model; it is loaded with the first
    request."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.requests: queue.Queue[tuple[Message, Tensors]] = queue.Queue()
        self.host: Any = None
        self.hub: Hub | None = None
        self.pool, self.folder = settings.pool, settings.folder
        self.main_thread = threading.get_ident()
        shared = None if settings.rendezvous else shared_store(settings)
        rendezvous = (
            StoreRendezvous(dist.PrefixStore("evdit", shared)) if shared else FileRendezvous(Path(settings.rendezvous))
        )
        if settings.rank == 0:
            port = self._open_hub(rendezvous)
        else:
            self._enter_hub(rendezvous)
        if settings.folder:
            joined_file(settings.folder, settings.rank).touch()
        dist.init_process_group(
            settings.backend,
            store=shared or dist.FileStore(str(Path(self.folder) / "store"), settings.ranks),
            rank=settings.rank,
            world_size=settings.ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )
        self.comm = Communicator(beside=dist.new_group(timeout=COLLECTIVE_TIMEOUT), timeout=COLLECTIVE_TIMEOUT)
        if settings.rank == 0:
            address = PoolAddress(settings.listen, port, settings.secret, settings.ranks, settings.devices, self.pool)
            write_pool_file(Path(settings.address_file), address)
            self._say_ready()

    def serve(self) -> None:
        """Answer requests for ever."""
        while True:
            message, tensors = self.requests.get()
            answer, result = self._run(message, tensors)
            if self.hub is not None:
                self.hub.answer(0, answer, result)
            else:
                self.connection.send(answer)

    def _say_ready(self) -> None:
        """Rank 0, where no starter says it."""
        if not self.settings.piped:
            found_by = self.settings.address_file
            print(f"{self.settings.ranks} workers are ready; ComfyUI finds them by {found_by}.", flush=True)  # noqa: T201

    def _open_hub(self, rendezvous: Any) -> int:
        """Rank 0: listen, say where, and wait for the others; returns its port."""
        s = self.settings
        self.lock = hold_lock(Path(s.address_file))
        Path(s.address_file).unlink(missing_ok=True)  # that of a pool that was killed
        if s.rendezvous and not s.folder:
            self.folder = fresh_folder()
        listener = listen(s.listen)
        port = listener.getsockname()[1]
        put = self.requests.put
        self.hub = Hub(
            listener,
            s.secret,
            s.ranks,
            lambda message, tensors: put((message, tensors)),
            self.where,
            host=s.host.name,
            about_pool={"pool": self.pool, "folder": self.folder},
            clean_up=self._clean_up,
        )
        hub = self.hub
        threading.Thread(target=_end_when_asked, args=(_hear_signals(), hub.end_when_asked), daemon=True).start()
        rendezvous.announce((s.listen, port))
        self.hub.wait_for_ranks(JOIN_SECONDS)
        return port

    def _enter_hub(self, rendezvous: Any) -> None:
        """Any other rank: find rank 0, and listen to it from then on."""
        end, reason = time.monotonic() + JOIN_SECONDS, "it has not said where it is"
        while time.monotonic() < end:
            try:
                if address := rendezvous.find():
                    self.connection = connect(address[0], address[1], self.settings.secret)
                    break
            except ConnectionError as error:
                if isinstance(error, WrongSecret) and not self.settings.rendezvous:
                    raise ValueError(
                        f"Rank 0 has another secret than this machine. Copy {secret_file()} from its machine to this one, "
                        "with its mode 0600, and start the pool anew."
                    ) from None
                reason = str(error)  # a file that an earlier pool has left; this one's comes
            time.sleep(0.1)
        else:
            address = (
                "" if self.settings.rendezvous else ", and see whether this machine reaches the EVDIT_LISTEN there"
            )
            raise TimeoutError(
                f"Rank {self.settings.rank} did not reach rank 0 in {JOIN_SECONDS:.0f} s: {reason}. Look at rank 0's log{address}."
            )
        self.connection.send({"role": "rank", "rank": self.settings.rank, "version": CODE_VERSION})
        about, _ = self.connection.receive()
        self.pool, self.folder = about["pool"], about["folder"]
        if not self.settings.piped:  # torchrun ends a rank the moment that another one fails, rank 0 included
            threading.Thread(target=_end_when_asked, args=(_hear_signals(), self._leave), daemon=True).start()
        threading.Thread(target=self._listen, args=(self.connection,), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        try:
            while True:
                message, tensors = connection.receive()
                if message["do"] == "where":
                    connection.send({"where": self.where()})
                else:
                    self.requests.put((message, tensors))
        except ConnectionEnded:
            self._leave()

    def _leave(self) -> None:
        """End this rank, and remove what rank 0 cannot, which may have been killed."""
        try:
            self._clean_up()
        finally:
            os._exit(LOST_EXIT)

    def _clean_up(self) -> None:
        """Remove what the pool has left on this machine; a starter removes its folder itself."""
        remove_pool_file(Path(self.settings.address_file), self.pool)
        if self.settings.rendezvous and not self.settings.piped:
            Path(self.settings.rendezvous).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def where(self) -> str:
        """What the main thread is doing: the end of its stack."""
        frame = sys._current_frames().get(self.main_thread)
        return "".join(traceback.format_stack(frame, limit=None)[-3:]) if frame else ""

    def _run(self, message: Message, tensors: Tensors) -> tuple[Message, Tensors]:
        try:
            with torch.inference_mode():
                return self._do(message, tensors)
        except BaseException as error:  # whatever it is, the user must see it and the others must not wait
            lines = "".join(traceback.format_exception(error)).strip().splitlines()
            print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201 - this is the rank's log
            mistake = isinstance(error, ValueError)
            return {
                "error": self._describe(error),
                "mistake": mistake,
                "traceback": "\n".join(lines[-TRACE_LINES:]),
            }, {}

    def _do(self, message: Message, tensors: Tensors) -> tuple[Message, Tensors]:
        if message["do"] == "self-test":
            return self_test(self.comm, torch.device(self.settings.device)), {}
        if message["do"] == "open":
            check_paths(message.get("paths", {}))
            if self.host is None:
                self.host = self.settings.host.load()(self.settings, self.comm)
            return self.host.open(message), {}
        if message["do"] == "offload":
            if self.host is not None:
                self.host.offload()
            return {}, {}
        if self.host is None:
            raise ValueError(
                "The workers were asked for a step before they were told which model. Queue the prompt again."
            )
        if message["do"] == "step":
            return self.host.step(message, tensors)
        raise ValueError(f"The workers were asked to {message['do']!r}, which they do not know. Start them anew.")

    def _describe(self, error: BaseException) -> str:
        text = str(error).strip() or type(error).__name__
        if not is_out_of_memory(error):
            return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        size = ""
        if self.settings.device.startswith("cuda"):
            properties = torch.cuda.get_device_properties(self.settings.device)
            size = f" ({properties.name}, {properties.total_memory / 2**20:.0f} MiB)"
        return f"out of memory on {self.settings.device}{size}: {text.splitlines()[0]}"


def _end_with_starter() -> None:
    # Not by sys.stdin, whose lock would be held where this process ends by an error, which Python takes for one of its own.
    while os.read(0, 1):
        pass
    # The starter's watcher does this too, whatever this interpreter is doing, and cleans up.
    os._exit(0)


def _end_with_torchrun(parent: int) -> None:
    # On Linux the system does this, from boot.py on.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(LOST_EXIT)


def _signals_to_end() -> list[signal.Signals]:
    """Those that torchrun passes on to its ranks when it is asked to end."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


def _end_when_asked(signals: socket.socket, end: Callable[[], None]) -> None:
    while signals.recv(1)[0] not in _signals_to_end():
        pass
    end()


def _hear_signals() -> socket.socket:
    """Where a signal's number arrives with the signal; a handler of Python's alone would wait for a step to end."""
    here, there = socket.socketpair()
    there.setblocking(False)
    signal.set_wakeup_fd(there.detach())
    for number in _signals_to_end():
        signal.signal(number, lambda *_: None)
    return here


def _keep_to_loopback() -> None:
    """Ranks of one machine talk over the loopback interface alone."""
    name = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def _settings() -> Settings:
    if started_by_slurm():
        return settings_from_slurm()
    return settings_from_torchrun() if started_by_torchrun() else Settings.read(sys.stdin.buffer)


def main() -> None:
    """Run as a rank until told to end."""
    print_patiently()
    settings = _settings()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends a step that computes, too
    if settings.piped:
        threading.Thread(target=_end_with_starter, daemon=True).start()
    elif sys.platform != "linux":  # SLURM, which is there on Linux alone, ends what it has started
        threading.Thread(target=_end_with_torchrun, args=(os.getppid(),), daemon=True).start()
    if settings.rendezvous:
        _keep_to_loopback()
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(settings.device))
    Worker(settings).serve()
