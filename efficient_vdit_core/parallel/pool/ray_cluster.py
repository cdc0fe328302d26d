"""A connection to Ray with a place for each rank: to the cluster that RAY_ADDRESS names, or to a Ray of this machine's own,
which listens on loopback and asks for a token."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

from ...limits.packages import install
from ...limits.quote import quoted, reason
from .imports import Host
from .open_ports import open_beyond_loopback, processes_of_session
from .private_files import write_private
from .processes import BOOT, Processes
from .secret import new_secret

FIRST_VERSION_WITH_TOKENS = (2, 52)
# The system takes 107 characters for a socket's path, and Ray adds up to 63 to this one.
MOST_OF_A_PATH = 44
_ANSWER_SECONDS = 10.0
# For which Ray waits at the end of this process for one that is gone; by itself it would wait for a minute.
_RECONNECT_SECONDS = "15"
_OWN_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: Ray then listens on loopback only
    "RAY_AUTH_MODE": "token",  # or any user of this machine could run code as this one
}


class Ray:
    """A connection to Ray, with a place for each rank. ``ranks`` GPUs, or all of the cluster's where it is 0; CPU ranks
    where ``on_gpu`` is off. The workers build models with ``host``, and import from the folders ``imports`` only.

    Raises ValueError where Ray is not installed or has no room, RuntimeError and TimeoutError where it does not start.
    """

    def __init__(self, ranks: int, on_gpu: bool, host: Host, imports: Sequence[str], seconds: float) -> None:
        self.on_gpu, self.host, self.imports = on_gpu, host, tuple(imports)
        self.head: Processes | None = None
        self.ray: Any = None
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        version, address = _version(), _running_ray()
        try:
            where = address or self._start_own(version, ranks, seconds)
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _RECONNECT_SECONDS)
            self.ray = _ray()  # Ray reads its variables when it is imported
            self.ray.init(address=where, log_to_driver=False, logging_level="error")
            self.ranks = ranks or int(self.ray.cluster_resources().get("GPU", 0))
            self.group = self._room(seconds)
            self.title = f"{self.ranks} workers are ready on {'GPUs' if on_gpu else 'CPUs'} that Ray chose"
        except BaseException as error:
            self.stop()
            if isinstance(error, ConnectionError):  # what RAY_ADDRESS names is none, or wants another token
                raise ValueError(f"Ray at RAY_ADDRESS, {address!r}, does not let this in: {reason(error)}") from None
            raise

    def _start_own(self, version: str, ranks: int, seconds: float) -> str:
        """Start a Ray on this machine; where it is."""
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < FIRST_VERSION_WITH_TOKENS:
            raise ValueError(
                f"Ray {version} lets any user of this machine run code as you, expected 2.52 or later, which asks for "
                f"a token. {install('ray>=2.52', instead='Name a cluster of yours in RAY_ADDRESS')}"
            )
        self.head = Processes("ray")
        if len(str(self.head.folder)) > MOST_OF_A_PATH:
            raise ValueError(
                f"Ray's sockets cannot lie in the folder for temporary files, {self.head.folder.parent}: its path is too long for "
                "them. Set TMPDIR to a shorter one, such as /tmp."
            )
        token, address_file = self.head.folder / "token", self.head.folder / "address"
        write_private(token, new_secret())
        os.environ.update(_OWN_RAY, RAY_AUTH_TOKEN_PATH=str(token))
        about = {"cpus": 0 if self.on_gpu else ranks, "gpus": None if self.on_gpu else 0}
        about |= {"folder": str(self.head.folder / "r"), "address_file": str(address_file)}
        self.head.start(BOOT.parent / "pool" / "ray_head.py", json.dumps(about).encode() + b"\n", dict(os.environ))
        end = time.monotonic() + seconds
        while not address_file.exists():
            if how := self.head.ended():
                raise RuntimeError(f"Ray ended while it started ({how[0]}):\n{self.head.last_lines(0)}")
            if time.monotonic() > end:
                raise TimeoutError(f"Ray was not ready after {seconds:.0f} s. Raise --start-timeout.")
            time.sleep(0.05)
        every = processes_of_session(self.head.processes[0].pid)
        if ports := [port for process in every for port in open_beyond_loopback(process)]:
            raise RuntimeError(f"Ray {version} listens to the network on {ports}, expected loopback only.")
        return address_file.read_text(encoding="utf-8")

    def _room(self, seconds: float) -> Any:
        """A group with a place for each rank, as near to one another as there is room; rank 0's is on this machine."""
        kind, there = "GPU" if self.on_gpu else "CPU", self.ray.cluster_resources()
        if not 2 <= self.ranks <= there.get(kind, 0):
            raise ValueError(
                f"The pool was to have {self.ranks} ranks, and Ray has {int(there.get(kind, 0))} {kind}s, expected two ranks or more "
                f"and a {kind} for each. Name another number, or give Ray more machines."
            )
        here = self.ray.get_runtime_context().get_node_id()
        mine = next(node["Resources"] for node in self.ray.nodes() if node["NodeID"] == here)
        name = next(name for name in mine if re.match("node:(?!__)", name))
        places = [{kind: 1.0} for _ in range(self.ranks)]
        places[0][name] = 0.001
        group = self.ray.util.placement_group(places, strategy="PACK")
        if not group.wait(seconds):
            raise TimeoutError(
                f"Ray found no place for {self.ranks} ranks in {seconds:.0f} s, the first of them on this machine: its {kind}s are "
                "in use. Wait, or name fewer ranks."
            )
        return group

    def lives(self) -> bool:
        """Whether Ray still answers; where it does not, its own calls wait, and then end this process without a word."""
        host, _, port = self.ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """Leave Ray, and end it where it was started here."""
        if self.ray is not None and self.ray.is_initialized() and self.lives():
            self.ray.shutdown()
        if self.head is not None:
            self.head.stop()


def _version() -> str:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"--engine ray needs Ray, which is not installed here. {install('ray>=2.52', instead='Leave the option out')}"
        ) from None


def _running_ray() -> str:
    """Where RAY_ADDRESS says that Ray runs, or nothing. Raises ValueError where it does not, which Ray would wait for."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):
        return "" if address == "local" else address
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.:\[\]-]+", host) or not port.isdecimal():
        raise ValueError(
            f"RAY_ADDRESS is {quoted(address)}, expected HOST:PORT of a cluster that this machine is one of, for rank 0 and ComfyUI."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"No Ray answers at RAY_ADDRESS, {quoted(address)}: {error}. Start it, or unset the variable."
        ) from None
    return address


def _ray() -> Any:
    for name in ("util.scheduling_strategies", "exceptions"):
        importlib.import_module(f"ray.{name}")
    return importlib.import_module("ray")
