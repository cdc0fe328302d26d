"""A pool whose ranks Ray places: on the cluster that RAY_ADDRESS names, or on a Ray of this machine's own.

Rank 0 stays on this machine, where ComfyUI finds it. Ray carries settings and how a rank ended; the secret, the requests
and what ranks exchange go past it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ... import __version__
from ...limits.quote import quoted, reason
from .imports import Host
from .listening import open_beyond_loopback, processes_of_session
from .pool_file import default_pool_file, read_pool_file, remove_pool_file
from .private import write_private
from .processes import BOOT, Processes
from .secret import new_secret, shared_secret
from .settings import LOOPBACK, Settings

FIRST_VERSION_WITH_TOKENS = (2, 52)
# The system takes 107 characters for a socket's path, and Ray adds up to 63 to this one.
MOST_OF_A_PATH = 44
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 5.0
# What the one who starts a pool says to its ranks by the environment; on other machines Ray's own would be there.
_VARIABLES = ("EVDIT_", "GLOO_", "NCCL_")
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
                "a token. Run `pip install --upgrade ray`, or name a cluster of yours in RAY_ADDRESS."
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
                f"The pool was to have {self.ranks} ranks, expected from 2 to {int(there.get(kind, 0))}, which is how many {kind}s "
                "Ray has. Name another number, or give Ray more machines."
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

    def start(self, seconds: float) -> RayWorkers:
        """A pool of workers that are ready. Raises ValueError for what a machine lacks, RuntimeError naming the rank that
        ended, TimeoutError if none did."""
        workers = RayWorkers(self)
        try:
            workers.start()
            workers.wait(seconds)
        except BaseException:
            workers.stop(gently=False)
            raise
        return workers

    def stop(self) -> None:
        """Leave Ray, and end it where it was started here."""
        if self.ray is not None:
            self.ray.shutdown()
        if self.head is not None:
            self.head.stop()


class RayWorkers:
    """The ranks of one pool, as Workers are those of a local one."""

    def __init__(self, engine: Ray) -> None:
        self.engine, self.ray, self.pool = engine, engine.ray, secrets.token_hex(8)
        self.folder: Processes | None = None
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        kind = {"num_gpus": 1, "num_cpus": 0} if engine.on_gpu else {"num_cpus": 1}
        actor = self.ray.remote(_beside_rank())
        self.actors = [
            actor.options(**kind, scheduling_strategy=strategy(engine.group, bundle)).remote()
            for bundle in range(engine.ranks)
        ]

    def start(self) -> None:
        """Start the worker of each rank."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        about = self._ask([actor.load.remote(str(BOOT), variables) for actor in self.actors])
        if other := sorted({f"{a['machine']} has {a['version']}" for a in about if a["version"] != __version__}):
            raise ValueError(
                f"This is version {__version__} of Efficient-vDiT, {', '.join(other)}. Install the same on every machine."
            )
        shared_secret(make=True)
        meet = self._meet(Counter(a["machine"] for a in about), len({a["node"] for a in about}))
        beside = Counter(a["node"] for a in about)
        started = []
        for rank, actor in enumerate(self.actors):
            settings = Settings(
                rank=rank,
                ranks=len(self.actors),
                device="cuda:0" if self.engine.on_gpu else "cpu",  # Ray shows a rank its own GPU alone
                backend="nccl" if self.engine.on_gpu else "gloo",
                secret="",
                host=self.engine.host,
                imports=self.engine.imports,
                address_file="",
                pool=self.pool,
                **meet,
            )
            told = {name: value for name, value in asdict(settings).items() if name not in _KNOWN_THERE}
            started.append(actor.call.remote("start", told, beside[about[rank]["node"]]))
        self._ask(started)

    def _meet(self, machines: Counter[str], nodes: int) -> dict[str, Any]:
        """Where the ranks meet: in a folder of this machine's, or in rank 0's store."""
        if nodes == 1:
            self.folder = Processes(self.pool, default_pool_file())
            return {"folder": str(self.folder.folder), "meeting": str(self.folder.folder / "meeting.json")}
        listen = os.environ.get("EVDIT_LISTEN", LOOPBACK)
        if "EVDIT_LISTEN" not in os.environ:
            raise ValueError(
                f"Ray has placed the ranks on {', '.join(machines)}, expected EVDIT_LISTEN: the address by which the others reach "
                "this machine. Set it, or name no more ranks than this machine has room for."
            )
        with socket.create_server((listen, 0)) as free:
            port = free.getsockname()[1]
        return {"store": f"{listen}:{port}", "listen": listen}

    def wait(self, seconds: float) -> None:
        """Returns once all ranks have met. Raises RuntimeError naming the rank that ended, TimeoutError if none did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            address = read_pool_file(default_pool_file())
            if address is not None and address.pool == self.pool:
                return
            for rank, how in self.ended().items():
                raise RuntimeError(f"Rank {rank} ended while it started ({how}):\n{self.last_lines(rank)}")
            time.sleep(0.2)
        raise TimeoutError(f"The workers were not ready after {seconds:.0f} s. Raise --start-timeout.")

    def ended(self) -> dict[int, str]:
        """The ranks that have ended, and how."""
        answers, found = [actor.call.remote("ended") for actor in self.actors], {}
        for rank, answer in enumerate(answers):
            try:
                found[rank] = self.ray.get(answer, timeout=_ANSWER_SECONDS)
            except self.ray.exceptions.GetTimeoutError:
                pass  # a busy machine
            except self.ray.exceptions.RayError:
                found[rank] = "Ray's process beside it is gone"
        return {rank: how for rank, how in found.items() if how}

    def last_lines(self, rank: int) -> str:
        """The end of a rank's log, or nothing where it cannot be had."""
        try:
            return self.ray.get(self.actors[rank].call.remote("last_lines"), timeout=_ANSWER_SECONDS)
        except self.ray.exceptions.RayError:
            return ""

    def stop(self, *, gently: bool = True) -> None:
        """End all ranks, ``gently`` at first; their places stay."""
        ends = [actor.call.remote("stop", gently) for actor in self.actors]
        self.ray.wait(ends, num_returns=len(ends), timeout=_STOP_SECONDS)
        for actor in self.actors:
            self.ray.kill(actor)
        if self.folder is not None:
            self.folder.stop()
        remove_pool_file(default_pool_file(), self.pool)

    def _ask(self, answers: list[Any]) -> list[Any]:
        try:
            return self.ray.get(answers, timeout=_ANSWER_SECONDS * len(answers))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray could not start the ranks: {str(error).splitlines()[0]}") from None


# Each machine has its own.
_KNOWN_THERE = ("secret", "address_file", "log", "piped")


def _beside_rank() -> type:
    """The class that Ray runs beside each rank. It is sent as it stands here, because the pack is no package that Ray's
    workers could import: it goes in by path, as everywhere."""

    class BesideRank:
        def load(self, boot: str, variables: dict[str, str]) -> dict[str, str]:
            import importlib.util
            import os
            import platform

            import ray

            if not os.path.isfile(boot):
                raise ValueError(
                    f"{platform.node()} has no {boot}, expected the pack at the same path on every machine of the pool. Copy or "
                    "mount it there."
                )
            os.environ.update(variables)
            spec = importlib.util.spec_from_file_location("evdit_boot", boot)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            try:
                self.rank = module.core("parallel.pool.ray_rank").RayRank()
            except ImportError as error:
                raise ValueError(
                    f"On {platform.node()} the worker cannot be loaded: {error}. Start Ray there by ComfyUI's Python."
                ) from None
            node = ray.get_runtime_context().get_node_id()
            return {"version": self.rank.version, "machine": platform.node(), "node": node}

        def call(self, name: str, *values: Any) -> Any:
            return getattr(self.rank, name)(*values)

    return BesideRank


def _version() -> str:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "--engine ray needs Ray, which is not installed here. Run `pip install 'ray>=2.52'` in ComfyUI's Python environment, or "
            "leave the option out."
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
