"""Open-Sora-Plan v1.2 as a native ComfyUI MODEL: latent format, model class, loader.

Shapes: latents (B, 4, T, H, W); text (B, L, C); text mask (B, L), 1 = word.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....efficient_vdit_core.models.distilled import read_metadata
from ....efficient_vdit_core.models.opensora_plan import checkpoint, transformer
from ....efficient_vdit_core.models.opensora_plan.config import LATENT_SCALE, DiTConfig
from ..distilled import DISTILLED
from ..paths import resolve
from .model_sampling import SAMPLING_SETTINGS, EpsilonSampling, VelocitySampling
from .patchers import patcher_class

log = logging.getLogger("efficient_vdit")

_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
WEIGHT_DTYPES = list(_DTYPES)
# Text is padded to a multiple of this, so that prompts of different lengths can share a batch; the padding is masked.
TEXT_MULTIPLE = 64


class OpenSoraPlanLatent(comfy.latent_formats.LatentFormat):
    """4x in time and 8x in space; scaled for the transformer. 4 channels but for models that were trained on more."""

    latent_dimensions = 3

    def __init__(self, channels: int = 4) -> None:
        self.latent_channels = channels
        self.scale_factor = LATENT_SCALE
        # The VAE grew out of Stable Diffusion's; its preview colours are near enough. Further channels show nothing.
        factors = comfy.latent_formats.SD15().latent_rgb_factors[:channels]
        self.latent_rgb_factors = [*factors, *[[0.0, 0.0, 0.0]] * (channels - len(factors))]


class OpenSoraT2V(transformer.OpenSoraT2V):
    """The engine's transformer with ComfyUI's attention, weight-casting layers and model wrappers."""

    def __init__(
        self, image_model: str, config: DiTConfig, dtype: Any = None, device: Any = None, operations: Any = None
    ) -> None:
        # An 8-bit float can hold the matrices; the small modulation tables need more.
        is_8_bit = dtype is not None and dtype.itemsize == 1
        build = {"device": device, "operations": operations, "attention": optimized_attention}
        super().__init__(config, dtype=torch.bfloat16 if is_8_bit else dtype, **build)
        if is_8_bit:
            self.dtype = dtype
            for module in self.modules():
                if hasattr(module, "comfy_cast_weights"):
                    module.to(dtype)
                    # With dynamic memory a layer has no weights yet, and says what they shall become.
                    for name in ("weight_comfy_model_dtype", "bias_comfy_model_dtype"):
                        if hasattr(module, name):
                            setattr(module, name, dtype)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, options)


class OpenSoraPlan(comfy.model_base.BaseModel):
    """ComfyUI's model around the transformer: noise schedule and conditioning."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        predicts_v = model_config.unet_config["config"].prediction_type == "v_prediction"
        kinds = comfy.model_base.ModelType
        super().__init__(
            model_config, kinds.V_PREDICTION if predicts_v else kinds.EPS, device=device, unet_model=OpenSoraT2V
        )
        self.model_sampling = (VelocitySampling if predicts_v else EpsilonSampling)(model_config)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Text and its mask. Called before the first step, so a latent that does not fit is refused here."""
        self._check_latent(kwargs.get("noise"))
        conds = super().extra_conds(**kwargs)
        text = kwargs.get("cross_attn")
        if text is not None:
            self._check_text(text)
            text, mask = padded_text(text, kwargs.get("attention_mask"))
            conds["c_crossattn"] = comfy.conds.CONDRegular(text)
            conds["attention_mask"] = comfy.conds.CONDRegular(mask)
        return conds

    def _check_latent(self, noise: Tensor | None) -> None:
        channels = self.latent_format.latent_channels
        if noise is not None and (noise.ndim != 5 or noise.shape[1] != channels):
            raise ValueError(
                f"The latent has shape {tuple(noise.shape)}, expected (batch, {channels}, frames, height, width): it was encoded by "
                "another VAE. Encode with the VAE of Load Open-Sora-Plan VAE, or start from an empty video latent "
                "(EmptyHunyuanLatentVideo)."
            )

    def _check_text(self, text: Tensor) -> None:
        expected = self.diffusion_model.config.caption_channels
        if text.shape[-1] != expected:
            raise ValueError(
                f"The conditioning has {text.shape[-1]} channels, expected {expected}: it comes from another text encoder "
                "than this model was trained with. Load the encoder that belongs to the model with Load Open-Sora-Plan Text Encoder."
            )


class OpenSoraPlanConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about the architecture when it builds, places and saves the model."""

    unet_config = {"image_model": "opensora_plan_v12"}
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = SAMPLING_SETTINGS
    latent_format = OpenSoraPlanLatent
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    # Megabytes of activations per latent element and byte, over 0.01: about 1.5 GiB in bf16 at 8 x 90 x 160.
    memory_usage_factor = 0.65

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        self.latent_format = OpenSoraPlanLatent(unet_config["config"].in_channels)

    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> OpenSoraPlan:
        return OpenSoraPlan(self, device=device)


def load_model(name: str, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    """A MODEL (ModelPatcher) from a list entry; ``disable_dynamic`` as in ComfyUI's own loaders.

    Raises ValueError where the file is not an Open-Sora-Plan v1.2 transformer.
    """
    path = resolve("diffusion_models", name, "transformer")
    state_dict, config = checkpoint.read_transformer(path)
    model_config = OpenSoraPlanConfig({"image_model": "opensora_plan_v12", "config": config})
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    supported = model_config.supported_inference_dtypes
    dtype = _DTYPES[weight_dtype]
    if dtype is None:
        size = comfy.utils.calculate_parameters(state_dict)
        dtype = mm.unet_dtype(
            model_params=size, supported_dtypes=list(supported), weight_dtype=comfy.utils.weight_dtype(state_dict)
        )
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, supported))
    model = model_config.get_model(state_dict, device=offload_device)
    loaded = patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(state_dict, "")
    # How newer versions of ComfyUI load the weights once more, for another GPU.
    loaded.cached_patcher_init = (load_model, (name, weight_dtype))
    distilled = read_metadata(path)
    if distilled is not None:
        loaded.set_attachments(DISTILLED, distilled)
    return loaded


def padded_text(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Text (B, L, C) and mask (B, L) with L rounded up to TEXT_MULTIPLE; the model drops what all rows leave unused.

    Text that other nodes have joined to the encoded prompt is longer than its mask; it counts as words.
    """
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    mask = mask[:, : text.shape[1]].expand(text.shape[0], -1)
    mask = F.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    extra = -text.shape[1] % TEXT_MULTIPLE
    return F.pad(text, (0, 0, 0, extra)), F.pad(mask, (0, extra))
