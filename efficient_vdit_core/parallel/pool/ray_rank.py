"""What stands beside a rank where Ray has placed it: starts the same worker as everywhere, and says how it ended.

The secret is read here, from the user's file on this machine: nothing that goes through Ray holds it.
"""

from __future__ import annotations

from typing import Any

from .code_version import CODE_VERSION
from .imports import Host
from .pool_file import default_pool_file
from .private_files import make_private_folder
from .processes import BOOT, Processes, environment_of_ranks
from .secret import shared_secret
from .settings import Settings


class RayRank:
    """One rank, as a process of this machine's. ``version``: that of the pack here."""

    version = CODE_VERSION

    def __init__(self) -> None:
        self.processes: Processes | None = None

    def start(self, told: dict[str, Any], beside: int) -> None:
        """Start it with the settings ``told``, one of ``beside`` on this machine. Raises ValueError where the machine has
        no secret."""
        make_private_folder()
        # In the pool's folder, where it is on this machine: its owner removes it, also where Ray has ended what stands here.
        self.processes = Processes(told["pool"], within=told["folder"] or None)
        lists = {name: tuple(told[name]) for name in ("devices", "imports")}
        settings = Settings(
            **{**told, **lists, "host": Host(**told["host"])},
            secret=shared_secret(make=False),
            address_file=str(default_pool_file()),
            log=str(self.processes.log(0)),
            piped=True,
        )
        self.processes.start(BOOT, settings.line(), environment_of_ranks(beside))

    def ended(self) -> str:
        """How its process has ended; nothing while it runs."""
        return self.processes.ended().get(0, "") if self.processes is not None else ""

    def last_lines(self) -> str:
        """The end of its log."""
        return self.processes.last_lines(0) if self.processes is not None else ""

    def stop(self, gently: bool) -> None:
        """End it, and remove its log."""
        if self.processes is not None:
            self.processes.stop(gently=gently)
