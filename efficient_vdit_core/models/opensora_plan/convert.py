"""Turns upstream pickles into safetensors, once: the VAE's checkpoint.ckpt and mT5's pytorch_model.bin."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...limits.quote import quoted
from ...storage.files import check_writable_file
from ...storage.weight_files import save_safetensors
from .checkpoint import read_vae
from .text import SPIECE_KEY, read_text_encoder


def convert_vae(source: str | Path, target: str | Path) -> None:
    """Write the VAE of a .ckpt (averaged weights where it has them) as one safetensors file with its configuration."""
    target = check_target(target)
    state_dict, config = read_vae(source)
    save_safetensors(target, state_dict, {"config": json.dumps(config.to_dict()), "format": "pt"})


def convert_text_encoder(source: str | Path, target: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the encoder half of mT5, with its tokenizer inside, as one safetensors file.

    ``source`` is a folder with the weights (.bin or safetensors), spiece.model and config.json, or the weights file in
    it.
    """
    source, target = Path(source), check_target(target)
    if source.is_dir() and not any(source.glob("*.safetensors*")):
        source = _torch_file(source)
    weights, config, spiece = read_text_encoder(source)
    for name in list(weights):
        # One tensor at a time: the memory-mapped original and its copy never stand side by side.
        weights[name] = weights[name].to(dtype)
    save_safetensors(target, {**weights, SPIECE_KEY: spiece}, {"config": json.dumps(config), "format": "pt"})


def check_target(target: str | Path) -> Path:
    """Raises ValueError where no safetensors file can be written there."""
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"The target {quoted(target.name)} does not end in .safetensors. Choose such a name.")
    # Before tens of GB are read. Its folder may be new: then the one in which that will be made is asked.
    made = next(folder for folder in target.absolute().parents if folder.exists())
    check_writable_file(made / target.name)
    return target


def _torch_file(folder: Path) -> Path:
    found = sorted(folder.glob("pytorch_model*.bin"))
    if len(found) != 1:
        raise ValueError(
            f"The folder {quoted(folder.name)} holds {len(found)} files pytorch_model*.bin, expected one. "
            "Download google/mt5-xxl as it is published, in one file, or safetensors."
        )
    return found[0]
