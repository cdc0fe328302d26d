"""diffusers' models in ComfyUI: where each layer is there, for a LoRA, and the names of whole weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...limits.documents import parse_json
from ...limits.quote import named, quoted
from ...storage.weight_files import read_state_dict, save_safetensors

WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
MINIMAX_H3 = "MiniMaxH3Transformer3DModel"
# Patterns in diffusers' names and what stands for them in ComfyUI, one after another.
_WAN = (
    # Wan's own names, which ComfyUI keeps.
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"^proj_out", "head.head"),
    (r"(?<=\d\.)norm2", "norm3"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"add_([kv])_proj", r"\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"to_out\.0", "o"),
    (r"to_([qkv])", r"\1"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)
_COGVIDEOX = (
    # ComfyUI's blocks keep the joint attention's layers in themselves.
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_out\.0", "attn_out"),
    (r"attn1\.(?:to_)?", ""),
    (r"ff\.net\.0\.proj", "ff_proj"),
    (r"ff\.net\.2", "ff_out"),
    (r"^time_embedding\.", "time_embedding_"),
)
_MINIMAX_H3 = (
    # MiniMax's own names, which ComfyUI keeps.
    (r"^token_refiner\.refiner_blocks", "token_refiner.blocks"),
    (r"^transformer_blocks", "blocks"),
    (r"attn\.to_[qkv]", "attn.qkv_proj"),
    (r"attn\.to_out\.0", "attn.out_proj"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
)
_PATCHES = ("patch_size", "in_channels", "text_embed_dim", "sample_width", "sample_height", "sample_frames",
            "temporal_compression_ratio", "max_text_seq_length", "spatial_interpolation_scale",
            "temporal_interpolation_scale")  # fmt: skip
_RULES = {WAN: _WAN, COGVIDEOX: _COGVIDEOX, MINIMAX_H3: _MINIMAX_H3}
_WHOLE = (WAN, COGVIDEOX)  # whose whole weights are renamed
QKV = "qkv"


@dataclass(frozen=True)
class ComfyLayer:
    """A linear layer's place in ComfyUI: it gives one of ``parts`` equal pieces of the outputs of the layer ``name``, in
    the same order or with the halves of the piece swapped."""

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False

    def outputs(self, x: Tensor) -> Tensor:
        """Rows (outputs, ...) of the layer in the order that the other side has them in."""
        return x.roll(len(x) // 2, 0) if self.swapped else x


def comfy_layer(kind: str, layer: str) -> ComfyLayer:
    """Where a linear layer of a model of class ``kind`` of diffusers is in ComfyUI."""
    name = comfy_name(kind, layer)
    if kind == MINIMAX_H3 and (found := re.search(r"attn\.to_([qkv])$", layer)):
        return ComfyLayer(name, part=QKV.index(found[1]), parts=len(QKV))
    # ComfyUI's SwiGLU has its gate first, diffusers' its value.
    return ComfyLayer(name, swapped=kind == MINIMAX_H3 and name.endswith("mlp.fc1"))


def comfy_name(kind: str, name: str) -> str:
    """The name in ComfyUI of a layer or a tensor of a model of class ``kind`` of diffusers."""
    for pattern, there in _RULES[kind]:
        name = re.sub(pattern, there, name)
    return name


def convert_weights(source: str | Path, target: str | Path) -> int:
    """Writes whole weights that the trainer exported (a .safetensors file with diffusers' names) under ComfyUI's names,
    with what they say of themselves; returns the number of tensors.

    CogVideoX 2B's table of positions is written too: without one ComfyUI takes a model for one with rotary positions.
    With it the model makes clips of the size that it was trained on, and no others.

    Raises ValueError where the file does not say that it is a Wan or CogVideoX.
    """
    state, about = read_state_dict(source)
    where = named(Path(source).name)
    config = parse_json(about.get("config", "{}"), f"The config in {where}", advice="Export the weights again.")
    kind = config.get("_class_name", "") if isinstance(config, dict) else ""
    if kind not in _WHOLE:
        raise ValueError(
            f"{where} is {quoted(kind) if kind else 'of no class that it names'}, expected whole weights of {WAN} or {COGVIDEOX} "
            "that this trainer has exported. A LoRA needs no conversion."
        )
    if kind == COGVIDEOX and not config.get("use_rotary_positional_embeddings"):
        state["patch_embed.pos_embedding"] = _positions(config)
    found = {comfy_name(kind, name): x for name, x in state.items()}
    save_safetensors(Path(target), found, {key: text for key, text in about.items() if key != "config"})
    return len(found)


def _positions(config: dict[str, Any]) -> Tensor:
    """diffusers' own table (1, text + tokens, width) for clips of the trained size."""
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    known = {name: config[name] for name in _PATCHES if name in config}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    embed: Any = CogVideoXPatchEmbed(embed_dim=width, use_positional_embeddings=True, **known)
    return embed.pos_embedding
