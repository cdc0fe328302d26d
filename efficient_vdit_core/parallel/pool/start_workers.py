"""A pool of workers on this machine: a process for each device."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .faults import PoolFault
from .imports import Host
from .pool_file import PoolAddress, read_pool_file
from .processes import BOOT, Processes, environment_of_ranks, full, has_room
from .rendezvous import joined_file
from .secret import new_secret
from .settings import Settings


class Workers(Processes):
    """The processes of a local pool, one for each of ``devices`` ("cpu" or "cuda:N").

    They build models with ``host``, and import from the folders ``imports`` only. Raises OSError where the folder for
    temporary files is full or a process cannot be started.
    """

    def __init__(
        self,
        devices: Sequence[str],
        backend: str,
        host: Host,
        imports: Sequence[str] = (),
        *,
        address_file: Path | None = None,
        peer_to_peer: bool = True,
    ) -> None:
        super().__init__(secrets.token_hex(8), address_file)
        secret, environment = new_secret(), environment_of_ranks(len(devices), peer_to_peer)
        for rank, device in enumerate(devices):
            settings = Settings(
                rank=rank,
                ranks=len(devices),
                device=device,
                backend=backend,
                secret=secret,
                host=host,
                imports=tuple(imports),
                address_file=str(self.address_file),
                pool=self.pool,
                folder=str(self.folder),
                rendezvous=str(self.folder / "rendezvous.json"),
                log=str(self.log(rank)),
                devices=tuple(devices),
                piped=True,
            )
            self.start(BOOT, settings.line(), environment)

    def wait(self, seconds: float, poll: Callable[[], None] | None = None) -> PoolAddress:
        """The pool's address once all ranks are in one group. Raises RuntimeError naming the rank that ended, which is a
        PoolFault where it had met the others, TimeoutError if none did, OSError where the folder for temporary files has become
        full."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            address = read_pool_file(self.address_file)
            if address is not None and address.pool == self.pool:
                return address
            for rank, how in self.ended().items():
                kind = PoolFault if joined_file(str(self.folder), rank).exists() else RuntimeError
                words, no_room = self.last_lines(rank), not has_room(self.folder)
                self.stop()
                if no_room:
                    raise OSError(full(self.folder.parent))
                raise kind(f"Rank {rank} ended while it started ({how}):\n{words}")
            if poll is not None:
                poll()
            time.sleep(0.05)
        self.stop()
        raise TimeoutError(
            f"The workers were not ready after {seconds:.0f} s. Raise start_timeout, or see what keeps the machine busy."
        )
