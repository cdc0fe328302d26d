import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.assets import tiny_path
from efficient_vdit_core.cli import main
from efficient_vdit_core.models.opensora_plan.checkpoint import load_transformer, load_vae
from efficient_vdit_core.models.opensora_plan.config import VAEConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.models.opensora_plan.vae import CausalVAE
from efficient_vdit_core.storage.files import write_torch
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors
from efficient_vdit_core.tinyworld.crossing.scene import BAR
from efficient_vdit_core.tinyworld.moving.scene import (
    ATTRIBUTES,
    DIRECTIONS,
    FIRST_BOUNCE,
    SIZE,
    SPEEDS,
    Scene,
    coverage,
    is_held_out,
    random_scene,
    render,
)
from efficient_vdit_core.tinyworld.train import dit as train_dit
from efficient_vdit_core.tinyworld.train import latents
from efficient_vdit_core.tinyworld.train import recipe as train_recipe
from efficient_vdit_core.tinyworld.train import vae as train_vae
from efficient_vdit_core.tinyworld.train.decoder import train_decoder
from efficient_vdit_core.tinyworld.train.export import export_transformer, standardise_latents
from efficient_vdit_core.tinyworld.train.grow import grown
from efficient_vdit_core.tinyworld.train.latents import cache_clips
from efficient_vdit_core.tinyworld.train.recipe import TinyRecipe
from efficient_vdit_core.tinyworld.train.text import Captions, train_sentencepiece, train_text_encoder
from efficient_vdit_core.tinyworld.train.vae import TINY_VAE
from efficient_vdit_core.tinyworld.worlds import MOVING, WORLDS
from efficient_vdit_core.training import TrainingRun


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def test_shapes_move_as_captioned_and_stay_inside():
    for scene in scenes(100, seed=1):
        centers = scene.centers()
        assert (centers >= scene.radius - 1e-9).all() and (centers <= SIZE - scene.radius + 1e-9).all()
        step = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed]
        np.testing.assert_allclose(
            np.diff(centers[: FIRST_BOUNCE + 1], axis=0), np.tile(step, (FIRST_BOUNCE, 1)), atol=1e-9
        )
        assert np.allclose(np.abs(np.diff(centers, axis=0)).max(axis=1), SPEEDS[scene.speed], atol=SPEEDS[scene.speed])


def test_a_fast_shape_bounces():
    centers = Scene("circle", "red", "right", "fast", "black", (30.0, 32.0), 10.0).centers()
    assert centers[:, 0].max() <= 54 and centers[-1, 0] < centers[:, 0].max() - 5


def test_a_part_of_a_clip_is_that_part():
    scene = scenes(1, seed=4)[0]
    np.testing.assert_array_equal(render(scene)[7:12], render(scene, first=7, frames=5))


def test_an_eighth_of_the_combinations_is_held_out():
    share = np.mean([is_held_out(s) for s in scenes(4000, seed=2)])
    assert 0.05 < share < 0.25


class Words:
    """Stands for a text encoder."""

    def encode(self, words):
        return torch.zeros(len(words), 3, train_dit.TINY_DIT.caption_channels), torch.ones(len(words), 3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_base_learns_what_it_is_asked_to_say(tmp_path, monkeypatch, prediction):
    """Of clips that are all zero, a network that says nothing is off by the noise, or by its share at the step's level:
    whose mean square over all steps is that of the schedule's alpha bar, 0.28."""
    losses, plain = [], train_dit.weighted_loss
    monkeypatch.setattr(train_dit, "weighted_loss", lambda *args: losses.append((args, plain(*args))) or losses[-1][1])

    clips = train_dit.CachedClips(torch.zeros(4, 4, 8, 8, 8), scenes(4))
    words: Any = Words()
    model = train_dit.train_dit(tmp_path, clips, words, steps=1, batch=16, prediction=prediction)
    assert model.config.prediction_type == prediction
    (said, wanted, weights), loss = losses[0]
    assert not said.any()
    if prediction == "epsilon":
        assert wanted.square().mean().item() == pytest.approx(1.0, abs=0.03)
        assert loss.item() == pytest.approx((wanted.square().flatten(1).mean(1) * weights).mean().item())
    else:
        assert loss.item() == pytest.approx(0.28, abs=0.03)


def test_what_is_said_as_noise_counts_as_what_is_said_as_v():
    """The same guess at clips, in either language; but where there is next to no signal, noise would count without bounds."""
    random = torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(5, 4, 2, 3, 3, generator=random) for _ in range(3))
    a = torch.tensor([0.05, 0.2, 0.5, 0.9, 0.999])
    share, rest = a.view(-1, 1, 1, 1, 1), (1 - a.square()).sqrt().view(-1, 1, 1, 1, 1)
    said = (share * x0 + rest * noise - share * guess) / rest  # the noise that a guess at the clip stands for

    def loss(prediction, *errors):
        return float(train_dit.weighted_loss(*errors, train_dit.weights_of(prediction, a)))

    in_v = loss("v_prediction", share * said - rest * guess, share * noise - rest * x0)
    assert loss("epsilon", said, noise) == pytest.approx(in_v, rel=1e-4)
    assert train_dit.weights_of("epsilon", torch.tensor([0.05, 0.005])).tolist() == pytest.approx([400.0, 400.0])


def test_beginnings_of_clips_come_first_where_that_is_asked_for(tmp_path, monkeypatch):
    """The first quarter of them, half of them, whole ones; and a network of whole ones is what comes out."""
    latents, plain, seen = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(2, 4, 8, 8, 8), train_dit.weighted_loss, []
    monkeypatch.setattr(train_dit, "weighted_loss", lambda *args: seen.append(args[1]) or plain(*args))
    clips = train_dit.CachedClips(latents, scenes(2))
    words: Any = Words()
    model = train_dit.train_dit(tmp_path, clips, words, steps=10, batch=2, short_first=True)
    assert [wanted.shape[2] for wanted in seen] == [2] * 5 + [4] * 3 + [8] * 2
    assert model.config.sample_size_t == 8
    for (
        wanted
    ) in seen:  # at the noisiest of the levels, -s x0 is what is wanted but for noise: the frames from the first on
        means = wanted[1].mean(dim=(0, 2, 3))
        assert (means.diff() < 0).all() and means[0].abs() < 0.3


def test_captions_name_every_attribute_and_tokenise_without_unknowns():
    captions = Captions(train_sentencepiece())
    for i, scene in enumerate(scenes(30, seed=3)):
        text = scene.caption(i)
        assert all(getattr(scene, name) in text for name in ATTRIBUTES)
        ids, mask = captions.ids([text, "", "snowy peaks"])
        assert not (ids == 2).any()
        assert ids[1].tolist()[0] == 1 and mask[1].sum() == 1
    assert set(MOVING.vocabulary) == set(ATTRIBUTES)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
class TestEachWorld:
    def test_what_a_caption_names_is_of_its_vocabulary(self, world):
        rng = np.random.default_rng(5)
        for _ in range(5):
            scene = world.random_scene(rng)
            named = world.named(scene)
            assert named.keys() == world.vocabulary.keys()
            assert all(value in world.vocabulary[name] for name, value in named.items())
            said = {name: value for name, value in named.items() if name != "front"}
            assert all(value in scene.caption() for value in said.values())

    def test_shapes_are_told_from_the_ground(self, world):
        rng = np.random.default_rng(6)
        for _ in range(3):
            scene = world.random_scene(rng)
            shapes = world.shapes(train_vae.to_model_range(world.render(scene)[None]))[0, 0].numpy()
            drawn = np.zeros(shapes.shape)
            for mover in getattr(scene, "movers", (scene,)):
                centers = mover.centers(world.frames)
                places = np.column_stack([centers, np.full(world.frames, mover.radius)])
                drawn = np.maximum(drawn, coverage(mover.shape, places))
            if world.name == "crossing":
                drawn[..., BAR] = 0
            assert shapes[drawn > 0.9].mean() > 0.99 and shapes[drawn == 0].mean() < 0.01

    def test_every_part_of_it_can_be_trained(self, tmp_path, world):
        spiece = train_sentencepiece(world)
        encoder = train_text_encoder(tmp_path / "text", spiece, world=world, steps=1, batch=2)
        assert all(bool(p.isfinite().all()) for p in encoder.parameters())
        vae = train_vae.train_vae(tmp_path / "vae", CausalVAE(TINY_VAE), world=world, steps=1)
        assert all(bool(p.isfinite().all()) for p in vae.parameters())
        latents = torch.randn(2, 6, world.latent_frames, 8, 8)
        clips = train_dit.CachedClips(latents, [world.random_scene(np.random.default_rng(i)) for i in range(2)])
        words: Any = Words()
        model = train_dit.train_dit(tmp_path / "dit", clips, words, world=world, steps=1, batch=2, bf16=True)
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())
        assert model.config.sample_size_t == world.latent_frames and model.config.in_channels == 6


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"parts": ("vae", "transformer")}, "The transformer needs a text_encoder"),
        ({"parts": ("decoder",)}, "The decoder needs a vae"),
        ({"start_vae": Path("nowhere")}, "'nowhere' does not exist"),
        ({"start": tiny_path("vae", "tiny")}, "transformer"),
        ({"parts": ("text_encoder",), "res_blocks": 2}, "--res-blocks is for the vae, which is not trained"),
        ({"parts": ("text_encoder", "vae"), "prediction": "epsilon"}, "--prediction is for the transformer, which is"),
        ({"parts": ("text_encoder",), "vae_steps": 1}, "--vae-steps is for the vae, which is not trained"),
        ({"decoder_steps": 1}, "--decoder-steps is for the decoder, which is not trained"),
        ({"parts": ("vae", "decoder"), "dit_steps": 1}, "--dit-steps is for the transformer, which is not"),
        ({"parts": ("vae",), "clips": 1}, "--clips is for the transformer, which is not"),
        ({"parts": ("vae",), "batch": 1}, "--batch is for the transformer, which is not"),
        ({"parts": ("text_encoder",), "bf16": True}, "--bf16 is for the vae or decoder or transformer, which is not"),
        ({"parts": ("text_encoder",), "tensorboard": True}, "--tensorboard is for the vae or decoder or transformer"),
    ],
)
def test_what_a_training_needs_is_asked_for_before_it_starts(tmp_path, monkeypatch, settings, told):
    monkeypatch.setattr(train_recipe, "claim_folder", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(ValueError, match=told):
        TinyRecipe(tmp_path / "run", tmp_path / "out", **settings).train()
    assert not list(tmp_path.iterdir())


SMALL_VAE = VAEConfig(hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=1)


def test_a_vae_is_gone_on_from(tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(SMALL_VAE)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    after = train_vae.train_vae(tmp_path, vae, steps=1)
    assert after.config == SMALL_VAE
    far = [float((after.state_dict()[name] - value).abs().max()) for name, value in before.items()]
    assert 0 < max(far) < 0.05


@torch.no_grad()
def test_a_vae_with_more_channels_and_blocks_does_as_before_and_learns_by_them(tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(SMALL_VAE)
    more = grown(vae, 6, 2)
    x = torch.randn(2, 3, 5, 16, 16)
    (mean, logvar), (further_mean, further_logvar) = vae.moments(x), more.moments(x)
    torch.testing.assert_close(further_mean[:, :4], mean)
    torch.testing.assert_close(further_logvar[:, :4], logvar)
    torch.testing.assert_close(more.decode(further_mean), vae.decode(mean))
    torch.testing.assert_close(grown(vae, res_blocks=2).decode(mean), vae.decode(mean))
    deviation = further_mean.std(dim=(0, 2, 3, 4))
    assert deviation[4:].min() > 0.1 * deviation[:4].mean(), "of the size of the others"
    assert bool((further_logvar[:, 4:].mul(0.5).exp() < 0.1 * deviation[4:].view(-1, 1, 1, 1)).all()), "and certain"

    with torch.enable_grad():
        after = train_vae.train_vae(tmp_path, more.requires_grad_(True), steps=2)
    assert after.config.embed_dim == 6 and bool(after.decoder.conv_in.conv.weight[:, 4:].any())
    assert bool(after.state_dict()["decoder.up.0.block.2.conv2.conv.weight"].any())


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1)])
def test_a_vae_is_not_made_to_forget(sizes):
    with pytest.raises(ValueError, match="has 4 latent channels and 2 residual blocks a stage"):
        grown(grown(CausalVAE(SMALL_VAE), res_blocks=2), *sizes)


def make_run(folder, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    run = TrainingRun(
        model, [torch.optim.AdamW(model.parameters(), lr=0.1)], folder=folder, steps=steps, seed=7, warmup=3
    )
    losses = []

    def loss_of(generator):
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        losses.append(float(loss.detach()))
        return loss

    return run, loss_of, losses


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    run, loss_of, whole = make_run(tmp_path / "whole", 20)
    averaged = run.train(loss_of)
    run, loss_of, first = make_run(tmp_path / "cut", 20)

    def stops(generator):
        if len(first) == 9:
            raise KeyboardInterrupt
        return loss_of(generator)

    with pytest.raises(KeyboardInterrupt):
        run.train(stops)
    resumed, loss_of, second = make_run(tmp_path / "cut", 20)
    assert resumed.step == 9
    again = resumed.train(loss_of)
    assert first + second == whole
    assert all(torch.equal(again[k], averaged[k]) for k in averaged)
    assert [f.name for f in (tmp_path / "cut").iterdir()] == ["checkpoint.pt"]


def test_cached_latents_are_those_of_the_captions_beside_them(tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(TINY_VAE).eval().requires_grad_(False)
    first = cache_clips(vae, 1, tmp_path, seed=1)
    again, other, more = (
        cache_clips(vae, 1, tmp_path, seed=1),
        cache_clips(vae, 1, tmp_path, seed=2),
        cache_clips(vae, 2, tmp_path, seed=1),
    )
    assert torch.equal(first.latents, again.latents) and len(more.latents) == len(more.scenes) == 2
    assert other.scenes != first.scenes and not torch.equal(other.latents, first.latents)
    for value in vae.parameters():
        value.mul_(1.01)
    assert not torch.equal(cache_clips(vae, 1, tmp_path, seed=1).latents, first.latents)


@pytest.fixture
def encoded(monkeypatch):
    """The clips that a VAE encodes, and an encoding that ends as by Ctrl-C once ``ends`` were."""
    found = {"count": 0, "ends": 100}
    encode = CausalVAE.encode

    def counted(self, pixels):
        if found["count"] == found["ends"]:
            raise KeyboardInterrupt
        found["count"] += 1
        return encode(self, pixels)

    monkeypatch.setattr(CausalVAE, "encode", counted)
    monkeypatch.setattr(latents, "A_FILE", 2)
    return found


def test_latents_that_were_encoded_outlive_ctrl_c(tmp_path, encoded):
    torch.manual_seed(0)
    vae = CausalVAE(SMALL_VAE).eval().requires_grad_(False)
    whole = cache_clips(vae, 5, tmp_path / "whole").latents
    encoded |= {"count": 0, "ends": 3}
    with pytest.raises(KeyboardInterrupt):
        cache_clips(vae, 5, tmp_path)
    encoded["ends"] = 100
    assert torch.equal(cache_clips(vae, 5, tmp_path).latents, whole) and encoded["count"] == 3 + 3
    vae.decoder.conv_out.conv.weight.mul_(2.0)  # latents are the encoder's
    assert torch.equal(cache_clips(vae, 5, tmp_path).latents, whole) and encoded["count"] == 3 + 3


def test_a_damaged_file_of_latents_is_named(tmp_path, encoded):
    vae = CausalVAE(SMALL_VAE).eval().requires_grad_(False)
    cache_clips(vae, 3, tmp_path)
    second = sorted(tmp_path.glob("*/*.pt"))[1]
    write_torch(second, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="0001.pt in the cache does not hold 1 latents. Delete it"):
        cache_clips(vae, 3, tmp_path)


def test_a_decoder_trained_further_keeps_the_encoder_and_every_latent(tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(SMALL_VAE)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    after = train_decoder(tmp_path, vae, steps=1).state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_pictures_error_counts_hue_slopes_and_motion():
    x = torch.zeros(1, 3, 4, 8, 8)
    x[..., 2:5, 2:5] = 0.5
    shapes = MOVING.shapes(x)

    def picture_error(out, true):
        return train_vae.picture_error(out, true, shapes[:, :, : true.shape[2]])

    assert float(picture_error(x, x)) == 0.0
    gray, hue = torch.full_like(x, 0.1), torch.zeros_like(x)
    hue[:, 0], hue[:, 1] = 0.1, -0.1
    assert float(picture_error(x + hue, x)) > 1.2 * float(picture_error(x + gray, x)), "of a smaller error"
    flickering, still = x + gray * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None], x + gray
    assert float(picture_error(flickering, x)) > float(picture_error(still, x))
    stripes = x + gray * torch.tensor([1.0, -1.0] * 4)
    assert float(picture_error(stripes, x)) > float(picture_error(still, x))
    assert float(picture_error(still[:, :, :1], x[:, :, :1])) > 0, "stills have no motion"


def test_a_failing_evaluation_loses_no_step(tmp_path):
    run, loss_of, _ = make_run(tmp_path, 20)

    def fails(averaged):
        raise OSError("no room for samples")

    with pytest.raises(OSError, match="samples"):
        run.train(loss_of, evaluate=fails, evaluate_every=3)
    assert make_run(tmp_path, 20)[0].step == 3


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read.*damaged"):
        make_run(tmp_path, 20)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run, loss_of, _ = make_run(tmp_path, 20)
    with pytest.raises(ValueError, match="loss became nan at step 1"):
        run.train(lambda generator: loss_of(generator) * float("nan"))
    kept = torch.load(run.checkpoint, weights_only=True)
    assert kept["step"] == 0 and all(v.isfinite().all() for v in kept["model"].values())


def test_standardised_latents_decode_to_the_same_pixels():
    torch.manual_seed(0)
    vae = CausalVAE(TINY_VAE).eval().requires_grad_(False)
    x = torch.randn(2, 3, 5, 32, 32)
    before, latents = vae.decode(vae.encode(x)), vae.encode(x)
    standardise_latents(vae, latents, 0.18215)
    scaled = vae.encode(x) * 0.18215
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(vae.encode(x)), before, atol=1e-4, rtol=1e-4)


def test_a_transformer_goes_on_from_one_of_latents_with_fewer_channels(tmp_path):
    start = load_transformer(tiny_path("transformer", "tiny"), dtype=torch.float32)
    latents = torch.randn(2, 6, MOVING.latent_frames, 8, 8)
    clips = train_dit.CachedClips(latents, [random_scene(np.random.default_rng(i)) for i in range(2)])
    words: Any = Words()
    after = train_dit.train_dit(tmp_path, clips, words, start=start, steps=1, batch=2).state_dict()
    for name, value in start.state_dict().items():
        of_latents = name in ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias")
        assert (after[name].shape != value.shape) if of_latents else (after[name] - value).abs().max() < 0.05


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins the training of the transformer on the built-in VAE and text encoder, or of other parts, with some settings; the
    transformer makes no step."""
    begun = []
    monkeypatch.setattr(train_recipe, "train_dit", lambda folder, *_, **settings: begun.append(folder))
    monkeypatch.setattr(train_recipe, "export_transformer", lambda *_: None)
    monkeypatch.setattr(train_recipe, "load_transformer", lambda *_, **__: torch.nn.Identity())
    out = tmp_path / "out"
    for part in ("vae", "text_encoder"):
        shutil.copytree(tiny_path(part, "tiny"), out / part)

    def go(parts=("transformer",), **settings):
        begun.clear()
        short = {"clips": 1, "dit_steps": 1} if "transformer" in parts else {}
        TinyRecipe(tmp_path / "run", out, parts=parts, **{**short, **settings}).train()
        return begun

    return go


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prediction": "epsilon"}, "prediction: 'v_prediction' -> 'epsilon'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"world": WORLDS["crossing"]}, "world: 'moving' -> 'crossing'"),
        ({"clips": 2}, "clips: 1 -> 2"),
        ({"batch": 7}, "batch: 32 -> 7"),
        ({"short_first": True}, "short_first: False -> True"),
        ({"start": tiny_path("transformer", "tiny")}, "start: '' -> "),
    ],
)
def test_a_part_that_was_begun_with_others_is_not_gone_on_with(begin, tmp_path, settings, told):
    assert begin() == [tmp_path / "run" / "transformer"]
    assert len(begin(dit_steps=2, device="cpu", tensorboard=True)) == 1, "how long, and where"
    with pytest.raises(ValueError, match=f"transformer was begun with other settings .*{told}"):
        begin(**settings)
    record = tmp_path / "run" / "transformer" / "settings.json"
    kept = json.loads(record.read_text())
    record.unlink()  # as an earlier version left it
    assert len(begin()) == 1 and json.loads(record.read_text()) == kept


def test_a_transformer_keeps_to_the_encoders_that_it_learnt_from(begin, tmp_path):
    begin()
    file = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    weights, about = read_state_dict(file)
    for part, same in (("decoder", True), ("encoder", False)):
        name = next(name for name in weights if name.startswith(f"{part}."))
        save_safetensors(file, {**weights, name: weights[name] + 1}, about)
        if same:
            begin()
            continue
        with pytest.raises(ValueError, match="begun with other settings .*vae_encoder"):
            begin()


def test_a_start_of_another_shape_is_refused_before_anything_is_trained(tmp_path):
    config = replace(train_dit.TINY_DIT, num_layers=2)
    export_transformer(OpenSoraT2V(config), tmp_path / "start")
    with pytest.raises(
        ValueError, match="transformer of another shape than the tiny one: 2 blocks of 4 x 36, expected 6"
    ):
        TinyRecipe(tmp_path / "run", tmp_path / "out", start=tmp_path / "start").train()
    other = replace(train_dit.TINY_DIT, in_channels=8, out_channels=8, sample_size_t=24, prediction_type="epsilon")
    export_transformer(OpenSoraT2V(other), tmp_path / "may")
    train_dit.check_start(tmp_path / "may")
    assert not (tmp_path / "run").exists()


def test_a_start_that_the_run_would_replace_is_refused(begin, tmp_path):
    for start in (tmp_path / "out" / "vae", tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match="what the run goes on from, and what it will write"):
            begin(parts=("vae",), start_vae=start)


def test_a_start_is_known_by_its_weights(tmp_path):
    folder = tiny_path("vae", "tiny")
    weights, about = read_state_dict(folder)
    again = tmp_path / "diffusion_pytorch_model.safetensors"
    save_safetensors(again, dict(reversed(weights.items())), {**about, "other": "bytes"})
    assert len({train_recipe._contents(path) for path in (folder, again, tmp_path)}) == 1
    save_safetensors(again, {**weights, "quant_conv.conv.bias": weights["quant_conv.conv.bias"] + 1}, about)
    assert train_recipe._contents(again) != train_recipe._contents(folder)


def test_a_vae_is_not_trained_further_under_a_transformer(begin, tmp_path):
    begin()
    (tmp_path / "run" / "vae").mkdir()
    write_torch(tmp_path / "run" / "vae" / "checkpoint.pt", {"step": 5})
    with pytest.raises(ValueError, match="learnt the latents of the VAE after 5 steps, and 9 are asked for"):
        begin(parts=("vae",), vae_steps=9)


def test_a_repeated_run_leaves_the_decoder_that_was_trained_since(begin, tmp_path, monkeypatch):
    file = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    trained = load_vae(file, dtype=torch.float32)
    monkeypatch.setattr(train_recipe, "train_vae", lambda *_, **__: trained)
    monkeypatch.setattr(train_recipe, "_sample_latents", lambda vae, _: torch.randn(4, 4, 2, 2, 2))
    weights, about = read_state_dict(file)
    name = next(name for name in weights if name.startswith("decoder."))
    save_safetensors(file, {**weights, name: weights[name] + 1}, about)
    begin(parts=("vae",))
    assert torch.equal(read_state_dict(file)[0][name], weights[name] + 1)
    next(trained.encoder.parameters()).data += 1
    begin(parts=("vae",))
    assert torch.equal(read_state_dict(file)[0][name], weights[name]), "another VAE is written"


def test_a_record_from_before_a_setting_tells_what_it_was(begin, tmp_path):
    folder = tmp_path / "run" / "vae"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"world": "moving", "seed": 0, "start": ""}))
    with pytest.raises(ValueError, match="vae was begun with other settings .*latent_channels: None -> 8"):
        begin(parts=("vae",), latent_channels=8)


def test_a_new_vae_may_have_fewer_channels(tmp_path):
    made = TinyRecipe(tmp_path, tmp_path, latent_channels=2)._begun_vae()
    assert made.config == replace(TINY_VAE, z_channels=2, embed_dim=2)


def test_clips_that_came_back_before_ctrl_c_are_kept(tmp_path, monkeypatch):
    judged = []

    def to_pixels(video):
        if judged:
            raise KeyboardInterrupt
        judged.append(video)
        return pixels(video)

    pixels = train_vae.to_pixels
    monkeypatch.setattr(train_vae, "to_pixels", to_pixels)
    file = tmp_path / "a.json"
    assert main(["tinyworld", "read-back", "--clips", "2", "--json", str(file)]) == 130 and not file.exists()
    found = json.loads((tmp_path / "a.json.part").read_text())
    assert found["complete"] is False and found["clips"] == 1 and found["psnr"] > 20 and found["world"] == "moving"


def test_what_comes_back_of_a_vae_is_told_and_kept(tmp_path, capsys):
    assert main(["tinyworld", "read-back", "--clips", "1", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out) == found and found["world"] == "moving" and found["clips"] == 1
    scene = MOVING.random_scene(np.random.default_rng(10_000))
    true = train_vae.to_model_range(MOVING.render(scene)[None])
    vae = load_vae(tiny_path("vae", "tiny"), dtype=torch.float32)
    with torch.no_grad():
        error = F.mse_loss(vae.decode(vae.encode(true)).clamp(-1, 1), true)
    assert found["psnr"] == pytest.approx(float(10 * torch.log10(4 / error)), rel=1e-4)
