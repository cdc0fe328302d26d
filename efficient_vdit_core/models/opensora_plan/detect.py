"""Tells an Open-Sora-Plan v1.2 file from its relatives, and says plainly what another file is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...limits.quote import named

_ADVICE = "Choose the transformer of LanguageBind/Open-Sora-Plan-v1.2.0 (29x720p or 93x720p)."

# MindSpeed-MM exports the same weights under other names.
_RENAMES = (
    (r"^videodit_blocks\.", "transformer_blocks."),
    (r"\.self_atten\.", ".attn1."),
    (r"\.cross_atten\.", ".attn2."),
    (r"(attn[12])\.proj_([qkv])\.", r"\1.to_\2."),
    (r"(attn[12])\.proj_out\.", r"\1.to_out.0."),
)

# What config.json calls the transformer, and its relatives, which may differ from it in nothing else.
TRANSFORMER_KINDS = ("OpenSoraT2V", "AllegroTransformer3DModel", "OpenSoraInpaint", "LatteT2V", "OpenSoraT2V_v1_3")

# What it calls the VAE.
VAE_KINDS = ("CausalVAEModel",)

# Marks that ComfyUI's save nodes add beside a model's own tensors.
_SAVE_MARKS = ("v_pred", "ztsnr")

# What the keys of other transformers start with.
_OTHERS = (
    ("temporal_transformer_blocks.", "Open-Sora-Plan v1.0 or v1.1 (LatteT2V: separate space and time attention)"),
    ("blocks.0.self_attn.", "Wan"),
    ("double_blocks.", "HunyuanVideo or Flux"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("input_blocks.", "a UNet"),
    ("decoder.", "a VAE"),
    ("encoder.block.", "a text encoder"),
)


def unify_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the reference names, without the prefixes and marks of trainers and of ComfyUI."""
    prefix = r"^(module\.|model\.diffusion_model\.|diffusion_model\.)"
    names = {name: re.sub(prefix, "", name) for name in state_dict if name not in _SAVE_MARKS}
    if any(name.startswith("videodit_blocks.") for name in names.values()):
        for old, new in _RENAMES:
            names = {name: re.sub(old, new, short) for name, short in names.items()}
    return {short: state_dict[name] for name, short in names.items()}


def check_transformer_config(values: Mapping[str, Any]) -> None:
    """Refuse a config.json of a relative that has the same weights' shapes or a different class."""
    kind = str(values.get("_class_name", "OpenSoraT2V"))
    scales = [values.get(f"interpolation_scale_{axis}") for axis in "thw"]
    if kind == "AllegroTransformer3DModel" or scales == [2.2, 2.0, 2.0]:
        raise ValueError(
            "This is an Allegro transformer: the same architecture as Open-Sora-Plan v1.2, but trained anew, with another VAE and "
            f"text encoder. {_ADVICE}"
        )
    if kind == "OpenSoraInpaint":
        raise ValueError(f"This is Open-Sora-Plan v1.2 image-to-video (93x480p_i2v), which is not supported. {_ADVICE}")
    if kind in ("LatteT2V", "OpenSoraT2V_v1_3"):
        raise ValueError(f"This is another version of Open-Sora-Plan (class {kind}). {_ADVICE}")
    if kind != "OpenSoraT2V":
        raise ValueError(f"The configuration describes a {named(kind)}, expected an OpenSoraT2V. {_ADVICE}")


def check_transformer_keys(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse the weights of any other model, by name where it is known."""
    for start, what in _OTHERS:
        if any(name.startswith(start) for name in state_dict):
            raise ValueError(f"This file is {what}, expected an Open-Sora-Plan v1.2 transformer. {_ADVICE}")
    if any(name.endswith("lora_up.weight") for name in state_dict):
        raise ValueError(
            f"This file is a LoRA, which changes a transformer: load it beside one with ComfyUI's LoRA loader. {_ADVICE}"
        )
    needed = (
        "pos_embed.proj.weight",
        "adaln_single.linear.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "proj_out.weight",
    )
    if any(re.search(r"transformer_blocks\.\d+(\.\d+)?\..*norm", name) for name in state_dict):
        raise ValueError(
            f"This file has learned norms inside its blocks, as Open-Sora-Plan v1.3 has; v1.2 has none. {_ADVICE}"
        )
    absent = [name for name in needed if name not in state_dict]
    if absent:
        raise ValueError(f"This file has no {absent[0]}, so it is not an Open-Sora-Plan v1.2 transformer. {_ADVICE}")
    patch = state_dict["pos_embed.proj.weight"]
    if patch.ndim != 4:
        raise ValueError(
            f"Its patch embedding has shape {tuple(patch.shape)}, expected 2D patches: it is another version. {_ADVICE}"
        )
    of_patch = patch.shape[2] * patch.shape[3]
    if patch.shape[1] * of_patch != state_dict["proj_out.weight"].shape[0]:
        raise ValueError(
            f"Its patch embedding takes {patch.shape[1]} channels, expected as many as come out, "
            f"{state_dict['proj_out.weight'].shape[0] // of_patch}: this is the image-to-video model (93x480p_i2v), which is not "
            f"supported. {_ADVICE}"
        )


def check_depth(state_dict: Mapping[str, Tensor], layers: int) -> None:
    """Refuse a configuration of another depth than the weights'."""
    found = {name.split(".")[1] for name in state_dict if name.startswith("transformer_blocks.")}
    if len(found) != layers:
        raise ValueError(
            f"The weights have {len(found)} layers, but the configuration says num_layers={layers}. Keep the config.json of "
            "the checkpoint beside it, or download both again."
        )


def check_vae_keys(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse the weights of any other VAE, by name where it is known."""
    advice = "Choose vae/checkpoint.ckpt of LanguageBind/Open-Sora-Plan-v1.2.0, or what 'evdit convert vae' made of it."
    if "encoder.conv_in.conv.weight" in state_dict:
        raise ValueError(
            f"This VAE's first convolution is causal and 3D, as in Open-Sora-Plan v1.0 and v1.1; v1.2 has a 2D one. {advice}"
        )
    for name in ("encoder.conv_in.weight", "decoder.conv_in.conv.weight", "post_quant_conv.conv.weight"):
        if name not in state_dict:
            raise ValueError(f"This file has no {name}, so it is not the Open-Sora-Plan v1.2 VAE. {advice}")
