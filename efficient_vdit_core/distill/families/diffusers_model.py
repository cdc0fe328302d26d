"""diffusers' video transformers, Wan and CogVideoX, as distillation sees them.

A folder in diffusers' layout: transformer, scheduler, vae, text_encoder, tokenizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.backends.spans import take
from ...attention.dense_call import Override
from ...attention.hook.state import FORWARD_KEY, ForwardState
from ...attention.layout import TokenLayout
from ...limits.quote import named, quoted
from ...media.video import to_frames
from ...sampling.path import FLOW, PREDICTIONS, FlowPath, NoisePath, VPPath
from ...tiles import TokenGrid
from ..config import MAX_BATCH, ModelConfig
from ..lora.comfy_names import COGVIDEOX, WAN
from ..objectives.features import FeatureTap
from .clip_part import ClipPart, unwrapped
from .diffusers_folder import DiffusersFolder, latent_statistics, read_json
from .intercept import OVERRIDE, Intercepted, crosses
from .model import Options, check_frames, check_sides, serves_all, visiting
from .texts import Encode

WAN_TEXT = 512  # tokens that Wan pads its texts to
PIPELINES = {WAN: "WanPipeline", COGVIDEOX: "CogVideoXPipeline"}
LOW, WAN_BOUNDARY = "transformer_2", 0.875  # Wan 2.2's second network, and its text-to-video models' boundary
WAN_5B_CHANNELS = 48  # of the latents of Wan 2.2's TI2V 5B


class DiffusersModel(DiffusersFolder):
    """See `model.FamilyModel`."""

    FAMILIES: ClassVar = {WAN: "wan", COGVIDEOX: "cogvideox"}
    guided, can_host, at_once, sound_rate, encoder_packages = True, False, MAX_BATCH, 0, ()

    def __init__(self, config: ModelConfig) -> None:
        self.boundary = _boundary(Path(config.path), config.expert)
        super().__init__(config)
        if config.expert == "low" and not config.transformer:
            self.transformer_file = self.folder / LOW
        if self.config.get("patch_size_t"):
            raise ValueError(
                "This CogVideoX packs frames in time (version 1.5), which is not supported here. Use version 1.0."
            )
        given, made = self.config["in_channels"], self.config.get("out_channels") or self.config["in_channels"]
        if given != made:
            raise ValueError(
                f"The transformer of {named(self.folder.name)} takes {given} channels and makes {made}: the others are of a picture, as "
                "image-to-video models have it, and only text-to-video models are trained. Choose one of these."
            )
        vae = self.folder / "vae" / "config.json"
        # Wan 2.2's 5B has a VAE of its own; folders of earlier ones may not say.
        self.vae = {"scale_factor_temporal": 4, "scale_factor_spatial": 8, **(read_json(vae) if vae.is_file() else {})}
        self.path, self.prediction = _schedule(read_json(self.folder / "scheduler" / "scheduler_config.json"))

    def load(self, weights: str = "") -> nn.Module:
        return self._telling(super().load(weights))

    def skeleton(self) -> nn.Module:
        return self._telling(super().skeleton())

    def _telling(self, module: Any) -> nn.Module:
        """The same module, which tells its attention to the text from that over the video."""
        for block in module.blocks if self.kind == WAN else ():
            crosses(block.attn2)
        return module

    def serves(self, timesteps: Tensor) -> Tensor:
        if not self.expert:
            return serves_all(timesteps)
        noisy = self.path.coefficients(timesteps)[1] >= self.boundary
        return noisy if self.expert == "high" else ~noisy

    @property
    def schedules(self) -> list[Any]:
        return [self.prediction, self.path.describe()]

    @property
    def _is_wan_5b(self) -> bool:
        return self.kind == WAN and self.config["in_channels"] == WAN_5B_CHANNELS

    @property
    def fps(self) -> int:
        return 8 if self.kind == COGVIDEOX else 24 if self._is_wan_5b else 16

    @property
    def text_size(self) -> tuple[int, int]:
        if self.kind == WAN:
            return WAN_TEXT, int(self.config["text_dim"])
        return int(self.config["max_text_seq_length"]), int(self.config["text_embed_dim"])

    @property
    def text_padding(self) -> int:
        return WAN_TEXT if self.kind == WAN else 0

    @property
    def parts(self) -> dict[str, Path]:
        return {"text encoder": self.folder / "text_encoder", "VAE": self.folder / "vae"}

    def predict(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any] | None = None
    ) -> Tensor:
        x, context = z.to(self.dtype), condition[0].to(self.dtype)
        return self._ask(module, x, time, context, self._rotary(z), options)

    def predict_part(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any], part: ClipPart
    ) -> Tensor:
        x, context = z.to(self.dtype), condition[0].to(self.dtype)
        own, rotary = x[:, :, slice(*part.frames)], self._rotary(z)
        if self.kind == WAN:
            with part.cut_from_whole(unwrapped(module).rope, x):
                return self._ask(module, own, time, context, None, options)
        rotary = rotary and (take(rotary[0], part.video, 0), take(rotary[1], part.video, 0))
        with part.cut_from_whole(unwrapped(module).patch_embed, context, x.transpose(1, 2)):
            return self._ask(module, own, time, context[:, slice(*part.text)], rotary, options)

    def _ask(
        self,
        module: nn.Module,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        options: dict[str, Any] | None,
    ) -> Tensor:
        inputs: dict[str, Any] = {"encoder_hidden_states": context, "timestep": time, "return_dict": False}
        with Intercepted(options):
            if self.kind == WAN:
                return module(hidden_states=x, **inputs)[0]
            return module(hidden_states=x.transpose(1, 2), image_rotary_emb=rotary, **inputs)[0].transpose(1, 2)

    def _rotary(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        p = self.config["patch_size"]
        size = (z.shape[-2] // p, z.shape[-1] // p)
        base = (self.config["sample_height"] // p, self.config["sample_width"] // p)
        # As CogVideoXPipeline crops the trained grid to the video's shape, centred.
        scale = min(base[0] / size[0], base[1] / size[1])
        inner = (round(size[0] * scale), round(size[1] * scale))
        low = (round((base[0] - inner[0]) / 2), round((base[1] - inner[1]) / 2))
        crops = (low, (low[0] + inner[0], low[1] + inner[1]))
        return get_3d_rotary_pos_embed(  # pyright: ignore[reportReturnType]
            embed_dim=self.config["attention_head_dim"],
            crops_coords=crops,
            grid_size=size,
            temporal_size=z.shape[2],
            device=z.device,
        )

    def layout(self, z: Tensor) -> TokenLayout:
        p, (t, h, w) = self.config["patch_size"], z.shape[-3:]
        pt, ph, pw = p if isinstance(p, list | tuple) else (1, p, p)
        prefix = int(self.config.get("max_text_seq_length", 0)) if self.kind == COGVIDEOX else 0
        return TokenLayout(TokenGrid(t // pt, h // ph, w // pw), prefix=prefix)

    def options_with(self, override: Override) -> Options:
        return lambda z: {
            FORWARD_KEY: ForwardState(self.layout(z)), OVERRIDE: override, "total_blocks": self.layers
        }  # fmt: skip

    def tap(self, module: nn.Module) -> FeatureTap:
        blocks: Any = module.blocks if self.kind == WAN else module.transformer_blocks
        return FeatureTap(
            {"attention": [b.attn1 for b in blocks], "mlp": [b.ffn if self.kind == WAN else b.ff for b in blocks]}
        )

    def text_encoder(self, device: torch.device) -> Encode:
        pipe = self._pipeline(torch.bfloat16, vae=None).to(device)  # as the models are used; in float32 umT5 is 23 GB

        @torch.no_grad()
        def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
            rows = self.text_size[0]  # diffusers' own default for Wan is 226, but the model is sampled with 512
            context = pipe.encode_prompt(
                texts, do_classifier_free_guidance=False, max_sequence_length=rows, device=device
            )[0]
            return context, context.any(-1).long()  # Wan's padding is zeros; CogVideoX's is as good as words

        return encode

    def video_encoder(self, device: torch.device) -> Callable[[np.ndarray], Tensor]:
        vae = self._load_vae().to(device)

        @torch.no_grad()
        def encode(frames: np.ndarray) -> Tensor:
            x = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5 - 1
            latents = vae.encode(x).latent_dist.mode().float().cpu()
            mean, deviation = latent_statistics(vae)
            return ((latents - mean) / deviation)[0]

        return encode

    def video_decoder(self, device: torch.device) -> Callable[[Tensor], np.ndarray]:
        vae = self._vae

        @torch.no_grad()
        def decode(latents: Tensor) -> np.ndarray:
            mean, deviation = latent_statistics(vae)
            with visiting(vae, device):
                z = (latents[None].cpu() * deviation + mean).to(device, vae.dtype)
                return to_frames(vae.decode(z).sample[0].cpu())

        return decode

    @cached_property
    def _vae(self) -> Any:
        """The decoder's: samples are decoded time and again during a training."""
        return self._load_vae()

    def _load_vae(self) -> Any:
        return self._pipeline(torch.float32, text_encoder=None, tokenizer=None).vae

    def _pipeline(self, dtype: torch.dtype, **without: None) -> Any:
        """diffusers' pipeline without its transformers, and without what else is None."""
        import diffusers

        # By its own class: asked of DiffusionPipeline, what is None is loaded all the same where the class has it optional.
        kind = getattr(diffusers, PIPELINES[self.kind])
        networks = {"transformer", "transformer_2"} & inspect.signature(kind.__init__).parameters.keys()
        without |= dict.fromkeys(networks)
        return kind.from_pretrained(str(self.folder), torch_dtype=dtype, **without)

    def size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        check_frames(frames, frames % 4 == 1, "4k + 1")
        p = self.config["patch_size"]
        check_sides(height, width, self.vae["scale_factor_spatial"] * (p if isinstance(p, int) else p[-1]))
        wan = (121, 704, 1280) if self._is_wan_5b else (81, 480, 832)
        trained = (49, 480, 720) if self.kind == COGVIDEOX else wan
        return frames or trained[0], height or trained[1], width or trained[2]

    def latent_shape(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        frames, height, width = size
        pixels, every = self.vae["scale_factor_spatial"], self.vae["scale_factor_temporal"]
        return int(self.config["in_channels"]), (frames - 1) // every + 1, height // pixels, width // pixels


def _boundary(folder: Path, expert: str) -> float:
    """The noise level at and above which the first of two networks is asked; 0 for a model with one."""
    two = (folder / LOW).is_dir()
    if two != bool(expert):
        found = "two networks, each a training of its own" if two else "one network"
        advice = "Set it (evdit convert lora: --expert) to high, then to low." if two else "Leave it out."
        raise ValueError(f"{named(folder.name)} holds {found}, but model.expert is {quoted(expert)}. {advice}")
    return float(read_json(folder / "model_index.json").get("boundary_ratio") or WAN_BOUNDARY) if two else 0.0


def _schedule(values: dict[str, Any]) -> tuple[NoisePath, str]:
    """Noise path and prediction type of a scheduler's configuration."""
    if "flow" in str(values.get("prediction_type", "")) or "FlowMatch" in values.get("_class_name", ""):
        return FlowPath(float(values.get("flow_shift") or values.get("shift") or 1.0)), FLOW
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

    prediction = values.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"The scheduler's prediction_type is {quoted(prediction)}, expected one of {', '.join(PREDICTIONS)}."
        )
    kind = CogVideoXDDIMScheduler if "CogVideoX" in values.get("_class_name", "") else DDIMScheduler
    scheduler: Any = kind.from_config(values)
    return VPPath.from_alphas_bar(scheduler.alphas_cumprod), prediction
