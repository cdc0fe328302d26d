"""Compiles the pack's Triton kernels for GPUs that are not here, and says where they could not run well there.

Needs Triton and no GPU: its wheel holds the compilers. What a launch would specialise on comes from Triton's own binder,
fed with stand-ins for tensors. Each case, an architecture, kernel and head_dim, compiles its configs in a process of its
own, for a compiler that fails an assertion ends its process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import re
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..limits.packages import install
from ..limits.quote import first_cause

KIB = 1024
# Shared memory that one program may have, as the driver reports it (AMD: LDS of a workgroup), and the matrix instruction.
ARCHITECTURES = {
    "sm_80": (163 * KIB, r"mma\.sync"),
    "sm_86": (99 * KIB, r"mma\.sync"),
    "sm_89": (99 * KIB, r"mma\.sync"),
    "sm_90": (227 * KIB, r"wgmma\.mma_async"),
    "sm_100": (227 * KIB, r"tcgen05\.mma"),
    "sm_120": (99 * KIB, r"mma\.sync"),
    "gfx942": (64 * KIB, r"v_mfma"),
}
QUICK = ("sm_80", "sm_90", "sm_120")
HEAD_DIMS = (64, 96, 128)
ATTENTION, MERGE = ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"), "merge_kernel"
TENSOR_MEMORY = 512  # columns, sm_100
MAX_SPILL = 64  # bytes a thread


@dataclass(frozen=True)
class Case:
    """One kernel in bfloat16 for one architecture and head_dim."""

    architecture: str
    kernel: str
    head_dim: int


@dataclass
class Compiled:
    """What came of one config: bytes of shared memory and of spills a thread, counts of instructions, and what is wrong
    with it."""

    config: str
    shared: int = 0
    tensor_memory: int = 0
    registers: int = 0
    spill: int = 0
    matrix: int = 0
    asynchronous: int = 0
    seconds: float = 0.0
    error: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """A case's configs in the order of its list, each of which may be what the tuning picks on a card."""

    case: Case
    configs: list[Compiled]
    crash: str = ""

    @property
    def passed(self) -> bool:
        """Whether there are configs, and none of them has a fault."""
        return bool(self.configs) and not any(c.faults for c in self.configs)

    def row(self) -> dict[str, Any]:
        """For a results file."""
        return {
            **asdict(self.case),
            "passed": self.passed,
            "crash": self.crash,
            "configs": [asdict(c) for c in self.configs],
        }


def cases(architectures: tuple[str, ...], head_dims: tuple[int, ...]) -> list[Case]:
    """Every kernel for each of them."""
    return [Case(a, k, d) for a in architectures for d in head_dims for k in (*ATTENTION, MERGE)]


def compile_cases(chosen: list[Case], jobs: int) -> Iterator[Outcome]:
    """Compiles the cases, ``jobs`` at a time, and yields each as it is done.

    Call it in a process that has not imported Triton yet: it sets what Triton reads at its import. Raises ValueError
    where there is no Triton, or processes cannot be forked.
    """
    if sys.platform != "linux":
        raise ValueError(f"Kernels are compiled ahead of time on Linux only, this is {sys.platform}.")
    if "triton" in sys.modules:
        raise ValueError("Triton is imported already, with other settings. Compile in a fresh process.")
    os.environ.pop("TRITON_INTERPRET", None)  # it would turn the kernels into Python
    os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_DISABLE_LINE_INFO="1", TRITON_ALWAYS_COMPILE="1")
    try:
        from triton.runtime.driver import driver
    except ImportError as error:
        raise ValueError(f"Triton is not installed, whose compilers are asked. {install('triton')}") from error
    stand_in: Any = _Device()
    driver.set_active(stand_in)
    context, waiting, running = multiprocessing.get_context("fork"), list(chosen), []
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_outcome, args=(case, sender), daemon=True)
            process.start()
            sender.close()
            running.append((case, process, receiver))
        case, process, receiver = running.pop(0)
        try:
            yield receiver.recv()
        except EOFError:
            process.join()
            yield Outcome(case, [], f"the compiler ended with status {process.exitcode}")
        process.join()


def kernels_hash() -> str:
    """Tells one state of the kernels' sources, and of what launches them, from another."""
    folder = Path(__file__).parents[1] / "attention" / "backends"
    sources = [(folder / f"{name}.py").read_bytes() for name in ("arrow_kernels", "triton", "merge_kernels", "merge")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


class _Device:
    """Stands for Triton's driver: it answers which GPU to compile for."""

    utils = types.SimpleNamespace()
    target: Any = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None


def _send_outcome(case: Case, sender: Connection) -> None:
    from triton.backends.compiler import GPUTarget

    name = case.architecture
    if name.startswith("sm_"):
        _Device.target = GPUTarget("cuda", int(name[3:]), 32)
    else:
        _Device.target = GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    configs = [_compile(case, config) for config in _configs(case)]
    for compiled in configs:
        compiled.faults = [compiled.error] if compiled.error else _faults(case, compiled)
    sender.send(Outcome(case, configs))


def _configs(case: Case) -> list[dict[str, Any]]:
    """The keyword arguments of each config that the kernel would be tuned over there."""
    if case.kernel == MERGE:
        from ..attention.backends.merge import block_sizes

        return [block_sizes(case.head_dim)]
    from ..attention.backends import arrow_kernels
    from ..attention.backends.triton import HEAD_DIMS as TILES

    tuner, (first, second) = getattr(arrow_kernels, case.kernel), TILES[case.head_dim]
    return [config.all_kwargs() for config in tuner.early_config_prune(tuner.configs, {}, D0=first, D1=second)]


def _compile(case: Case, config: dict[str, Any]) -> Compiled:
    from ..attention.backends import arrow_kernels, merge_kernels

    name = " ".join(f"{key} {value}" for key, value in config.items() if value not in (None, False))
    compiled, start, log = Compiled(name), time.perf_counter(), io.StringIO()
    arguments, flags = _merge_arguments() if case.kernel == MERGE else _attention_arguments(case)
    kernel = merge_kernels.merge_kernel if case.kernel == MERGE else getattr(arrow_kernels, case.kernel).fn
    try:
        with contextlib.redirect_stdout(log):
            built = kernel.warmup(*arguments, grid=(1,), **flags, **config, enable_fp_fusion=True)
    except Exception as error:  # the compiler raises anything
        why = first_cause(error)  # Triton wraps it in the source lines of every caller
        compiled.error = f"does not compile: {type(why).__name__}: {' '.join(str(why).split())[-200:]}"
    else:
        _read(case, compiled, built, log.getvalue())
    compiled.seconds = round(time.perf_counter() - start, 1)
    return compiled


def _read(case: Case, compiled: Compiled, built: Any, log: str) -> None:
    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found.group(1)) if found else 0

    compiled.shared = built.metadata.shared
    compiled.tensor_memory = getattr(built.metadata, "tmem_size", 0) or 0
    if "ptx" in built.asm:
        text = built.asm["ptx"]
        compiled.registers = number(r"Used (\d+) registers", log)
        compiled.spill = number(r"(\d+) bytes spill stores", log)
        compiled.asynchronous = len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk", text))
    else:
        text = built.asm["amdgcn"]
        compiled.registers = number(r"\.vgpr_count:\s*(\d+)", text)
        compiled.spill = 4 * number(r"\.vgpr_spill_count:\s*(\d+)", text)
    compiled.matrix = len(re.findall(ARCHITECTURES[case.architecture][1], text))


def _faults(case: Case, compiled: Compiled) -> list[str]:
    """Why a config must not be offered there."""
    most, found = ARCHITECTURES[case.architecture][0], []
    if compiled.shared > most:
        found.append(f"shared memory {compiled.shared} of {most} bytes")
    if compiled.tensor_memory > TENSOR_MEMORY:
        found.append(f"tensor memory {compiled.tensor_memory} of {TENSOR_MEMORY} columns")
    if compiled.spill > MAX_SPILL:
        found.append(f"spills {compiled.spill} bytes")
    if case.kernel in ATTENTION:
        if not compiled.matrix:
            found.append("no matrix instruction")
        if case.architecture.startswith("sm_") and not compiled.asynchronous:
            found.append("no asynchronous loads: nothing is pipelined")
    return found


def _stand_ins() -> tuple[Any, Any, Any]:
    """Stand for tensors of bfloat16, float32 and int32."""
    import torch
    from triton.runtime.jit import MockTensor

    return MockTensor(torch.bfloat16), MockTensor(torch.float32), MockTensor(torch.int32)


def _attention_arguments(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As ``triton.py`` launches the kernel: q, k, v as views (1, H, N, D) of (1, N, H, D)."""
    from ..attention.backends.triton import HEAD_DIMS as TILES

    (x, f, i), (heads, frames, size), dim = _stand_ins(), (24, 24, 3600), case.head_dim
    strides = (frames * size * heads * dim, dim, heads * dim, 1)
    sizes = (1, heads, frames * size, size, 0, 0, size.bit_length(), math.log2(math.e) / math.sqrt(dim))
    first, second = TILES[dim]
    flags = {"D0": first, "D1": second}
    if case.kernel == "forward_kernel":
        return (x, x, x, x, f, i, i, i, *[strides] * 4, *sizes), flags
    if case.kernel == "query_gradient_kernel":
        return (x, x, x, x, f, x, f, x, f, i, i, i, *[strides] * 6, *sizes), {"WITH_DLSE": False, **flags}
    return (x, x, x, f, x, f, x, x, i, i, i, *[strides] * 6, *sizes), flags


def _merge_arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As ``merge.py`` launches it: rows are frames of 3600 tokens, 24 heads x 128."""
    x, f, _ = _stand_ins()
    rows, logs = (3600 * 24 * 128, 128, 24 * 128), (3600, 24 * 3600, 1)
    return (x, f, x, f, x, f, 24, 3600, *[rows, logs] * 3), {}
