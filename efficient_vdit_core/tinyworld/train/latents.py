"""Clips of a tiny world as latents, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.opensora_plan.config import LATENT_SCALE
from ...models.opensora_plan.vae import CausalVAE
from ...storage.files import read_torch, write_torch
from ..worlds import MOVING, World
from .vae import to_model_range

A_FILE = 256  # clips; those of a file that was written are not encoded again where a run was cut


@dataclass(frozen=True)
class CachedClips:
    """Scaled latents (n, C, T, 8, 8) and the scenes that they show."""

    latents: Tensor
    scenes: list[Any]


def cache_clips(
    vae: CausalVAE, count: int, folder: Path, *, world: World = MOVING, seed: int = 1, device: str = "cpu"
) -> CachedClips:
    """Encode ``count`` clips of ``world`` once, or read them back from ``folder``. A held-out caption never occurs among
    them. The VAE is moved to ``device``, the latents stay on the CPU. ValueError where a file of them is damaged."""
    rng = np.random.default_rng(seed)
    scenes = [world.trained_on(world.random_scene, rng) for _ in range(count)]
    # Named after all that made them: latents of another world, count, seed or encoder must not meet these captions.
    encoder = [*vae.encoder.state_dict().values(), *vae.quant_conv.state_dict().values()]
    files = folder / f"latents-{stamp_of(encoder, f'{world.name} {count} {seed}')}"
    parts = {files / f"{first // A_FILE:04}.pt": scenes[first : first + A_FILE] for first in range(0, count, A_FILE)}
    missing = {file: part for file, part in parts.items() if not file.is_file()}
    if missing:
        files.mkdir(parents=True, exist_ok=True)
        _encode(vae.to(device), world, missing, device)
    return CachedClips(torch.cat([_read(file, len(part)) for file, part in parts.items()]), scenes)


@torch.no_grad()
def _encode(vae: CausalVAE, world: World, missing: dict[Path, list[Any]], device: str) -> None:
    from tqdm import tqdm

    with tqdm(total=sum(map(len, missing.values())), desc="latents", mininterval=5) as bar:
        for file, scenes in missing.items():
            latents = torch.empty(0)
            for number, scene in enumerate(scenes):
                latent = vae.encode(to_model_range(world.render(scene)[None]).to(device))[0] * LATENT_SCALE
                if number == 0:  # at once: small latents among the VAE's large buffers kept the heap from shrinking
                    latents = torch.empty(len(scenes), *latent.shape)
                latents[number] = latent
                bar.update()
            write_torch(file, latents)


def _read(file: Path, count: int) -> Tensor:
    latents = read_torch(file, "Delete it; the same command makes it anew.")
    if not isinstance(latents, Tensor) or len(latents) != count:
        raise ValueError(
            f"{file} in the cache does not hold {count} latents. Delete it; the same command makes it anew."
        )
    return latents


def stamp_of(weights: Iterable[Tensor], about: str = "") -> str:
    """Tells weights, in their order, from others; ``about``: what else is to be told apart by it."""
    stamp = hashlib.sha256(about.encode())
    for value in weights:
        stamp.update(value.cpu().numpy().tobytes())
    return stamp.hexdigest()[:16]
