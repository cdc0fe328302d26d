"""The video models whose self-attention the pack understands: one row for each class of ComfyUI's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import layouts
from .layouts import Conds, LayoutRule

# (diffusion model, conditionings by name) -> the layer of each self-attention call in turn; () = one call a layer
OrderRule = Callable[[Any, Conds], tuple[int, ...]]
SINGLE: Mapping[str, str] = {"double": "blocks"}


def _one_a_layer(model: Any, conds: Conds) -> tuple[int, ...]:
    return ()


def _vace_order(model: Any, conds: Conds) -> tuple[int, ...]:
    """Behind a mapped layer, its second stream attends once for each control video."""
    context = conds.get("vace_context")
    streams = 1 if context is None else context.shape[1]
    return tuple(
        i for i in range(len(model.blocks)) for _ in range(1 + (streams if i in model.vace_layers_mapping else 0))
    )


def _nothing(model: Any) -> str:
    return ""


def _h3_caution(model: Any) -> str:
    """Checkpoints that were trained under another sparse pattern bring its gate, which dense attention leaves out."""
    if getattr(model.blocks[0].attn, "to_gate_compress", None) is None:
        return ""
    return (
        "this checkpoint was trained for another sparse attention (VSA, FastH3), whose gate a tile plan does not use. Run it "
        "under ComfyUI's Model Sparse Attention (method vsa), or take a checkpoint without it."
    )


@dataclass(frozen=True)
class Family:
    """How one class of diffusion models keeps its layers and orders its tokens.

    Attributes:
        name: as in plan files.
        layout: where the video tokens stand.
        heads: path of the head count from the model.
        blocks: where the model keeps its layers, by ComfyUI's ``block_type``, in the order in which they run.
        order: the layer of each self-attention call, for versions of ComfyUI that give no ``block_index``.
        hook_since: the first ComfyUI version in which the class passes the attention override on; "" = all supported.
        caution: what the user should know before a plan goes over this model, "" where there is nothing.
    """

    name: str
    layout: LayoutRule
    heads: str = "num_heads"
    blocks: Mapping[str, str] = field(default_factory=lambda: SINGLE)
    order: OrderRule = _one_a_layer
    hook_since: str = ""
    caution: Callable[[Any], str] = _nothing

    def depth(self, diffusion_model: nn.Module) -> int:
        """The number of layers."""
        return sum(len(getattr(diffusion_model, name)) for name in self.blocks.values())

    def offsets(self, diffusion_model: nn.Module) -> dict[str, int]:
        """The first layer of each block type: ``block_index`` restarts with it."""
        found, start = {}, 0
        for kind, name in self.blocks.items():
            found[kind] = start
            start += len(getattr(diffusion_model, name))
        return found

    def head_count(self, diffusion_model: nn.Module) -> int:
        """The number of attention heads in a layer."""
        value: Any = diffusion_model
        for name in self.heads.split("."):
            value = getattr(value, name)
        return int(value)

    def why_no_hook(self) -> str:
        """Why this ComfyUI cannot override the attention of the family; an empty text where it can."""
        if not self.hook_since or _version(comfyui_version()) >= _version(self.hook_since):
            return ""
        return f"ComfyUI {comfyui_version()} gives it no attention hook, {self.hook_since} and later do"


def comfyui_version() -> str:
    """The version of the ComfyUI that runs, such as 0.3.64."""
    import comfyui_version

    return comfyui_version.__version__


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def find_family(diffusion_model: nn.Module) -> Family | None:
    """The row of this model, or None. Exact classes only: a subclass may order its tokens in another way."""
    return FAMILIES.get(type(uncompiled(diffusion_model)).__name__)


def why_no_family(diffusion_model: nn.Module) -> str:
    """Why a model without a row stays dense."""
    known = f"where its video tokens stand is not known. Known are {', '.join(FAMILIES)}"
    return LEFT_DENSE.get(type(uncompiled(diffusion_model)).__name__, known)


def uncompiled(diffusion_model: nn.Module) -> nn.Module:
    """The model itself where torch.compile has wrapped it."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


FAMILIES: dict[str, Family] = {
    "OpenSoraT2V": Family(
        "opensora_plan", layouts.open_sora_plan, "config.num_attention_heads", {"double": "transformer_blocks"}
    ),
    # T2V, I2V, Fun (ref_conv), Phantom, ATI, TI2V 5B, Bernini, FlowRVS, InfiniteTalk; the 14B of Wan 2.2 are two of
    # these.
    "WanModel": Family("wan", layouts.wan),
    "VaceWanModel": Family("wan", layouts.wan, order=_vace_order),
    "CameraWanModel": Family("wan", layouts.wan),
    # Its face attention goes over 5 keys a frame and by no hook: left as it is.
    "AnimateWanModel": Family("wan", layouts.wan),
    "WanDancerModel": Family("wan", layouts.wan),
    "SCAILWanModel": Family("wan", layouts.wan_pose),
    "SCAIL2WanModel": Family("wan", layouts.wan_pose),
    "HumoWanModel": Family("wan", layouts.wan_reference),
    "WanModel_S2V": Family("wan", layouts.wan_reference, hook_since="0.5.0"),
    # HunyuanVideo, its I2V, SkyReels, and 1.5 with its super-resolution model.
    "HunyuanVideo": Family(
        "hunyuan_video", layouts.hunyuan_video, blocks={"double": "double_blocks", "single": "single_blocks"}
    ),
    "LTXVModel": Family(
        "ltx_video", layouts.ltx_video, "transformer_blocks.0.attn1.heads", {"double": "transformer_blocks"}
    ),
    "LTXAVModel": Family("ltx_av", layouts.ltx_audio_video, "num_attention_heads", {"double": "transformer_blocks"}),
    "CogVideoXTransformer3DModel": Family("cogvideox", layouts.cogvideox, "num_attention_heads"),
    # Its blocks are single streams; ComfyUI names their patches "double_block" all the same.
    "MiniMaxH3Model": Family("minimax_h3", layouts.minimax_h3, "blocks.0.attn.heads", caution=_h3_caution),
    "AsymmDiTJoint": Family("mochi", layouts.mochi),
    "GeneralDIT": Family("cosmos", layouts.cosmos),
    "MiniTrainDIT": Family("cosmos_predict2", layouts.cosmos),
    "Kandinsky5": Family(
        "kandinsky5",
        layouts.kandinsky5,
        "visual_transformer_blocks.0.self_attention.num_heads",
        {"double": "visual_transformer_blocks"},
    ),
}

# Models that the pack knows and leaves as they are.
LEFT_DENSE = {
    "CausalWanModel": "it makes a few frames at a time over a cache of the earlier ones, and ComfyUI passes no attention hook there",
}
