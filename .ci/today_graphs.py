"""The templates of what people run today: MiniMax-H3 with turbo LoRAs, LTX-2.3 and 2.5 in two stages, Wan 2.2 image to video."""

from __future__ import annotations

from collections.abc import Iterator

from template_graphs import (
    HIGH_NOISE_DENSE,
    HUB,
    WAN21,
    WAN22,
    WAN22_COLUMNS,
    Graph,
    Node,
    experts_share,
    loader,
    model,
    note,
    prompts,
    video,
)

H3 = f"{HUB}/Comfy-Org/MiniMax-H3/resolve/main"
LTX25 = f"{HUB}/Lightricks/LTX-2.5/resolve/main"
LTX, LTX_PARTS = f"{HUB}/Lightricks/LTX-2.3", f"{HUB}/Comfy-Org/ltx-2.3/resolve/main/split_files"
H3_COLUMNS = ("1 Model", "2 Sparse attention", "3 Prompt and size", "4 Sampling", "5 Video and sound")
LTX_COLUMNS = (
    "1 Model and prompt",
    "2 Sparse attention",
    "3 Half size, 8 steps",
    "4 Full size, 3 steps",
    "5 Video and sound",
)
H3_PROMPT = (
    "A fox runs through a snowy forest at sunrise, tracking camera, cinematic light. Sound: soft paws on snow, a light "
    "wind in the trees, a raven far away."
)
LTX_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
LTX_SECOND = "0.85, 0.725, 0.4219, 0.0"


def preset(source: str, name: str, preview: tuple[int, int], **values: object) -> dict[str, Node]:
    """Load Tile Plan with a preset, Sparse Attention, and a switch between its model and the dense one."""
    return {
        "plan": Node("EVDiTLoadTilePlan", 1, {"plan_name": f"{name} (preset)", "text": ""}, preview=preview),
        "sparse": Node("EVDiTSparseAttention", 1, values, {"model": (source, 0), "plan": ("plan", 0)}),
        "switch": Node(
            "ComfySwitchNode", 1, {"switch": True}, {"on_false": (source, 0), "on_true": ("sparse", 0)}, "Sparse attention on"
        ),
    }  # fmt: skip


def files(*found: dict[str, str]) -> str:
    return "\n".join(f"- `models/{f['directory']}`: [{f['name']}]({f['url']})" for f in found)


def _minimax_h3(steps: int, lora: dict[str, str], shift: float, first_frame: bool) -> Graph:
    task = "image" if first_frame else "text"
    unet = model("diffusion_models", f"{H3}/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors")
    clip = model("text_encoders", f"{H3}/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors")
    vae = model("vae", f"{H3}/vae/minimax_h3_video_vae_fp16.safetensors")
    audio = model("vae", f"{H3}/vae/minimax_h3_audio_vae_fp32.safetensors")
    links = {"clip": ("clip", 0), "vae": ("vae", 0)} | ({"first_frame": ("image", 0)} if first_frame else {})
    nodes = {
        "model": loader("UNETLoader", "unet_name", unet, weight_dtype="default"),
        "lora": Node(
            "LoraLoaderModelOnly", 0, {"lora_name": lora["name"], "strength_model": 1.0}, {"model": ("model", 0)},
            f"Turbo LoRA, {steps} steps", [lora],
        ),
        **preset("lora", "minimax_h3", (107, 50), dense_first_steps=1),
        "clip": loader("CLIPLoader", "clip_name", clip, column=1, type="minimax"),
        "shift": Node("MiniMaxH3SigmaShift", 2, {"shift_video": shift, "shift_audio": 3.0}, {"model": ("switch", 0)}),
        "vae": loader("VAELoader", "vae_name", vae, column=2),
        **({"image": Node("LoadImage", 2, {"image": "example.png"}, title="First frame")} if first_frame else {}),
        "prompt": Node(
            "MiniMaxH3ImageToVideo", 2, {"prompt": H3_PROMPT, "width": 1344, "height": 768, "length": 124}, links,
            "Prompt, size and length",
        ),
        "guider": Node("BasicGuider", 3, {}, {"model": ("shift", 0), "conditioning": ("prompt", 0)}),
        "noise": Node("RandomNoise", 3, {"noise_seed": 0}),
        "euler": Node("KSamplerSelect", 3, {"sampler_name": "res_multistep"}),
        "sigmas": Node("BasicScheduler", 3, {"scheduler": "simple", "steps": steps, "denoise": 1.0}, {"model": ("shift", 0)}),
        "sampler": Node(
            "SamplerCustomAdvanced", 3, {},
            {
                "noise": ("noise", 0), "guider": ("guider", 0), "sampler": ("euler", 0), "sigmas": ("sigmas", 0),
                "latent_image": ("prompt", 1),
            },
        ),
        "audio_vae": loader("VAELoader", "vae_name", audio, column=4),
        "sound": Node("VAEDecodeAudio", 4, {}, {"samples": ("sampler", 0), "vae": ("audio_vae", 0)}),
        **video(("sampler", 0), ("vae", 0), 24, column=4),
    }  # fmt: skip
    nodes["decode"].column, nodes["create"].links["audio"] = 3, ("sound", 0)  # beside its VAE
    # A first frame stands before the video as 2016 more tokens, which are never sparse.
    bound, of_10_s, of_15_s = ("1.41x", "1.65x", "1.79x") if first_frame else ("1.46x", "1.70x", "1.84x")
    text = note(
        nodes["plan"],
        f"MiniMax-H3, {task} to video: sparse attention and {steps} steps",
        f"124 frames (5 s) of 1344x768 with sound, in {steps} steps by a turbo LoRA, without guidance. *Sparse Attention* keeps the first "
        "step dense, the mild preset the first two layers and the last; its reference frames are every fifth latent frame, which holds a "
        "single pixel frame. Text, sound and keyframes stay exact.",
        files(unet, lora, clip, vae, audio),
        f"About 20 GB for the model, 15 GB for the text encoder, one after the other. Under this plan a step gains at most {bound}, by "
        f"FLOPs; 10 s gain at most {of_10_s}, 15 s {of_15_s}. With INT8 attention (ComfyUI's *Model Attention Backend*, before or "
        "behind *Sparse Attention*) both add up.",
        "The same scene with other details. The LoRA was not trained for sparse attention: keep the mild preset, and look at motion "
        "first. The switch *Sparse attention on* gives the dense clip.",
        needs="0.33",
    )
    caption = ("MiniMax-H3", f"{task} to video, 5 s of 768p", f"{steps} steps, a step at most {bound} faster")
    name = f"minimax_h3_{task}_{steps}_steps"
    return Graph(name, f"MiniMax-H3 faster, {task}, {steps} steps", caption, text, nodes, H3_COLUMNS)


def minimax_h3_text() -> Graph:
    lora = model(
        "loras",
        f"{HUB}/lightx2v/Minimax-h3-Turbo/resolve/main/minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors",
    )
    return _minimax_h3(8, lora, 12.0, first_frame=False)


def minimax_h3_image() -> Graph:
    """The LoRA of 4 steps was made for 768p, where its makers set a shift of 6."""
    lora = model("loras", f"{H3}/loras/minimax_h3_fl2v_turbo_4step_v1.0_768p_comfyui_bf16.safetensors")
    return _minimax_h3(4, lora, 6.0, first_frame=True)


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


LTX_NEGATIVE = "pc game, console game, video game, cartoon, childish, ugly"
LTX_WHAT = (
    "121 frames (5 s) of 1920x1088 with sound: 8 steps at half the size, the latents doubled, then 3 steps, without guidance. The "
    "preset holds in both stages; the clip's first step stays dense (`start_percent` 0.01), the second stage is sparse from its "
    "first on. The sound has attention of its own, which stays dense."
)
LTX_EXPECT = (
    "The look of full attention with small changes of motion. The switch *Sparse attention on* gives the dense clip."
)


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
        **prompts("clip", H3_PROMPT, LTX_NEGATIVE, column=0),
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
        **prompts("clip", H3_PROMPT, LTX_NEGATIVE, column=0),
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


def wan22_image() -> Graph:
    """Two experts, two steps each."""
    plan, split = "all:6 0-1:full -1:full", f"{WAN22}/resolve/main/split_files"
    clip = model(
        "text_encoders", f"{WAN21}/resolve/main/split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    )
    vae = model("vae", f"{split}/vae/wan_2.1_vae.safetensors")
    nodes: dict[str, Node] = {"plan": Node("EVDiTTilePlan", 1, {"text": plan}, preview=(21, 40))}
    found = []
    for noise in ("high", "low"):
        unet = model(
            "diffusion_models", f"{split}/diffusion_models/wan2.2_i2v_{noise}_noise_14B_fp8_scaled.safetensors"
        )
        lora = model("loras", f"{split}/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_{noise}_noise.safetensors")
        found += [unet, lora]
        nodes[f"{noise}_model"] = loader("UNETLoader", "unet_name", unet, weight_dtype="default")
        nodes[f"{noise}_lora"] = Node(
            "LoraLoaderModelOnly", 0, {"lora_name": lora["name"], "strength_model": 1.0}, {"model": (f"{noise}_model", 0)},
            f"Few-step LoRA, {noise} noise", [lora],
        )  # fmt: skip
        mild = {"dense_first_steps": 1, "dense_blocks": HIGH_NOISE_DENSE} if noise == "high" else {}
        links = {"model": (f"{noise}_lora", 0), "plan": ("plan", 0)}
        nodes[f"{noise}_sparse"] = Node("EVDiTSparseAttention", 1, mild, links, f"Sparse Attention, {noise} noise")
        nodes[f"{noise}_shift"] = Node("ModelSamplingSD3", 2, {"shift": 5.0}, {"model": (f"{noise}_sparse", 0)})
    common = {"noise_seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    texts = {"positive": ("start", 0), "negative": ("start", 1)}
    nodes |= {
        "clip": loader("CLIPLoader", "clip_name", clip, column=2, type="wan"),
        "vae": loader("VAELoader", "vae_name", vae, column=3),
        "image": Node("LoadImage", 2, {"image": "example.png"}, title="First frame"),
        **prompts("clip", "the camera moves closer, leaves stir in the wind", column=2),
        "start": Node(
            "WanImageToVideo", 3, {"width": 832, "height": 480, "length": 81, "batch_size": 1},
            {"positive": ("positive", 0), "negative": ("negative", 0), "vae": ("vae", 0), "start_image": ("image", 0)},
        ),
        "first": Node(
            "KSamplerAdvanced", 3,
            {**common, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"},
            {"model": ("high_shift", 0), **texts, "latent_image": ("start", 2)}, "Steps 1-2",
        ),
        "second": Node(
            "KSamplerAdvanced", 3,
            {"add_noise": "disable", **common, "start_at_step": 2, "end_at_step": 4, "return_with_leftover_noise": "disable"},
            {"model": ("low_shift", 0), **texts, "latent_image": ("first", 0)}, "Steps 3-4",
        ),
        "decode_vae": loader("VAELoader", "vae_name", vae, column=4),
        **video(("second", 0), ("decode_vae", 0), 16, column=4),
    }  # fmt: skip
    each, overall = experts_share(plan, 21, 40)
    text = note(
        nodes["plan"],
        "Wan 2.2 14B, image to video: sparse attention and 2 + 2 steps",
        f"81 frames of 832x480 in 4 steps without guidance, two by each of Wan's two experts, which get one plan: {each}.",
        files(*found, clip, vae),
        "About 14 GB for each of the two experts, one after the other, and 7 GB for the text encoder. A step gains at most 1.30x at this "
        "size, by FLOPs, and 1.47x at 1280x720.",
        "The high-noise expert sets layout and motion: its first step and six of its first layers stay dense. Bypass its *Sparse "
        "Attention* (Ctrl+B) where motion still falls apart.",
    )
    caption = ("Wan 2.2 14B", "image to video, 81 frames of 832x480", f"2 + 2 steps, {overall}")
    return Graph("wan22_image_4_steps", "Wan 2.2 14B faster, image, 4 steps", caption, text, nodes, WAN22_COLUMNS)


def today_graphs() -> Iterator[Graph]:
    yield from (minimax_h3_text(), minimax_h3_image(), ltx23(), ltx25(), wan22_image())
