"""How a worker learns what it is: a line of JSON on its standard input, or torchrun's environment."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import IO, Any

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Settings:
    """``store``: the file for the rendezvous, or empty under torchrun. ``device``: "cpu" or "cuda:N".

    ``address_file``: where rank 0 announces the pool. ``listen``: the address that rank 0 listens on. ``log``: where
    this rank's output goes, or empty where its starter shows it.
    """

    rank: int
    ranks: int
    device: str
    backend: str
    store: str = ""
    secret: str = ""
    address_file: str = ""
    listen: str = LOOPBACK
    log: str = ""
    devices: tuple[str, ...] = ()

    def write(self, stream: IO[bytes]) -> None:
        """Hand them to a worker; the stream stays open, and its end tells the worker that the starter is gone."""
        stream.write(json.dumps(asdict(self)).encode() + b"\n")
        stream.flush()


def read_settings() -> Settings:
    """This worker's settings. Raises ValueError where neither a starter nor torchrun gave any."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _from_torchrun()
    line = sys.stdin.buffer.readline()
    if not line:
        raise ValueError(
            "A worker was started by hand, expected `evdit workers`, torchrun, or the node. Use one of these."
        )
    values: dict[str, Any] = json.loads(line)
    return Settings(**{**values, "devices": tuple(values["devices"])})


def _from_torchrun() -> Settings:
    import torch

    from .pool_file import default_pool_file

    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    return Settings(
        rank=int(os.environ["RANK"]),
        ranks=int(os.environ["WORLD_SIZE"]),
        device=f"cuda:{local}" if on_gpu else "cpu",
        backend="nccl" if on_gpu else "gloo",
        address_file=str(default_pool_file()),
        # Ranks on other machines must reach rank 0; the address is the administrator's to choose.
        listen=os.environ.get("EVDIT_LISTEN", LOOPBACK),
    )
