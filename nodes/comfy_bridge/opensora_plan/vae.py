"""The causal video VAE as a native ComfyUI VAE.

Shapes: pixels (B, 3, F, H, W) in [-1, 1] inside, (F, H, W, 3) or (B, F, H, W, 3) in [0, 1] outside; latents (B, 4, t,
h, w).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ....efficient_vdit_core.models.opensora_plan import checkpoint, vae_tiling
from ....efficient_vdit_core.models.opensora_plan.config import VAEConfig
from ....efficient_vdit_core.models.opensora_plan.vae import CausalVAE
from ..paths import resolve
from .patchers import patcher_class

log = logging.getLogger("efficient_vdit")

TIME, SPACE = 4, 8


def load_vae(name: str, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """A VAE from a list entry; ``disable_dynamic`` as in ComfyUI's own loaders. Raises ValueError where the file is not the
    v1.2 VAE."""
    vae = OpenSoraPlanVAE(*checkpoint.read_vae(resolve("vae", name, "vae")), disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (_reload_patcher, (name,))  # how ComfyUI loads it once more, for another GPU
    return vae


def _reload_patcher(name: str, disable_dynamic: bool = False) -> Any:
    return load_vae(name, disable_dynamic).patcher


class FirstStage(CausalVAE):
    """The network as ComfyUI calls it: surplus frames are left out instead of disturbing the whole clip."""

    def encode(self, x: Tensor) -> Tensor:
        frames = (x.shape[2] - 1) // TIME * TIME + 1
        if frames != x.shape[2]:
            log.warning(
                "The VAE codes 4k + 1 frames; of %d the last %d are left out. Give 5, 9, ..., 29, ... frames to keep all.",
                x.shape[2],
                x.shape[2] - frames,
            )
        return super().encode(x[:, :, :frames])

    def decode(self, z: Tensor) -> Tensor:
        if z.ndim != 5 or z.shape[1] != self.config.embed_dim:
            raise ValueError(
                f"The latent has shape {tuple(z.shape)}, expected (batch, {self.config.embed_dim}, frames, height, width): it "
                "belongs to another VAE. Decode it with the VAE of the model that made it."
            )
        pixels = super().decode(z)
        if not bool(pixels.isfinite().all()):
            raise ValueError(
                f"The decoded clip holds NaN or infinite values in {str(pixels.dtype).removeprefix('torch.')}: the sampler's "
                "result was not finite, or the precision is too low. Start ComfyUI with --fp32-vae, or sample again."
            )
        return pixels


class OpenSoraPlanVAE(comfy.sd.VAE):
    """ComfyUI's VAE with Open-Sora-Plan's network and tiling.

    The stock constructor knows a fixed list of networks and offers no way in. Without weights it sets its attributes,
    to which each version of ComfyUI adds, and stops; the network and what belongs to it are set here.
    """

    def __init__(self, state_dict: dict[str, Tensor], config: VAEConfig, disable_dynamic: bool = False) -> None:
        with _no_complaint():
            super().__init__(sd={})
        self.first_stage_model = FirstStage(config, operations=comfy.ops.disable_weight_init).eval()
        self.first_stage_model.load_state_dict(state_dict)
        self._describe(config)
        self._place(disable_dynamic)

    def _describe(self, config: VAEConfig) -> None:
        """Sizes, value ranges and memory needs."""
        self.latent_channels = config.embed_dim
        self.latent_dim = 3
        self.output_channels = 3
        self.upscale_ratio = (lambda t: max(0, t * TIME - (TIME - 1)), SPACE, SPACE)
        self.upscale_index_formula = (TIME, SPACE, SPACE)
        self.downscale_ratio = (lambda f: max(0, math.floor((f + TIME - 1) / TIME)), SPACE, SPACE)
        self.downscale_index_formula = (TIME, SPACE, SPACE)
        # The decoder's peak is some six and a half tensors of the full resolution's width; the encoder's is lower.
        channels = 6.5 * config.hidden_size
        self.memory_used_encode = lambda shape, dtype: channels * math.prod(shape[-3:]) * mm.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            channels * TIME * SPACE**2 * math.prod(shape[-3:]) * mm.dtype_size(dtype)
        )
        self.process_input = lambda image: image * 2.0 - 1.0
        # In place and returned: newer versions of ComfyUI drop what it returns, older ones use it.
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes = [torch.bfloat16, torch.float32]

    def _place(self, disable_dynamic: bool) -> None:
        """Devices and dtype, as the stock constructor chooses them."""
        self.device = mm.vae_device()
        self.output_device = mm.intermediate_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.patcher = patcher_class(disable_dynamic)(
            self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device()
        )
        self.size = mm.module_size(self.first_stage_model)

    def decode_tiled_3d(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        samples: Tensor,
        tile_t: int = 999,
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: tuple[int, int, int] = (1, 4, 4),
    ) -> Tensor:
        """Latents (B, 4, t, h, w) to pixels (B, 3, F, H, W) in [0, 1]; tile sizes and overlap in latent units."""
        tiles = len(vae_tiling.latent_chunks(samples.shape[2], tile_t)) * _tiles_in_frame(samples, tile_x, 1)
        network = SimpleNamespace(decode=self._on_tiles(self.first_stage_model.decode, tiles))
        pixels = vae_tiling.tiled_decode(network, samples, latent_size=tile_x, latent_frames=tile_t)  # pyright: ignore[reportArgumentType]
        return self.process_output(pixels)

    def encode_tiled_3d(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        samples: Tensor,
        tile_t: int = 9999,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: tuple[int, int, int] = (1, 64, 64),
    ) -> Tensor:
        """Pixels (B, 3, F, H, W) in [0, 1] to latents (B, 4, t, h, w); tile sizes and overlap in frames and pixels."""
        frames = (tile_t + TIME - 1) // TIME
        tiles = len(vae_tiling.pixel_chunks(samples.shape[2], frames)) * _tiles_in_frame(
            samples, tile_x // SPACE, SPACE
        )
        network = SimpleNamespace(encode=self._on_tiles(self.first_stage_model.encode, tiles))
        pixels = self.process_input(samples)
        return vae_tiling.tiled_encode(network, pixels, latent_size=tile_x // SPACE, latent_frames=frames)  # pyright: ignore[reportArgumentType]

    def _on_tiles(self, code: Callable[[Tensor], Tensor], tiles: int) -> Callable[[Tensor], Tensor]:
        """`code` for one tile on the VAE's device, with progress; stops between tiles when the user cancels."""
        progress = comfy.utils.ProgressBar(tiles)

        def run(tile: Tensor) -> Tensor:
            mm.throw_exception_if_processing_interrupted()
            result = code(tile.to(device=self.device, dtype=self.vae_dtype)).to(self.output_device).float()
            progress.update(1)
            return result

        return run


@contextmanager
def _no_complaint() -> Iterator[None]:
    """Without the stock constructor's warning that it got no weights."""

    def other(record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()

    logging.getLogger().addFilter(other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(other)


def _tiles_in_frame(x: Tensor, latent_size: int, width: int) -> int:
    """``width``: how many elements of ``x`` a latent is wide."""
    if max(x.shape[-2:]) <= latent_size * width:
        return 1
    return math.prod(-(-size // (vae_tiling.tile_step(latent_size) * width)) for size in x.shape[-2:])
