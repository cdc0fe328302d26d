"""The recipes for large models, each run from its first stage to its last on a tiny model of that class."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import cogvideox, minimax_h3, opensora_plan, wan, wan_5b, wan_22

from efficient_vdit_core.assets import recipe_path
from efficient_vdit_core.cli import main
from efficient_vdit_core.distill.config import ModelConfig, read_toml
from efficient_vdit_core.distill.families.diffusers_model import DiffusersModel
from efficient_vdit_core.distill.families.minimax_h3 import MiniMaxH3Model
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.families.published_lora import merge_published
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.media.video import write_video
from efficient_vdit_core.models.distilled import DistillMetadata
from efficient_vdit_core.storage.weight_files import save_safetensors

# Recipe -> model, the latents of its own clips, what comes out, and its stages.
RECIPES = {
    "wan_1_3b": (wan, (21, 60, 104), 2, ("consistency", "knowledge")),
    "wan_ti2v_5b": (wan_5b, (31, 44, 80), 2, ("consistency", "knowledge")),
    "wan_1_3b_turbo": (wan, (21, 60, 104), 1, ("knowledge",)),
    "wan22_14b": (wan_22, (21, 60, 104), 2, ("consistency", "knowledge")),
    "wan22_14b_turbo": (wan_22, (21, 60, 104), 1, ("knowledge",)),
    "minimax_h3": (minimax_h3, (37, 48, 84), 2, ("consistency", "knowledge")),
    "minimax_h3_turbo": (minimax_h3, (37, 48, 84), 1, ("knowledge",)),
    "cogvideox_2b": (cogvideox, (13, 60, 90), 1, ("knowledge",)),
    # Their sizes stand in the checkpoints.
    "three_stage": (opensora_plan, None, 2, ("consistency", "knowledge")),
    "three_stage_93": (opensora_plan, None, 2, ("consistency", "knowledge")),
}
SMALL = {
    "data": {"source": "teacher", "clips": 2, "teacher_steps": 2, "frames": 13, "height": 64, "width": 64},
    "search": {"captions": 1, "thresholds": [0.9], "speedups": [], "candidates": "1,2"},
    "consistency_training": {"steps": 2, "optimizer": "adamw", "precision": "float32", "samples_every": 0, "accumulate": 1},
    "knowledge_training": {"steps": 2, "optimizer": "adamw", "precision": "float32", "accumulate": 1},
}  # fmt: skip


def published(folder, rank=2, seed=3, expert=""):
    """A LoRA for the tiny Wan in the names that ComfyUI's users have, with biases: each layer's change, and the file."""
    generator, lora, changes = torch.Generator().manual_seed(seed), {}, {}
    state = open_model(ModelConfig(path=str(folder), family="diffusers", expert=expert)).load().state_dict()
    names = {f"{a}.{theirs}": f"{b}.{ours}" for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn"))
             for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))}  # fmt: skip
    names |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    for block in range(4):
        for theirs, ours in names.items():
            out, into = state[f"blocks.{block}.{theirs}.weight"].shape
            down, up = (torch.randn(s, generator=generator) * 0.1 for s in ((rank, into), (out, rank)))
            bias, stem = torch.randn(out, generator=generator) * 0.1, f"diffusion_model.blocks.{block}.{ours}"
            lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff_b": bias}
            lora[f"{stem}.alpha"] = torch.tensor(1.0)
            changes |= {f"blocks.{block}.{theirs}.weight": up @ down / rank, f"blocks.{block}.{theirs}.bias": bias}
    lora |= {f"diffusion_model.blocks.{i}.norm3.diff": torch.zeros(24) for i in range(4)}
    save_safetensors(folder / "published.safetensors", lora, {})
    return changes, folder / "published.safetensors"


def published_h3(folder, rank=2, seed=3):
    """The same for MiniMax-H3, whose q, k and v are one layer and whose feed-forward has the gate first."""
    generator, lora, changes = torch.Generator().manual_seed(seed), {}, {}
    blocks = {"token_refiner.blocks.0": "token_refiner.refiner_blocks.0"}
    blocks |= {f"blocks.{i}": f"transformer_blocks.{i}" for i in range(4)}
    sizes = {"attn.qkv_proj": (192, 48), "attn.out_proj": (48, 64), "mlp.fc1": (192, 48), "mlp.fc2": (48, 96)}
    for ours, theirs in blocks.items():
        for layer, (out, into) in sizes.items():
            down, up = (torch.randn(s, generator=generator) * 0.1 for s in ((rank, into), (out, rank)))
            lora |= {
                f"diffusion_model.{ours}.{layer}.lora_A.weight": down,
                f"diffusion_model.{ours}.{layer}.lora_B.weight": up,
            }
            change = up @ down
            if layer == "attn.qkv_proj":
                rows = zip("qkv", change.chunk(3), strict=True)
                changes |= {f"{theirs}.attn.to_{part}.weight": x for part, x in rows}
            else:
                name = {"attn.out_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}[layer]
                gate_last = torch.cat(change.chunk(2)[::-1]) if layer == "mlp.fc1" else change
                changes[f"{theirs}.{name}.weight"] = gate_last
    save_safetensors(folder / "published.safetensors", lora, {})
    return changes, folder / "published.safetensors"


def turbo(folder, out, expert="", publish=published):
    file = out / "turbo.safetensors"
    which = ["--expert", expert] if expert else []
    assert (
        main(
            [
                "convert",
                "lora",
                str(folder),
                str(file),
                "--lora",
                str(publish(Path(folder), **({"expert": expert} if expert else {}))[1]),
                *which,
            ]
        )
        == 0
    )
    return file


def test_a_published_lora_is_merged_with_its_strength(tmp_path):
    where = wan(tmp_path)
    changes, lora = published(tmp_path)
    before = open_model(where).load().state_dict()
    assert merge_published(where.path, lora, tmp_path / "out.safetensors", 0.5) == len(changes) == 80
    after = open_model(replace(where, transformer=str(tmp_path / "out.safetensors"))).load().state_dict()
    for name, x in before.items():
        # Weights lie in bf16.
        torch.testing.assert_close(after[name], x + 0.5 * changes.get(name, torch.zeros(())), atol=5e-3, rtol=5e-3)


def test_a_scale_that_peft_wrote_beside_the_tensors_counts(tmp_path):
    where = wan(tmp_path)
    down, up = torch.randn(2, 24) * 0.1, torch.randn(24, 2) * 0.1
    name, about = "transformer.blocks.0.attn1.to_q", {"transformer.r": 2, "transformer.lora_alpha": 8}
    lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    before = open_model(where).load().state_dict()["blocks.0.attn1.to_q.weight"]
    for more, says in (
        ({}, ""),
        ({"transformer.rank_pattern": {"to_q": 4}}, "ranks of their own"),
    ):
        save_safetensors(tmp_path / "p.safetensors", lora, {"lora_adapter_metadata": json.dumps({**about, **more})})
        if says:
            with pytest.raises(ValueError, match=says):
                merge_published(where.path, tmp_path / "p.safetensors", tmp_path / "out.safetensors")
            continue
        merge_published(where.path, tmp_path / "p.safetensors", tmp_path / "out.safetensors")
        after = open_model(replace(where, transformer=str(tmp_path / "out.safetensors"))).load().state_dict()
        torch.testing.assert_close(after["blocks.0.attn1.to_q.weight"], before + 4 * up @ down, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize(("alpha", "strength"), [({}, 1.0), ({"alpha": "8"}, 4.0)])
def test_a_lora_for_minimax_h3_is_merged_with_the_alpha_that_its_file_says(alpha, strength, tmp_path):
    """Files for it say alpha in their metadata or leave it out: then it is the rank, here 2."""
    where = minimax_h3(tmp_path)
    changes, lora = published_h3(tmp_path)
    save_safetensors(lora, load_file(lora), alpha)
    before = open_model(where).load().state_dict()
    assert merge_published(where.path, lora, tmp_path / "out.safetensors") == len(changes) == 30
    after = open_model(replace(where, transformer=str(tmp_path / "out.safetensors"))).load().state_dict()
    for name, x in before.items():
        want = x + strength * changes.get(name, torch.zeros(()))
        torch.testing.assert_close(after[name], want, atol=1e-2, rtol=1e-2, msg=name)  # weights lie in bf16


def test_what_cannot_be_merged_into_minimax_h3_is_told(tmp_path):
    where = minimax_h3(tmp_path)
    _, lora = published_h3(tmp_path)
    state, stem = load_file(lora), "diffusion_model.blocks.0.attn.out_proj"
    pruned = {"diffusion_model.blocks.0.adaln_proj.linear.lora_A.weight": torch.ones(2, 5),
              "diffusion_model.blocks.0.adaln_proj.linear.lora_B.weight": torch.ones(864, 2)}  # fmt: skip
    for more, about, says in (
        ({f"{stem}.diff_b": torch.ones(48)}, {}, "diffusers cannot read the LoRA"),
        ({f"{stem}.dora_scale": torch.ones(48)}, {}, "kinds that diffusers leaves out"),
        (pruned, {}, "is for another model: 1 of its 31 changes"),
        ({}, {"alpha": "many"}, "says that its alpha is 'many', expected a number"),
    ):
        save_safetensors(lora, {**state, **more}, about)
        with pytest.raises(ValueError, match=says) as told:
            merge_published(where.path, lora, tmp_path / "out.safetensors")
        assert len(str(told.value)) <= 400 and not (tmp_path / "out.safetensors").exists()


def test_a_lora_for_another_model_and_one_that_changes_norms_are_refused(tmp_path, capsys):
    where = wan(tmp_path)
    _, lora = published(tmp_path)
    state = load_file(lora)
    norms = {**state, "diffusion_model.blocks.0.norm3.diff": torch.ones(24)}
    save_safetensors(tmp_path / "norms.safetensors", norms, {})
    wide = {k: torch.cat([x, x], -1) if k.endswith("down.weight") else x for k, x in state.items()}
    save_safetensors(tmp_path / "wide.safetensors", wide, {})
    for file, says in (
        ("norms", "changes 1 tensors of kinds that diffusers leaves out, such as diffusion_model.blocks.0.norm3.diff"),
        ("wide", "is for another model: 40 of its 80 changes"),
    ):
        lora = ["--lora", str(tmp_path / f"{file}.safetensors")]
        assert main(["convert", "lora", where.path, str(tmp_path / "x.safetensors"), *lora]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()
    for name in ("patch_embedding.diff_b", "blocks.0.modulation.diff", "time_projection.1.diff_b"):
        save_safetensors(tmp_path / "more.safetensors", {**state, f"diffusion_model.{name}": torch.ones(3)}, {})
        with pytest.raises(ValueError, match=r"changes 1 tensors of kinds that diffusers leaves out"):
            merge_published(where.path, tmp_path / "more.safetensors", tmp_path / "x.safetensors")
    assert main(["convert", "lora", where.path, str(tmp_path / "x.safetensors")]) == 2
    assert "--lora is missing" in capsys.readouterr().err


def videos(folder):
    """Two clips with captions beside them."""
    folder.mkdir()
    for name, text in (("a", "a red cat"), ("b", "a blue dog")):
        frames = np.random.default_rng(len(text)).integers(0, 255, (13, 64, 64, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", frames, fps=16, metadata={})
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(params=[name for name, (_, latents, *_) in RECIPES.items() if latents])
def recipe(request):
    return request.param, read_toml(recipe_path(request.param))


def encode_video(frames):
    """Latents of 13 frames of 64 x 64 pixels."""
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(int(frames.sum())))


@pytest.mark.parametrize(
    ("name", "expert"),
    [(n, e) for n, (build, *_) in RECIPES.items() for e in (("high", "low") if build is wan_22 else ("",))],
)
def test_every_stage_runs_on_a_tiny_model_of_that_class(name, expert, tmp_path, monkeypatch):
    values = read_toml(recipe_path(name))
    torch.manual_seed(0)
    build, _, files, stages = RECIPES[name]
    where, words = build(tmp_path), 512 if build is not cogvideox else 5
    seen = []

    def encode(texts):
        seen.extend(texts)
        generator = torch.Generator().manual_seed(len(texts[0]))
        return torch.randn(len(texts), words, 8, generator=generator), torch.ones(len(texts), words, dtype=torch.long)

    for kind in (DiffusersModel, MiniMaxH3Model, OpenSoraPlanModel):
        monkeypatch.setattr(kind, "text_encoder", lambda *_: encode)
        monkeypatch.setattr(kind, "encoder_packages", ())
    captions = tmp_path / "captions.txt"
    captions.write_text("a red cat\na blue dog\n")
    model = {"path": where.path, "device": "cpu", "dtype": "float32", "lora_rank": 2, "expert": expert}
    model |= {"transformer": where.transformer, "text_encoder": ""}
    if name.endswith("_turbo"):
        publish = published_h3 if build is minimax_h3 else published
        model["transformer"] = str(turbo(where.path, tmp_path, expert, publish))
    data = {**SMALL["data"], "captions": str(captions)}
    if build is minimax_h3:
        data |= {"frames": 22, "guidance": 1.0}
    if expert:  # which cannot sample alone
        data |= {"source": "videos", "folder": str(videos(tmp_path / "videos"))}
        monkeypatch.setattr(DiffusersModel, "video_encoder", lambda *_: encode_video)
    small = {**SMALL, "model": {**values["model"], **model} if build is minimax_h3 else model, "data": data}
    merged = {s: {**values.get(s, {}), **small.get(s, {})} for s in values.keys() | small.keys() if s != "order"}
    if len(stages) == 1:
        del merged["consistency_training"]
    results = ThreeStages(RecipeConfig.from_dict({"order": values["order"], **merged}), tmp_path / "run").run()
    assert len(results) == 1 and values["data"].get("negative", "") in seen
    (found,) = results.values()
    assert len(found) == files
    about = []
    for file in found:
        with safe_open(file, "pt") as opened:
            about.append(DistillMetadata.from_entries(opened.metadata()))
            assert len(opened.keys()) > 0
    assert [a.method for a in about] == list(stages) and {a.expert for a in about} == {expert}
    assert about[-1].tile_plan is not None and about[-1].plan == json.loads(about[-1].tile_plan.to_json())


def test_the_clips_are_those_that_the_model_was_trained_on(recipe, tmp_path):
    name, values = recipe
    build, latents, *_ = RECIPES[name]
    model = open_model(build(tmp_path))
    shape = model.latent_shape(model.size(0, 0, 0))
    assert shape[1:] == latents
    recipe = RecipeConfig.from_dict(values)
    recipe.search.check(model.latent_shape(model.size(recipe.data.frames, 0, 0))[1])


def all_of(module):
    """Parameters and buffers, the ones that no file has as well."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_norms_stay_in_float32_as_diffusers_reads_them(tmp_path):
    where = wan(tmp_path)
    model = open_model(replace(where, dtype="bfloat16"))
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    read, own = (all_of(model.load(weights)) for weights in ("", str(file)))
    assert {torch.float32, torch.bfloat16} == {x.dtype for x in own.values()}
    assert read.keys() == own.keys() and all(
        torch.equal(read[n], x) and read[n].dtype == x.dtype for n, x in own.items()
    )
    assert {n: x.dtype for n, x in all_of(model.skeleton()).items()} == {n: x.dtype for n, x in own.items()}


@pytest.mark.parametrize(("build", "multiple"), [(wan_5b, 32), (wan, 16), (cogvideox, 16)])
def test_a_size_of_which_no_whole_tokens_can_be_made_is_refused_at_once(tmp_path, build, multiple):
    model = open_model(build(tmp_path))
    assert model.size(5, 22 * multiple, 0)[1] == 22 * multiple
    told = f"data.height is .*a multiple of {multiple}, .* Set it to {22 * multiple} or {23 * multiple}"
    with pytest.raises(ValueError, match=told):
        model.size(5, 22 * multiple + multiple // 2, 0)


def test_a_step_s_time_may_stand_at_every_token_of_the_5b(tmp_path):
    """diffusers' pipeline gives the 5B a time for each token; where they are all alike, one for the video is the same."""
    model = open_model(wan_5b(tmp_path))
    module = model.load().eval()
    z, text = torch.randn(1, 48, 3, 4, 6), torch.randn(1, 5, 8)
    with torch.no_grad():
        one = module(hidden_states=z, timestep=torch.tensor([400.0]), encoder_hidden_states=text, return_dict=False)[0]
        every = torch.full((1, 3 * 2 * 3), 400.0)
        torch.testing.assert_close(
            module(hidden_states=z, timestep=every, encoder_hidden_states=text, return_dict=False)[0], one
        )
