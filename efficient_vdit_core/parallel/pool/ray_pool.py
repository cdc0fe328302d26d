"""A pool whose ranks Ray places. Rank 0 stays on this machine, where ComfyUI finds it.

Ray carries settings and how a rank ended; the secret, the requests and what ranks exchange go past it.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from ...limits.quote import reason
from .backend import backend_for
from .code_version import CODE_VERSION
from .pool_file import default_pool_file, read_pool_file, remove_pool_file
from .processes import BOOT, Processes
from .ray_cluster import Ray
from .secret import shared_secret
from .settings import Settings, address_for_others

_ANSWER_SECONDS, _STOP_SECONDS = 10.0, 5.0
# What the one who starts a pool says to its ranks by the environment; on other machines Ray's own would be there.
_VARIABLES = ("EVDIT_", "GLOO_", "NCCL_")
_LATE = "The workers were not ready in time. Raise --start-timeout, or see what keeps the machines busy."
# Each machine has its own.
_KNOWN_THERE = ("secret", "address_file", "log", "piped")


class RayPools(Ray):
    """Pools on a Ray, one after another."""

    def start(self, seconds: float) -> RayWorkers:
        """A pool of workers that are ready. Raises ValueError for what a machine lacks, RuntimeError naming the rank that
        ended, TimeoutError if none did."""
        workers = RayWorkers(self)
        try:
            workers.start(time.monotonic() + seconds)
        except BaseException:
            workers.stop(gently=False)
            raise
        return workers


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

    def start(self, end: float) -> None:
        """Start the worker of each rank, and return once they have met, before the time ``end``."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        about = self._ask([actor.load.remote(str(BOOT), variables) for actor in self.actors], end)
        if other := sorted({f"{a['machine']} has {a['version']}" for a in about if a["version"] != CODE_VERSION}):
            raise ValueError(
                f"This is version {CODE_VERSION} of Efficient-vDiT, {', '.join(other)}. Install the same on every machine."
            )
        shared_secret(make=True)
        meet = self._meet(Counter(a["machine"] for a in about), len({a["node"] for a in about}))
        beside = Counter(a["node"] for a in about)
        device = "cuda:0" if self.engine.on_gpu else "cpu"  # Ray shows a rank its own GPU alone
        started = []
        for rank, actor in enumerate(self.actors):
            settings = Settings(
                rank=rank,
                ranks=len(self.actors),
                device=device,
                backend=backend_for(device),
                secret="",
                host=self.engine.host,
                imports=self.engine.imports,
                address_file="",
                pool=self.pool,
                **meet,
            )
            told = {name: value for name, value in asdict(settings).items() if name not in _KNOWN_THERE}
            started.append(actor.call.remote("start", told, beside[about[rank]["node"]]))
        self._ask(started, end)
        self._wait(end)

    def _meet(self, machines: Counter[str], nodes: int) -> dict[str, Any]:
        """Where the ranks meet: in a folder of this machine's, or in rank 0's store."""
        if nodes == 1:
            self.folder = Processes(self.pool, default_pool_file())
            return {"folder": str(self.folder.folder), "rendezvous": str(self.folder.folder / "rendezvous.json")}
        listen = address_for_others(f"Ray has placed the ranks on {', '.join(machines)}")
        with socket.create_server((listen, 0)) as free:
            port = free.getsockname()[1]
        return {"store": f"{listen}:{port}", "listen": listen}

    def _wait(self, end: float) -> None:
        while time.monotonic() < end:
            address = read_pool_file(default_pool_file())
            if address is not None and address.pool == self.pool:
                return
            for rank, how in self.ended().items():
                raise RuntimeError(f"Rank {rank} ended while it started ({how}):\n{self.last_lines(rank)}")
            time.sleep(0.2)
        raise TimeoutError(_LATE)

    def ended(self) -> dict[int, str]:
        """The ranks that have ended, and how. Raises RuntimeError where Ray has."""
        if not self.engine.lives():
            raise RuntimeError("Ray has ended, and the workers with it; its own log says why. Start the command anew.")
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
        if self.engine.lives():
            ends = [actor.call.remote("stop", gently) for actor in self.actors]
            self.ray.wait(ends, num_returns=len(ends), timeout=_STOP_SECONDS)
            for actor in self.actors:
                self.ray.kill(actor)
        if self.folder is not None:
            self.folder.stop()
        remove_pool_file(default_pool_file(), self.pool)

    def _ask(self, answers: list[Any], end: float) -> list[Any]:
        errors = self.ray.exceptions
        try:
            return self.ray.get(answers, timeout=max(0.0, end - time.monotonic()))
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.GetTimeoutError:
            raise TimeoutError(_LATE) from None
        except errors.RayError as error:
            raise RuntimeError(f"Ray could not start the ranks: {reason(error)}") from None


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
