"""The adapter for MiniMax-H3, on a tiny random one, against diffusers' schedulers, its blocks and an explicit mask."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from small_models import LAYERS, minimax_h3

from efficient_vdit_core.distill.config import DistillConfig, ModelConfig
from efficient_vdit_core.distill.families.cpu_offload import bytes_on_host
from efficient_vdit_core.distill.families.minimax_h3_clip import PATCH, ClipShape, latent_frames, sound_latents
from efficient_vdit_core.distill.families.model import sparse_options
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.forecast.advice import advice
from efficient_vdit_core.distill.forecast.memory import plan_memory
from efficient_vdit_core.distill.lora.files import attach_frozen, comfy_lora, merged, start_from
from efficient_vdit_core.distill.lora.layers import adapted, add_lora
from efficient_vdit_core.distill.objectives.rollout import roll_down, trajectory
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.storage.weight_files import save_safetensors
from efficient_vdit_core.tiles import TilePattern

diffusers = pytest.importorskip("diffusers")

# 22 frames of 96 x 160 pixels: 7 latent frames of 3 x 5 tokens, and 37 latents of sound on each side.
T, H, W, WORDS = 7, 6, 10, 5
SHAPE = ClipShape(24, 32, T, H, W)


@pytest.fixture
def h3(tmp_path):
    return open_model(minimax_h3(tmp_path))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(words=WORDS, seed=3):
    return noise(1, words, 8, seed=seed), torch.ones(1, words, dtype=torch.long)


def as_diffusers(module, video, sound, words, times):
    """The forward as diffusers' blocks make it: velocities towards the data of ``video`` (C, T, H, W) and ``sound`` rows."""
    from diffusers.modular_pipelines.minimax_h3 import before_denoise as blocks

    packed = blocks.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(len(words), dtype=torch.long), T, H, W, len(sound) // 2, (1, 2, 2), 2, 2, 0
    )
    positions, tags, of_video, of_sound, of_text, *_ = packed
    distinct, indices = blocks.MiniMaxH3SetTimestepsStep.build_row_timesteps(
        of_video, of_sound, 0, 0, len(words), *map(float, times), 0.999, 1.0
    )
    rows = blocks.patchify_video_latents(video[None], (1, 2, 2))
    return module(
        hidden_states=rows[None], audio_hidden_states=sound[None], encoder_hidden_states=words[None], timestep=distinct,
        timestep_indices=indices, token_tags=tags, position_ids=positions, video_indices=of_video, audio_indices=of_sound,
        text_indices=of_text, return_dict=False,
    )  # fmt: skip


def test_a_clip_has_the_sizes_of_diffusers_blocks(h3):
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as blocks

    for frames in range(22, 363, 17):
        assert latent_frames(frames) == blocks.video_latent_num_frames(frames, 17, 5)
        assert sound_latents(latent_frames(frames)) == blocks.audio_latent_num_frames(frames)
    assert h3.size(0, 0, 0)[1:] == blocks.resolve_canvas_size(16, 9, 32, 768, 768 * 1344)
    assert h3.latent_shape(h3.size(22, 96, 160)) == SHAPE.state
    video, sound, rest = noise(24, T, H, W), noise(74, 32), noise(SHAPE.state[0] * T * H * W - 24 * T * H * W - 74 * 32)
    for ours, given in zip(SHAPE.unpack(SHAPE.pack(video, sound, rest)), (video, sound, rest), strict=True):
        assert torch.equal(ours, given)


@pytest.mark.parametrize("steps", [4, 9])
def test_a_rollout_is_that_of_diffusers_two_schedulers(h3, steps):
    """Euler steps of pictures and sound, each down a schedule of its own, in which the velocity points to the data."""
    module, (words, mask) = h3.load().eval(), condition()
    video, sound = noise(24, T, H, W), noise(74, 32, seed=1)
    start = SHAPE.pack(video, sound, torch.zeros_like(SHAPE.unpack(torch.zeros(SHAPE.state))[2]))
    schedules = [diffusers.MiniMaxH3Scheduler(shift=shift) for shift in (12.0, 3.0)]
    for schedule in schedules:
        schedule.set_timesteps(steps + 1)
    assert [len(s.timesteps) for s in schedules] == [steps, steps]

    def network(z, time):
        return h3.predict(module, z, time, (words, mask))

    way = list(trajectory(network, h3.path, h3.prediction, start[None], segments=steps))
    for (_, z), times in zip(way, zip(*(s.timesteps for s in schedules), strict=True), strict=True):
        with torch.no_grad():
            to_data, sound_to_data = as_diffusers(module, video, sound, words[0], times)
        rows = to_data[0].view(T, H // 2, W // 2, 24, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(24, T, H, W)
        video = schedules[0].step(rows, times[0], video, return_dict=False)[0]
        sound = schedules[1].step(sound_to_data[0], times[1], sound, return_dict=False)[0]
        ours, carried, rest = SHAPE.unpack(z[0])
        level, of_sound = (float(s.sigmas[s.step_index]) for s in schedules)
        torch.testing.assert_close(ours, video, atol=2e-5, rtol=1e-5)
        ratio = of_sound / level if level else 1 / 4
        torch.testing.assert_close(carried * ratio, sound, atol=2e-5, rtol=1e-5)
    assert rest.abs().max() == 0


def test_what_is_left_over_is_known(h3):
    """Behind the sound the clean value is 0, whatever the noise."""
    z = roll_down(lambda z, t: h3.predict(h3.load(), z, t, condition()), h3.path, h3.prediction,
                  noise(1, *SHAPE.state), segments=2)  # fmt: skip
    video, sound, rest = SHAPE.unpack(z[0])
    assert rest.abs().max() < 1e-6 < min(video.std(), sound.std())


def test_a_batch_is_what_each_clip_gives_alone(h3):
    module = h3.load().eval()
    z, time = noise(2, *SHAPE.state), torch.tensor([0.9, 0.4])
    words, mask = noise(2, 6, 8), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        both = h3.predict(module, z, time, (words, mask))
        for i, length in ((0, 6), (1, 3)):
            alone = h3.predict(module, z[i : i + 1], time[i : i + 1], (words[i : i + 1, :length], None))
            torch.testing.assert_close(both[i : i + 1], alone)
        assert h3.predict(module, z, time, (words[:, :0], mask[:, :0])).isfinite().all(), "no words at all"


def oracle(patterns, prefix, grid):
    """scaled_dot_product_attention with each layer's mask written out in float64, layer by layer."""
    frames, tokens = grid
    rows = prefix + frames * tokens
    frame = torch.arange(frames).repeat_interleave(tokens)
    calls = iter(patterns)

    def attend(query, key, value, **_):
        q, k, v = query, key, value
        mask = None
        if q.shape[-2] == rows:  # not that of the words
            pattern = next(calls)
            if pattern.k is not None:
                known = torch.zeros(frames, dtype=torch.bool)
                known[list(pattern.reference_frames(frames))] = True
                sees = (frame[:, None] == frame[None]) | known[frame][:, None] | known[frame][None]
                mask = torch.ones(rows, rows, dtype=torch.bool)
                mask[prefix:, prefix:] = sees
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return (logits.softmax(-1) @ v.double()).to(q.dtype)

    return attend


@pytest.mark.parametrize("ks", [(1, None, 2, 3), (2, 2, 2, 2)])
def test_a_plan_leaves_words_and_sound_exact_forward_and_backward(h3, ks, monkeypatch):
    plan = TilePlan(patterns=tuple(TilePattern(k) for k in ks), family="minimax_h3")
    z, time, given = noise(1, *SHAPE.state), torch.tensor([0.8]), condition()
    weight = noise(1, *SHAPE.state, seed=5)
    found = []
    for by_mask in (False, True):
        module = h3.load()
        options = None if by_mask else sparse_options(h3, plan)(z)
        with monkeypatch.context() as patch:
            if by_mask:
                prefix, rows = WORDS + SHAPE.sound_rows, SHAPE.h // PATCH * (SHAPE.w // PATCH)
                patch.setattr(F, "scaled_dot_product_attention", oracle(plan.patterns, prefix, (T, rows)))
            out = h3.predict(module, z, time, given, options)
        (out * weight).sum().backward()
        found.append([out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 50
    for ours, theirs in zip(*found, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=2e-5 * max(scale, 1e-3), rtol=1e-4)
    dense = h3.predict(h3.load(), z, time, given)
    assert float((dense.detach() - found[0][0]).abs().max()) > 1e-3


def test_a_plan_for_another_model_is_refused(h3):
    for plan, says in (
        (TilePlan.uniform(1, layers=LAYERS + 1), "layers"),
        (TilePlan(patterns=(TilePattern(1),) * LAYERS, family="wan"), "wan"),
    ):
        with pytest.raises(ValueError, match=says):
            sparse_options(h3, plan)


@pytest.mark.parametrize("plan", [None, TilePlan(patterns=tuple(TilePattern(k) for k in (1, None, 2, 1)))])
def test_checkpointed_blocks_run_again_under_the_same_plan(h3, plan):
    z, time, given = noise(1, *SHAPE.state), torch.tensor([0.6]), condition()
    grads = []
    for checkpoints in (False, True):
        module = h3.load()
        if checkpoints:
            h3.checkpoint_blocks(module)
        features = []
        options = sparse_options(h3, plan)(z) if plan else None
        with h3.tap(module).open(lambda name, layer, value, kept=features: kept.append(value), ("attention", "mlp")):
            out = h3.predict(module, z, time, given, options)
        assert len(features) == 2 * LAYERS and {x.shape for x in features} == {(1, WORDS + 74 + T * 15, 48)}
        torch.stack([x.square().sum() for x in (out, *features)]).sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def with_lora(h3, rank=2, alpha=3.0):
    module = h3.load().eval()
    add_lora(module, rank, alpha)
    generator = torch.Generator().manual_seed(7)
    for layer in adapted(module).values():
        for part in layer.part("lora"):
            torch.nn.init.normal_(part, std=0.2, generator=generator)
    return module


def test_a_lora_is_read_back_as_it_was_written(h3, tmp_path):
    """ComfyUI has one layer where diffusers has three, of the ranks of all together."""
    module, file = with_lora(h3), tmp_path / "lora.safetensors"
    lora = comfy_lora(module, module.state_dict(), h3.comfy_layer)
    fused = "diffusion_model.blocks.0.attn.qkv_proj"
    assert lora[f"{fused}.lora_down.weight"].shape == (6, 48) and lora[f"{fused}.lora_up.weight"].shape == (192, 6)
    assert float(lora[f"{fused}.alpha"]) == 9.0
    save_safetensors(file, lora, {})
    z, time, given = noise(1, *SHAPE.state), torch.tensor([0.8]), condition()
    with torch.no_grad():
        expected = h3.predict(module, z, time, given)
        assert float((h3.predict(h3.load().eval(), z, time, given) - expected).abs().max()) > 0.1
        frozen, started, whole = (h3.load().eval() for _ in range(3))
        attach_frozen(frozen, [file], h3.comfy_layer)
        ranks = {len(layer.part(layer.frozen[0])[0]) for layer in adapted(frozen, "frozen0").values()}
        add_lora(started, 2, 3.0)
        start_from(started, file, h3.comfy_layer)
        whole.load_state_dict(merged(whole.state_dict(), lora, h3.comfy_layer))
        for other in (frozen, started, whole):
            torch.testing.assert_close(h3.predict(other, z, time, given), expected, atol=1e-5, rtol=1e-4)
    assert ranks == {2}


def test_a_lora_of_one_layer_in_comfyui_serves_all_three_of_diffusers(h3, tmp_path):
    """As others write it: one rank for q, k and v."""
    key, down, up = "diffusion_model.blocks.1.attn.qkv_proj", noise(6, 48), noise(192, 6)
    lora = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(6.0)}
    save_safetensors(tmp_path / "lora.safetensors", lora, {})
    module, base = h3.load(), h3.load().state_dict()
    attach_frozen(module, [tmp_path / "lora.safetensors"], h3.comfy_layer)
    change = (up @ down).chunk(3)
    found = merged(base, lora, h3.comfy_layer)
    for i, name in enumerate("qkv"):
        weight = f"transformer_blocks.1.attn.to_{name}.weight"
        torch.testing.assert_close(found[weight], base[weight] + change[i])
        worn_down, worn_up = module.get_submodule(weight.removesuffix(".weight")).part("frozen0")
        torch.testing.assert_close(worn_up @ worn_down, change[i])


def config(h3, method="consistency", **sections):
    folder = str(h3.folder)
    values = {
        "method": method,
        "objective": {"segments": 2, **({"plan": "2:5"} if method == "knowledge" else {"teacher_steps": 4})},
        "model": {"path": folder, "family": "diffusers", "device": "cpu", "train": "lora"},
        "data": {"source": "teacher", "guidance": 1.0, "frames": 22, "height": 96, "width": 160},
        "training": {"batch": 1},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return DistillConfig.from_dict(values)


REFUSED = {
    "full training": (
        {"model": {"train": "full", "host_modulation": True}},
        "host_modulation keeps weights of MiniMax-H3",
    ),
    "frames": ({"data": {"frames": 21}}, r"data.frames is 21, expected 17k \+ 5"),
    "wans frames": ({"data": {"frames": 81}}, r"data.frames is 81, expected 17k \+ 5"),
    "height": ({"data": {"height": 720}}, "data.height is 720, expected a multiple of 32"),
    "width": ({"data": {"width": 848}}, "data.width is 848, expected a multiple of 32"),
    "batch": ({"training": {"batch": 4}}, "training.batch is 4, but this model takes 1 clip in .*accumulate to 4"),
    "guidance": ({"objective": {"guidance": 3.0}}, "guidance is 3.0, but .* guidance inside already. Leave it out"),
    "the teacher's guidance": ({"data": {"guidance": 3.0}}, "data.guidance is 3.0, but .* already. Set it to 1"),
    "expert": ({"model": {"expert": "low"}}, "one network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_h3_cannot_do_is_told_before_any_work(case, h3, tmp_path):
    from efficient_vdit_core.distill.runs.trainer import distill

    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\n")
    changes, says = REFUSED[case]
    changes = {**changes, "data": {"captions": str(captions), **changes.get("data", {})}}
    with pytest.raises(ValueError, match=says) as told:
        distill(config(h3, **changes), tmp_path / "run")
    assert len(str(told.value)) <= 400 and not (tmp_path / "run").exists()


def test_its_one_sequence_is_not_shared_out(h3):
    from efficient_vdit_core.distill.forecast.advice import advice
    from efficient_vdit_core.distill.runs.sequence_parallel import check_shares

    asked = config(h3, training={"sequence_parallel": 2})
    with pytest.raises(ValueError, match="one sequence that it does not share out. Set it to 1"):
        check_shares(asked, h3)
    assert not any("sequence_parallel" in line for line in advice(config(h3), 2**20))


@pytest.mark.parametrize("missing", ["audio_vae", "audio_scheduler"])
def test_a_folder_without_its_sound_is_told_before_any_work(missing, h3, tmp_path):
    from efficient_vdit_core.distill.runs.trainer import distill

    (tmp_path / missing / ("config.json" if missing == "audio_vae" else "scheduler_config.json")).unlink()
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").touch()
    (videos / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=rf"{missing}.* does not exist, expected a model folder"):
        distill(config(h3, data={"source": "videos", "folder": str(videos)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("frames", [22, 30])
def test_wans_own_frames_are_refused_as_before(frames, tmp_path):
    from small_models import wan

    with pytest.raises(ValueError, match=rf"data.frames is {frames}, expected 4k \+ 1"):
        open_model(wan(tmp_path)).size(frames, 0, 0)


def test_a_schedule_without_a_shift_is_told(tmp_path):
    where = minimax_h3(tmp_path)
    for shift in ({}, {"shift": "far"}, {"shift": 0}):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(shift))
        with pytest.raises(ValueError, match="shift"):
            open_model(replace(where))


def test_the_modulation_gives_the_same_from_the_hosts_memory(h3, tmp_path):
    """With its LoRA's gradients, in blocks that run twice; nothing that moves or saves the model sees it."""
    hosted = open_model(ModelConfig(path=str(tmp_path), family="diffusers", host_modulation=True))
    z, time, given, grads = noise(1, *SHAPE.state), torch.tensor([0.7]), condition(), []
    for model in (h3, hosted):
        module = model.load()
        add_lora(module, 2)
        for layer in adapted(module).values():
            torch.nn.init.constant_(layer.part("lora")[1], 0.1)
            torch.nn.init.constant_(layer.part("lora")[0], 0.02)
        model.checkpoint_blocks(module)
        out = model.predict(module, z, time, given)
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in module.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    kept = h3.load().transformer_blocks[0].adaln_proj
    assert bytes_on_host(module) == LAYERS * sum(p.numel() * 4 for p in kept.parameters())
    assert bytes_on_host(hosted.skeleton()) == bytes_on_host(module)
    names = [name for name, _ in module.named_parameters()]
    assert not [name for name in names if "adaln_proj" in name and "transformer_blocks" in name]


def test_the_real_model_has_33_billion_weights_and_13_of_them_can_stay_in_the_hosts_memory(h3, tmp_path):
    """Counted on the meta device, of diffusers' own defaults."""
    file = tmp_path / "transformer" / "config.json"
    with torch.device("meta"):
        real = dict(diffusers.MiniMaxH3Transformer3DModel(num_layers=1, num_refiner_layers=1).config)
    file.write_text(
        json.dumps({**real, "num_layers": 50, "num_refiner_layers": 2, "_class_name": h3.kind}, default=list)
    )
    where = ModelConfig(path=str(tmp_path), family="diffusers", dtype="bfloat16", host_modulation=True)
    module = open_model(where).skeleton()
    rest = sum(p.numel() for p in module.parameters())
    kept = bytes_on_host(module) / 2
    assert (kept + rest) / 1e9 == pytest.approx(33.12, abs=0.005) and kept / 1e9 == pytest.approx(13.01, abs=0.005)


def test_score_distillation_takes_pictures_and_sound_too(h3, tmp_path, monkeypatch):
    from efficient_vdit_core.distill.runs.trainer import distill

    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\n")
    monkeypatch.setattr(
        type(h3), "text_encoder", lambda *_: lambda texts: (noise(len(texts), 3, 8), torch.ones(len(texts), 3))
    )
    monkeypatch.setattr(type(h3), "encoder_packages", ())
    data, training = {"source": "captions", "captions": str(captions)}, {"steps": 5, "save_every": 5}
    result = distill(config(h3, "score", data=data, training=training), tmp_path / "run")
    with safe_open(result, "pt") as opened:
        ups = [opened.get_tensor(name) for name in opened.keys() if name.endswith("lora_up.weight")]  # noqa: SIM118
    assert (
        len(ups) == 4 * (LAYERS + 1)
        and all(bool(up.isfinite().all()) for up in ups)
        and any(bool(up.any()) for up in ups)
    )


def test_a_text_encoder_that_cannot_be_loaded_is_told_before_hours_of_encoding(h3, tmp_path, monkeypatch):
    """transformers' processor for Qwen3-VL asks for torchvision where it is made, behind the clips."""
    from efficient_vdit_core.distill.runs.trainer import distill

    found = ["torchvision"]
    monkeypatch.setattr("efficient_vdit_core.limits.packages.find_spec", lambda name: name in found or None)
    states = lambda texts: (noise(len(texts), 3, 8), torch.ones(len(texts), 3))  # noqa: E731
    monkeypatch.setattr(type(h3), "text_encoder", lambda *_: found and states)
    (tmp_path / "captions.txt").write_text("a cat\n")
    data = {"source": "captions", "captions": str(tmp_path / "captions.txt"), "cache": str(tmp_path / "cache")}
    score = config(h3, "score", data=data, training={"steps": 5, "save_every": 5})
    found.clear()
    with pytest.raises(ValueError, match=r"^torchvision is missing, .*text encoder .* -m pip install torchvision$"):
        distill(score, tmp_path / "run")
    assert not list((tmp_path / "cache").iterdir())
    found.append("torchvision")
    assert distill(score, tmp_path / "run").is_file()
    found.clear()  # what was encoded elsewhere needs no encoder here
    assert distill(score, tmp_path / "another run").is_file()


def test_a_forecast_counts_what_is_in_the_hosts_memory_there(h3):
    plain = config(h3, "knowledge", training={"precision": "float32"})
    hosted = replace(plain, model=replace(plain.model, host_modulation=True))
    before, after = (plan_memory(stage) for stage in (plain, hosted))
    moved = bytes_on_host(open_model(hosted.model).skeleton())
    assert before.held["weights"] - after.held["weights"] == after.host - before.host == moved > 0
    assert [line for line in advice(plain, 2**18) if line.startswith("model.host_modulation = true")]
