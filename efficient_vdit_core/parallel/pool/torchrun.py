"""A worker's place where torchrun has started it, and what torchrun must not leave open."""

from __future__ import annotations

import os

from .open_ports import open_beyond_loopback
from .placement import Placement, settings_at
from .settings import Settings

COMMAND = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file --nproc-per-node {ranks} "
    "efficient_vdit_core/parallel/boot.py"
)


def started_by_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def settings_from_torchrun() -> Settings:
    """This rank's settings. Raises ValueError where torchrun listens to others than this machine without need, or where
    there is no secret."""
    variables = os.environ
    if "LOCAL_WORLD_SIZE" not in variables:
        raise ValueError(
            "A worker was started with RANK but without LOCAL_WORLD_SIZE, expected torchrun, which sets both. Start it by that."
        )
    ranks, one_machine = int(variables["WORLD_SIZE"]), variables["LOCAL_WORLD_SIZE"] == variables["WORLD_SIZE"]
    if one_machine:
        _refuse_open_store(ranks)
    names = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return settings_at(
        Placement(
            rank=int(variables["RANK"]),
            ranks=ranks,
            local=int(variables.get("LOCAL_RANK", "0")),
            machine=int(variables.get("GROUP_RANK", "0")),
            one_machine=one_machine,
            run=" ".join(variables.get(name, "") for name in names),
        )
    )


def _refuse_open_store(ranks: int) -> None:
    # Such a store listens on all interfaces, and torchrun unpickles what its c10d rendezvous finds there.
    ports = open_beyond_loopback(os.getppid())
    if ports or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        which = f" (port {', '.join(map(str, ports))})" if ports else ""
        raise ValueError(
            f"torchrun keeps a store here that every computer of the network can reach{which} and write to. On one machine it "
            f"needs none. Start it so:\n{COMMAND.format(ranks=ranks)}"
        )
