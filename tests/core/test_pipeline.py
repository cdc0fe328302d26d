"""Text to video with tiny random models: the plumbing against handwritten loops, and every refusal before the work."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core import assets
from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.generation.devices import pick_device
from efficient_vdit_core.generation.model_folder import find_model
from efficient_vdit_core.generation.model_header import ModelHeader
from efficient_vdit_core.generation.request import VideoRequest
from efficient_vdit_core.models.distilled import DistillMetadata
from efficient_vdit_core.models.opensora_plan.config import LATENT_SCALE, DiTConfig, VAEConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.models.opensora_plan.vae import CausalVAE
from efficient_vdit_core.pipeline import Pipeline
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.search import ProbeRecord, make_probe_override
from efficient_vdit_core.search.record import ATTENTION
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
CHANNELS = 16


class Words:
    """A stand-in for mT5: each character is a token with a fixed random state."""

    table = torch.randn(128, CHANNELS, generator=torch.Generator().manual_seed(5))

    def encode(self, prompts):
        self.seen = prompts
        ids = [[ord(c) % 128 for c in p][:20] + [1] for p in prompts]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
        return torch.stack([self.table[i + [0] * (longest - len(i))] for i in ids]), mask


def make_pipeline(prediction_type="v_prediction", layers=2):
    torch.manual_seed(0)
    config = DiTConfig(
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=12,
        caption_channels=CHANNELS,
        sample_size=(4, 6),
        sample_size_t=4,
        interpolation_scale_h=1.0,
        interpolation_scale_w=1.0,
        prediction_type=prediction_type,
    )
    vae = VAEConfig(hidden_size=4, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=2)
    return Pipeline(OpenSoraT2V(config).eval(), CausalVAE(vae).eval(), Words(), name="random")


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


class Spy:
    """Records what the transformer is called with."""

    def __init__(self, pipeline, monkeypatch):
        self.calls = []
        forward = pipeline.transformer.forward

        def record(x, timestep, context, attention_mask=None, transformer_options=None):
            self.calls.append((x, timestep, context, attention_mask, transformer_options))
            return forward(x, timestep, context, attention_mask, transformer_options)

        monkeypatch.setattr(pipeline.transformer, "forward", record)


def guided(pipeline, z, t, texts, guidance):
    """The reference's classifier-free guidance, written out."""
    context, mask = Words().encode(texts)
    out = pipeline.transformer(torch.cat([z, z]), t.float().expand(2), context, mask)
    return out[:1] + guidance * (out[1:] - out[:1])


def pixels(pipeline, z):
    video = pipeline.vae.decode(z / LATENT_SCALE)[0]
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def assert_same_video(got, expected):
    """Equal but for a rounding to the next of 256 levels here and there."""
    difference = np.abs(got.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02
    assert expected.std() > 1, "a video of one colour would prove nothing"


def test_what_is_not_chosen_is_what_the_model_was_trained_for(pipeline):
    video = pipeline.generate("a cat", steps=2, guidance=2.0)
    assert video.frames.shape == (13, 32, 48, 3) and video.frames.dtype == np.uint8


def test_a_seed_gives_one_video(pipeline):
    make = lambda seed, **kw: pipeline.generate("a cat", steps=2, seed=seed, **kw).frames  # noqa: E731
    assert np.array_equal(make(1), make(1))
    assert not np.array_equal(make(1), make(2))
    assert not np.array_equal(make(1, gamma=1.0), make(1))
    assert np.array_equal(make(1, gamma=1.0), make(1, gamma=1.0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_ddim_equals_the_reference_loop(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    pipeline = make_pipeline(prediction_type)
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(5)
    z = torch.randn(1, 4, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    for t in scheduler.timesteps:
        z = scheduler.step(guided(pipeline, z, t, ["", "a cat"], 4.0), t, z).prev_sample
    video = pipeline.generate("a cat", negative="", sampler="ddim", steps=5, guidance=4.0, seed=3)
    assert_same_video(video.frames, pixels(pipeline, z))


@torch.no_grad()
def test_euler_ancestral_equals_the_reference_loop():
    diffusers = pytest.importorskip("diffusers")
    pipeline = make_pipeline("epsilon")
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**LINEAR)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 4, 4, 4, 6, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = guided(pipeline, scheduler.scale_model_input(z, t), t, ["", "a cat"], 4.0)
        z = scheduler.step(out, t, z, generator=generator).prev_sample
    video = pipeline.generate("a cat", negative="", sampler="euler_ancestral", steps=5, guidance=4.0, seed=3)
    assert_same_video(video.frames, pixels(pipeline, z))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_deterministic_consistency_equals_trailing_ddim(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    pipeline = make_pipeline(prediction_type)
    scheduler = diffusers.DDIMScheduler(
        **LINEAR, clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(5)
    z = torch.randn(1, 4, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    for t in scheduler.timesteps:
        z = scheduler.step(guided(pipeline, z, t, ["", "a cat"], 4.0), t, z).prev_sample
    video = pipeline.generate("a cat", negative="", sampler="consistency", steps=5, guidance=4.0, seed=3)
    assert_same_video(video.frames, pixels(pipeline, z))


def test_batch_is_negative_then_positive_at_the_segment_edges(pipeline, monkeypatch):
    spy = Spy(pipeline, monkeypatch)
    pipeline.generate("dog", negative="cat", steps=3, segments=2, guidance=2.0)
    timesteps = [round(float(t[0]), 2) for _, t, *_ in spy.calls]
    assert timesteps == [999.0, 499.0, 249.0]
    negative, positive = spy.calls[0][2]
    assert torch.equal(negative[0], Words.table[ord("c")]) and torch.equal(positive[0], Words.table[ord("d")])


def test_fractional_timesteps_reach_the_model(pipeline, monkeypatch):
    spy = Spy(pipeline, monkeypatch)
    pipeline.generate("dog", steps=3, guidance=1.0)
    assert [float(t) for _, t, *_ in spy.calls] == pytest.approx([999, 665.667, 332.333], abs=0.01)


def test_guidance_1_spends_no_negative_pass(pipeline, monkeypatch):
    spy = Spy(pipeline, monkeypatch)
    pipeline.generate("dog", steps=2, guidance=1.0)
    assert [len(x) for x, *_ in spy.calls] == [1, 1]


def test_full_plan_equals_dense_and_a_sparse_one_differs(pipeline):
    make = lambda plan: pipeline.generate("dog", steps=2, plan=plan)  # noqa: E731
    dense, full, sparse = make(None), make(TilePlan.uniform(4)), make(TilePlan.uniform(1))
    assert np.array_equal(dense.frames, full.frames)
    assert not np.array_equal(dense.frames, sparse.frames)
    assert sparse.report.sparse == 2 * 2, "two layers in each of two steps"
    assert full.report.sparse == 0


LENGTHS = pytest.mark.parametrize("letters", [16, 17, 18])  # and the end token: 18 are 3 frames of 2 x 3 tokens


@LENGTHS
def test_text_as_long_as_the_video_is_not_taken_for_video(pipeline, letters):
    make = lambda plan: pipeline.generate("x" * letters, steps=1, frames=9, guidance=1.0, plan=plan)  # noqa: E731
    sparse = make(TilePlan.uniform(1))
    assert sparse.report.sparse == 2 and sparse.report.dense == {"cross-attention": 2}, "in two layers"
    assert not np.array_equal(sparse.frames, make(None).frames)


@LENGTHS
def test_a_search_with_text_as_long_as_the_video_measures_the_video_alone(pipeline, letters):
    pattern, want, calls = TilePattern(1), [], itertools.count()
    record, layout = ProbeRecord((pattern,)), TokenLayout(TokenGrid(3, 2, 3))
    probe = make_probe_override(record)

    def looking(func, q, k, v, heads, mask=None, **kwargs):
        if next(calls) % 2 == 0:  # a block's self-attention comes first
            split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
            dense, sparse = F.scaled_dot_product_attention(*split), tile_attention(*split, layout, pattern)
            want.append([float((sparse - dense).norm() / dense.norm())])
        return probe(func, q, k, v, heads, mask=mask, **kwargs)

    pipeline.observe(pipeline.request("x" * letters, steps=1, frames=9, guidance=1.0), looking)
    assert [record.errors[ATTENTION][layer, pattern] for layer in range(2)] == [pytest.approx(x) for x in want]
    assert record.dense == {"cross-attention": 2}


def test_metadata_tells_all_that_made_the_video(pipeline):
    plan = TilePlan.uniform(1)
    video = pipeline.generate("dog", steps=3, segments=2, gamma=0.5, seed=9, plan=plan, guidance=2.0)
    meta = video.metadata
    assert (meta["prompt"], meta["seed"], meta["steps"], meta["segments"], meta["gamma"]) == ("dog", 9, 3, 2, 0.5)
    assert (meta["frames"], meta["height"], meta["width"], meta["guidance"]) == (13, 32, 48, 2.0)
    assert meta["plan"]["reference_frames"] == 1 and "sparse" in meta["attention"]
    assert set(meta["versions"]) >= {"efficient-vdit", "torch", "python"}


def test_progress_counts_every_evaluation(pipeline):
    for sampler in ("consistency", "ddim"):
        seen = []
        pipeline.generate(
            "dog", steps=3, sampler=sampler, progress=lambda done, total, seen=seen: seen.append((done, total))
        )
        assert seen == [(1, 3), (2, 3), (3, 3)]


def test_other_sizes_work_and_say_so(pipeline, caplog):
    video = pipeline.generate("dog", frames=1, height=48, width=16, steps=1)
    assert video.frames.shape == (1, 48, 16, 3)
    assert "not what this model was trained for" in caplog.text


def test_template_is_filled_in(pipeline):
    pipeline.generate("A  dog", steps=1, template="a", guidance=1.0)
    assert pipeline.text_encoder.seen == ["masterpiece , best quality , ultra-detailed , a dog."]
    pipeline.generate(" ", steps=1, template="a", guidance=1.0)
    assert pipeline.text_encoder.seen == [""], "the unconditional prompt of the training"


def test_prompts_of_any_length_work(pipeline, caplog):
    assert pipeline.generate("", steps=1).frames.size
    assert "prompt is empty" in caplog.text
    assert pipeline.generate("dog " * 1250, steps=1).frames.size


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"frames": 30}, "frames must be 4k\\+1 .* got 30.*; use 29 or 33"),
        ({"frames": 0}, "frames must be 4k\\+1"),
        ({"frames": -3}, "frames must be 4k\\+1"),
        ({"height": 100}, "height must be a multiple of 16, got 100.*; use 96 or 112"),
        ({"width": 8}, "width must be a multiple of 16, got 8.*; use 16"),
        ({"width": 0}, "width must be"),
        ({"steps": 0}, "steps must lie in 1..1000"),
        ({"steps": 1001, "sampler": "ddim"}, "steps must lie in 1..1000"),
        (
            {"steps": 1, "sampler": "ddim"},
            "steps must lie in 2..1000 for ddim, got 1: .* use 2 or more, or the sampler consistency",
        ),
        ({"steps": 1, "sampler": "euler_ancestral"}, "steps must lie in 2..1000 for euler_ancestral, got 1"),
        ({"steps": 4, "segments": 5}, "steps must be at least segments"),
        ({"segments": 0}, "segments must be at least 1"),
        ({"gamma": 1.5}, "gamma must lie in 0..1"),
        ({"gamma": float("nan")}, "gamma must lie in 0..1"),
        ({"guidance": -1.0}, "guidance is"),
        ({"guidance": float("inf")}, "guidance is"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"frames": 29.0}, "frames is 29.0, expected a whole number"),
        ({"steps": 8.5}, "steps is 8.5, expected a whole number"),
        ({"residual_every": 6}, "residual_every is 6, but there is no plan"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"template": "z"}, "template must be one of"),
        ({"plan": TilePlan.uniform(1, layers=7)}, "layers"),
        ({"plan": TilePlan.uniform(1, family="wan")}, "family"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_model_runs(pipeline, monkeypatch, choices, words):
    spy = Spy(pipeline, monkeypatch)
    with pytest.raises(ValueError, match=words):
        pipeline.generate("dog", **choices)
    assert not spy.calls


def test_numbers_of_numpy_are_numbers(pipeline):
    request = pipeline.request("dog", seed=np.int64(5), steps=np.int32(2))
    assert (request.seed, request.steps) == (5, 2) and type(request.seed) is int


def test_nothing_is_chosen_beside_a_request(pipeline):
    request = pipeline.request("dog", steps=1)
    with pytest.raises(ValueError, match="seed, steps cannot be chosen beside a request"):
        pipeline.generate(request, seed=7, steps=4)


def test_guidance_that_is_inside_the_weights_is_not_added_again(caplog):
    header = ModelHeader.read("tiny-8-steps")
    for sampler in ("consistency", "ddim", "euler_ancestral"):
        assert header.request("dog", sampler=sampler).guidance == 1.0
    assert header.request("dog", sampler="ddim").steps == 100 and not caplog.records
    assert ModelHeader.read("tiny").request("dog", sampler="ddim").guidance == 3.0
    header.request("dog", guidance=7.0)
    assert "already inside this distilled model" in caplog.text


def test_a_model_of_jumps_is_told_of_steps_between_them(caplog):
    header = ModelHeader.read("tiny-8-steps")
    header = replace(header, distilled=replace(header.distilled, jumps_only=True))
    assert header.request("dog").steps == header.request("dog", steps=8).steps == 8 and not caplog.records
    for choices in ({"steps": 16}, {"sampler": "ddim"}):
        header.request("dog", **choices)
        assert "of a model that has learnt 8 jumps and nothing between: set steps to 8" in caplog.text
        caplog.clear()


def test_settings_that_do_nothing_are_named():
    assert "ignores" in VideoRequest("dog", sampler="ddim", gamma=0.5).remarks()[0]
    assert VideoRequest("dog").remarks() == []


def test_steps_of_ddim_that_do_not_begin_at_noise_are_named(caplog):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler()
    told = set()
    for steps in range(2, 1001):
        scheduler.set_timesteps(steps)
        first = int(scheduler.timesteps[0])
        remarks = VideoRequest("dog", sampler="ddim", steps=steps).remarks()
        assert len(remarks) == (first < 900), steps
        assert not remarks or f"begins at {first} of 999" in remarks[0]
        told |= {steps} if remarks else set()
    assert {8, 9, 300} <= told and not {10, 20, 25, 50, 100, 250, 500} & told
    assert "10, 20, 25, 50, 100, 250, 500" in VideoRequest("dog", sampler="ddim", steps=8).remarks()[0]
    for sampler in ("euler_ancestral", "consistency"):
        assert not VideoRequest("dog", sampler=sampler, steps=8).remarks()
    assert not VideoRequest("dog", sampler="ddim").remarks()  # what the sampler has then begins at noise
    ModelHeader.read("tiny").requests(["a", "b", "c"], sampler="ddim", steps=8)
    (record,) = caplog.records
    assert "begins at 875 of 999" in record.getMessage()


def test_the_small_short_weights_have_less_guidance():
    """29x480p alone of the published weights, as its maker advises."""
    tiny = ModelHeader.read("tiny")
    for size, frames, guidance in (((60, 80), 8, 2.5), ((60, 80), 24, 7.5), ((90, 160), 8, 7.5), ((90, 160), 24, 7.5)):
        header = ModelHeader("large", replace(tiny.config, sample_size=size, sample_size_t=frames))
        assert header.request("dog").guidance == guidance and header.request("dog", guidance=4.0).guidance == 4.0
        assert header.request("dog").negative


def test_a_negative_prompt_without_guidance_is_told_once_and_not_claimed(caplog):
    for name in ("tiny", "tiny-8-steps"):
        requests = ModelHeader.read(name).requests(["dog", "cat"], negative="bird", guidance=1.0)
        assert [(request.prompt, request.negative) for request in requests] == [("dog", ""), ("cat", "")]
        assert [record.message.split(":")[0] for record in caplog.records] == ["The negative prompt does nothing"]
        caplog.clear()
    large = replace(ModelHeader.read("tiny"), name="large")
    assert large.request("dog", guidance=1.0).negative == "" and not caplog.records
    assert large.request("dog").negative and large.request("dog", negative="bird").negative == "bird"
    assert not caplog.records


def test_a_result_that_is_not_finite_is_reported(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.transformer, "forward", lambda x, *args: x * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipeline.generate("dog", steps=1)


@pytest.mark.parametrize("name", ["banana", "cuda:99"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ValueError, match="cannot be used"):
        pick_device(name)


def test_parts_are_found_in_every_layout(tmp_path):
    for part in (
        "plain/transformer",
        "plain/vae",
        "plain/text_encoder",
        "hub/29x720p",
        "hub/vae",
        "hub/text_encoder",
        "other",
    ):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "hub/29x720p/diffusion_pytorch_model.safetensors").touch()
    plain, hub = find_model(tmp_path / "plain"), find_model(tmp_path / "hub")
    assert plain.transformer == tmp_path / "plain/transformer" and plain.text_encoder == tmp_path / "plain/text_encoder"
    assert hub == find_model(tmp_path / "hub/29x720p")
    assert (hub.name, hub.vae) == ("29x720p", tmp_path / "hub/vae")
    assert find_model(tmp_path / "hub", tmp_path / "other").text_encoder == tmp_path / "other"
    (tmp_path / "hub/29x720p").rename(tmp_path / "disk")
    (tmp_path / "hub/29x720p").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert find_model(tmp_path / "hub/29x720p").vae == tmp_path / "hub/vae"  # beside the link
    (tmp_path / "hub/93x720p").mkdir()
    with pytest.raises(ValueError, match="holds 2 models .*name one"):
        find_model(tmp_path / "hub")


@pytest.mark.parametrize(
    "parts, words",
    [
        ([], "There is no model at"),
        (["a"], "is no model folder"),
        (["transformer", "text_encoder"], "has no vae"),
        (["transformer", "vae"], "has no text encoder.*evdit convert"),
    ],
)
def test_missing_parts_are_named(tmp_path, parts, words):
    for part in parts:
        (tmp_path / "model" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        find_model(tmp_path / "model")


def test_loras_count_and_tell_how_to_sample(tmp_path):
    """Both of a recipe: what they add is what weights with the sum have, and the last one's steps and plan are taken."""
    source = assets.tiny_path("transformer") / "diffusion_pytorch_model.safetensors"
    weights, entries = read_state_dict(source)
    key, full = "transformer_blocks.3.attn1.to_v.weight", {k: v.float() for k, v in weights.items()}
    generator = torch.Generator().manual_seed(4)
    told = (
        DistillMetadata("consistency", segments=4, steps=4, guidance=3.0),
        DistillMetadata(
            "knowledge", segments=4, steps=4, guidance=3.0, plan=json.loads(TilePlan.uniform(1, 6, frames=8).to_json())
        ),
    )
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for rank, about, file in zip((2, 3), told, files, strict=True):
        down, up = (torch.randn(size, generator=generator) / 4 for size in ((rank, 144), (144, rank)))
        stem = f"diffusion_model.{key.removesuffix('.weight')}"
        lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
        save_safetensors(file, lora, about.to_entry())
        full[key] = full[key] + up @ down / rank
    summed = tmp_path / "diffusion_pytorch_model.safetensors"
    save_safetensors(summed, full, {**entries, **told[1].to_entry()})

    frozen, merged = Pipeline.from_model(loras=files), Pipeline.from_model(transformer=summed)
    header = ModelHeader.read(loras=files)
    request = header.request("a red circle", frames=5, height=16, width=16)
    assert (request.steps, request.guidance) == (4, 1.0) and header.tuned_plan == frozen.tuned_plan == merged.tuned_plan
    assert header.tuned_plan.to_text() == "0-5:1:7"
    frames = [p.generate(request, plan=p.tuned_plan).frames.astype(int) for p in (frozen, merged)]
    assert abs(frames[0] - frames[1]).max() <= 1
    plain = Pipeline.from_model().generate(request, plan=header.tuned_plan).frames.astype(int)
    assert abs(plain - frames[0]).max() > 1


def test_a_lora_that_is_not_there_is_told_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("efficient_vdit_core.models.opensora_plan.checkpoint.load_transformer", None)
    with pytest.raises(ValueError, match=r"LoRA '/nowhere.safetensors' is no file"):
        ModelHeader.read(loras=["/nowhere.safetensors"])
