"""The file by which ComfyUI finds a running pool: where it listens and the secret, readable by this user alone."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ...attention.choose import cache_folder


@dataclass(frozen=True)
class PoolAddress:
    """``secret`` also tells one pool from another; ``devices`` are empty for a pool that may span machines."""

    host: str
    port: int
    secret: str
    ranks: int
    devices: tuple[str, ...] = ()


def default_pool_file() -> Path:
    """Where `evdit workers` announces its pool and ComfyUI looks for one."""
    return cache_folder() / "workers" / "pool.json"


def write_pool_file(path: Path, address: PoolAddress) -> None:
    """Write it whole, for this user only. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(address), file)
    os.replace(temporary, path)


def read_pool_file(path: Path) -> PoolAddress | None:
    """The pool that the file names, running or not; None where there is no such file, or one that is not ours to
    trust."""
    try:
        if hasattr(os, "getuid") and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077):
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return PoolAddress(**{**values, "devices": tuple(values["devices"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_pool_file(path: Path, secret: str) -> None:
    """Remove the file if it is still that pool's."""
    found = read_pool_file(path)
    if found is not None and found.secret == secret:
        path.unlink(missing_ok=True)
