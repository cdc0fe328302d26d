"""The templates of LTX-2.3 and 2.5, in two stages."""

from __future__ import annotations

from graph import FOX_WITH_SOUND, HUB, Graph, Node, files, loader, model, note, preset, prompts, video

LTX25 = f"{HUB}/Lightricks/LTX-2.5/resolve/main"
LTX, LTX_PARTS = f"{HUB}/Lightricks/LTX-2.3", f"{HUB}/Comfy-Org/ltx-2.3/resolve/main/split_files"
LTX_COLUMNS = (
    "1 Model and prompt",
    "2 Sparse attention",
    "3 Half size, 8 steps",
    "4 Full size, 3 steps",
    "5 Video and sound",
)
LTX_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
LTX_SECOND = "0.85, 0.725, 0.4219, 0.0"
LTX_NEGATIVE = "pc game, console game, video game, cartoon, childish, ugly"
LTX_WHAT = (
    "121 frames (5 s) of 1920x1088 with sound: 8 steps at half the size, the latents doubled, then 3 steps, without guidance. The "
    "preset holds in both stages; the clip's first step stays dense (`start_percent` 0.01), the second stage is sparse from its "
    "first on. The sound has attention of its own, which stays dense."
)
LTX_EXPECT = (
    "The look of full attention with small changes of motion. The switch *Sparse attention on* gives the dense clip."
)


def _ltx_two_stages(vae: tuple[str, int], again: tuple[str, int], sampler: str, fps: int) -> dict[str, Node]:
    """Text to video with sound from ``switch``'s model: 8 steps at half size, the latent doubled, 3 steps more.

    vae: what the latents are doubled with. again: what they are decoded with. Nodes that must be there beside these are the
    prompts, ``audio_vae``, ``twice`` and ``sound_vae``.
    """

    def stage(column: int, sigmas: str, latent: tuple[str, int], end: str) -> dict[str, Node]:
        parts = {"noise": ("noise", 0), "guider": ("guider", 0), "sampler": ("steps", 0), "sigmas": (f"sigmas{end}", 0)}
        return {
            f"sigmas{end}": Node("ManualSigmas", column, {"sigmas": sigmas}),
            f"sampler{end}": Node("SamplerCustomAdvanced", column, {}, {**parts, "latent_image": latent}),
            f"apart{end}": Node("LTXVSeparateAVLatent", 3, {}, {"av_latent": (f"sampler{end}", 0)}),
        }

    conditioning = {"positive": ("rate", 0), "negative": ("rate", 1)}
    upsampled = {"samples": ("apart", 0), "upscale_model": ("twice", 0), "vae": vae}
    nodes = {
        "rate": Node("LTXVConditioning", 1, {"frame_rate": float(fps)}, {"positive": ("positive", 0), "negative": ("negative", 0)}),
        "latent": Node("EmptyLTXVLatentVideo", 2, {"width": 960, "height": 544, "length": 121}),
        "silence": Node(
            "LTXVEmptyLatentAudio", 2, {"frames_number": 121, "frame_rate": fps}, {"audio_vae": ("audio_vae", 0)}
        ),
        "together": Node("LTXVConcatAVLatent", 2, {}, {"video_latent": ("latent", 0), "audio_latent": ("silence", 0)}),
        "noise": Node("RandomNoise", 2, {"noise_seed": 0}),
        "guider": Node("CFGGuider", 2, {"cfg": 1.0}, {"model": ("switch", 0), **conditioning}),
        "steps": Node("KSamplerSelect", 2, {"sampler_name": sampler}),
        **stage(2, LTX_SIGMAS, ("together", 0), ""),
        "larger": Node("LTXVLatentUpsampler", 3, {}, upsampled),
        "again": Node("LTXVConcatAVLatent", 3, {}, {"video_latent": ("larger", 0), "audio_latent": ("apart", 1)}),
        **stage(3, LTX_SECOND, ("again", 0), "_2"),
        "sound": Node("LTXVAudioVAEDecode", 4, {}, {"samples": ("apart_2", 1), "audio_vae": ("sound_vae", 0)}),
        **video(("apart_2", 0), again, fps, tiled=True, column=4),
    }  # fmt: skip
    nodes["create"].links["audio"] = ("sound", 0)
    return nodes


def ltx23() -> Graph:
    """From one checkpoint, with the few-step LoRA."""
    whole = model("checkpoints", f"{HUB}/Lightricks/LTX-2.3-fp8/resolve/main/ltx-2.3-22b-dev-fp8.safetensors")
    lora = model(
        "loras", f"{LTX_PARTS}/loras/ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors"
    )
    gemma = model(
        "text_encoders",
        f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors",
    )
    twice = model("latent_upscale_models", f"{LTX}/resolve/main/ltx-2.3-spatial-upscaler-x2-1.1.safetensors")
    nodes = {
        "model": loader("CheckpointLoaderSimple", "ckpt_name", whole),
        "lora": Node(
            "LoraLoaderModelOnly", 0, {"lora_name": lora["name"], "strength_model": 0.5}, {"model": ("model", 0)},
            "Few-step LoRA", [lora],
        ),
        "clip": Node(
            "LTXAVTextEncoderLoader", 0, {"text_encoder": gemma["name"], "ckpt_name": whole["name"]}, models=[gemma, whole]
        ),
        **preset("lora", "ltx_av", (61, 48), start_percent=0.01),
        **prompts("clip", FOX_WITH_SOUND, LTX_NEGATIVE, column=0),
        "audio_vae": loader("LTXVAudioVAELoader", "ckpt_name", whole, column=0),
        "twice": loader("LatentUpscaleModelLoader", "model_name", twice, column=3),
        "sound_vae": loader("LTXVAudioVAELoader", "ckpt_name", whole, column=4),
        **_ltx_two_stages(("model", 2), ("model", 2), "euler", 25),
    }  # fmt: skip
    text = note(
        nodes["plan"],
        "LTX-2.3 in two stages, with sparse attention",
        LTX_WHAT,
        files(whole, lora, gemma, twice),
        "About 29 GB for the checkpoint in fp8 and 9 GB for the text encoder. At the full size a step gains at most 1.32x, by FLOPs, "
        "at 241 frames 1.48x; at half size hardly anything; all 11 steps together at most 1.24x.",
        LTX_EXPECT,
        needs="0.25",
    )
    caption = ("LTX-2.3", "5 s of 1920x1088, with sound", "8 + 3 steps, a step at most 1.32x faster")
    return Graph("ltx23_two_stages", "LTX-2.3 faster, two stages", caption, text, nodes, LTX_COLUMNS)


def ltx25() -> Graph:
    """From the distilled transformer and parts of their own."""
    unet = model(
        "diffusion_models", f"{LTX25}/diffusion_models/ltx-2.5-22b-distilled-transformer-comfy-int8-convrot.safetensors"
    )
    gemma = model("text_encoders", f"{LTX25}/text_encoders/gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors")
    vae, sound = (model("vae", f"{LTX25}/vae/ltx-2.5-{part}-vae-bf16.safetensors") for part in ("video", "audio"))
    twice = model(
        "latent_upscale_models",
        f"{LTX25}/latent_upscale_models/ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors",
    )
    nodes = {
        "model": loader("UNETLoader", "unet_name", unet, weight_dtype="default"),
        "clip": loader("CLIPLoader", "clip_name", gemma, type="ltxv"),
        **preset("model", "ltx_av", (61, 48), start_percent=0.01),
        **prompts("clip", FOX_WITH_SOUND, LTX_NEGATIVE, column=0),
        "audio_vae": loader("VAELoader", "vae_name", sound, column=1),
        "twice": loader("LatentUpscaleModelLoader", "model_name", twice, column=3),
        "vae": loader("VAELoader", "vae_name", vae, column=3),
        "sound_vae": loader("VAELoader", "vae_name", sound, column=4),
        "decode_vae": loader("VAELoader", "vae_name", vae, column=4),
        **_ltx_two_stages(("vae", 0), ("decode_vae", 0), "euler_ancestral", 24),
    }
    text = note(
        nodes["plan"],
        "LTX-2.5 in two stages, with sparse attention",
        LTX_WHAT,
        files(unet, gemma, vae, sound, twice),
        "About 21 GB for the model and 13 GB for the text encoder in INT8, one after the other; ask for access on the model's page "
        "before you download. At the full size a step gains at most 1.32x, by the FLOPs of LTX-2.3's sizes; at half size hardly anything; "
        "all 11 steps together at most 1.24x.",
        LTX_EXPECT,
        needs="0.33",
    )
    caption = ("LTX-2.5", "5 s of 1920x1088, with sound", "8 + 3 steps, a step at most 1.32x faster")
    return Graph("ltx25_two_stages", "LTX-2.5 faster, two stages", caption, text, nodes, LTX_COLUMNS)
