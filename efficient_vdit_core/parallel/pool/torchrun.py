"""A worker's settings where torchrun has started it, and what torchrun must not leave open."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile

import torch

from .imports import COMFYUI_HOST, usual_folders
from .listening import open_beyond_loopback
from .pool_file import default_pool_file
from .private import make_private_folder, private_folder
from .secret import shared_secret
from .settings import LOOPBACK, Settings

COMMAND = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file --nproc-per-node {ranks} "
    "efficient_vdit_core/parallel/boot.py"
)
_RUN = "run-"


def started_by_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def settings_from_torchrun() -> Settings:
    """This rank's settings. Raises ValueError where torchrun listens to others than this machine without need, or where
    there is no secret."""
    variables = os.environ
    rank, ranks = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    local, on_gpu = int(variables.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if "LOCAL_WORLD_SIZE" not in variables:
        raise ValueError(
            "A worker was started with RANK but without LOCAL_WORLD_SIZE, expected torchrun, which sets both. Start it by that."
        )
    one_machine = variables["LOCAL_WORLD_SIZE"] == variables["WORLD_SIZE"]
    listen = variables.get("EVDIT_LISTEN", LOOPBACK)
    if one_machine:
        _refuse_open_store(ranks)
        if listen != LOOPBACK:
            raise ValueError(
                f"EVDIT_LISTEN is {listen!r}, expected none: a pool on one machine listens on loopback only. Unset it."
            )
    make_private_folder()
    kind = "cuda:{}" if on_gpu else "cpu"
    return Settings(
        rank=rank,
        ranks=ranks,
        device=kind.format(local),
        backend="nccl" if on_gpu else "gloo",
        # The first machine makes it; the others must have been given it.
        secret=shared_secret(make=variables.get("GROUP_RANK", "0") == "0"),
        host=COMFYUI_HOST,
        imports=usual_folders(),
        address_file=str(default_pool_file()),
        pool=secrets.token_hex(8),
        meeting=_meeting_file() if one_machine else "",
        listen=listen,  # ranks on other machines must reach rank 0; the address is the administrator's to choose
        devices=tuple(kind.format(i) for i in range(ranks)) if one_machine else (),
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


def _meeting_file() -> str:
    """The same for all ranks of one torchrun, and of one of its attempts."""
    names = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    key = hashlib.sha256(" ".join(os.environ.get(name, "") for name in names).encode()).hexdigest()
    return str(private_folder() / f"meeting-{key[:16]}.json")


def fresh_folder() -> str:
    """A folder for the pool of rank 0, which holds the user's lock; what killed pools have left goes."""
    folder = private_folder()
    for left in folder.glob(f"{_RUN}*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=_RUN, dir=folder)
