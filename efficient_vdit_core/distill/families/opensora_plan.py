"""Open-Sora-Plan v1.2, the tiny one and the real one, as distillation sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.dense_call import Override
from ...attention.hook.state import FORWARD_KEY, ForwardState
from ...attention.layout import TokenLayout
from ...attention.sdpa import OVERRIDE_KEY
from ...generation.devices import DTYPES
from ...generation.model_folder import FAMILY, find_model
from ...generation.request import SPACE, TIME
from ...limits.quote import quoted
from ...media.video import to_frames
from ...models.opensora_plan.checkpoint import load_transformer, load_vae, read_transformer
from ...models.opensora_plan.config import LATENT_SCALE, DiTConfig
from ...models.opensora_plan.text import MAX_TOKENS, TextEncoder
from ...models.opensora_plan.transformer import FIRST_FRAME, OpenSoraT2V
from ...models.opensora_plan.vae import CausalVAE
from ...models.opensora_plan.vae_tiling import tiled_decode, tiled_encode
from ...plan import TilePlan
from ...sampling.path import VPPath
from ...tiles import TokenGrid
from ..config import MAX_BATCH, ModelConfig
from ..lora.comfy_names import ComfyLayer
from ..lora.files import attach_frozen
from ..objectives.features import FeatureTap
from .clip_part import ClipPart
from .model import Options, check_frames, serves_all, visiting
from .texts import Encode


class OpenSoraPlanModel:
    """See `model.FamilyModel`."""

    family, expert, serves = FAMILY, "", staticmethod(serves_all)
    guided, can_host, at_once, sound_rate, text_padding = True, False, MAX_BATCH, 0, 0
    fps, encoder_packages = 24, ()

    def __init__(self, config: ModelConfig) -> None:
        if config.expert:
            raise ValueError(
                f"model.expert is {quoted(config.expert)}, but Open-Sora-Plan has one network. Leave it out."
            )
        self.folder = find_model(config.path, config.text_encoder or None)
        self.transformer_file = Path(config.transformer) if config.transformer else self.folder.transformer
        if config.dtype not in DTYPES:
            raise ValueError(
                f"model.dtype is {quoted(config.dtype)}, expected one of {', '.join(DTYPES)}. Correct the configuration."
            )
        self.dtype, self.loras = DTYPES[config.dtype], config.loras
        state_dict, self.config = read_transformer(self.transformer_file)
        # Merged weights may hold some in float32. In 8 bits most of what is learnt would become 0.
        smallest = min((value.dtype for value in state_dict.values()), key=lambda dtype: dtype.itemsize)
        self.saved_dtype = smallest if smallest.itemsize > 1 else torch.bfloat16
        self.path, self.prediction = VPPath(), self.config.prediction_type
        self.layers, self.heads = self.config.num_layers, self.config.num_attention_heads
        self._vae: CausalVAE | None = None

    def load(self, weights: str = "") -> OpenSoraT2V:
        module = load_transformer(weights or self.transformer_file, dtype=self.dtype)
        self._check_same(module.config, weights)
        module.train().requires_grad_(True)
        attach_frozen(module, self.loras, self.comfy_layer)
        return module

    def skeleton(self) -> OpenSoraT2V:
        module = OpenSoraT2V(self.config, dtype=self.dtype, device="meta").train()
        attach_frozen(module, self.loras, self.comfy_layer)
        return module

    def check_weights(self, weights: str = "") -> None:
        if weights:  # its own are looked at when it is opened
            self._check_same(read_transformer(weights)[1], weights)

    def _check_same(self, config: DiTConfig, weights: str) -> None:
        if config != self.config:
            raise ValueError(
                f"{weights} is another model than {self.transformer_file.name}: their configurations differ. Choose another."
            )

    @property
    def schedules(self) -> list[Any]:
        return []

    @property
    def text_size(self) -> tuple[int, int]:
        return MAX_TOKENS, self.config.caption_channels

    @property
    def parts(self) -> dict[str, Path]:
        return {"text encoder": self.folder.text_encoder, "VAE": self.folder.vae}

    def predict(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any] | None = None
    ) -> Tensor:
        context, mask = condition
        return module(z.to(self.dtype), time, context, mask, options)

    def layout(self, z: Tensor) -> TokenLayout:
        p, (t, h, w) = self.config.patch_size, z.shape[-3:]
        return TokenLayout(TokenGrid(t, -(-h // p), -(-w // p)))

    def predict_part(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any], part: ClipPart
    ) -> Tensor:
        first, last = part.frames
        return self.predict(module, z[:, :, first:last], time, condition, {**options, FIRST_FRAME: first})

    def check_plan(self, plan: TilePlan) -> None:
        plan.check_fits(family=FAMILY, layers=self.layers, heads=self.heads)

    def options_with(self, override: Override) -> Options:
        return lambda z: {FORWARD_KEY: ForwardState(self.layout(z)), OVERRIDE_KEY: override}

    def tap(self, module: nn.Module) -> FeatureTap:
        blocks: Any = module.transformer_blocks
        return FeatureTap({"attention": [b.attn1 for b in blocks], "mlp": [b.ff for b in blocks]})

    def checkpoint_blocks(self, module: nn.Module) -> None:
        module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]

    def text_encoder(self, device: torch.device) -> Encode:
        from ...models.opensora_plan.captions import clean_caption

        dtype = torch.float32 if self.folder.built_in else torch.bfloat16  # as the reference runs it
        encoder = TextEncoder.from_folder(self.folder.text_encoder, dtype=dtype, device=device)
        # The reference cleans twice: the second pass removes what the first one uncovers.
        return lambda texts: encoder.encode([clean_caption(clean_caption(t)) for t in texts])

    def video_encoder(self, device: torch.device) -> Callable[[np.ndarray], Tensor]:
        vae = load_vae(self.folder.vae, dtype=torch.float32).to(device)

        @torch.no_grad()
        def encode(frames: np.ndarray) -> Tensor:
            x = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            return tiled_encode(vae, x)[0].cpu() * LATENT_SCALE

        return encode

    def video_decoder(self, device: torch.device) -> Callable[[Tensor], np.ndarray]:
        vae = self.vae()

        @torch.no_grad()
        def decode(latents: Tensor) -> np.ndarray:
            with visiting(vae, device):
                return to_frames(tiled_decode(vae, latents[None].float().to(device) / LATENT_SCALE)[0].cpu())

        return decode

    def vae(self) -> CausalVAE:
        if self._vae is None:
            self._vae = load_vae(self.folder.vae, dtype=torch.float32)
        return self._vae

    def size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        check_frames(frames, frames % 4 == 1, "4k + 1")
        h, w = self.config.sample_size
        return frames or (self.config.sample_size_t - 1) * TIME + 1, height or h * SPACE, width or w * SPACE

    def latent_shape(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        frames, height, width = size
        return self.config.in_channels, (frames - 1) // TIME + 1, height // SPACE, width // SPACE

    def comfy_layer(self, layer: str) -> ComfyLayer:
        return ComfyLayer(layer)

    def config_entry(self) -> dict[str, Any]:
        return self.config.to_dict()
