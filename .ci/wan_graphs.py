"""The templates of Wan 2.1 and 2.2."""

from __future__ import annotations

from graph import FOX, HUB, Graph, Node, files, loader, model, note, part, prompts, share, sparse, video

from efficient_vdit_core.plan import TilePlan

WAN21, WAN22 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged", f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
WAN22_COLUMNS = ("1 Models", "2 Sparse attention", "3 Prompt and size", "4 Sampling", "5 Video")
# Wan 2.2's high-noise expert sets layout and motion: its first step stays dense, and so do these of its blocks.
HIGH_NOISE_DENSE = "0-5,-1"


def experts_share(plan: str, frames: int, layers: int) -> tuple[str, str]:
    """What Wan 2.2's two experts compute of the self-attention: each for a note, in all 2 + 2 steps for a picture."""
    high, low = (TilePlan.from_text(plan).with_dense(dense).density(frames, layers) for dense in (HIGH_NOISE_DENSE, ""))
    each = f"of the self-attention the high-noise one computes {high:.0%} after a dense first step, the low-noise one {low:.0%}"
    overall = f"{(1 + high + 2 * low) / 4:.0%}"
    return f"{each}; over all four steps {overall}", f"{overall} of their attention"


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


def wan21() -> Graph:
    plan = "all:6 0-1:full -1:full"
    unet = model(
        "diffusion_models", f"{WAN21}/resolve/main/split_files/diffusion_models/wan2.1_t2v_14B_fp8_scaled.safetensors"
    )
    clip = model(
        "text_encoders", f"{WAN21}/resolve/main/split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    )
    vae = model("vae", f"{WAN21}/resolve/main/split_files/vae/wan_2.1_vae.safetensors")
    lora = model(
        "loras",
        f"{HUB}/Kijai/WanVideo_comfy/resolve/main/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
    )
    nodes = {
        "model": loader("UNETLoader", "unet_name", unet, weight_dtype="default"),
        "lora": Node(
            "LoraLoaderModelOnly", 0, {"lora_name": lora["name"], "strength_model": 1.0}, {"model": ("model", 0)}, "Few-step LoRA", [lora]
        ),
        "clip": loader("CLIPLoader", "clip_name", clip, type="wan"),
        "vae": loader("VAELoader", "vae_name", vae, column=3),
        **sparse("lora", plan, (21, 40)),
        **prompts("clip", FOX),
        "latent": Node("EmptyHunyuanLatentVideo", 2, {"width": 832, "height": 480, "length": 81}),
        "shift": Node("ModelSamplingSD3", 2, {"shift": 5.0}, {"model": ("sparse", 0)}),
        "sampler": Node(
            "KSampler", 2, {"seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"},
            {"model": ("shift", 0), "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)},
        ),
        **video(("sampler", 0), ("vae", 0), 16),
    }  # fmt: skip
    text = note(
        nodes["plan"],
        "Wan 2.1 14B: sparse attention and 4 steps",
        f"81 frames of 832x480 in 4 steps without guidance, by a step-distilled LoRA, with {share(plan, 21, 40)} computed.",
        files(unet, lora, clip, vae),
        "About 14 GB for the model and 7 GB for the text encoder; ComfyUI moves what does not fit.",
        "The look of full attention with small changes of motion. The LoRA sets the quality of 4 steps; it was not trained for a plan.",
    )
    caption = ("Wan 2.1 14B", "81 frames, 832x480", f"4 steps, {part(plan, 21, 40)}")
    return Graph("wan21_sparse_4_steps", "Wan 2.1 14B faster, text, 4 steps", caption, text, nodes)


def wan22() -> Graph:
    plan, split = "all:6 0-1:full -1:full", f"{WAN22}/resolve/main/split_files"
    clip = model(
        "text_encoders", f"{WAN21}/resolve/main/split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    )
    vae = model("vae", f"{split}/vae/wan_2.1_vae.safetensors")
    high, of_high = _wan22_expert("high", split)
    low, of_low = _wan22_expert("low", split)
    nodes: dict[str, Node] = {
        "plan": Node("EVDiTTilePlan", 1, {"text": plan}, preview=(21, 40)),
        **high,
        **low,
        "clip": loader("CLIPLoader", "clip_name", clip, column=2, type="wan"),
        "vae": loader("VAELoader", "vae_name", vae, column=4),
        **prompts("clip", FOX, column=2),
        "latent": Node("EmptyHunyuanLatentVideo", 2, {"width": 832, "height": 480, "length": 81}),
        "first": _wan22_steps("high", 0, 2, "latent"),
        "second": _wan22_steps("low", 2, 4, "first"),
        **video(("second", 0), ("vae", 0), 16, column=4),
    }
    files = (*of_high, *of_low, clip, vae)
    each, overall = experts_share(plan, 21, 40)
    text = note(
        nodes["plan"],
        "Wan 2.2 14B: sparse attention and 4 steps",
        f"81 frames of 832x480 in 4 steps without guidance. Wan 2.2 is two models, which get one plan: {each}.",
        "\n".join(f"- `models/{f['directory']}`: [{f['name']}]({f['url']})" for f in files),
        "About 14 GB for each of the two models, one after the other, and 7 GB for the text encoder.",
        "The high-noise model sets layout and motion, so its first step and six of its first layers stay dense: bypass its "
        "*Sparse Attention* where motion still falls apart.",
    )
    caption = ("Wan 2.2 14B", "81 frames, 832x480", f"4 steps, {overall}")
    return Graph("wan22_sparse_4_steps", "Wan 2.2 14B faster, text, 4 steps", caption, text, nodes, WAN22_COLUMNS)


def _wan22_expert(noise: str, split: str) -> tuple[dict[str, Node], list[dict[str, str]]]:
    """One of the two models with its few-step LoRA, sparse under the node ``plan``, and its files."""
    unet = model("diffusion_models", f"{split}/diffusion_models/wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors")
    lora = model("loras", f"{split}/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors")
    title, lora_link = f"{noise} noise", {"model": (f"{noise}_model", 0)}
    sparse_links = {"model": (f"{noise}_lora", 0), "plan": ("plan", 0)}
    # 0.2 of the schedule is the first of these 4 steps, which only the high-noise expert takes.
    mild = {"start_percent": 0.2, "dense_blocks": HIGH_NOISE_DENSE if noise == "high" else ""}
    nodes = {
        f"{noise}_model": loader("UNETLoader", "unet_name", unet, weight_dtype="default"),
        f"{noise}_lora": Node(
            "LoraLoaderModelOnly", 0, {"lora_name": lora["name"]}, lora_link, f"Few-step LoRA, {title}", [lora]
        ),
        f"{noise}_sparse": Node("EVDiTSparseAttention", 1, mild, sparse_links, f"Sparse Attention, {title}"),
        f"{noise}_shift": Node("ModelSamplingSD3", 2, {"shift": 5.0}, {"model": (f"{noise}_sparse", 0)}),
    }
    return nodes, [unet, lora]


def _wan22_steps(noise: str, start: int, end: int, latent: str) -> Node:
    """Steps ``start`` to ``end`` of 4 by one of the two models: the first noises what the second finishes."""
    begins = start == 0
    widgets = {
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "add_noise": "enable" if begins else "disable",
        "noise_seed": 0,
        "start_at_step": start,
        "end_at_step": end,
        "return_with_leftover_noise": "enable" if begins else "disable",
    }
    links = {
        "model": (f"{noise}_shift", 0),
        "positive": ("positive", 0),
        "negative": ("negative", 0),
        "latent_image": (latent, 0),
    }
    return Node("KSamplerAdvanced", 3, widgets, links, f"Steps {start + 1}-{end}")
