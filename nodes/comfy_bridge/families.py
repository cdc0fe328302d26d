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


# Matrices of a block that do not meet the video's tokens, by their path.
_ASIDE = re.compile(
    r"ada_?ln|mod(ulation|_x|_y)?\b|_mod\.|^norm[12]\.linear|time|txt_|_y\b|(cross_attn|attn2)\.(to_)?[kv]"
    r"|^blocks\.1\.block\.attn\.to_[kv]"  # Cosmos: attention to the text
    r"|^audioT\.|\baudio_(attn|ff)|\baudio_to_video_attn\.to_[kv]|\bvideo_to_audio_attn\.to_(q|gate|out)"
    r"|\b(va_)?cross_attention\.to_[kv]|\bav_cross_attention\.(to_q|out)",
    re.IGNORECASE,
)


def at(model: Any, path: str) -> Any:
    """What stands at a path of attributes, such as ``blocks.0.attn.heads``."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def _at(path: str) -> Callable[[Any], int]:
    return lambda model: int(at(model, path))


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
class Stack:
    """The layers of one model: how many blocks of each ``block_type``, in the order in which they run, and its attention heads
    and their size.

    Read once, where a node is made: within a forward another node may have put blocks of its own into the model.
    """

    blocks: Mapping[str, int]
    heads: int
    head_dim: int

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(self.blocks.values())

    @property
    def offsets(self) -> dict[str, int]:
        """The first layer of each block type: ``block_index`` restarts with it."""
        counts = list(self.blocks.values())
        return {kind: sum(counts[:before]) for before, kind in enumerate(self.blocks)}


@dataclass(frozen=True)
class Family:
    """How one class of diffusion models keeps its layers and orders its tokens.

    Attributes:
        name: as in plan files.
        layout: where the video tokens stand.
        head_dim: the size of a head in the attention over the video.
        heads: path of the head count from the model.
        blocks: where the model keeps its layers, by ComfyUI's ``block_type``, in the order in which they run.
        order: the layer of each self-attention call of a forward.
        hook_since: the first ComfyUI version in which the class passes the attention override on; "" = all supported.
        caution: what the user should know before a plan goes over this model, "" where there is nothing.
        chunk_heads: whether every fifth latent frame begins a chunk of the VAE and holds one pixel frame.
    """

    name: str
    layout: LayoutRule
    head_dim: Callable[[Any], int]
    heads: str = "num_heads"
    blocks: Mapping[str, str] = field(default_factory=lambda: SINGLE)
    order: OrderRule = _one_a_layer
    hook_since: str = ""
    caution: Callable[[Any], str] = _nothing
    chunk_heads: bool = False

    def stack(self, diffusion_model: nn.Module) -> Stack:
        """Its layers, heads and their size as they are now."""
        counts = self.count_blocks(diffusion_model)
        return Stack(counts, self.head_count(diffusion_model), self.head_dim(diffusion_model))

    def count_blocks(self, diffusion_model: nn.Module) -> dict[str, int]:
        """How many blocks of each type it has now."""
        return {kind: len(getattr(diffusion_model, name)) for kind, name in self.blocks.items()}

    def depth(self, diffusion_model: nn.Module) -> int:
        """The number of layers."""
        return sum(self.count_blocks(diffusion_model).values())

    def layers(self, diffusion_model: nn.Module) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        # Cosmos keeps its blocks in a dictionary.
        return [block for name in self.blocks.values() for block in getattr(diffusion_model, name).children()]

    def token_weights(self, diffusion_model: nn.Module) -> int:
        """Elements of the matrices that every token of the sequence is multiplied with, all layers together.

        What runs once a forward (modulation), over the text or over the audio is left out.
        """
        linear: Any = [
            module
            for block in self.layers(diffusion_model)
            for name, module in block.named_modules()
            if hasattr(module, "in_features") and not _ASIDE.search(name)
        ]
        return sum(module.in_features * module.out_features for module in linear)

    def head_count(self, diffusion_model: nn.Module) -> int:
        """The number of attention heads in a layer."""
        return int(at(diffusion_model, self.heads))

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


def find_family(diffusion_model: nn.Module | type) -> Family | None:
    """The row of this model or class, or None. Exact classes only: a subclass may order its tokens in another way."""
    return FAMILIES.get(_class(diffusion_model).__name__)


def why_no_family(diffusion_model: nn.Module | type) -> str:
    """Why a model or class without a row stays dense."""
    known = f"where its video tokens stand is not known. Known are {', '.join(FAMILIES)}"
    return LEFT_DENSE.get(_class(diffusion_model).__name__, known)


def class_of(model: Any) -> type:
    """The class that the network of a MODEL has when that is sampled.

    Nodes patch it as an object, as RES4LYF's ReWanPatcher does, and such a patch stays on the network while it is loaded, also
    for a MODEL that has none.
    """
    own = model.get_model_object("diffusion_model.__class__")
    patched = own is not type(model.model.diffusion_model)
    return own if patched else _class(model.get_model_object("diffusion_model"))


def _class(diffusion_model: nn.Module | type) -> type:
    return diffusion_model if isinstance(diffusion_model, type) else type(uncompiled(diffusion_model))


def uncompiled(diffusion_model: nn.Module) -> nn.Module:
    """The model itself where torch.compile has wrapped it."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


_WAN_HEAD = _at("blocks.0.self_attn.head_dim")
_LTX_HEAD = _at("transformer_blocks.0.attn1.dim_head")
_LTX_BLOCKS = {"double": "transformer_blocks"}

FAMILIES: dict[str, Family] = {
    "OpenSoraT2V": Family(
        "opensora_plan",
        layouts.open_sora_plan,
        _at("config.attention_head_dim"),
        "config.num_attention_heads",
        {"double": "transformer_blocks"},
    ),
    # T2V, I2V, Fun (ref_conv), Phantom, ATI, TI2V 5B, Bernini, FlowRVS, InfiniteTalk; the 14B of Wan 2.2 are two of
    # these.
    "WanModel": Family("wan", layouts.wan, _WAN_HEAD),
    "VaceWanModel": Family("wan", layouts.wan, _WAN_HEAD, order=_vace_order),
    "CameraWanModel": Family("wan", layouts.wan, _WAN_HEAD),
    # Its face attention goes over 5 keys a frame and by no hook: left as it is.
    "AnimateWanModel": Family("wan", layouts.wan_animate, _WAN_HEAD),
    "WanDancerModel": Family("wan", layouts.wan, _WAN_HEAD),
    "SCAILWanModel": Family("wan", layouts.wan_pose, _WAN_HEAD),
    "SCAIL2WanModel": Family("wan", layouts.wan_pose, _WAN_HEAD),
    "HumoWanModel": Family("wan", layouts.wan_reference, _WAN_HEAD),
    "WanModel_S2V": Family("wan", layouts.wan_reference, _WAN_HEAD, hook_since="0.5.0"),
    # HunyuanVideo, its I2V, SkyReels, and 1.5 with its super-resolution model.
    "HunyuanVideo": Family(
        "hunyuan_video",
        layouts.hunyuan_video,
        lambda model: model.hidden_size // model.num_heads,
        blocks={"double": "double_blocks", "single": "single_blocks"},
    ),
    "LTXVModel": Family("ltx_video", layouts.ltx_video, _LTX_HEAD, "transformer_blocks.0.attn1.heads", _LTX_BLOCKS),
    "LTXAVModel": Family("ltx_av", layouts.ltx_audio_video, _LTX_HEAD, "num_attention_heads", _LTX_BLOCKS),
    "CogVideoXTransformer3DModel": Family(
        "cogvideox", layouts.cogvideox, _at("blocks.0.head_dim"), "num_attention_heads"
    ),
    # Its blocks are single streams; ComfyUI names their patches "double_block" all the same.
    "MiniMaxH3Model": Family(
        "minimax_h3",
        layouts.minimax_h3,
        _at("blocks.0.attn.head_dim"),
        "blocks.0.attn.heads",
        caution=_h3_caution,
        chunk_heads=True,
    ),
    "AsymmDiTJoint": Family("mochi", layouts.mochi, _at("blocks.0.attn.head_dim")),
    "GeneralDIT": Family("cosmos", layouts.cosmos, lambda model: model.model_channels // model.num_heads),
    "MiniTrainDIT": Family("cosmos_predict2", layouts.cosmos, lambda model: model.model_channels // model.num_heads),
    "Kandinsky5": Family(
        "kandinsky5",
        layouts.kandinsky5,
        _at("visual_transformer_blocks.0.self_attention.head_dim"),
        "visual_transformer_blocks.0.self_attention.num_heads",
        {"double": "visual_transformer_blocks"},
    ),
    # As ComfyUI's pull request and Kandinsky's own nodes have it.
    "Kandinsky6NativeAVDiT": Family(
        "kandinsky6",
        layouts.kandinsky6,
        _at("visual_blocks.0.videoT.self_attention.head_dim"),
        "visual_blocks.0.videoT.self_attention.num_heads",
        {"double": "visual_blocks"},
    ),
}

# Models that the pack knows and leaves as they are.
LEFT_DENSE = {
    "WanAnimate2Model": "it attends a frame at a time, over all frames and one pose frame of its own: no call goes over the whole video",
    "NaDiT": "SeedVR2 attends within windows of a few frames: no call goes over the whole video",
    "CausalWanModel": "it makes a few frames at a time over a cache of the earlier ones, and ComfyUI passes no attention hook there",
}
