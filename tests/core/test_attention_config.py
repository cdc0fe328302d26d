"""A plan as an attention-config LoRA, read back as ComfyUI's documentation says that it is read."""

import json

import pytest
from safetensors.numpy import load_file

from efficient_vdit_core import cli
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern


def h3_plan(**changes) -> TilePlan:
    """Of 50 layers: full, 2:22 and 12:12 in turn, at 24 latent frames."""
    patterns = tuple((TilePattern(None), TilePattern(2), TilePattern(12))[i % 3] for i in range(50))
    return TilePlan(**{"patterns": patterns, "family": "minimax_h3", "frames": 24, **changes})


def written(tmp_path, plan, *options):
    plan.save(tmp_path / "plan.json")
    target = tmp_path / "attention.safetensors"
    assert cli.main(["convert", "attention", str(tmp_path / "plan.json"), str(target), *options]) == 0
    assert all(value.dtype == "uint8" for value in load_file(target).values())
    return {name: json.loads(value.tobytes()) for name, value in load_file(target).items()}


def test_each_layer_that_is_not_full_attends_sparsely(tmp_path, capsys):
    entries = written(tmp_path, h3_plan(), "--tau", "1.5")
    expected = {f"diffusion_model.blocks.{i}.attn.comfy_attention.config" for i in range(50) if i % 3}
    assert entries.keys() == expected
    assert all(entry == [{"attention": "comfy_kitchen_sol", "tau": 1.5}] for entry in entries.values())
    assert "33 of 50 layers" in capsys.readouterr().out


def test_below_leaves_dense_what_the_plan_hardly_thins_and_int8_serves_the_rest(tmp_path):
    entries = written(tmp_path, h3_plan(), "--below", "0.5", "--int8")
    int8 = {"attention": "comfy_kitchen_int8"}
    assert len(entries) == 50
    for layer in range(50):
        entry = entries[f"diffusion_model.blocks.{layer}.attn.comfy_attention.config"]
        assert entry == ([{"attention": "comfy_kitchen_sol", "tau": 1.0}, int8] if layer % 3 == 1 else [int8])


def test_a_uniform_plan_with_dense_layers_counts_them_in_the_models_depth(tmp_path):
    plan = TilePlan(uniform_pattern=TilePattern(2), dense_layers=((0, 1), (-1, -1)), family="minimax_h3", frames=24)
    layers = {int(name.split(".")[2]) for name in written(tmp_path, plan)}
    assert layers == set(range(2, 49))


@pytest.mark.parametrize(
    "changes, options, said",
    [
        ({"family": "wan"}, [], "The plan is for wan, expected minimax_h3"),
        ({"patterns": (TilePattern(2),) * 30}, [], "has 30 layers, but the model has 50"),
        ({"frames": None}, [], "does not say for how many latent frames"),
        ({}, ["--below", "0.1"], "so the file would say nothing"),
        ({}, ["--below", "1.5"], "--below is 1.5, expected a number from 0 to 1"),
        ({}, ["--tau", "0"], "--tau is 0.0, expected a number above 0"),
    ],
)
def test_what_cannot_be_said_is_refused_and_writes_nothing(tmp_path, capsys, changes, options, said):
    h3_plan(**changes).save(tmp_path / "plan.json")
    target = tmp_path / "attention.safetensors"
    assert cli.main(["convert", "attention", str(tmp_path / "plan.json"), str(target), *options]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()
