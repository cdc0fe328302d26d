"""What the templates are written in: nodes and links, and the parts that many of them have; .ci/templates.py lays them out."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from efficient_vdit_core.plan import TilePlan  # noqa: E402

HUB = "https://huggingface.co"
BAD = "low quality, worst quality, blurry, distorted, static, subtitles, watermark"
FOX = "a fox running through a snowy forest at sunrise, tracking camera, cinematic light"
FOX_WITH_SOUND = (
    "A fox runs through a snowy forest at sunrise, tracking camera, cinematic light. Sound: soft paws on snow, a light "
    "wind in the trees, a raven far away."
)
SHOWN_NAMES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

COLUMNS = ("1 Model", "2 Sparse attention and prompt", "3 Sampling", "4 Video")


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


def preset(source: str, name: str, preview: tuple[int, int], **values: Any) -> dict[str, Node]:
    """Load Tile Plan with a preset, Sparse Attention, and a switch between its model and the dense one."""
    switched = {"on_false": (source, 0), "on_true": ("sparse", 0)}
    return sparse(source, "", preview, **values) | {
        "plan": Node("EVDiTLoadTilePlan", 1, {"plan_name": f"{name} (preset)", "text": ""}, preview=preview),
        "switch": Node("ComfySwitchNode", 1, {"switch": True}, switched, "Sparse attention on"),
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


def files(*found: dict[str, str]) -> str:
    return "\n".join(f"- `models/{f['directory']}`: [{f['name']}]({f['url']})" for f in found)


def note(plan: Node, title: str, what: str, files: str, cost: str, tip: str, needs: str = "0.3.60") -> str:
    """The text beside a template. ``plan``: the node whose chart shows the plan."""
    shown = plan.title or SHOWN_NAMES[plan.kind]["display_name"]
    return (
        f"## {title}\n\n{what}\n\n**Files**\n\n{files}\n\n**Memory and time.** {cost}\n\n**Expect.** {tip}\n\n"
        f"Click a layer in *{shown}* to change it; bypass *Sparse Attention* (Ctrl+B) to compare with full attention. "
        f"After the run the chart and the log tell how many calls became sparse. Needs ComfyUI {needs} or newer."
    )
