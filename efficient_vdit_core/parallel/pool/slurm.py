"""A worker's place where SLURM's srun has started it, by the script of `evdit workers --engine slurm`."""

from __future__ import annotations

import os

from .placement import Placement, settings_at
from .settings import Settings

# Set by the script, with HOST:PORT of the ranks' store; a step of another script is none of ours.
STORE = "EVDIT_STORE"


def started_by_slurm() -> bool:
    """Whether this process is one of the script's ranks."""
    return STORE in os.environ and "SLURM_PROCID" in os.environ


def settings_from_slurm() -> Settings:
    """This rank's settings. Raises ValueError where the script is not the one that srun needs, or where there is no
    secret."""
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES")
    variables = os.environ
    if missing := [name for name in names if not variables.get(name, "").isdecimal()]:
        raise ValueError(
            f"SLURM does not say {', '.join(missing)} to this worker, expected a rank that srun started. Use the script that "
            "`evdit workers --engine slurm` writes."
        )
    rank, ranks, local, machine, machines = (int(variables[name]) for name in names)
    run = " ".join(variables.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    place = Placement(rank, ranks, local, machine, machines == 1, f"slurm {run}")
    return settings_at(place, "" if place.one_machine else variables[STORE])
