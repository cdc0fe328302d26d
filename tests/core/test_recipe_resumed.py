"""A recipe that is started again: from another place, with other settings, or with another plan under the same name."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import wan

from efficient_vdit_core.distill.config import DataConfig, DistillConfig
from efficient_vdit_core.distill.data.clips import ClipSet
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig
from efficient_vdit_core.distill.runs import recipe, search_stage, trainer
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.distill.runs.resume_check import claim_run
from efficient_vdit_core.distill.runs.search_stage import SearchConfig
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.search import output
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors

sys.path.insert(0, str(Path(__file__).parent))
from test_distill_trainer import base, config, small_data  # noqa: E402, F401

pytest.importorskip("accelerate")


@pytest.fixture
def values(base, monkeypatch):  # noqa: F811
    """A recipe of a step for each training, on the small model."""
    monkeypatch.setattr(recipe, "prepare_data", trainer.prepare_data)
    monkeypatch.setattr(recipe, "check_data", lambda config, model: None)
    monkeypatch.setattr(trainer, "check_data", lambda config, model: None)
    training = {"steps": 1, "batch": 2, "learning_rate": 0.01}
    return {
        "model": {"transformer": str(base), "device": "cpu"},
        "consistency": {"segments": 2, "teacher_steps": 4},
        "consistency_training": training,
        "search": {"captions": 1, "candidates": "1", "thresholds": [10.0]},
        "knowledge_training": training,
    }


def run(values, folder, **sections):
    changed = {name: {**values[name], **section} for name, section in sections.items()}
    return ThreeStages(RecipeConfig.from_dict({**values, **changed}), folder).run()


@pytest.fixture
def searches(monkeypatch):
    """The candidates of each probing run that is made."""
    found, probe = [], search_stage.probe
    monkeypatch.setattr(
        search_stage, "probe", lambda config, *args, **kw: found.append(config.candidates) or probe(config, *args, **kw)
    )
    return found


@pytest.mark.parametrize(
    "change",
    [{"candidates": "1,2"}, {"captions": 2}, {"seed": 1}, {"head_groups": 2}],
    ids=lambda change: next(iter(change)),
)
def test_plans_of_another_search_are_not_taken(values, tmp_path, searches, change):
    run(values, tmp_path / "run")
    (name,) = change
    with pytest.raises(
        ValueError, match=rf"plans was begun with other settings \(search\.{name}: .*delete that folder"
    ):
        run(values, tmp_path / "run", search=change)
    assert searches == ["1"]


def test_plans_from_before_there_was_another_error_are_the_attentions(values, tmp_path, searches):
    run(values, tmp_path / "run")
    record = tmp_path / "run" / "plans" / "settings.json"
    before = {name: value for name, value in json.loads(record.read_text()).items() if name != "search.error"}
    record.write_text(json.dumps(before))
    with pytest.raises(ValueError, match="plans was begun with other settings .*search.error: 'attention' -> 'output'"):
        run(values, tmp_path / "run", search={"error": "output"})
    assert json.loads(record.read_text()) == before and searches == ["1"]


def test_plans_of_another_teacher_are_not_taken(values, tmp_path):
    stages = ThreeStages(RecipeConfig.from_dict(values), tmp_path / "run")
    (plan,) = stages.plans("plans", "").values()
    weights, entries = read_state_dict(values["model"]["transformer"])
    other = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    save_safetensors(other, {name: 2 * value for name, value in weights.items()}, entries)
    with pytest.raises(ValueError, match=r"plans was begun with other settings \(model: "):
        stages.plans("plans", other)
    (plan.parent / "settings.json").unlink()  # as an earlier version left it
    assert stages.plans("plans", other) == {"r-10": plan}


def test_a_further_target_leaves_the_plans_that_stand(values, tmp_path, searches):
    run(values, tmp_path / "run")
    plan = tmp_path / "run" / "plans" / "r-10.json"
    before = plan.read_bytes(), plan.stat().st_mtime_ns
    assert list(run(values, tmp_path / "run", search={"thresholds": [10.0, 1e-9]})) == ["r-10", "r-1e-09"]
    assert (plan.read_bytes(), plan.stat().st_mtime_ns) == before and searches == ["1", "1"]


def test_a_search_that_was_stopped_binds_nobody(values, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(search_stage, "probe", stopped)
        run(values, tmp_path / "run")
    assert list(run(values, tmp_path / "run", search={"candidates": "1,2"})) == ["r-10"]


@pytest.fixture
def measured(monkeypatch):
    """The errors of the output that are measured, the fourth of which may be interrupted."""
    found, measure = [], output.relative_error

    def measuring(approximate, exact):
        if measuring.stop and len(found) == 3:
            raise KeyboardInterrupt
        found.append(measure(approximate, exact))
        return found[-1]

    measuring.stop = False
    monkeypatch.setattr(output, "relative_error", measuring)
    return found, measuring


def test_a_search_by_the_output_goes_on_where_it_was_stopped(values, tmp_path, measured):
    found, measuring = measured
    by_output = {**values["search"], "error": "output", "candidates": "0,1", "captions": 3}
    values = {**values, "search": by_output}
    run(values, tmp_path / "whole")
    whole = [*found]
    assert len(whole) > 6 and len(set(whole)) > 3
    found.clear()
    measuring.stop = True
    with pytest.raises(KeyboardInterrupt):
        run(values, tmp_path / "run")
    measuring.stop = False
    with pytest.raises(ValueError, match=r"plans was begun with other settings \(search.candidates: '0,1' -> '1'"):
        run(values, tmp_path / "run", search={"candidates": "1"})
    run(values, tmp_path / "run")
    assert found == whole, "none is measured twice"
    plans = [tmp_path / name / "plans" / "r-10.json" for name in ("run", "whole")]
    assert plans[0].read_bytes() == plans[1].read_bytes()

    run(values, tmp_path / "run", search={"thresholds": [10.0, 1e-9]})
    assert found == whole, "a further target needs no further forward"


def test_errors_of_other_batches_are_measured_anew(values, tmp_path, measured):
    found, _ = measured
    values = {**values, "search": {**values["search"], "error": "output", "captions": 3}}
    stages = [
        ThreeStages(RecipeConfig.from_dict({**values, "consistency_training": {**values["consistency_training"], "batch": n}}), tmp_path)
        for n in (2, 3)
    ]  # fmt: skip
    stages[0].plans("plans", "")
    of_two = len(found)
    (tmp_path / "plans" / "r-10.json").unlink()
    stages[1].plans("plans", "")
    assert 2 * (len(found) - of_two) == of_two, "one forward holds all three samples, where there were two"
    assert sorted(file.name for file in (tmp_path / "plans").glob("*.pt")) == ["errors-of-2.pt", "errors-of-3.pt"]


def test_a_recipe_goes_on_wherever_its_folder_is(values, tmp_path, monkeypatch):
    """Named by another path, and moved; what is finished is not made again, and no network loaded for it."""
    monkeypatch.chdir(tmp_path)
    (made,) = run(values, Path("runs") / "vdit").values()
    contents = made[0].read_bytes()
    monkeypatch.setattr(trainer, "make_objective", None)
    monkeypatch.setattr(OpenSoraPlanModel, "load", None)
    assert run(values, tmp_path / "runs" / "vdit") == {"r-10": [tmp_path / made[0]]}
    shutil.move("runs", "elsewhere")
    assert run(values, tmp_path / "elsewhere" / "vdit")["r-10"][0].read_bytes() == contents


def test_a_lower_rate_for_the_plan_that_diverged_leaves_what_is_finished(values, tmp_path, caplog):
    values["search"]["thresholds"] = [10.0, 1e-9]
    made = run(values, tmp_path / "run")
    first, second = (files[0] for files in made.values())
    contents = first.read_bytes()
    second.unlink()  # as if it had diverged
    with pytest.raises(ValueError, match=r"knowledge-r-1e-09 was started with another .*learning_rate: 0\.01 -> 0\.02"):
        run(values, tmp_path / "run", knowledge_training={"learning_rate": 0.02})
    assert run(values, tmp_path / "run", knowledge_training={"learning_rate": 0.001}) == made
    assert first.read_bytes() == contents and second.is_file()
    told = "knowledge-r-10 was finished with training.learning_rate = 0.01, and is kept as it is."
    assert told in caplog.messages and (second.parents[1] / "config.1.toml").is_file()
    with pytest.raises(ValueError, match=r"was made with another configuration .*training\.seed: 0 -> 1"):
        run(values, tmp_path / "run", knowledge_training={"learning_rate": 0.001, "seed": 1})


def test_a_plan_that_changed_under_a_run_is_refused_by_what_it_computes(base, tmp_path):  # noqa: F811
    file, folder = tmp_path / "plan.json", tmp_path / "run"
    TilePlan.uniform(2).save(file)
    named = config(base, "knowledge", objective={"plan": str(file)})
    claim_run(named, folder)
    TilePlan.uniform(1).save(file)
    with pytest.raises(ValueError, match=r"objective\.plan: 'all:2' -> 'all:1'.*its plan is plan\.json there"):
        claim_run(named, folder)
    claim_run(config(base, "knowledge", objective={"plan": str(folder / "plan.json")}), folder)
    claim_run(config(base, "knowledge", objective={"plan": "2:6"}), folder)


def test_weights_that_changed_under_a_run_are_refused(base, tmp_path):  # noqa: F811
    claim_run(config(base), tmp_path / "run")
    weights, entries = read_state_dict(base)
    save_safetensors(base, {name: torch.zeros_like(value) for name, value in weights.items()}, entries)
    with pytest.raises(ValueError, match=r"model\.transformer: 'weights \w+' -> 'weights \w+'"):
        claim_run(config(base), tmp_path / "run")


@pytest.mark.parametrize("source", ["teacher", "videos"])
def test_data_that_changed_under_a_run_are_refused(base, tmp_path, source):  # noqa: F811
    folder, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        (data / f"{name}.mp4").write_bytes(b"1234")
        (data / f"{name}.txt").write_text(f"{name}\n")
    section = (
        {"source": source, "captions": str(data / "a.txt")}
        if source == "teacher"
        else {"source": source, "folder": str(data)}
    )
    started = replace(config(base), data=DataConfig(**section))
    claim_run(started, folder)
    claim_run(started, folder)
    (data / "a.txt").write_text("another\n")
    with pytest.raises(ValueError, match=r"run was started with another configuration \(data: '. \w+ \(\w+\)' -> "):
        claim_run(started, folder)
    (data / "a.txt").write_text("a\n")
    (data / "b.mp4").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"data: '2 videos") if source == "videos" else nullcontext():
        claim_run(started, folder)
    record = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({name: x for name, x in record.items() if name != "data"}))
    claim_run(started, folder)  # as earlier versions left it
    shutil.rmtree(data)
    claim_run(started, folder, finished=True)  # what is finished needs none


def test_a_search_by_the_output_tells_the_texts_it_measured_from_others(tmp_path):
    model = open_model(wan(tmp_path / "model"))
    clips = [ClipSet(torch.zeros(1, 4, 3, 4, 4), [(text,)]) for text in "ab"]
    for error, same in (("output", False), ("attention", True)):
        first, second = (
            search_stage.search_settings(SearchConfig(error=error), model, c, segments=4, steps=4) for c in clips
        )
        assert (first == second) is same


def test_what_changed_in_the_models_folder_under_a_run_is_refused(tmp_path):
    """And a search under another schedule is another."""
    model, folder = wan(tmp_path / "model"), tmp_path / "run"
    started = DistillConfig("consistency", ConsistencyConfig(segments=2), model)
    clips = ClipSet(torch.zeros(1, 4, 3, 4, 4), [("a",)])
    stamp = lambda: search_stage.search_settings(SearchConfig(), open_model(model), clips, segments=4, steps=4)  # noqa: E731
    claim_run(started, folder)
    claim_run(started, folder)
    before, file = stamp(), tmp_path / "model" / "scheduler" / "scheduler_config.json"
    kept = file.read_text()
    file.write_text(json.dumps({**json.loads(kept), "flow_shift": 8.0}))
    with pytest.raises(ValueError, match=r"the schedule in model\.path: .*1\.0.* -> .*8\.0"):
        claim_run(started, folder)
    assert stamp()["schedules"] != before["schedules"]
    file.write_text(kept)
    assert stamp() == before
    module = open_model(model).load()
    module.load_state_dict({name: 2 * x for name, x in module.state_dict().items()})
    module.save_pretrained(tmp_path / "model" / "transformer")
    with pytest.raises(ValueError, match=r"the transformer in model\.path: 'weights .* -> 'weights"):
        claim_run(started, folder)
    record = json.loads((folder / "settings.json").read_text())
    old = {name: value for name, value in record.items() if "in model.path" not in name}
    (folder / "settings.json").write_text(json.dumps(old))
    claim_run(started, folder)  # as earlier versions left it
    assert json.loads((folder / "settings.json").read_text()).keys() == record.keys()


def test_a_run_without_a_record_keeps_to_its_paths(base, tmp_path):  # noqa: F811
    """As an earlier version left it."""
    first, second, folder = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "run"
    for file in (first, second):
        TilePlan.uniform(2).save(file)
    claim_run(config(base, "knowledge", objective={"plan": str(first)}), folder)
    for name in ("settings.json", "plan.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"objective\.plan: .*a\.json' -> "):
        claim_run(config(base, "knowledge", objective={"plan": str(second)}), folder)
    claim_run(config(base, "knowledge", objective={"plan": str(first)}), folder)
    claim_run(config(base, "knowledge", objective={"plan": str(second)}), folder)
