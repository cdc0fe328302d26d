"""The file by which ComfyUI finds a running pool: where it listens and the secret, readable by this user alone.

Rank 0 holds a lock beside it for as long as it lives, however it ends: so a pool that is only silent is not taken for
one that is gone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...storage.locks import is_locked, take_lock
from .private_files import private_folder, read_private, write_private
from .secret import is_secret


@dataclass(frozen=True)
class PoolAddress:
    """``pool`` tells one pool from another; ``devices`` are empty for a pool that spans machines."""

    host: str
    port: int
    secret: str
    ranks: int
    devices: tuple[str, ...] = ()
    pool: str = ""


def default_pool_file() -> Path:
    """Where `evdit workers` and torchrun announce their pool and ComfyUI looks for one."""
    return private_folder() / "pool.json"


def write_pool_file(path: Path, address: PoolAddress) -> None:
    """Write it whole, for this user only. Raises OSError."""
    write_private(path, json.dumps(asdict(address)))


def read_pool_file(path: Path) -> PoolAddress | None:
    """The pool that the file names, running or not; None where there is no such file, or one that is not ours to
    trust."""
    try:
        values = json.loads(read_private(path) or "null")
    except (ValueError, RecursionError):
        return None
    return PoolAddress(**{**values, "devices": tuple(values["devices"])}) if _is_address(values) else None


def _is_address(values: Any) -> bool:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(PoolAddress)}:
        return False
    devices = values["devices"]
    return (
        isinstance(values["host"], str)
        and type(values["port"]) is int
        and 0 < values["port"] < 2**16
        and is_secret(values["secret"])
        and type(values["ranks"]) is int
        and 0 < values["ranks"] < 2**16
        and isinstance(devices, list)
        and all(isinstance(device, str) for device in devices)
        and len(devices) in (0, values["ranks"])
        and isinstance(values["pool"], str)
    )


def remove_pool_file(path: Path, pool: str) -> None:
    """Remove the file if it is still that pool's."""
    found = read_pool_file(path)
    if found is not None and found.pool == pool:
        path.unlink(missing_ok=True)


def hold_lock(path: Path) -> int:
    """Mark this process as rank 0 of the pool that ``path`` announces, until it ends. Raises RuntimeError where another
    is."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = take_lock(_lock_path(path))
    if descriptor is None:
        raise RuntimeError("A pool of workers runs already, and ComfyUI finds one only. Use it, or end it first.")
    return descriptor


def is_held(path: Path) -> bool:
    """Whether rank 0 of the pool that ``path`` announces lives, on this machine or on one that shares the folder."""
    return is_locked(_lock_path(path))


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.lock")
