"""What a worker is told, as a line of JSON on its standard input."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import IO, Any

from .imports import Host, check_import

LOOPBACK = "127.0.0.1"


def address_for_others(placed: str) -> str:
    """The address that rank 0, on this machine, listens on for those of others, which only the user can choose. Raises
    ValueError where no EVDIT_LISTEN says it; ``placed`` says who is where."""
    address = os.environ.get("EVDIT_LISTEN", "")
    if not address:
        raise ValueError(
            f"{placed}, expected EVDIT_LISTEN: the address by which the others reach this machine. Set it, or start no more ranks "
            "than this machine has room for."
        )
    return address


@dataclass(frozen=True)
class Settings:
    """``device``: "cpu" or "cuda:N". ``secret``: what this rank proves to the others. ``host``: what builds the models,
    and ``imports``: the folders that it may load code from.

    ``folder``: rank 0's, where the ranks of one machine exchange addresses; empty where they span machines.
    ``rendezvous``: the file that names rank 0's address, or empty where they meet in a store: that of rank 0 at ``store``,
    HOST:PORT, or torchrun's own where that is empty. ``address_file``: where rank 0 announces the pool, by the name
    ``pool``. ``listen``: the address that rank 0 listens on. ``log``: where this rank's output goes, or empty where its
    starter shows it. ``piped``: whether a starter holds the other end of the standard input.
    """

    rank: int
    ranks: int
    device: str
    backend: str
    secret: str
    host: Host
    imports: tuple[str, ...]
    address_file: str
    pool: str
    folder: str = ""
    rendezvous: str = ""
    store: str = ""
    listen: str = LOOPBACK
    log: str = ""
    devices: tuple[str, ...] = ()
    piped: bool = False

    def check_import(self, path: str) -> None:
        """Raises ValueError where this worker may not load code from ``path``."""
        check_import(path, self.imports)

    def line(self) -> bytes:
        """What a worker finds first on its standard input; the end of that tells it that its starter is gone."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, stream: IO[bytes]) -> Settings:
        """Those that the starter wrote. Raises ValueError where it wrote none."""
        line = stream.readline()
        if not line:
            raise ValueError(
                "A worker was started by hand, expected `evdit workers`, torchrun, or the node. Use one of these."
            )
        values: dict[str, Any] = json.loads(line)
        lists = {name: tuple(values[name]) for name in ("devices", "imports")}
        return cls(**{**values, **lists, "host": Host(**values["host"])})
