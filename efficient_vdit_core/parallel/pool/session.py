"""One pool as ComfyUI uses it from prompt to prompt: found or started, tested, given its model, started anew after a
fault."""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .backend import backend_for
from .client import Answers, Message, Poll, Pool
from .faults import PoolFault
from .imports import COMFYUI_HOST, Host
from .messages import Tensors
from .pool_file import PoolAddress, default_pool_file, is_held, read_pool_file, remove_pool_file

log = logging.getLogger("efficient_vdit")

# The first exchange on a GPU also makes its context and NCCL's connections.
SELF_TEST_SECONDS = 30.0
# Models that the workers hold at once; a workflow rarely has more than a high-noise and a low-noise one.
MODELS_KEPT = 4
# What is tried in turn where GPUs cannot talk: direct copies between GPUs are broken on some machines.
_GPU_ATTEMPTS = (("nccl", True), ("nccl", False), ("gloo", True))


@dataclass(frozen=True)
class Launch:
    """What a node asks for. ``opening`` describes the model to the workers; ``key`` names it; times are in seconds.

    Workers that are started for it build models with ``host``, and import from the folders ``imports`` only.
    """

    devices: tuple[str, ...]
    key: str
    opening: Message = field(repr=False)
    start_timeout: float = 120.0
    step_timeout: float = 600.0
    host: Host = COMFYUI_HOST
    imports: tuple[str, ...] = ()


class Session:
    """Safe for several threads; one request at a time. ``failures`` counts how often no pool with the model could be
    had."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pool: Pool | None = None
        self.workers: Any = None
        self.devices: tuple[str, ...] = ()
        self.opened: list[str] = []  # the models that the workers hold, the one used last at the end
        self.tests: list[Message] = []
        self.failures = 0

    def ready(self, launch: Launch, poll: Poll | None = None) -> Pool:
        """A pool on the launch's devices with the launch's model built. Raises ValueError, RuntimeError or TimeoutError
        saying why not."""
        with self.lock:
            if self.pool is None or not self.pool.usable or self.devices != launch.devices:
                self._say_other_devices(launch)
                self.stop()
                try:
                    self._find_or_start(launch, poll)
                except BaseException:  # Cancel too: nobody would end what has been started
                    self.stop()
                    raise
            assert self.pool is not None
            if launch.key not in self.opened:
                self._open(launch, poll)
            self.opened.remove(launch.key)
            self.opened.append(launch.key)
            return self.pool

    def _say_other_devices(self, launch: Launch) -> None:
        if self.workers is not None and self.devices != launch.devices:
            log.warning(
                "Efficient-vDiT: the workers on %s end and others start on %s, which reads the model from disk again: there is one pool "
                "at a time. Name the same devices in every Sequence Parallel node of a workflow.",
                ", ".join(self.devices),
                ", ".join(launch.devices),
            )

    def forget_if_gone(self) -> None:
        """Leave a pool that ended while nothing was asked of it: no work was lost, and the next request finds or starts
        another. Not between the steps of a run, whose user must hear which rank ended."""
        with self.lock:
            if self.pool is not None and self.pool.usable and (why := self.pool.gone()):
                log.warning("Efficient-vDiT: the workers have ended since the last run and are sought anew: %s", why)
                self.stop(gently=False)

    def _open(self, launch: Launch, poll: Poll | None) -> None:
        """Have the workers build the launch's model, and let go of the one that was not used for longest."""
        # Before they are asked: those that succeed let go of it, also where another one then fails.
        self.opened = self.opened[-MODELS_KEPT + 1 :]
        about = {"do": "open", "key": launch.key, "keep": [*self.opened, launch.key], **launch.opening}
        built, _ = self._ask(about, None, launch.start_timeout, poll)
        if len({said.get("plan") for said in built}) > 1:
            raise ValueError(
                "The workers' models have different plans, expected the same in each: a search before this node found something "
                "else in each of them. Save the plan of one search, and load it."
            )
        if len(dtypes := {str(said.get("dtype")) for said in built}) > 1:
            raise ValueError(
                f"The workers' devices compute this model in {' and '.join(sorted(dtypes))}, expected one precision: what they "
                "exchange would not fit. Choose one in the model loader (weight_dtype), or name devices of one generation."
            )
        # Other folders of models than before have them let go of all.
        held = set.intersection(*(set(said["held"]) for said in built))
        self.opened = [key for key in self.opened if key in held] + [launch.key]

    def step(self, launch: Launch, message: Message, tensors: Tensors, poll: Poll | None = None) -> Answers:
        """One forward pass on the pool: every rank's answer, and rank 0's tensors."""
        with self.lock:
            self.ready(launch, poll)
            return self._ask({**message, "do": "step", "key": launch.key}, tensors, launch.step_timeout, poll)

    def offload(self, timeout: float = 60.0) -> bool:
        """Have the workers free their devices; the models stay in main memory. Returns whether they have: behind a step
        that was cancelled they do it later, for a run's end must not wait for that."""
        with self.lock:
            if self.pool is None or not self.pool.usable or not self.opened:
                return False
            ranks, _ = self._ask({"do": "offload"}, None, timeout, None, wait=False)
            return bool(ranks)

    def stop(self, *, gently: bool = True) -> None:
        """End workers that were started here, ``gently`` where they still listen; leave a pool that others started."""
        with self.lock:
            if self.pool is not None:
                self.pool.close()
            if self.workers is not None:
                self.workers.stop(gently=gently)
            self.pool, self.workers, self.opened, self.tests = None, None, [], []

    def _ask(
        self, message: Message, tensors: Tensors | None, timeout: float, poll: Poll | None, *, wait: bool = True
    ) -> Answers:
        assert self.pool is not None
        try:
            return self.pool.ask(message, tensors, timeout=timeout, poll=poll, wait=wait)
        except PoolFault as fault:
            text = self._with_last_lines(fault)
            self.stop(gently=False)
            raise PoolFault(text, fault.lost, runs_on=fault.runs_on) from None

    def _with_last_lines(self, fault: PoolFault) -> str:
        """The fault, with how the lost ranks' processes ended and the end of their logs, where these are on this
        machine."""
        lines = [str(fault)]
        if self.workers is not None and fault.lost:
            end = time.monotonic() + 1.0
            while not set(fault.lost) & set(self.workers.ended()) and time.monotonic() < end:
                time.sleep(0.02)
            for rank in fault.lost:
                how = self.workers.ended().get(rank, "still running")
                lines.append(f"rank {rank}: {how}; its last lines:\n{self.workers.last_lines(rank)}")
        if fault.runs_on and self.workers is None:
            lines.append("They were left running: wait until they are less busy, or end them where they were started.")
        elif self.workers is None:
            lines.append("`evdit workers` starts them anew by itself; under torchrun start them again.")
        else:
            lines.append("The workers are started anew with the next run.")
        return "\n".join(lines)

    def _find_or_start(self, launch: Launch, poll: Poll | None) -> None:
        patience = max(launch.start_timeout, launch.step_timeout)
        self.pool = running_pool(launch.devices, launch.host.name, poll, patience=patience)
        if self.pool is None and launch.devices[0].startswith("rank"):
            raise RuntimeError(
                "The pool of workers that spanned machines, or that Ray had placed, is gone. Start it again where `evdit workers` "
                "does not by itself, or name devices of this machine."
            )
        if self.pool is None:
            start = self._start_on_gpus if launch.devices[0].startswith("cuda") else self._start
            start(launch, poll)
        else:
            self._test(poll)
        self.devices = launch.devices

    def _start_on_gpus(self, launch: Launch, poll: Poll | None) -> None:
        """By the first backend that works. What keeps a rank from meeting the others, such as a package that is missing, is
        no fault of a backend's and is raised at once. So is a time-out: GPUs talk in the self-test first."""
        last = ""
        for backend, peer_to_peer in _GPU_ATTEMPTS:
            if backend == "nccl" and backend_for(launch.devices[0]) == "gloo":
                continue
            try:
                return self._start(launch, poll, backend, peer_to_peer)
            except PoolFault as fault:
                how = backend if peer_to_peer else f"{backend} without peer access"
                log.warning("Efficient-vDiT: the GPUs could not talk over %s: %s", how, fault)
                last = f"the last, by {how}, ended so:\n{fault}"
                self.stop()
        raise RuntimeError(
            "The GPUs could not exchange data by NCCL or gloo. Run on one device, or mend the driver. The log has each attempt; "
            f"{last}"
        )

    def _start(self, launch: Launch, poll: Poll | None, backend: str = "gloo", peer_to_peer: bool = True) -> None:
        self.workers = starter().Workers(
            launch.devices, backend, launch.host, launch.imports, peer_to_peer=peer_to_peer
        )
        self.pool = Pool(self.workers.wait(launch.start_timeout, poll), launch.host.name, poll)
        self._test(poll)

    def _test(self, poll: Poll | None) -> None:
        self.tests, _ = self._ask({"do": "self-test"}, None, SELF_TEST_SECONDS, poll)


def starter() -> Any:
    """The module that starts processes. Raises ValueError where the pack is the registry's, which has none."""
    try:
        return importlib.import_module(".start_workers", __package__)
    except ImportError:
        raise ValueError(
            "No pool of workers is running, and the registry's build of the pack starts none itself. Start one with torchrun, as "
            "the help page of EVDiTSequenceParallel says, or use a clone of the pack."
        ) from None


def running_pool(
    devices: tuple[str, ...], host: str = COMFYUI_HOST.name, poll: Poll | None = None, *, patience: float = 600.0
) -> Pool | None:
    """The pool that `evdit workers` or torchrun runs, if it has these devices; a file left by one that is gone is
    removed.

    Raises PoolFault where the pool lives and cannot be used, such as one that does not answer.
    """
    path = default_pool_file()
    address = read_pool_file(path)
    if address is None or _names(address) != devices:
        return None
    try:
        return Pool(address, host, poll, patience=patience)
    except OSError as error:
        if is_held(path):
            raise PoolFault(
                f"The pool of workers at {address.host}:{address.port} lives but cannot be reached: {error}. Wait until it is less "
                "busy, or end it where it was started."
            ) from None
        remove_pool_file(path, address.pool)
        return None


def _names(address: PoolAddress) -> tuple[str, ...]:
    # A pool that spans machines does not list its devices.
    return address.devices or tuple(f"rank {rank}" for rank in range(address.ranks))


def parse_devices(text: str) -> tuple[str, ...]:
    """``auto``, ``0,1`` or ``cpu,cpu`` as names: those of a running pool, else all GPUs of this machine, else one
    CPU."""
    text = text.strip().lower()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        address = read_pool_file(default_pool_file())
        if address is not None and is_held(default_pool_file()):
            return _names(address)
        return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)
    parts = [part.strip() for part in text.split(",")]
    if all(part == "cpu" for part in parts):
        cores = max(2, os.cpu_count() or 1)
        if len(parts) > cores:
            raise ValueError(
                f"devices names {len(parts)} CPU ranks, expected {cores} at most: this machine has no more cores. Name fewer."
            )
        return tuple(parts)
    if not all(re.fullmatch(r"\d{1,3}", part) for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(
            f'devices is {text!r}, expected "auto" or GPU numbers such as "0,1", each once. Correct the text.'
        )
    missing = [part for part in parts if int(part) >= count]
    if missing:
        shown = {0: "no GPU. Write auto", 1: "one GPU, number 0. Write auto"}.get(
            count, f"{count} GPUs. Name those from 0 to {count - 1}, or write auto"
        )
        raise ValueError(f"devices names GPU {missing[0]}, but this machine shows {shown}.")
    return tuple(f"cuda:{int(part)}" for part in parts)
