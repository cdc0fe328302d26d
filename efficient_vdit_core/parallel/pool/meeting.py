"""Where the ranks of a pool find rank 0's door: an address, which is no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .private import read_private, write_private

_KEY = "evdit/door"

Address = tuple[str, int]


class FileMeeting:
    """A file of the user's, for ranks on one machine. One that an earlier pool has left names a door that is shut."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def announce(self, address: Address) -> None:
        write_private(self.path, json.dumps(address))

    def find(self) -> Address | None:
        """Rank 0's address, or None where it has not said it yet."""
        return _address(read_private(self.path))


class StoreMeeting:
    """A key of the store that torchrun keeps for ranks on several machines; waits for it as long as that store does."""

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
