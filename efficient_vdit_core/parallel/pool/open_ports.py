"""On which ports a process can be reached from other machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_LISTEN = "0A"
# As the kernel writes them: 127.x.x.x ends in 7F; ::1, and an IPv4 loopback address inside an IPv6 one.
_LOOPBACK_4, _LOOPBACK_6, _MAPPED_6 = "7F", "00000000000000000000000001000000", "0000000000000000FFFF0000"


def open_beyond_loopback(process: int) -> list[int]:
    """The TCP ports on which ``process`` listens to more than this machine; none where the system does not tell (other
    than Linux, or another user's process)."""
    if sys.platform != "linux":
        return []
    sockets = _sockets(process)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            address, port = words[1].split(":")
            if words[3] == _LISTEN and words[9] in sockets and not _is_loopback(address):
                found.add(int(port, 16))
    return sorted(found)


def processes_of_session(session: int) -> list[int]:
    """The processes of that session; none where the system does not tell."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[3]) == session:
                found.append(int(entry.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def _is_loopback(address: str) -> bool:
    if len(address) == 8:
        return address.endswith(_LOOPBACK_4)
    return address == _LOOPBACK_6 or (address.startswith(_MAPPED_6) and address.endswith(_LOOPBACK_4))


def _sockets(process: int) -> set[str]:
    """The inode numbers of its sockets."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{process}/fd"):
            try:
                target = os.readlink(entry.path)
            except OSError:
                continue  # closed meanwhile
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found
