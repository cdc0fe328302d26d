"""The templates of models that are downloaded, as nodes and links; .ci/templates.py lays them out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from efficient_vdit_core.plan import TilePlan  # noqa: E402

HUB = "https://huggingface.co"
WAN21, WAN22 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged", f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
FLUX_TEXT, OSP = f"{HUB}/comfyanonymous/flux_text_encoders", f"{HUB}/LanguageBind/Open-Sora-Plan-v1.2.0"
BAD = "low quality, worst quality, blurry, distorted, static, subtitles, watermark"
FOX = "a fox running through a snowy forest at sunrise, tracking camera, cinematic light"
# Wan 2.2's high-noise expert sets layout and motion: its first step stays dense, and so do these of its blocks.
HIGH_NOISE_DENSE = "0-5,-1"
SHOWN_NAMES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

COLUMNS = ("1 Model", "2 Sparse attention and prompt", "3 Sampling", "4 Video")
WAN22_COLUMNS = ("1 Models", "2 Sparse attention", "3 Prompt and size", "4 Sampling", "5 Video")


@dataclass
class Node:
    """One node: its class, the column it stands in, values of its widgets, links as input -> (node, output)."""

    kind: str
    column: int
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""
    models: list[dict[str, str]] = field(default_factory=list)
    preview: tuple[int, int] | None = None  # of a Tile Plan: the model's latent frames and layers
    extra: int = 0  # px that it needs beside others of its class: a chart whose legend has several lines


@dataclass
class Graph:
    """A template: its name for scripts, its title in the template browser, the note beside it, and its nodes."""

    name: str
    title: str
    caption: tuple[str, str, str]  # of its picture: model, size, gain
    note: str
    nodes: dict[str, Node]  # by a name of their own, from top to bottom in each column
    columns: tuple[str, ...] = COLUMNS  # titles of the groups
    app: tuple[
        tuple[str, str, str], ...
    ] = ()  # of a template that opens as an app: node, widget and label of each input


def model(directory: str, url: str, name: str = "") -> dict[str, str]:
    return {"name": name or url.rsplit("/", 1)[1], "url": url, "directory": directory}


def loader(kind: str, widget: str, file: dict[str, str], column: int = 0, **values: Any) -> Node:
    """A loader of one file that can be downloaded."""
    return Node(kind, column, {widget: file["name"], **values}, models=[file])


def sparse(source: str, plan: str, preview: tuple[int, int], **values: Any) -> dict[str, Node]:
    """Tile Plan and Sparse Attention on one model."""
    return {
        "plan": Node("EVDiTTilePlan", 1, {"text": plan}, preview=preview),
        "sparse": Node("EVDiTSparseAttention", 1, values, {"model": (source, 0), "plan": ("plan", 0)}),
    }


def prompts(clip: str, positive: str, negative: str = BAD, column: int = 1) -> dict[str, Node]:
    return {
        "positive": Node("CLIPTextEncode", column, {"text": positive}, {"clip": (clip, 0)}, "Prompt"),
        "negative": Node("CLIPTextEncode", column, {"text": negative}, {"clip": (clip, 0)}, "Negative prompt"),
    }


def video(
    samples: tuple[str, int], vae: tuple[str, int], fps: float, *, tiled: bool = False, column: int = 3
) -> dict[str, Node]:
    """Decode and save."""
    decode, name = ("VAEDecodeTiled" if tiled else "VAEDecode"), "video/EfficientvDiT"
    return {
        "decode": Node(decode, column, {}, {"samples": samples, "vae": vae}),
        "create": Node("CreateVideo", column, {"fps": fps}, {"images": ("decode", 0)}),
        "save": Node("SaveVideo", column, {"filename_prefix": name, "format": "mp4"}, {"video": ("create", 0)}),
    }


def share(plan: str, frames: int, layers: int) -> str:
    """What a plan computes of the self-attention, for a note."""
    return f"{TilePlan.from_text(plan).density(frames, layers):.0%} of the self-attention"


def part(plan: str, frames: int, layers: int) -> str:
    """The same for a picture."""
    return f"{TilePlan.from_text(plan).density(frames, layers):.0%} of the attention"


def experts_share(plan: str, frames: int, layers: int) -> tuple[str, str]:
    """What Wan 2.2's two experts compute of the self-attention: each for a note, in all 2 + 2 steps for a picture."""
    high, low = (TilePlan.from_text(plan).with_dense(dense).density(frames, layers) for dense in (HIGH_NOISE_DENSE, ""))
    each = f"of the self-attention the high-noise one computes {high:.0%} after a dense first step, the low-noise one {low:.0%}"
    overall = f"{(1 + high + 2 * low) / 4:.0%}"
    return f"{each}; over all four steps {overall}", f"{overall} of their attention"


def note(plan: Node, title: str, what: str, files: str, cost: str, tip: str, needs: str = "0.3.60") -> str:
    """The text beside a template. ``plan``: the node whose chart shows the plan."""
    shown = plan.title or SHOWN_NAMES[plan.kind]["display_name"]
    return (
        f"## {title}\n\n{what}\n\n**Files**\n\n{files}\n\n**Memory and time.** {cost}\n\n**Expect.** {tip}\n\n"
        f"Click a layer in *{shown}* to change it; bypass *Sparse Attention* (Ctrl+B) to compare with full attention. "
        f"After the run the chart and the log tell how many calls became sparse. Needs ComfyUI {needs} or newer."
    )


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
        "\n".join(f"- `models/{f['directory']}`: [{f['name']}]({f['url']})" for f in (unet, lora, clip, vae)),
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
        "\n".join(f"- `models/{f['directory']}`: [{f['name']}]({f['url']})" for f in (unet, clip_l, llava, vae)),
        "About 26 GB for the model in bf16 (choose fp8_e4m3fn for half) and 9 GB for the text encoder.",
        "The same scene as with full attention; fine motion differs. More reference frames hold it closer.",
    )
    caption = ("HunyuanVideo", "73 frames, 848x480", part(plan, 19, 60))
    return Graph("hunyuan_video_sparse", "HunyuanVideo faster, text, 20 steps", caption, text, nodes)


def downloaded_graphs() -> Iterator[Graph]:
    yield from (wan22(), wan21(), hunyuan(), opensora(29), opensora(93), several_gpus())
