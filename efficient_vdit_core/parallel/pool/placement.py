"""A worker's settings where torchrun or SLURM has placed it: the same for both, but for where the ranks meet."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass

import torch

from .backend import backend_for
from .imports import COMFYUI_HOST, usual_folders
from .pool_file import default_pool_file
from .private_files import make_private_folder, private_folder
from .secret import shared_secret
from .settings import LOOPBACK, Settings, address_for_others

_RUN = "run-"


@dataclass(frozen=True)
class Placement:
    """Rank ``rank`` of ``ranks``, number ``local`` on machine number ``machine``. ``run`` is what the ranks of this start
    have in common, and those of no other."""

    rank: int
    ranks: int
    local: int
    machine: int
    one_machine: bool
    run: str


def settings_at(place: Placement, store: str = "") -> Settings:
    """The settings of the rank that was placed there; ``store`` is as in Settings.

    Raises ValueError where the pool would listen to more than it must, or to less, or where there is no secret.
    """
    listen = _listen(place)
    make_private_folder()
    kind = "cuda:{}" if torch.cuda.is_available() else "cpu"
    # A rank that is shown its own GPU alone knows it by the number 0.
    device = kind.format(0 if torch.cuda.device_count() == 1 else place.local)
    return Settings(
        rank=place.rank,
        ranks=place.ranks,
        device=device,
        backend=backend_for(device),
        # The first machine makes it; the others must have been given it.
        secret=shared_secret(make=place.machine == 0),
        host=COMFYUI_HOST,
        imports=usual_folders(),
        address_file=str(default_pool_file()),
        pool=secrets.token_hex(8),
        rendezvous=_rendezvous_file(place.run) if place.one_machine else "",
        store=store,
        listen=listen,
        devices=tuple(kind.format(i) for i in range(place.ranks)) if place.one_machine else (),
    )


def _listen(place: Placement) -> str:
    """The address that rank 0 listens on; the other machines have no use for one."""
    if place.machine == 0 and not place.one_machine:
        return address_for_others("The ranks were placed on several machines")
    listen = os.environ.get("EVDIT_LISTEN", LOOPBACK)
    if place.one_machine and listen != LOOPBACK:
        raise ValueError(
            f"EVDIT_LISTEN is {listen!r}, expected none: a pool on one machine listens on loopback only. Unset it."
        )
    return listen


def _rendezvous_file(run: str) -> str:
    return str(private_folder() / f"rendezvous-{hashlib.sha256(run.encode()).hexdigest()[:16]}.json")


def fresh_folder() -> str:
    """A folder for the pool of rank 0, which holds the user's lock; what killed pools have left goes."""
    folder = private_folder()
    for left in folder.glob(f"{_RUN}*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=_RUN, dir=folder)
