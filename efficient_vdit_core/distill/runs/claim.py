"""Who may go on in the folder of a run: the configuration that it was started with, but for what changes nothing that is
learnt, and for a learning rate that is lowered, which is how a run goes on that diverged."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from ...limits.quote import named, shortened
from ..config import DistillConfig

CONFIG = "config.toml"
RATE = "training.learning_rate"


def claim_run(config: DistillConfig, folder: Path, *, finished: bool = False) -> None:
    """Save the configuration in a new folder. Raises ValueError for one that was started with another.

    Where the rate alone is lower than before and the run is not ``finished``, the new configuration takes the place of the
    old one, which stays beside it as config.1.toml, config.2.toml and so on.
    """
    file = folder / CONFIG
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config.save(file)
        return
    before = DistillConfig.load(file)
    differences = before.differences(config)
    lowered = config.training.learning_rate < before.training.learning_rate
    if list(differences) == [RATE] and lowered and not finished:
        before.save(next(f for n in count(1) if not (f := folder / f"config.{n}.toml").exists()))
        config.save(file)
    elif differences:
        shown = shortened("; ".join(f"{key}: {change}" for key, change in differences.items()), 200)
        raise ValueError(
            f"{named(folder.name)} was {'made' if finished else 'started'} with another configuration ({shown}). Resume with "
            "the same one, or choose a new folder."
        )
