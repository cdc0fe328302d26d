"""MiniMax-H3's encoders and decoder: Qwen3-VL for the prompt, a VAE for the pictures and one for the sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...media.video import to_frames
from .diffusers_folder import latent_statistics
from .minimax_h3_clip import SIDES
from .model import visiting
from .texts import Encode

# Of each colour, as the VAE's pixels are normalised: those of ImageNet.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def h3_text_encoder(folder: Path, device: torch.device, channels: int) -> Encode:
    """The hidden states of a middle layer for the prompt alone, without a template or special tokens. An empty prompt has
    none."""
    from diffusers.modular_pipelines.minimax_h3.encoders import get_qwen3vl_prompt_embeds
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    kind: Any = Qwen3VLForConditionalGeneration
    encoder = kind.from_pretrained(str(folder / "text_encoder"), dtype=torch.bfloat16).to(device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    processor = Qwen3VLProcessor.from_pretrained(str(folder / "processor"))

    def states(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            return torch.zeros(0, channels, dtype=torch.bfloat16)
        return get_qwen3vl_prompt_embeds(encoder, processor, ids, device=device, dtype=torch.bfloat16)[0].cpu()

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [states(text) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask

    return encode


class H3Encoder:
    """Both VAEs on ``device``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        import diffusers

        self.device = device
        self.vae = read_vae(folder).to(device)
        kind: Any = diffusers.AutoencoderKLMiniMaxH3Audio
        self.sound_vae = kind.from_pretrained(str(folder / "audio_vae")).to(device)

    @torch.no_grad()
    def pictures(self, frames: np.ndarray) -> Tensor:
        """Normalised latents (C, T, h, w) of uint8 (F, H, W, 3)."""
        pixels = torch.from_numpy(frames).to(self.device).float() / 255
        x = ((pixels - _colour(MEAN, pixels)) / _colour(DEVIATION, pixels)).permute(3, 0, 1, 2)[None]
        mean, deviation = latent_statistics(self.vae)
        return ((self.vae.encode(x).latent_dist.mode().float().cpu() - mean) / deviation)[0]

    @torch.no_grad()
    def sound(self, sound: np.ndarray | None, length: int) -> Tensor:
        """Normalised latents (2, C, length) of float32 (2, samples), or of silence."""
        x = torch.zeros(SIDES, 1, length * self.sound_vae.hop_length)
        if sound is not None:
            given = torch.from_numpy(sound)[:, : x.shape[-1]]
            x[:, 0, : given.shape[-1]] = given
        mean, deviation = (s.flatten()[:, None] for s in latent_statistics(self.sound_vae))
        return (self.sound_vae.encode(x.to(self.device)).latent_dist.mode().float().cpu() - mean) / deviation


def read_vae(folder: Path) -> Any:
    """The pictures' VAE in float32, on the CPU."""
    import diffusers

    return diffusers.AutoencoderKLMiniMaxH3.from_pretrained(str(folder / "vae"))


@torch.no_grad()
def h3_pictures(vae: Any, latents: Tensor, device: torch.device) -> np.ndarray:
    """uint8 (F, H, W, 3) of normalised latents (C, T, h, w), decoded on ``device``, where the VAE is for that time."""
    mean, deviation = latent_statistics(vae)
    with visiting(vae, device):
        x = vae.decode((latents[None].cpu() * deviation + mean).to(device)).sample[0].float().cpu()
    pixels = x.permute(1, 2, 3, 0) * _colour(DEVIATION, x) + _colour(MEAN, x)
    return to_frames(2 * pixels.permute(3, 0, 1, 2) - 1)


def _colour(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)
