"""The template of HunyuanVideo."""

from __future__ import annotations

from graph import FOX, HUB, Graph, Node, files, loader, model, note, part, share, sparse, video

FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders"


def hunyuan() -> Graph:
    plan, repo = "all:5 0-1:full -1:full", f"{HUB}/Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
    unet = model("diffusion_models", f"{repo}/diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors")
    llava = model("text_encoders", f"{repo}/text_encoders/llava_llama3_fp8_scaled.safetensors")
    clip_l = model("text_encoders", f"{FLUX_TEXT}/resolve/main/clip_l.safetensors")
    vae = model("vae", f"{repo}/vae/hunyuan_video_vae_bf16.safetensors")
    both = {"clip_name1": clip_l["name"], "clip_name2": llava["name"], "type": "hunyuan_video"}
    nodes = {
        "model": loader("UNETLoader", "unet_name", unet, weight_dtype="default"),
        "clip": Node("DualCLIPLoader", 0, both, models=[clip_l, llava]),
        "vae": loader("VAELoader", "vae_name", vae, column=3),
        **sparse("model", plan, (19, 60), start_percent=0.1),
        "positive": Node("CLIPTextEncode", 1, {"text": FOX}, {"clip": ("clip", 0)}, "Prompt"),
        "guidance": Node("FluxGuidance", 2, {"guidance": 6.0}, {"conditioning": ("positive", 0)}),
        "latent": Node("EmptyHunyuanLatentVideo", 2, {"width": 848, "height": 480, "length": 73}),
        "noise": Node("RandomNoise", 2, {"noise_seed": 0}),
        "shift": Node("ModelSamplingSD3", 2, {"shift": 7.0}, {"model": ("sparse", 0)}),
        "guider": Node("BasicGuider", 2, {}, {"model": ("shift", 0), "conditioning": ("guidance", 0)}),
        "sigmas": Node("BasicScheduler", 2, {"scheduler": "simple", "steps": 20, "denoise": 1.0}, {"model": ("shift", 0)}),
        "euler": Node("KSamplerSelect", 2, {"sampler_name": "euler"}),
        "sampler": Node(
            "SamplerCustomAdvanced", 2, {},
            {
                "noise": ("noise", 0), "guider": ("guider", 0), "sampler": ("euler", 0), "sigmas": ("sigmas", 0),
                "latent_image": ("latent", 0),
            },
        ),
        **video(("sampler", 0), ("vae", 0), 24, tiled=True),
    }  # fmt: skip
    text = note(
        nodes["plan"],
        "HunyuanVideo with sparse attention",
        f"73 frames of 848x480 in 20 steps; {share(plan, 19, 60)} is computed after the first tenth of the schedule. Its 20 double and 40 "
        "single blocks count as layers 0 to 59; text tokens attend to all and are seen by all.",
        files(unet, clip_l, llava, vae),
        "About 26 GB for the model in bf16 (choose fp8_e4m3fn for half) and 9 GB for the text encoder.",
        "The same scene as with full attention; fine motion differs. More reference frames hold it closer.",
    )
    caption = ("HunyuanVideo", "73 frames, 848x480", part(plan, 19, 60))
    return Graph("hunyuan_video_sparse", "HunyuanVideo faster, text, 20 steps", caption, text, nodes)
