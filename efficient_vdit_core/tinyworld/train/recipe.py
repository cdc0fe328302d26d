"""The whole recipe of the tiny models: text encoder, VAE, cached latents, transformer, export.

Every part keeps its state in a folder of the run and goes on from there, so a stopped run is started again with the
same command. A part that was begun with another world, seed, prediction, start or other data is refused.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...limits.quote import quoted
from ...models.opensora_plan.checkpoint import load_transformer, load_vae
from ...models.opensora_plan.config import LATENT_SCALE
from ...models.opensora_plan.text import TextEncoder
from ...models.opensora_plan.vae import CausalVAE
from ...storage.files import read_torch
from ...storage.folder_record import check_settings, claim_folder, settings_of
from ...storage.weight_files import read_state_dict
from ...training.run import CHECKPOINT
from ..worlds import MOVING, World
from .decoder import train_decoder
from .dit import check_start, train_dit
from .export import export_text_encoder, export_transformer, export_vae, standardise_latents
from .grow import grown
from .latents import cache_clips, stamp_of
from .text import train_sentencepiece, train_text_encoder
from .vae import TINY_VAE, to_model_range, train_vae

PARTS = ("text_encoder", "vae", "transformer")
# What settings of a part were before there were any.
BEFORE = {"latent_channels": None, "res_blocks": None, "rate": 1.0, "short_first": False}
NEEDS = {"decoder": ("vae",), "transformer": ("text_encoder", "vae")}
# What these parts alone hear, and so must not be asked for where none of them is trained.
OF_PARTS = {
    ("vae",): ("start_vae", "latent_channels", "res_blocks", "vae_rate", "vae_steps"),
    ("decoder",): ("decoder_steps",),
    ("transformer",): ("start", "prediction", "dit_steps", "clips", "batch", "short_first"),
    ("vae", "decoder", "transformer"): ("bf16", "tensorboard"),
}


@dataclass(frozen=True)
class TinyRecipe:
    """What is trained in the folder ``run`` and written to ``out``.

    parts: of ``PARTS``; what is left out is taken from ``out``. ``decoder`` is that of the VAE in ``out``, trained further.
    start, start_vae: folders of a transformer and a VAE to go on from in place of new ones.
    latent_channels, res_blocks: of the VAE; by default those of the one to go on from, or of ``TINY_VAE``.
    vae_rate: as ``rate`` of `train_vae`.
    bf16: VAE and transformer are trained in bfloat16, their weights staying in float32; on a CPU that multiplies bfloat16
        the VAE takes half to a sixth of the time (AVX-512 BF16, AMX), on others more.
    prediction: as of ``dit.train_dit``.
    clips, batch: of the transformer: clips to learn from, and of them in a step.
    short_first: the transformer learns beginnings of clips first, as ``dit.SHORT_FIRST`` has them.
    device: where it is computed.
    """

    run: Path
    out: Path
    world: World = MOVING
    parts: tuple[str, ...] = PARTS
    vae_steps: int = 9000
    decoder_steps: int = 9000
    dit_steps: int = 8000
    clips: int = 6144
    batch: int = 32
    seed: int = 0
    start: Path | None = None
    start_vae: Path | None = None
    latent_channels: int | None = None
    res_blocks: int | None = None
    vae_rate: float = 1.0
    bf16: bool = False
    prediction: str = "v_prediction"
    short_first: bool = False
    device: str = "cpu"
    tensorboard: bool = False

    def train(self) -> None:
        """Train every part that is asked for, or go on with it. Raises ValueError, before any work, where a part or a
        folder that it needs is not there."""
        self._check()
        self.run.mkdir(parents=True, exist_ok=True)
        makers = {
            "text_encoder": self._text_encoder,
            "vae": self._vae,
            "decoder": self._decoder,
            "transformer": self._transformer,
        }
        for part, make in makers.items():
            if part in self.parts:
                make()

    def _check(self) -> None:
        for part, needs in NEEDS.items():
            for need in needs:
                if part in self.parts and need not in self.parts and not (self.out / need).is_dir():
                    raise ValueError(
                        f"The {part} needs a {need}, and {quoted(str(self.out), 120)} has none. Add it to --parts, or take "
                        "the --out of a run that made one."
                    )
        for parts, names in OF_PARTS.items():
            for name in names:
                if not set(parts) & set(self.parts) and getattr(self, name) != getattr(TinyRecipe, name):
                    for_them = " or ".join(parts)
                    raise ValueError(
                        f"--{name.replace('_', '-')} is for the {for_them}, which is not trained. Leave it out, or add {for_them} to "
                        "--parts."
                    )
        for part, start in (("transformer", self.start), ("vae", self.start_vae)):
            self._check_start(part, start)
        if "vae" in self.parts:
            self._begun_vae()  # refuses what it cannot begin with
        if "transformer" in self.parts and self.start:
            check_start(self.start)
        for part in set(self.parts) & set(PARTS):  # the decoder's folder is named after what it is of
            check_settings(self.run / part, self._settings(part), before=BEFORE)
        if "vae" in self.parts:
            self._check_latents()

    def _check_start(self, part: str, start: Path | None) -> None:
        if not start:
            return
        if not start.exists():
            raise ValueError(f"{quoted(str(start), 120)} does not exist. Correct the folder to go on from.")
        if part in self.parts and start.resolve().is_relative_to((self.out / part).resolve()):
            raise ValueError(
                f"{quoted(str(start), 120)} is what the run goes on from, and what it will write. Choose another --out, or copy it."
            )

    def _check_latents(self) -> None:
        """Refuse to train a VAE further whose latents a transformer has learnt."""
        checkpoint = self.run / "vae" / CHECKPOINT
        if "vae_encoder" not in settings_of(self.run / "transformer") or not checkpoint.is_file():
            return
        trained = read_torch(checkpoint, f"Delete {checkpoint} to train anew.", mmap=True)["step"]
        if trained < self.vae_steps:
            raise ValueError(
                f"The transformer in {quoted(str(self.run), 120)} has learnt the latents of the VAE after {trained} steps, and "
                f"{self.vae_steps} are asked for. Leave the vae out of --parts, set --vae-steps as it was, delete the transformer's "
                "folder there, or choose another --run and --out."
            )

    def _settings(self, part: str) -> dict[str, Any]:
        """What a part that was begun with others cannot go on with. For how many steps and where it is computed may change."""
        everywhere = {"world": self.world.name, "seed": self.seed}
        if part == "vae":
            own = {"latent_channels": self.latent_channels, "res_blocks": self.res_blocks, "rate": self.vae_rate}
            return {**everywhere, "start": _contents(self.start_vae), **own}
        if part == "transformer":
            own = {
                "start": _contents(self.start),
                "prediction": self.prediction,
                "clips": self.clips,
                "batch": self.batch,
                "short_first": self.short_first,
            }
            return {**everywhere, **own}
        return everywhere

    @property
    def _everywhere(self) -> dict[str, Any]:
        """What every trainer is told."""
        return {"world": self.world, "seed": self.seed, "device": self.device}

    def _text_encoder(self) -> None:
        claim_folder(self.run / "text_encoder", self._settings("text_encoder"))
        spiece = train_sentencepiece(self.world, self.seed)
        encoder = train_text_encoder(self.run / "text_encoder", spiece, **self._everywhere)
        export_text_encoder(encoder, spiece, self.out / "text_encoder")

    def _begun_vae(self) -> CausalVAE:
        torch.manual_seed(self.seed)
        if self.start_vae:
            return grown(load_vae(self.start_vae, dtype=torch.float32), self.latent_channels, self.res_blocks)
        channels = self.latent_channels or TINY_VAE.embed_dim
        blocks = self.res_blocks or TINY_VAE.num_res_blocks
        return CausalVAE(replace(TINY_VAE, z_channels=channels, embed_dim=channels, num_res_blocks=blocks))

    def _vae(self) -> None:
        claim_folder(self.run / "vae", self._settings("vae"), before=BEFORE)
        vae = train_vae(
            self.run / "vae", self._begun_vae(), steps=self.vae_steps, bf16=self.bf16, rate=self.vae_rate,
            tensorboard=self.tensorboard, **self._everywhere,
        )  # fmt: skip
        written = deepcopy(vae.encoder).half()
        if (self.out / "vae").is_dir() and _digest(load_vae(self.out / "vae").encoder) == _digest(written):
            return  # it is there, and its decoder may have been trained further since
        standardise_latents(vae, _sample_latents(vae, self.world), LATENT_SCALE)
        export_vae(vae, self.out / "vae")

    def _decoder(self) -> None:
        vae = load_vae(self.out / "vae", dtype=torch.float32)
        folder = self.run / f"decoder-{_digest(vae.encoder)}"
        claim_folder(folder, self._settings("decoder"))
        trained = train_decoder(
            folder, vae, steps=self.decoder_steps, bf16=self.bf16, tensorboard=self.tensorboard, **self._everywhere
        )
        export_vae(trained, self.out / "vae")

    def _transformer(self) -> None:
        # Read back what was written: the transformer learns the latents of the very file that ships.
        vae = load_vae(self.out / "vae", dtype=torch.float32)
        text = TextEncoder.from_folder(self.out / "text_encoder", dtype=torch.float32)
        # Of the VAE the encoder alone: a decoder that was trained further leaves all latents as they were.
        read_back = {"vae_encoder": _digest(vae.encoder), "text_encoder": _digest(text.model)}
        claim_folder(self.run / "transformer", {**self._settings("transformer"), **read_back}, before=BEFORE)
        cached = cache_clips(vae, self.clips, self.run, world=self.world, seed=self.seed + 1, device=self.device)
        start = load_transformer(self.start, dtype=torch.float32).train().requires_grad_(True) if self.start else None
        model = train_dit(
            self.run / "transformer", cached, text, steps=self.dit_steps, batch=self.batch, tensorboard=self.tensorboard,
            start=start, prediction=self.prediction, bf16=self.bf16, short_first=self.short_first, **self._everywhere,
        )  # fmt: skip
        export_transformer(model, self.out / "transformer")
        load_transformer(self.out / "transformer")


def _contents(path: Path | None) -> str:
    """Tells the weights of one model's file or folder from another's, wherever they lie; "" for none. The same weights may be
    written in other bytes."""
    weights = read_state_dict(path)[0] if path else {}
    return stamp_of(weights[name] for name in sorted(weights)) if weights else ""


def _digest(module: nn.Module) -> str:
    return stamp_of(module.state_dict().values())


@torch.no_grad()
def _sample_latents(vae: CausalVAE, world: World) -> torch.Tensor:
    rng = np.random.default_rng(5)
    clips = (world.render(world.random_scene(rng)) for _ in range(64))
    return torch.cat([vae.encode(to_model_range(clip[None])) for clip in clips])
