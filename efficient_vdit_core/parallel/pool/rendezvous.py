"""Where the ranks of a pool find rank 0: its address, which is no secret."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .private_files import read_private, write_private
from .settings import Settings

_KEY = "evdit/acceptor"

Address = tuple[str, int]


class FileRendezvous:
    """A file of the user's, for ranks on one machine. One that an earlier pool has left names an address where nobody listens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def announce(self, address: Address) -> None:
        write_private(self.path, json.dumps(address))

    def find(self) -> Address | None:
        """Rank 0's address, or None where it has not said it yet."""
        return _address(read_private(self.path))


def joined_file(folder: str, rank: int) -> Path:
    """What a rank leaves in its starter's ``folder`` once it has met the others: what ends it after that lies between
    them."""
    return Path(folder, f"met-{rank}")


def shared_store(settings: Settings) -> dist.Store:
    """The store of ranks on several machines, the only thing that all of them can reach from the start. Raises OSError
    where rank 0 cannot listen there."""
    if not settings.store:
        return next(dist.rendezvous("env://"))[0]  # torchrun keeps it
    host, _, port = settings.store.rpartition(":")
    if settings.rank:
        return dist.TCPStore(host, int(port), settings.ranks, is_master=False)
    # Without a socket of ours it would listen on all interfaces (tests/core/test_library_faults.py).
    listener = socket.create_server((settings.listen, int(port)))
    return dist.TCPStore(
        host,
        int(port),
        settings.ranks,
        True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,
    )


class StoreRendezvous:
    """A key of the store of ranks on several machines; waits for it as long as that store does."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def announce(self, address: Address) -> None:
        self.store.set(_KEY, json.dumps(address))

    def find(self) -> Address | None:
        return _address(self.store.get(_KEY))


def _address(text: str | bytes | None) -> Address | None:
    try:
        host, port = json.loads(text or "null")
    except (ValueError, TypeError):
        return None
    return (host, port) if isinstance(host, str) and type(port) is int and 0 < port < 2**16 else None
