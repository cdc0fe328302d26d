"""Who may go on in the folder of a run: the configuration that it was started with, but for what changes nothing that is
learnt, and for a learning rate that is lowered, which is how a run goes on that diverged. One run at a time.

folder/config.toml   the configuration; config.1.toml and so on are those before, of higher rates
folder/train.lock    held while a run is in the folder
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from ...limits.quote import named, shortened
from ...storage.locks import locked
from ...training.processes import Processes
from ..config import DistillConfig
from .referenced_files import PLAN, PLAN_COPY, changes, keep_contents

CONFIG, LOCK = "config.toml", "train.lock"
RATE = "training.learning_rate"

log = logging.getLogger("efficient_vdit")


@contextmanager
def alone_in(folder: Path, accelerator: Any) -> Iterator[None]:
    """Keeps other runs out of ``folder`` while the block runs; process 0 does so for all. Raises ValueError, in every process,
    where another run is there."""
    with locked(folder / LOCK) if accelerator.is_main_process else nullcontext(True) as alone:
        if Processes(accelerator).any(not alone):
            raise ValueError(
                f"Another process trains in {named(folder.name)}, and two would overwrite each other's state. Wait until it has ended, or "
                "choose another folder."
            )
        yield


def claim_run(config: DistillConfig, folder: Path, *, finished: bool = False, any_rate: bool = False) -> None:
    """Save the configuration in a new folder, with what the plan, the weights and the data hold that it names. Raises ValueError for
    a folder that was started with another.

    Where the rate alone is lower than before and the run is not ``finished``, the new configuration takes the place of the
    old one, which stays beside it as config.1.toml, config.2.toml and so on. With ``any_rate`` a finished run is taken
    whatever its rate was.
    """
    file = folder / CONFIG
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config.save(file)
    else:
        _go_on(DistillConfig.load(file), config, folder, finished, any_rate)
    keep_contents(config, folder)


def _go_on(before: DistillConfig, config: DistillConfig, folder: Path, finished: bool, any_rate: bool) -> None:
    differences = changes(before, config, folder)
    rate_alone, rate = list(differences) == [RATE], before.training.learning_rate
    if rate_alone and finished and any_rate:
        log.warning("%s was finished with %s = %g, and is kept as it is.", named(folder.name), RATE, rate)
    elif rate_alone and not finished and config.training.learning_rate < rate:
        before.save(next(f for n in count(1) if not (f := folder / f"config.{n}.toml").exists()))
        config.save(folder / CONFIG)
    elif differences:
        shown = shortened("; ".join(f"{key}: {change}" for key, change in differences.items()), 200)
        kept = f" (its plan is {PLAN_COPY} there)" if PLAN in differences and (folder / PLAN_COPY).is_file() else ""
        raise ValueError(
            f"{named(folder.name)} was {'made' if finished else 'started'} with another configuration ({shown}). Resume with "
            f"the same one{kept}, or choose a new folder."
        )
