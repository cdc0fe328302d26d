"""What a training keeps, and when: by its steps and the clock, where it is asked to leave, where its line cannot be written,
where another process has no number."""

import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import tqdm
from torch import nn

from efficient_vdit_core.storage import saving_times
from efficient_vdit_core.storage.saving_times import SavingTimes
from efficient_vdit_core.training import TrainingRun
from efficient_vdit_core.training import run as training_run

sys.path.insert(0, str(Path(__file__).parent))
from ranks import run_group, through_crashes  # noqa: E402


def train(folder, more, *, steps=4, save_every=1000, accelerator=None):
    """A small run whose loss has ``more(step, generator)`` added."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = TrainingRun(model, [optimizer], folder=Path(folder), steps=steps, seed=0, accelerator=accelerator)
    run.train(lambda g: run.model(torch.ones(1, 2)).square().sum() + more(run.step, g), save_every=save_every)


def kept_step(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["step"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX's")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """Under nohup a terminal may close."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path, lambda step, generator: os.kill(os.getpid(), signal.SIGHUP) or 0.0)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert kept_step(tmp_path) == 4


def test_steps_that_take_long_are_saved_by_the_clock(tmp_path, monkeypatch):
    """As those of a large model, a night of which is fewer steps than are made between two checkpoints."""
    monkeypatch.setattr(training_run, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(saving_times, "SHARE", math.inf)
    kept = []
    train(tmp_path, lambda step, generator: kept.append(kept_step(tmp_path) if step else 0) or 0.0)
    assert kept == [0, 1, 2, 3]


def test_saving_takes_a_twentieth_of_the_time_at_the_most():
    now = [0.0]
    times = SavingTimes(60.0, clock=lambda: now[0])
    due = []
    for passed in (59.9, 0.1):
        now[0] += passed
        due.append(times.due())
    with times.saving():
        now[0] += 5.0
    for passed in (99.9, 0.2):
        now[0] += passed
        due.append(times.due())
    assert due == [False, True, False, True]


def test_a_step_whose_line_cannot_be_written_is_kept(tmp_path, monkeypatch):
    """Where the terminal is gone; the step after it draws what it would have drawn."""
    drawn, update = [], tqdm.tqdm.update

    def draw(step, generator):
        drawn.append(float(torch.rand(1, generator=generator)))
        return 0.0

    def broken(bar, n=1):
        if len(drawn) == 2:
            raise OSError("Input/output error")

    monkeypatch.setattr(tqdm.tqdm, "update", broken)
    with pytest.raises(OSError, match="Input/output"):
        train(tmp_path / "cut", draw)
    assert kept_step(tmp_path / "cut") == 2
    monkeypatch.setattr(tqdm.tqdm, "update", update)
    train(tmp_path / "cut", draw)
    train(tmp_path / "whole", draw)
    assert drawn[:4] == drawn[4:]


def of_two_ranks(folder, rank, ranks):
    """What the rank says where the third loss of one is no number."""
    from accelerate import Accelerator

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    try:
        train(
            folder,
            lambda step, generator: float("nan") if rank == 1 and step == 2 else 0.0,
            accelerator=Accelerator(cpu=True),
        )
    except ValueError as error:
        return str(error)


def test_of_several_processes_the_last_good_state_is_kept_too(tmp_path):
    pytest.importorskip("accelerate")
    said = through_crashes(lambda: run_group(partial(of_two_ranks, str(tmp_path)), 2, 300.0))
    assert "nan in another process at step 3" in said[0] and "The loss became nan at step 3" in said[1]
    assert all(f"{tmp_path / 'checkpoint.pt'} keeps the last good state" in words for words in said)
    assert kept_step(tmp_path) == 2
