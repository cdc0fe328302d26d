"""The templates of MiniMax-H3 with turbo LoRAs."""

from __future__ import annotations

from graph import FOX_WITH_SOUND, HUB, Graph, Node, files, loader, model, note, preset, video

H3 = f"{HUB}/Comfy-Org/MiniMax-H3/resolve/main"
H3_COLUMNS = ("1 Model", "2 Sparse attention", "3 Prompt and size", "4 Sampling", "5 Video and sound")


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
            "MiniMaxH3ImageToVideo", 2, {"prompt": FOX_WITH_SOUND, "width": 1344, "height": 768, "length": 124}, links,
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
