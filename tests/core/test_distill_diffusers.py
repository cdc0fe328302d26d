"""The adapter for diffusers' transformers, on tiny random ones."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import cogvideox, opensora_plan, wan_22
from small_models import wan as small_wan

from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.distill.config import DistillConfig, ModelConfig
from efficient_vdit_core.distill.data.prepare import _text_bank
from efficient_vdit_core.distill.families.intercept import OVERRIDE, Intercepted
from efficient_vdit_core.distill.families.model import sparse_options
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.lora.comfy_names import WAN, comfy_name
from efficient_vdit_core.distill.lora.files import comfy_lora, merged
from efficient_vdit_core.distill.lora.layers import add_lora
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig
from efficient_vdit_core.distill.runs.trainer import check_run
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.storage.weight_files import save_safetensors
from efficient_vdit_core.tiles import TilePattern

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def wan(tmp_path):
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    module.save_pretrained(tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return open_model(ModelConfig(path=str(tmp_path), family="diffusers"))


@pytest.mark.parametrize("name", ["transformer", "init"])
def test_weights_that_do_not_fit_are_refused_before_any_work(wan, tmp_path, name):
    """With the first odd tensor, and a word where its name is ComfyUI's."""
    state, file = wan.load().state_dict(), tmp_path / "other.safetensors"
    first = "blocks.0.attn1.norm_k.weight"

    def check(tensors):
        save_safetensors(file, tensors)
        made = DistillConfig("consistency", ConsistencyConfig(segments=2), replace(wan_config, **{name: str(file)}))
        check_run(made, open_model(made.model), sharded=False, processes=1)

    wan_config = ModelConfig(path=str(tmp_path), family="diffusers", device="cpu", train="full")
    check(state)
    with pytest.raises(
        ValueError, match=r"'model\.diffusion_model\.blocks\.0.* is none of .* are ComfyUI's, not diffusers'"
    ):
        check({f"model.diffusion_model.{comfy_name(WAN, n)}": x for n, x in state.items()})
    with pytest.raises(
        ValueError, match=rf"other\.safetensors does not hold the weights .*'{first}' is missing\. Check"
    ):
        check({n: x for n, x in state.items() if n != first})
    with pytest.raises(ValueError, match=rf"'{first}' has shape \(3,\), expected \(24,\)"):
        check({**state, first: torch.ones(3)})


def inputs():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 4, 6, 8, generator=g),
        torch.tensor([800.0, 300.0]),
        (torch.randn(2, 5, 8, generator=g), None),
    )


def test_wan_is_called_as_diffusers_calls_it(wan):
    assert (wan.family, wan.prediction, wan.path.shift, wan.layers, wan.heads) == ("wan", "flow", 5.0, 2, 2)
    module = wan.load()
    z, time, condition = inputs()
    expected = module(hidden_states=z, timestep=time, encoder_hidden_states=condition[0], return_dict=False)[0]
    assert torch.equal(wan.predict(module, z, time, condition), expected)


def test_plans_reach_wans_self_attention_alone(wan):
    module = wan.load().eval()
    z, time, condition = inputs()
    dense = wan.predict(module, z, time, condition)
    same = wan.predict(module, z, time, condition, sparse_options(wan, TilePlan.uniform(None))(z))
    torch.testing.assert_close(same, dense)
    seen = []

    def watching(func, q, k, v, heads, **kwargs):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return func(q, k, v, heads, **{name: kwargs[name] for name in ("mask",)})

    torch.testing.assert_close(wan.predict(module, z, time, condition, wan.options_with(watching)(z)), dense)
    assert seen == [((2, 2, 48, 12), (2, 2, 48, 12)), ((2, 2, 48, 12), (2, 2, 5, 12))] * 2
    plan = TilePlan(patterns=(TilePattern(1), TilePattern(None)), family="wan")
    sparse = wan.predict(module, z, time, condition, sparse_options(wan, plan)(z))
    assert not torch.allclose(sparse, dense, atol=1e-4)
    other = wan.predict(module, z, time, condition, sparse_options(wan, TilePlan.uniform(1))(z))
    assert not torch.allclose(other, sparse, atol=1e-4), "the second layer's pattern counts too"
    with pytest.raises(ValueError, match="layers"):
        sparse_options(wan, TilePlan.uniform(1, layers=3))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("length", [47, 48, 49])
@pytest.mark.parametrize("family", [opensora_plan, small_wan])
def test_text_as_long_as_the_video_is_not_taken_for_video(tmp_path, family, length, checkpointed):
    """Nor where a block is computed again for its gradients."""
    model = open_model(family(tmp_path))
    module, z = model.load(), torch.randn(1, 4, 4, 6, 8)  # 4 frames of 3 x 4 tokens
    if checkpointed:
        model.checkpoint_blocks(module)
    plan, report = TilePlan.uniform(1), AttentionReport()
    options = model.options_with(make_attention_override(plan, report))(z)
    text = torch.randn(1, length, 8), torch.ones(1, length, dtype=torch.long)
    out = model.predict(module, z, torch.tensor([500.0]), text, options)
    assert report.sparse == model.layers and report.dense == {"cross-attention": model.layers}
    out.sum().backward()
    times = 1 + checkpointed
    assert report.sparse == times * model.layers and report.dense == {"cross-attention": times * model.layers}


@pytest.mark.parametrize("plan", [None, TilePlan(patterns=(TilePattern(1), TilePattern(None)), family="wan")])
def test_checkpointed_blocks_run_again_under_the_same_plan(wan, plan):
    z, time, condition = inputs()
    grads = []
    for checkpointed in (False, True):
        module = wan.load()
        if checkpointed:
            wan.checkpoint_blocks(module)
        options = sparse_options(wan, plan)(z) if plan else None
        features = []
        with wan.tap(module).open(lambda name, layer, value, kept=features: kept.append(value), ("attention", "mlp")):
            out = wan.predict(module, z, time, condition, options)
        torch.stack([x.square().sum() for x in (out, *features)]).sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_lora_has_the_names_of_wan_in_comfyui(wan):
    module = wan.load()
    add_lora(module, 2)
    for p in (p for p in module.parameters() if p.requires_grad):
        torch.nn.init.normal_(p)
    lora = comfy_lora(module, module.state_dict(), wan.comfy_layer)
    layers = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    stems = {f"diffusion_model.blocks.{i}.{layer}" for i in range(2) for layer in layers}
    assert set(lora) == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    base = wan.load().state_dict()
    changed = merged(base, lora, wan.comfy_layer)
    assert sum(not torch.equal(changed[name], base[name]) for name in base) == len(stems)


def test_the_parts_of_wans_image_models_have_their_names_in_comfyui():
    names = {
        "blocks.0.attn2.add_k_proj.weight": "blocks.0.cross_attn.k_img.weight",
        "blocks.3.attn2.norm_added_k.weight": "blocks.3.cross_attn.norm_k_img.weight",
        "condition_embedder.image_embedder.norm2.bias": "img_emb.proj.4.bias",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",  # of first and last frame
    }
    assert {name: comfy_name(WAN, name) for name in names} == names


def test_a_lora_has_the_names_of_cogvideox_in_comfyui(tmp_path):
    """As comfy.ldm.cogvideo.model names them (0.25 and later)."""
    model = open_model(cogvideox(tmp_path))
    module = model.load()
    add_lora(module, 2)
    lora = comfy_lora(module, module.state_dict(), model.comfy_layer)
    layers = {name.removeprefix("diffusion_model.").removesuffix(".alpha") for name in lora if name.endswith(".alpha")}
    assert layers == {f"blocks.{i}.{x}" for i in range(4) for x in ("q", "k", "v", "attn_out", "ff_proj", "ff_out")}


def test_cogvideox_has_its_schedule_and_layout(tmp_path):
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8, num_layers=1,
        sample_width=8, sample_height=6, sample_frames=13, max_text_seq_length=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    module.save_pretrained(tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
        tmp_path / "scheduler"
    )
    model = open_model(ModelConfig(path=str(tmp_path), family="diffusers"))
    assert (model.family, model.prediction) == ("cogvideox", "v_prediction")
    assert float(model.path.coefficients(torch.tensor([999.0]))[0]) == pytest.approx(0.0, abs=1e-6)
    loaded = model.load().eval()
    z, time, condition = inputs()
    dense = model.predict(loaded, z, time, condition)
    assert dense.shape == z.shape and bool(dense.isfinite().all())
    sparse = model.predict(loaded, z, time, condition, sparse_options(model, TilePlan.uniform(1))(z))
    assert not torch.allclose(sparse, dense, atol=1e-4)


@pytest.mark.parametrize("family", [small_wan, cogvideox])
def test_an_image_to_video_model_is_refused_at_once(family, tmp_path):
    """Its picture stands in further channels, of which no clip of a training has any."""
    family(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 9}))
    with pytest.raises(ValueError, match="takes 9 channels and makes 4: .* only text-to-video models are trained"):
        open_model(ModelConfig(path=str(tmp_path), family="diffusers"))


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        open_model(ModelConfig(path=str(tmp_path), family="diffusers"))
    with pytest.raises(ValueError, match="does not exist"):
        open_model(ModelConfig(path=str(tmp_path / "none"), family="diffusers"))


def test_the_text_encoder_is_read_in_bf16(wan, monkeypatch):
    """umT5-XXL takes 23 GB in float32."""
    read = []

    class Pipe:
        def to(self, device):
            return self

        def encode_prompt(self, texts, **settings):
            return (torch.zeros(len(texts), 3, 8, dtype=torch.bfloat16),)

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kw: read.append(kw) or Pipe())
    context, mask = wan.text_encoder(torch.device("cpu"))(["a", "b"])
    assert context.shape == (2, 3, 8) and mask.shape == (2, 3)
    assert read[0]["torch_dtype"] == torch.bfloat16 and read[0]["vae"] is None


def wans_pipeline(wan):
    """Its text encoder and tokenizer alone, with a word for each letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    torch.manual_seed(3)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    scheduler = diffusers.UniPCMultistepScheduler()
    pipe = diffusers.WanPipeline(tokenizer, encoder, vae=None, scheduler=scheduler, transformer=None)  # pyright: ignore
    wan._pipeline = lambda *_, **__: pipe
    return pipe


def test_wan_learns_from_the_text_states_that_it_is_sampled_with(wan, tmp_path):
    """512 rows, zeros behind the words, which the network attends to as well; the cache keeps the words alone."""
    pipe, prompts = wans_pipeline(wan), ["ab", "a" * 300 + "b"]
    device = torch.device("cpu")
    expected = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512, device=device)[0]
    bank = _text_bank(prompts, wan, tmp_path, device)
    torch.testing.assert_close(bank.batch(prompts)[0], expected.detach())
    assert [len(bank.states[p]) for p in prompts] == [2, 301]
    assert wan.text_padding == wan.text_size[0] == 512


def test_videos_go_through_wans_own_vae(wan, tmp_path, monkeypatch):
    """Against diffusers' VAE called by hand. The decoder is used throughout a training and is read once; an encoder is
    its caller's own."""
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
                                     latents_std=[1.5, 0.5, 2.0, 1.0]).eval()  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=None
    ).save_pretrained(tmp_path)
    read, from_pretrained = [], diffusers.WanPipeline.from_pretrained
    monkeypatch.setattr(
        diffusers.WanPipeline, "from_pretrained", lambda *args, **kw: read.append(kw) or from_pretrained(*args, **kw)
    )

    frames = torch.randint(0, 256, (9, 32, 48, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mean, deviation = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        raw = vae.encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mode()
        pixels = vae.decode(raw).sample[0].clamp(-1, 1)
    latents = wan.video_encoder(torch.device("cpu"))(frames.numpy())
    torch.testing.assert_close(latents, ((raw - mean) / deviation)[0])
    for _ in range(3):
        video = torch.from_numpy(wan.video_decoder(torch.device("cpu"))(latents))
    assert (video.permute(3, 0, 1, 2).float() - (pixels + 1) * 127.5).abs().max() <= 0.51
    assert len(read) == 2


@pytest.mark.parametrize("networks", [("transformer",), ("transformer", "transformer_2")])
def test_what_encodes_and_decodes_is_read_without_the_networks(tmp_path, networks):
    """Of Wan 2.2's 14 billion weights each, in float32, beside a VAE."""
    config = wan_22(tmp_path) if len(networks) == 2 else small_wan(tmp_path)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=diffusers.UniPCMultistepScheduler(), transformer=None
    ).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    listed = {name: ["diffusers", "WanTransformer3DModel"] for name in networks}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **listed, "boundary_ratio": 0.875}))
    loaded = open_model(config)._pipeline(torch.float32, text_encoder=None, tokenizer=None).components
    assert [name for name, part in loaded.items() if isinstance(part, torch.nn.Module)] == ["vae"]


def test_what_is_intercepted_has_the_dtype_of_autocast():
    """On CUDA a norm gives float32 there: q and k come in another dtype than v, by which no backend may be chosen."""
    seen = []

    def override(dense, q, k, v, heads, **_):
        seen.append([x.dtype for x in (q, k, v)])
        return dense(q, k, v, heads)

    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), Intercepted({OVERRIDE: override}):
        positional = F.scaled_dot_product_attention(q, k, v.to(torch.bfloat16))
        named = F.scaled_dot_product_attention(query=q, key=k, value=v)
    assert seen == [[torch.bfloat16] * 3] * 2 and torch.equal(positional, named)
