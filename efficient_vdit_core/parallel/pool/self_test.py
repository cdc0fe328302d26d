"""The start-up self-test: one exchange between all ranks, its rate, the devices' rate, and who can reach whose
memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..sharding.communicator import Communicator, form

MEGABYTES = 8
# Side of the matrices by which a device's arithmetic is timed: 0.3 ms on a large GPU, 20 ms on a CPU core.
_SIDE = {"cuda": 4096, "cpu": 512}


def self_test(comm: Communicator, device: torch.device) -> dict[str, Any]:
    """Sends 8 MiB to every rank and checks what came; gigabytes a second sent by this rank, FLOPs a second, and its
    device.

    Raises RuntimeError where the data that arrived is not what was sent.
    """
    payload = torch.full((MEGABYTES * 2**20 // 4,), float(comm.rank), device=device)
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    best = float("inf")
    for _ in range(2):  # the first one also opens the connections
        start = time.perf_counter()
        sends = [[payload] if rank in others else [] for rank in range(comm.size)]
        receives = [[form(payload, 0, payload.numel())] if rank in others else [] for rank in range(comm.size)]
        received = comm.start("self-test", sends, receives, device).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    for rank in others:
        if not bool((received[rank][0] == float(rank)).all()):
            raise RuntimeError(f"What rank {rank} sent did not arrive unchanged at rank {comm.rank}.")
    return {
        "gigabytes_per_second": len(others) * payload.numel() * 4 / best / 1e9,
        "flops_per_second": _flops_per_second(device),
        "device": _name(device),
        "free_mib": torch.cuda.mem_get_info(device)[0] >> 20 if device.type == "cuda" else None,
        "peer_access": _peer_access(device),
    }


def _flops_per_second(device: torch.device) -> float:
    """What a product of two matrices reaches, in the dtype that models usually have there; all ranks at once."""
    side, dtype = _SIDE[device.type], torch.float32
    if device.type == "cuda":  # older ones only emulate bf16
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    x = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peer_access(device: torch.device) -> bool | None:
    """Whether this GPU reads the memory of all others of this machine directly; None on a CPU."""
    if device.type != "cuda":
        return None
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
