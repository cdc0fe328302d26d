"""The exact parameter lists of the published checkpoints, written down here from the model's description."""

import torch

from efficient_vdit_core.models.opensora_plan.config import OSP_29X720P, OSP_VAE
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.models.opensora_plan.vae import CausalVAE


def with_bias(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def transformer_manifest(layers=32, d=2304, text=4096):
    keys = {"scale_shift_table": (2, d)}
    keys |= with_bias("pos_embed.proj", d, 4, 2, 2)
    keys |= with_bias("adaln_single.emb.timestep_embedder.linear_1", d, 256) | with_bias(
        "adaln_single.emb.timestep_embedder.linear_2", d, d
    )
    keys |= with_bias("adaln_single.linear", 6 * d, d)
    keys |= with_bias("caption_projection.linear_1", d, text) | with_bias("caption_projection.linear_2", d, d)
    keys |= with_bias("proj_out", 16, d)
    for i in range(layers):
        block = f"transformer_blocks.{i}"
        keys[f"{block}.scale_shift_table"] = (6, d)
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                keys |= with_bias(f"{block}.{attention}.{part}", d, d)
        keys |= with_bias(f"{block}.ff.net.0.proj", 4 * d, d) | with_bias(f"{block}.ff.net.2", d, 4 * d)
    return keys


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def resblock_2d(name, a, b):
    keys = (
        norm(f"{name}.norm1", a)
        | with_bias(f"{name}.conv1", b, a, 3, 3)
        | norm(f"{name}.norm2", b)
        | with_bias(f"{name}.conv2", b, b, 3, 3)
    )
    return keys | (with_bias(f"{name}.nin_shortcut", b, a, 1, 1) if a != b else {})


def resblock_3d(name, a, b):
    keys = norm(f"{name}.norm1", a) | with_bias(f"{name}.conv1.conv", b, a, 3, 3, 3)
    keys |= norm(f"{name}.norm2", b) | with_bias(f"{name}.conv2.conv", b, b, 3, 3, 3)
    return keys | (with_bias(f"{name}.nin_shortcut.conv", b, a, 1, 1, 1) if a != b else {})


def middle(name):
    keys = (
        resblock_3d(f"{name}.block_1", 512, 512)
        | resblock_3d(f"{name}.block_2", 512, 512)
        | norm(f"{name}.attn_1.norm", 512)
    )
    for part in ("q", "k", "v", "proj_out"):
        keys |= with_bias(f"{name}.attn_1.{part}.conv", 512, 512, 1, 1, 1)
    return keys


def vae_manifest():
    keys = with_bias("encoder.conv_in", 128, 3, 3, 3)
    for level, (block, a, b) in enumerate(
        ((resblock_2d, 128, 128), (resblock_2d, 128, 256), (resblock_3d, 256, 512), (resblock_3d, 512, 512))
    ):
        keys |= block(f"encoder.down.{level}.block.0", a, b) | block(f"encoder.down.{level}.block.1", b, b)
    keys |= with_bias("encoder.down.0.downsample.conv", 128, 128, 3, 3)
    keys |= with_bias("encoder.down.1.downsample.conv.conv", 256, 256, 3, 3, 3) | with_bias(
        "encoder.down.2.downsample.conv.conv", 512, 512, 3, 3, 3
    )
    keys |= middle("encoder.mid") | norm("encoder.norm_out", 512) | with_bias("encoder.conv_out.conv", 8, 512, 3, 3, 3)
    keys |= with_bias("quant_conv.conv", 8, 8, 1, 1, 1) | with_bias("post_quant_conv.conv", 4, 4, 1, 1, 1)
    keys |= with_bias("decoder.conv_in.conv", 512, 4, 3, 3, 3) | middle("decoder.mid")
    for level, (a, b) in {3: (512, 512), 2: (512, 512), 1: (512, 256), 0: (256, 128)}.items():
        for i in range(3):
            keys |= resblock_3d(f"decoder.up.{level}.block.{i}", a if i == 0 else b, b)
    keys |= with_bias("decoder.up.3.upsample.conv.conv", 512, 512, 3, 3, 3) | with_bias(
        "decoder.up.2.upsample.conv.conv", 512, 512, 3, 3, 3
    )
    keys |= with_bias("decoder.up.1.upsample.conv.conv", 256, 256, 1, 3, 3)
    return keys | norm("decoder.norm_out", 128) | with_bias("decoder.conv_out.conv", 3, 128, 3, 3, 3)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_full_size_transformer_has_the_published_tensors():
    with torch.device("meta"):
        model = OpenSoraT2V(OSP_29X720P)
    assert shapes(model) == transformer_manifest()
    assert len(model.state_dict()) == 687
    assert sum(p.numel() for p in model.parameters()) == 2_771_907_856


def test_the_full_size_vae_has_the_published_tensors():
    with torch.device("meta"):
        model = CausalVAE(OSP_VAE)
    assert shapes(model) == vae_manifest()
    assert len(model.state_dict()) == 248
    assert sum(p.numel() for p in model.parameters()) == 239_189_991
