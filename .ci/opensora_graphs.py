"""The templates of Open-Sora-Plan, on one GPU and on several."""

from __future__ import annotations

from graph import FOX, HUB, Graph, Node, loader, model, note, part, prompts, share, sparse, video

OSP = f"{HUB}/LanguageBind/Open-Sora-Plan-v1.2.0"


def opensora(frames: int) -> Graph:
    latent, plan = (frames + 3) // 4, {29: "0-1:full 2-31:2:6", 93: "0-1:full 2-31:4:20"}[frames]
    folder, url = (
        f"open_sora_plan_v1.2_{frames}x720p",
        f"{OSP}/resolve/main/{frames}x720p/diffusion_pytorch_model.safetensors",
    )
    seconds = {29: 420, 93: 3400}[frames]
    file = model("diffusion_models", url, f"{folder}/diffusion_pytorch_model.safetensors")
    nodes = {
        "model": loader("EVDiTModelLoader", "model_name", file, weight_dtype="default"),
        "clip": Node("EVDiTTextEncoderLoader", 0, {"text_encoder_name": "mt5-xxl-encoder.safetensors", "template": "a"}),
        "plain": Node("EVDiTTextEncoderLoader", 0, {"text_encoder_name": "mt5-xxl-encoder.safetensors"}, title="For the negative prompt"),
        "vae": Node("EVDiTVAELoader", 3, {"vae_name": "open_sora_plan_v1.2/checkpoint.ckpt"}),
        **sparse("model", plan, (latent, 32)),
        **prompts("clip", FOX),
        "latent": Node("EmptyHunyuanLatentVideo", 2, {"width": 1280, "height": 720, "length": frames}),
        "sampler": Node(
            "KSampler", 2, {"seed": 0, "steps": 100, "cfg": 7.5, "sampler_name": "euler_ancestral", "scheduler": "normal"},
            {"model": ("sparse", 0), "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)},
        ),
        **video(("sampler", 0), ("vae", 0), 24, tiled=True),
    }  # fmt: skip
    nodes["negative"].links = {"clip": ("plain", 0)}
    text = note(
        nodes["plan"],
        f"Open-Sora-Plan v1.2, {frames} frames of 1280x720",
        f"The model of the Efficient-vDiT paper, as its authors recommend it (euler ancestral, 100 steps, cfg 7.5), with a plan by hand "
        f"that computes {share(plan, latent, 32)}: two full layers, the others with {plan.split(':')[-2]} reference frames of {latent}.",
        f"- `models/diffusion_models/{folder}/`: [diffusion_pytorch_model.safetensors]({url}) and its "
        f"[config.json]({OSP}/resolve/main/{frames}x720p/config.json)\n"
        f"- `models/vae/open_sora_plan_v1.2/`: [checkpoint.ckpt]({OSP}/resolve/main/vae/checkpoint.ckpt)\n"
        f"- `models/text_encoders/mt5-xxl-encoder.safetensors` (11 GB), made from a download of [google/mt5-xxl]({HUB}/google/mt5-xxl). In "
        "the pack's folder, with ComfyUI's Python: `python efficient_vdit_core convert text-encoder mt5-xxl "
        "mt5-xxl-encoder.safetensors`, where `mt5-xxl` is the folder with `pytorch_model.bin`, `config.json` and `spiece.model`",
        "5.5 GB of weights in bf16, the text encoder 11 GB more while it encodes. "
        f"Upstream reports {seconds} s on one H100 with full attention.",
        "A model that was not distilled for its plan loses some quality; keep more layers full where motion falls apart.",
    )
    caption = ("Open-Sora-Plan 1.2", f"{frames} frames, 1280x720", part(plan, latent, 32))
    return Graph(f"opensora_plan_{frames}x720p", f"Open-Sora-Plan 1.2, {frames} frames 720p", caption, text, nodes)


def several_gpus() -> Graph:
    """The 93-frame template, computed by all GPUs: the longer the clip, the more there is to share."""
    graph = opensora(93)
    nodes: dict[str, Node] = {}
    for name, node in graph.nodes.items():
        if name == "sampler":
            nodes["parallel"] = Node("EVDiTSequenceParallel", 2, {}, {"model": ("sparse", 0)})
            nodes["devices"] = Node("PreviewAny", 3, {}, {"source": ("parallel", 1)}, "Devices and rates")
            node.links["model"] = ("parallel", 0)
        nodes[name] = node
    text = graph.note.replace("## Open-Sora-Plan v1.2, 93 frames of 1280x720", "## Open-Sora-Plan v1.2 on several GPUs")
    extra = (
        "\n\n**Sequence Parallel** stands last before the sampler and starts a worker for each GPU; each builds the model itself and "
        "computes a part of the frames. With one GPU the model passes through. Sampler, preview and Cancel stay in ComfyUI. A pack from "
        "the registry starts no processes: start the pool first, as the help page of Sequence Parallel says."
    )
    caption = ("Several GPUs", "Open-Sora-Plan 1.2, 93 frames", "one video, shared out by frames")
    return Graph("opensora_plan_several_gpus", "Open-Sora-Plan 1.2, multi GPU", caption, text + extra, nodes)
