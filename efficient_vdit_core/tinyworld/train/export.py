"""Writes the trained tiny model in the very file format of the real one: same classes, same key names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.opensora_plan.text import SPIECE_KEY
from ...models.opensora_plan.transformer import OpenSoraT2V
from ...models.opensora_plan.vae import CausalVAE
from ...storage.files import write_text
from ...storage.weight_files import save_safetensors
from .text import encoder_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_vae(vae: CausalVAE, folder: Path) -> None:
    """Store the VAE in half precision with its configuration."""
    _write(folder, WEIGHTS, vae.state_dict(), vae.config.to_dict())


def export_transformer(model: OpenSoraT2V, folder: Path) -> None:
    """Store the transformer in half precision with its configuration."""
    _write(folder, WEIGHTS, model.state_dict(), model.config.to_dict())


def export_text_encoder(encoder: nn.Module, spiece: bytes, folder: Path) -> None:
    """Store encoder and tokenizer in one file, in single precision: it is small."""
    weights = {k: v for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    tokenizer = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    config = encoder_config(weights["shared.weight"].shape[0])
    _write(folder, "model.safetensors", {**weights, SPIECE_KEY: tokenizer}, config, dtype=torch.float32)


@torch.no_grad()
def standardise_latents(vae: CausalVAE, latents: Tensor, scale: float) -> None:
    """Fold a shift and a scale into the VAE's 1x1x1 convolutions, so that ``scale`` x latent has mean 0 and variance 1.

    ``latents`` (n, z, t, h, w) are unscaled samples. Decoding is unchanged: both convolutions take inverse parts.
    """
    channels = latents.shape[1]
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    gain = 1 / (scale * std)
    quant, post = vae.quant_conv.conv, vae.post_quant_conv.conv
    quant.weight[:channels] *= gain.view(-1, 1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0, 0] @ mean
    post.weight /= gain.view(1, -1, 1, 1, 1)


def _write(
    folder: Path, name: str, state_dict: dict[str, Tensor], config: dict, dtype: torch.dtype = torch.float16
) -> None:
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
    save_safetensors(folder / name, cast, {"config": json.dumps(config), "format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
