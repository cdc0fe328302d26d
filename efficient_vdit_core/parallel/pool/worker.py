"""One rank: joins the others, builds the model it is told to, and computes its share of each step until told to end.

The main thread computes; a second one listens, so that the rank can tell where it is and end while the first is busy.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.machinery
import importlib.util
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ... import __version__
from ..sharding.wire import Wire
from .hub import Hub, Message
from .messages import Connection, ConnectionEnded, Tensors, connect, listen, new_secret
from .pool_file import PoolAddress, write_pool_file
from .preflight import check_paths
from .self_test import self_test
from .settings import Settings, read_settings

CONTROL = "evdit/control"
JOIN_SECONDS = 120.0
# A hang is noticed by ComfyUI's step_timeout, which can name the rank; this is only for ranks nobody asks any more.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
LOST_EXIT = 4
TRACE_LINES = 12


class Worker:
    """``host`` is what builds and runs the model; it comes with the first request, by path, from ComfyUI's own pack."""

    def __init__(self, settings: Settings, wire: Wire, store: Any) -> None:
        self.settings, self.wire = settings, wire
        self.requests: queue.Queue[tuple[Message, Tensors]] = queue.Queue()
        self.host: Any = None
        self.hub: Hub | None = None
        self.main_thread = threading.get_ident()
        if settings.rank == 0:
            self._open_hub(store)
        else:
            control = json.loads(store.get(CONTROL))
            self.connection = connect(control["host"], control["port"], control["secret"], timeout=JOIN_SECONDS)
            self.connection.send({"role": "rank", "rank": settings.rank, "version": __version__})
            threading.Thread(target=self._listen, args=(self.connection,), daemon=True).start()

    def serve(self) -> None:
        """Answer requests for ever."""
        while True:
            message, tensors = self.requests.get()
            answer, result = self._run(message, tensors)
            if self.hub is not None:
                self.hub.answer(0, answer, result)
            else:
                self.connection.send(answer)

    def _open_hub(self, store: Any) -> None:
        s = self.settings
        listener, secret = listen(s.listen), s.secret or new_secret()
        port = listener.getsockname()[1]
        put = self.requests.put
        self.hub = Hub(
            listener, secret, s.ranks, lambda message, tensors: put((message, tensors)), self.where, s.address_file
        )
        store.set(CONTROL, json.dumps({"host": s.listen, "port": port, "secret": secret}))
        self.hub.wait_for_ranks(JOIN_SECONDS)
        if s.address_file:
            write_pool_file(Path(s.address_file), PoolAddress(s.listen, port, secret, s.ranks, s.devices))

    def _listen(self, connection: Connection) -> None:
        try:
            while True:
                message, tensors = connection.receive()
                if message["do"] == "where":
                    connection.send({"where": self.where()})
                else:
                    self.requests.put((message, tensors))
        except ConnectionEnded:
            os._exit(LOST_EXIT)

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
            return self_test(self.wire, torch.device(self.settings.device)), {}
        if message["do"] == "open":
            check_paths(message.get("paths", {}))
            if self.host is None:
                self.host = load_host(message["host"])(self.settings, self.wire)
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
        if not isinstance(error, torch.OutOfMemoryError):
            return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        size = ""
        if self.settings.device.startswith("cuda"):
            properties = torch.cuda.get_device_properties(self.settings.device)
            size = f" ({properties.name}, {properties.total_memory / 2**20:.0f} MiB)"
        return f"out of memory on {self.settings.device}{size}: {text.splitlines()[0]}"


def load_host(where: dict[str, str]) -> Any:
    """The class ``where["name"]`` of the module ``where["module"]``, a path below the folder ``where["package"]`` with
    dots.

    No folder means this package. Else the packages above the module are entered without running them: those of a node
    pack would import ComfyUI, which is not there before the host has set it up.
    """
    if not where["package"]:
        return getattr(importlib.import_module(f"...{where['module']}", __package__), where["name"])
    folder, package = Path(where["package"]), "evdit_host"
    for part in ["", *where["module"].split(".")[:-1]]:
        folder, package = (folder / part, f"{package}.{part}") if part else (folder, package)
        if package not in sys.modules:
            bare = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(package, None, is_package=True))
            bare.__path__ = [str(folder)]
            sys.modules[package] = bare
    module = where["module"].rsplit(".", 1)[-1]
    return getattr(importlib.import_module(f"{package}.{module}"), where["name"])


def _end_with_starter(folder: Path) -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)  # the starter's logs; one that was killed cannot
    os._exit(0)


def _end_with_parent(parent: int) -> None:
    # torchrun ends its ranks when it is asked to end; a killed one cannot.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(LOST_EXIT)


def main() -> None:
    """Run as a rank until told to end."""
    settings = read_settings()
    # Ctrl-C in a terminal reaches the whole group; the starter decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch, about = (
        (_end_with_starter, (Path(settings.store).parent,)) if settings.store else (_end_with_parent, (os.getppid(),))
    )
    threading.Thread(target=watch, args=about, daemon=True).start()
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(settings.device))
    if settings.store:
        store = dist.FileStore(settings.store, settings.ranks)
        dist.init_process_group(
            settings.backend, store=store, rank=settings.rank, world_size=settings.ranks, timeout=COLLECTIVE_TIMEOUT
        )
    else:
        dist.init_process_group(settings.backend, timeout=COLLECTIVE_TIMEOUT)
        store = dist.distributed_c10d._get_default_store()
    Worker(settings, Wire(), dist.PrefixStore("evdit", store)).serve()
