"""What ranks exchange tensors by, where PyTorch has GPUs and no NCCL, as on Windows."""

import argparse

import pytest
import torch

from efficient_vdit_core.commands import workers
from efficient_vdit_core.parallel.pool import start_workers
from efficient_vdit_core.parallel.pool.backend import backend_for
from efficient_vdit_core.parallel.pool.placement import Placement, settings_at

CHOICES = [(True, "nccl"), (False, "gloo")]


@pytest.fixture(autouse=True)
def two_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("EVDIT_LISTEN", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def have_nccl(monkeypatch, has):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has)


@pytest.mark.parametrize(("has", "expected"), CHOICES)
def test_gpus_exchange_by_nccl_where_there_is_one(monkeypatch, has, expected):
    have_nccl(monkeypatch, has)
    assert backend_for("cuda:1") == expected and backend_for("cpu") == "gloo"


@pytest.mark.parametrize(("has", "expected"), CHOICES)
def test_a_rank_that_torchrun_or_slurm_has_placed(monkeypatch, has, expected):
    have_nccl(monkeypatch, has)
    settings = settings_at(Placement(rank=1, ranks=2, local=1, machine=0, one_machine=True, run="test"))
    assert (settings.device, settings.backend) == ("cuda:1", expected)


@pytest.mark.parametrize(("has", "expected"), CHOICES)
def test_evdit_workers(monkeypatch, has, expected):
    """What would start the processes only says what it was asked for."""
    have_nccl(monkeypatch, has)

    def asked(devices, backend, *_, **__):
        raise InterruptedError(f"{backend} on {', '.join(devices)}")

    monkeypatch.setattr(start_workers, "Workers", asked)
    parser = argparse.ArgumentParser()
    workers.add_arguments(parser)
    with pytest.raises(InterruptedError, match=f"^{expected} on cuda:0, cuda:1$"):
        workers.run(parser.parse_args([]))
