"""What a finished stage held is free before the next one loads its own."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.runs import recipe, trainer
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.training import TrainingRun

sys.path.insert(0, str(Path(__file__).parent))
from test_distill_trainer import any_precision, base, config, small_data  # noqa: E402, F401

pytest.importorskip("accelerate")


@pytest.fixture
def no_collector():
    """Python does not look for cycles by itself. A process's first optimiser leaves one, with the frame that made it."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


pytestmark = pytest.mark.usefixtures("any_precision")


def trained(folder):
    """What a finished run of two steps held."""
    model = torch.nn.Linear(1, 1)
    run = TrainingRun(model, [torch.optim.SGD(model.parameters(), lr=0.1)], folder=folder, steps=2, seed=0)
    run.train(lambda generator: model.weight.square().sum())
    return [weakref.ref(x) for x in (run, run.average, model)]  # PyTorch's optimisers tie the weights into a cycle


def test_a_run_ends_with_its_last_name(tmp_path, no_collector):
    assert [ref() for ref in trained(tmp_path)] == [None] * 3


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("consistency", {}),
        ("consistency", {"training": {"precision": "bf16"}}),
        ("knowledge", {"model": {"host_teacher": True}}),
        ("knowledge", {"model": {"train": "lora", "lora_rank": 2}}),
        ("score", {}),
    ],
)
def test_a_finished_training_holds_no_network(base, tmp_path, monkeypatch, no_collector, method, changes):  # noqa: F811
    held, make_pair = [], trainer.make_pair

    def noted(*args):
        pair = make_pair(*args)
        held.extend(weakref.ref(p) for part in pair if part for p in (part, *part.parameters()))
        return pair

    monkeypatch.setattr(trainer, "make_pair", noted)
    trainer.distill(config(base, method, steps=3, **changes), tmp_path / "run")
    assert len(held) > 20 and all(ref() is None for ref in held)


def test_a_finished_search_holds_no_network(base, tmp_path, monkeypatch, no_collector):  # noqa: F811
    held, load = [], OpenSoraPlanModel.load

    def noted(self, weights=""):
        module = load(self, weights)
        held.extend(weakref.ref(x) for x in (module, *module.parameters()))
        return module

    monkeypatch.setattr(OpenSoraPlanModel, "load", noted)
    monkeypatch.setattr(recipe, "prepare_data", trainer.prepare_data)
    values = {"model": {"transformer": str(base), "device": "cpu"}, "consistency": {"segments": 2, "teacher_steps": 4}}
    values["search"] = {"captions": 1, "candidates": "1", "thresholds": [10.0]}
    files = ThreeStages(RecipeConfig.from_dict(values), tmp_path).plans("plans", "")
    assert all(file.is_file() for file in files.values())
    assert len(held) > 20 and all(ref() is None for ref in held)
