"""The whole recipe of the tiny models: text encoder, VAE, cached latents, transformer, export.

Every part keeps its state in a folder of the run and goes on from there, so a stopped run is started again with the
same command.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from ..models.opensora_plan.checkpoint import load_transformer, load_vae
from ..models.opensora_plan.text import TextEncoder
from ..models.opensora_plan.vae import CausalVAE
from ..pipeline import LATENT_SCALE
from .export import export_text_encoder, export_transformer, export_vae, standardise_latents
from .train_decoder import train_decoder
from .train_dit import cache_clips, train_dit
from .train_text import train_sentencepiece, train_text_encoder
from .train_vae import to_model_range, train_vae
from .worlds import MOVING, World

PARTS = ("text_encoder", "vae", "transformer")


def train(
    run: Path,
    out: Path,
    *,
    world: World = MOVING,
    parts: tuple[str, ...] = PARTS,
    vae_steps: int = 9000,
    decoder_steps: int = 9000,
    dit_steps: int = 8000,
    clips: int = 6144,
    batch: int = 32,
    seed: int = 0,
    start: Path | None = None,
    bf16: bool = False,
    prediction: str = "v_prediction",
    device: str = "cpu",
    tensorboard: bool = False,
    start_vae: Path | None = None,
) -> None:
    """Train ``parts`` in ``run`` and write them to ``out``; parts that are left out are taken from ``out``. ``decoder`` is
    that of the VAE in ``out``, trained further.

    ``start``, ``start_vae``: folders of a transformer and a VAE to go on from in place of new ones. ``prediction``: as of
    ``train_dit``. ``bf16``: the VAE is trained in bfloat16, its weights staying in float32; three to six times as fast on a
    CPU that multiplies bfloat16 (AVX-512 BF16, AMX), slower on others. ``device``: where it is computed.
    """
    run.mkdir(parents=True, exist_ok=True)
    if "text_encoder" in parts:
        spiece = train_sentencepiece(world, seed)
        encoder = train_text_encoder(run / "text_encoder", spiece, world=world, seed=seed, device=device)
        export_text_encoder(encoder, spiece, out / "text_encoder")
    if "vae" in parts:
        vae = train_vae(
            run / "vae",
            world=world,
            steps=vae_steps,
            seed=seed,
            bf16=bf16,
            device=device,
            tensorboard=tensorboard,
            start=load_vae(start_vae, dtype=torch.float32) if start_vae else None,
        )
        standardise_latents(vae, _sample_latents(vae, world), LATENT_SCALE)
        export_vae(vae, out / "vae")
    if "decoder" in parts:
        vae = load_vae(out / "vae", dtype=torch.float32)
        stamp = hashlib.sha256(b"".join(v.numpy().tobytes() for v in vae.encoder.state_dict().values())).hexdigest()[
            :16
        ]
        trained = train_decoder(
            run / f"decoder-{stamp}",
            vae,
            world=world,
            steps=decoder_steps,
            seed=seed,
            bf16=bf16,
            device=device,
            tensorboard=tensorboard,
        )
        export_vae(trained, out / "vae")
    if "transformer" in parts:
        # Read back what was written: the transformer learns the latents of the very file that ships.
        vae, text = (
            load_vae(out / "vae", dtype=torch.float32),
            TextEncoder.from_folder(out / "text_encoder", dtype=torch.float32),
        )
        cached = cache_clips(vae, clips, run, world=world, seed=seed + 1, device=device)
        known = load_transformer(start, dtype=torch.float32).train().requires_grad_(True) if start else None
        model = train_dit(
            run / "transformer",
            cached,
            text,
            world=world,
            steps=dit_steps,
            batch=batch,
            seed=seed,
            tensorboard=tensorboard,
            start=known,
            prediction=prediction,
            device=device,
        )
        export_transformer(model, out / "transformer")
        load_transformer(out / "transformer")


@torch.no_grad()
def _sample_latents(vae: CausalVAE, world: World, count: int = 64) -> torch.Tensor:
    rng = np.random.default_rng(5)
    clips = (world.render(world.random_scene(rng)) for _ in range(count))
    return torch.cat([vae.encode(to_model_range(clip[None])) for clip in clips])
