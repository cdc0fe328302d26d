"""The order in which a recipe runs its stages, and what each hands on to the next."""

import json
import re
import sys

import pytest
import torch

from efficient_vdit_core import cli
from efficient_vdit_core.assets import recipe_path
from efficient_vdit_core.distill.config import DataConfig, read_toml
from efficient_vdit_core.distill.forecast import recipe as forecast_parts
from efficient_vdit_core.distill.forecast.recipe import forecast, steps_within
from efficient_vdit_core.distill.objectives.consistency import check_pair
from efficient_vdit_core.distill.runs import recipe
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.models.distilled import DistillMetadata
from efficient_vdit_core.models.opensora_plan.captions import NEGATIVE_PROMPT, TEMPLATES
from efficient_vdit_core.search import parse_candidates
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors
from efficient_vdit_core.tiles import TokenGrid

PLAN = {"schema_version": 1, "reference_frames": 1}


@pytest.fixture
def calls(monkeypatch):
    """Every stage leaves its name in a file instead of training."""
    found = []

    def distill(config, folder, *, any_rate):
        found.append((folder.name, config))
        lora = config.model.train == "lora"
        file = folder / "lora.safetensors" if lora else folder / "transformer" / "diffusion_pytorch_model.safetensors"
        few = config.method == "consistency"
        about = DistillMetadata(
            config.method, 4, 4 if few else 12, guidance=3.0 if few else None, plan=None if few else PLAN
        )
        save_safetensors(file, {"w": torch.ones(2) * len(found)}, about.to_entry())
        return file

    monkeypatch.setattr(recipe, "distill", distill)
    monkeypatch.setattr(
        ThreeStages,
        "plans",
        lambda self, name, weights, segments=0: found.append((name, weights)) or {"r-0.1": "p.json"},
    )
    return found


def make(tmp_path, **values):
    return ThreeStages(
        RecipeConfig.from_dict({"consistency": {"segments": 4, "teacher_steps": 12, "guidance": 3.0}, **values}),
        tmp_path,
    )


def test_the_papers_order(calls, tmp_path):
    result = make(tmp_path).run()
    assert [name for name, _ in calls] == ["consistency", "plans", "knowledge-r-0.1"]
    dense = tmp_path / "consistency" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert calls[1][1] == dense and calls[2][1].model.transformer == str(dense)
    assert calls[2][1].objective.plan == "p.json" and calls[2][1].method == "knowledge"
    assert list(result) == ["r-0.1"] and calls[0][1].data.cache == calls[2][1].data.cache == str(tmp_path / "cache")


def test_knowledge_first_trains_the_sparse_base_for_guidance(calls, tmp_path):
    make(tmp_path, order="knowledge-first").run()
    assert [name for name, _ in calls] == ["plans", "knowledge-r-0.1", "consistency-r-0.1"]
    knowledge, consistency = calls[1][1], calls[2][1]
    assert (knowledge.objective.segments, knowledge.objective.steps, knowledge.data.negative_share) == (4, 12, 0.1)
    assert knowledge.model.transformer == "" and "knowledge-r-0.1" in consistency.model.transformer
    assert consistency.objective.plan == "p.json" and consistency.data.negative_share == 0.0


def test_merging_adds_the_changes_of_both(calls, tmp_path, monkeypatch):
    base = tmp_path / "base.safetensors"
    save_safetensors(base, {"w": torch.ones(2) * 10})
    model = type("M", (), {"transformer_file": base, "config_entry": lambda self: {"a": 1}})()
    monkeypatch.setattr(recipe, "open_model", lambda config: model)
    monkeypatch.setattr(ThreeStages, "check", lambda self: None)
    ((file,),) = make(tmp_path, order="merge").run().values()
    assert [name for name, _ in calls] == ["plans", "knowledge-r-0.1", "consistency"]
    weights, metadata = read_state_dict(file)
    assert (
        weights["w"].tolist() == [10 + (2 - 10) + (3 - 10)] * 2
    )  # the knowledge run came second, the consistency run third
    about = DistillMetadata.from_entries(metadata)
    assert about is not None and json.loads(metadata["config"]) == {"a": 1}
    assert (about.steps, about.guidance, about.plan) == (4, 3.0, PLAN), "sampled as the few-step model, under the plan"


@pytest.mark.parametrize("order", ["consistency-first", "knowledge-first"])
def test_loras_of_both_stages_belong_together(calls, tmp_path, order):
    (files,) = make(tmp_path, order=order, model={"train": "lora"}).run().values()
    first, second = (
        ("consistency", "knowledge-r-0.1") if order == "consistency-first" else ("knowledge-r-0.1", "consistency-r-0.1")
    )
    assert files == [tmp_path / first / "lora.safetensors", tmp_path / second / "lora.safetensors"]
    models = {name: stage.model for name, stage in calls if name in (first, second)}
    assert models[first].loras == () and models[second].loras == (str(files[0]),)
    assert models[second].transformer == "", "the weights stay as they are; the first LoRA is kept beside them"


@pytest.mark.parametrize(
    ("consistency", "asked", "steps"),
    [({}, {}, 4), ({"steps": 8}, {}, 8), ({}, {"steps": 6}, 6), ({"steps": 8}, {"steps": 6}, 6)],
)
def test_a_plan_alone_is_searched_and_trained_at_the_samplers_steps(calls, tmp_path, consistency, asked, steps):
    """Without a stage 1 behind it there are no other times: neither does its result say more steps than are taken."""
    consistency = {"segments": 4, "teacher_steps": 12, **consistency}
    stages = make(tmp_path, order="knowledge-only", consistency=consistency, knowledge=asked)
    stages.run()
    ((_, stage),) = calls[1:]
    assert (stage.objective.segments, stage.objective.steps) == (4, steps)
    assert stages.search_schedule(4) == {"segments": 4, "steps": steps}
    (planned,) = stages.planned()
    assert planned.objective.steps == steps


def test_the_steps_of_stage_1_are_foretold_of_stage_3(tmp_path):
    stages = make(tmp_path, consistency={"segments": 4, "steps": 8, "teacher_steps": 12})
    assert [stage.objective.steps for stage in stages.planned()] == [8, 8]


def test_a_plans_own_segments_are_those_of_its_search(calls, tmp_path):
    """Two networks or stages of one recipe may be told apart by them; steps of others do not fit."""
    consistency = {"segments": 2, "steps": 3, "teacher_steps": 12}
    alone = make(tmp_path, order="knowledge-only", consistency=consistency, knowledge={"segments": 4, "steps": 6})
    assert alone.segments == 4 and alone.search_schedule(alone.segments) == {"segments": 4, "steps": 6}
    (planned,) = alone.planned()
    assert (planned.objective.segments, planned.objective.steps) == (4, 6)
    behind = make(tmp_path, consistency=consistency, knowledge={"segments": 4}).planned()[1].objective
    assert (behind.segments, behind.steps) == (4, 0)


def test_without_a_target_nothing_is_foretold_either(tmp_path):
    with pytest.raises(ValueError, match="no plan would be searched"):
        next(forecast(make(tmp_path, search={"thresholds": []})))


def test_merging_counts_no_change_twice():
    with pytest.raises(ValueError, match="both begin with model.init, whose changes would count twice"):
        RecipeConfig.from_dict({"order": "merge", "model": {"init": "a.safetensors"}})


@pytest.mark.parametrize("order", ["merge", "knowledge-first"])
def test_steps_that_the_order_does_not_hear_are_refused(order):
    with pytest.raises(ValueError, match="knowledge.steps is 6, but with the order"):
        RecipeConfig.from_dict({"order": order, "knowledge": {"steps": 6}})


@pytest.mark.parametrize("stage", ["consistency", "knowledge"])
def test_a_plan_that_a_recipe_would_not_use_is_refused(stage):
    with pytest.raises(ValueError, match=f"{stage}.plan is '1:7', but a recipe searches its plans itself"):
        RecipeConfig.from_dict({stage: {"plan": "1:7"}})


def test_merging_forgets_no_lora():
    with pytest.raises(ValueError, match="order is .merge.*model.loras lie beside these"):
        RecipeConfig.from_dict({"order": "merge", "model": {"train": "lora", "loras": ["a.safetensors"]}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": {"speedups": [50.0]}}, "at most"),
        ({"search": {"thresholds": [-1.0]}}, "threshold is -1"),
        ({"search": {"candidates": "8"}}, "all mean full"),
        ({"search": {"thresholds": []}}, "no plan would be searched"),
        ({"search": {"speedups": [2.0, 2.0000001]}}, "agree in six digits"),
        ({"knowledge_training": {"optimizer": "adamw8bit"}}, "bitsandbytes"),
        ({"knowledge_training": {"tensorboard": True}}, "needs the package 'tensorboard'"),
        ({"model": {"train": "lora", "lora_rank": 6}, "knowledge_training": {"optimizer": "muon"}}, "LoRA of rank 6"),
        ({"data": {"source": "videos", "folder": "gone"}}, "no folder 'gone'"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_once(calls, tmp_path, monkeypatch, values, message):
    for package in ("bitsandbytes", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **values).run()
    assert calls == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"knowledge_training": {"host_average": True}}, "host_average is true, but under FSDP2"),
        ({"model": {"host_teacher": True}}, "host_teacher is true, but under FSDP2"),
        ({"knowledge_training": {"optimizer": "adamw8bit"}}, "do not know FSDP2's sharded weights"),
    ],
)
def test_what_a_later_stage_would_refuse_of_sharded_weights_is_refused_at_once(
    calls, tmp_path, monkeypatch, values, message
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **values).run()
    assert calls == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "backwards"}, "order is 'backwards'"),
        ({"table": {}}, "'table'"),
        ({"search": {"k": 1}}, "'k'"),
        ({"search": {"candidates": "two"}}, "'two'"),
        ({"knowledge_training": {"precision": "bf16"}}, "float32 and bf16"),
    ],
)
def test_wrong_recipes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig.from_dict(values)


# The paper's Table 1: sparsities in percent, by the recipe and its latent frames.
TABLE_1 = {
    "three_stage": (8, [64.38, 45.47, 29.88, 17.60]),
    "three_stage_93": (24, [72.05, 64.98, 51.88, 40.30, 21.51]),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_the_recipes_of_open_sora_plan_train_it_as_it_is_used(name, caplog):
    frames, sparsities = TABLE_1[name]
    recipe = RecipeConfig.from_dict(read_toml(recipe_path(name)))
    check_pair(recipe.consistency, "epsilon")
    assert not caplog.records
    assert (recipe.data.negative, recipe.data.template) == (NEGATIVE_PROMPT, TEMPLATES["a"])
    recipe.search.check(frames)
    tokens = TokenGrid(frames, 45, 80)  # of 720p
    found = [100 * pattern.block_sparsity(tokens) for pattern in parse_candidates(recipe.search.candidates)]
    assert found == pytest.approx(sparsities, abs=0.006)


def test_a_template_words_each_caption_once():
    data = DataConfig(template="(best), {}.")
    assert data.prompt("a {} cat") == "(best), a {} cat." and DataConfig().prompt("a cat") == "a cat"
    for wrong in ("best", "{} and {}"):
        with pytest.raises(ValueError, match="data.template is"):
            DataConfig(template=wrong)


def test_settings_on_the_command_line_win(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "efficient_vdit_core.distill.runs.trainer.distill", lambda config, folder: seen.append(config) or folder
    )
    file = tmp_path / "c.toml"
    file.write_text('method = "consistency"\n[training]\nsteps = 5\nbatch = 2\n')
    changes = ["training.steps=7", "objective.guidance=[1.0, 4.0]", "model.path=some folder"]
    overrides = [word for change in changes for word in ("--set", change)]
    assert cli.main(["distill", "consistency", "--config", str(file), "--out", str(tmp_path / "run"), *overrides]) == 0
    config = seen[0]
    assert (config.training.steps, config.training.batch, config.objective.guidance) == (7, 2, (1.0, 4.0))
    assert config.model.path == "some folder"


def test_the_memory_is_told_before_anything_is_trained(calls, capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[consistency_training]\nbatch = 4\n[knowledge_training]\nbatch = 4\n")
    asked = ["recipe", "three-stage", "--config", str(file), "--out", str(tmp_path / "run"), "--plan-memory", "--gpu"]
    assert cli.main([*asked, "24GB"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("consistency: ") and told.count(", fits into 24.0 GiB") == 3
    assert told.count("  activations ") == 3 and told.count("  in the host memory ") == 1
    assert "\nsearch: " in told and "\nall: under a minute at 100 TFLOP/s\n" in told
    assert cli.main([*asked, "80GB"]) == 0 and "at 300 TFLOP/s\n" in capsys.readouterr().out
    assert cli.main([*asked, "0.05"]) == 1
    told = capsys.readouterr().out
    assert (
        "does not fit into 0.050 GiB" in told
        and "  model.gradient_checkpointing = true: " in told
        and ", fits\n" in told
    )
    changes = {line.split()[0] for line in told.splitlines() if "_training." in line}
    assert {"consistency_training.batch", "knowledge_training.batch"} <= changes and "  training." not in told
    assert cli.main([*asked, "big"]) == 2
    assert "expected a GPU's memory such as 24GB" in capsys.readouterr().err
    for option, value in (("--gpu", "24GB"), ("--tflops", "100"), ("--hours", "10")):
        assert cli.main([*asked[:-2], option, value]) == 2
        assert f"{option} is given without --plan-memory" in capsys.readouterr().err
    assert calls == [] and not (tmp_path / "run").exists()


def test_a_part_is_told_before_the_next_is_looked_at(monkeypatch, capsys, tmp_path):
    """A full-size model takes seconds for each, and a slow processor minutes."""
    told = []
    plan_search = forecast_parts.plan_search
    monkeypatch.setattr(
        forecast_parts, "plan_search", lambda *a, **k: told.append(capsys.readouterr().out) or plan_search(*a, **k)
    )
    file = tmp_path / "c.toml"
    file.write_text("[consistency_training]\nbatch = 2\n[knowledge_training]\nbatch = 2\n")
    asked = ["recipe", "three-stage", "--config", str(file), "--out", str(tmp_path / "run"), "--plan-memory"]
    assert cli.main(asked) == 0
    assert told[0].startswith("consistency: ") and "search" not in told[0]


def test_mistakes_on_the_command_line_are_told(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["distill", "consistency", *out, "--set", "steps"]) == 2
    assert "SECTION.KEY=VALUE" in capsys.readouterr().err
    assert cli.main(["distill", "knowledge", *out, "--set", "training.step=3"]) == 2
    assert "'step'" in capsys.readouterr().err
    assert cli.main(["distill", "knowledge", *out, "--set", "method.x=3"]) == 2
    assert "no section" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_steps_that_a_night_has_time_for(tmp_path):
    """Each training is shortened alike; one that is run for each of three plans counts three times."""
    values = {
        "search": {"thresholds": [0.1, 0.2], "speedups": [2.0]},
        "consistency_training": {"steps": 40, "batch": 2},
    }
    values["knowledge_training"] = {"steps": 20, "batch": 2}
    for order, often in (("consistency-first", (1, 3)), ("knowledge-first", (3, 3)), ("merge", (1, 3))):
        parts = list(forecast(ThreeStages(RecipeConfig.from_dict({"order": order, **values}), tmp_path)))
        by_name = {part.name: part for part in parts}
        assert (by_name["consistency"].times, by_name["knowledge"].times) == often
        one, three = (by_name[name].work for name in ("consistency", "knowledge"))
        search = by_name["search"].hours(0.001)
        trained = sum(n * work.examples * work.flops for n, work in zip(often, (one, three), strict=True)) / 1e9 / 3600
        assert steps_within(parts, search + trained / 2, 0.001) == {"consistency": 20, "knowledge": 10}
        assert steps_within(parts, 10 * (search + trained), 0.001) == {"consistency": 40, "knowledge": 20}
        assert steps_within(parts, search / 2, 0.001) == {}
    assert [part.name for part in parts] == ["search", "knowledge", "consistency"]
    alone = forecast(ThreeStages(RecipeConfig.from_dict({"order": "knowledge-only", **values}), tmp_path))
    assert [part.name for part in alone] == ["search", "knowledge"]


def test_the_teachers_samples_count_where_they_are_the_data(tmp_path):
    """They come first and once, whatever the order, and are not shortened."""
    values = {f"{name}_training": {"steps": 20, "batch": 2} for name in ("consistency", "knowledge")}
    for order in ("consistency-first", "knowledge-first", "knowledge-only"):
        own = RecipeConfig.from_dict({"order": order, "data": {"source": "tinyworld"}, **values})
        sampled = RecipeConfig.from_dict({"order": order, "data": {"source": "teacher", "clips": 30}, **values})
        parts, (first, *others) = (list(forecast(ThreeStages(c, tmp_path))) for c in (own, sampled))
        assert first.name == "teacher's samples" and first.times == 1 and first.stage is None
        assert others and [(p.name, p.work) for p in others] == [(p.name, p.work) for p in parts]
        assert first.work.examples == 30 * 50 * 2
        assert set(steps_within([first, *others], 1.1 * first.hours(0.001), 0.001)) == {
            p.name for p in parts if p.stage
        }
        assert steps_within([first, *others], 0.9 * first.hours(0.001), 0.001) == {}


def test_it_is_told_what_one_gpu_does_alone(capsys, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat")
    data = f'[data]\nsource = "teacher"\ncaptions = "{(tmp_path / "captions.txt").as_posix()}"\n'
    (tmp_path / "c.toml").write_text(data + "[consistency_training]\nbatch = 2\n[knowledge_training]\nbatch = 2\n")
    asked = ["recipe", "three-stage", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]
    assert cli.main([*asked, "--plan-memory", "--tflops", "0.001", "--hours", "1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("teacher's samples: ") and "  409,600 forwards of " in told
    assert told.count("  by one GPU alone, while the others wait: on N GPUs that takes N times as long") == 1
    samples, consistency, search, knowledge = re.split(r"^(?=\w.*: .* into )", told, flags=re.MULTILINE)[1:]
    assert ["by one GPU alone" in part for part in (samples, consistency, search, knowledge)] == [
        False,
        False,
        True,
        False,
    ]
    assert "1 hours are too few for a step of each training: fewer data.clips or data.frames" in told
