"""What distillation needs of a model family, whatever its code looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.hook.override import AttentionReport, Override, make_attention_override
from ...attention.layout import TokenLayout
from ...limits.quote import quoted
from ...plan import TilePlan
from ...sampling.path import NoisePath
from ...storage.files import can_be_path
from ...tiles import TilePattern
from ..lora.comfy_names import ComfyLayer
from ..objectives.features import FeatureTap
from .clip_part import ClipPart
from .texts import Encode

Options = Callable[[Tensor], dict[str, Any]]


class FamilyModel(Protocol):
    """One family's way to load, call and save. Latents are (B, C, T, h, w), scaled as the network wants them."""

    @property
    def path(self) -> NoisePath: ...

    @property
    def prediction(self) -> str: ...

    @property
    def schedules(self) -> list[Any]:
        """What files of its folder say of noise and prediction, JSON-able; nothing where the family itself does."""
        ...

    @property
    def transformer_file(self) -> Path: ...

    @property
    def loras(self) -> tuple[str, ...]:
        """Files of the LoRAs that it wears."""
        ...

    @property
    def expert(self) -> str:
        """Which of a model's networks this is; "" where it has one, which serves all of diffusion time."""
        ...

    def serves(self, timesteps: Tensor) -> Tensor:
        """Whether a step that begins at each of ``timesteps`` (N,) is this network's; bool (N,) on the CPU."""
        ...

    @property
    def guided(self) -> bool:
        """Whether the model is sampled with guidance; False where its weights have it inside already."""
        ...

    @property
    def can_host(self) -> bool:
        """Whether ``model.host_modulation`` means something to it."""
        ...

    @property
    def at_once(self) -> int:
        """The most clips of a training's batch."""
        ...

    @property
    def sound_rate(self) -> int:
        """Samples a second of the sound that ``video_encoder``'s function takes beside the frames; 0 where it takes none."""
        ...

    @property
    def fps(self) -> int:
        """Frames a second of the clips that it makes."""
        ...

    @property
    def saved_dtype(self) -> torch.dtype:
        """What results are written in: 16 bits at least."""
        ...

    @property
    def family(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def heads(self) -> int: ...

    def load(self, weights: str = "") -> nn.Module:
        """The transformer in training mode with gradients on, from ``weights`` or the model's own, wearing the
        configuration's LoRAs."""
        ...

    def skeleton(self) -> nn.Module:
        """The transformer on the meta device: shapes and precisions, no weights."""
        ...

    def check_weights(self, weights: str = "") -> None:
        """Raises ValueError where the file, or the model's own, holds other tensors than `load` takes; before it is read."""
        ...

    @property
    def text_size(self) -> tuple[int, int]:
        """Longest text in tokens, and the channels of a text state."""
        ...

    @property
    def text_padding(self) -> int:
        """The rows to which it pads a text's states with zeros that are attended to; 0 where a mask leaves padding out."""
        ...

    @property
    def parts(self) -> dict[str, Path]:
        """Where the ``text encoder`` and the ``VAE`` lie."""
        ...

    @property
    def encoder_packages(self) -> tuple[str, ...]:
        """Modules without which ``text_encoder`` cannot be had, beyond those of the family itself."""
        ...

    def predict(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any] | None = None
    ) -> Tensor: ...

    def check_plan(self, plan: TilePlan) -> None:
        """Raises ValueError where the plan was made for another model."""
        ...

    def options_with(self, override: Override) -> Options:
        """Makes the options of one forward pass from its z, in which ``override`` sees the attention."""
        ...

    def tap(self, module: nn.Module) -> FeatureTap: ...

    def checkpoint_blocks(self, module: nn.Module) -> None:
        """Recompute blocks in the backward pass instead of keeping them."""
        ...

    def text_encoder(self, device: torch.device) -> Encode:
        """An encoder of its own on ``device``, which is free again when the encoder is."""
        ...

    def video_encoder(self, device: torch.device) -> Callable[..., Tensor]:
        """frames uint8 (F, H, W, 3), and the sound float32 (2, samples) of a model that has it, to latents (C, T, h, w) on
        the CPU; memory as of ``text_encoder``."""
        ...

    def video_decoder(self, device: torch.device) -> Callable[[Tensor], np.ndarray]:
        """latents (C, T, h, w) to frames uint8 (F, H, W, 3), computed on ``device``, which is free between calls."""
        ...

    def size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width, each what the model was trained for where it is 0. Raises ValueError for a size that
        the model cannot make."""
        ...

    def latent_shape(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]: ...

    def comfy_layer(self, layer: str) -> ComfyLayer:
        """Where a layer is in ComfyUI's model of this family."""
        ...

    def config_entry(self) -> dict[str, Any]:
        """The transformer's config.json."""
        ...


class SharedModel(FamilyModel, Protocol):
    """A family whose network several processes can ask together, each for its own frames of a clip."""

    def layout(self, z: Tensor) -> TokenLayout:
        """Where the video's tokens stand in the sequence of latents z."""
        ...

    def predict_part(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any], part: ClipPart
    ) -> Tensor:
        """`predict` of the whole ``z`` and ``condition``, asked for the frames of ``part`` alone: the network is given
        these, at the positions that they have in the whole."""
        ...


def can_share(model: FamilyModel) -> TypeGuard[SharedModel]:
    """Whether the family has what training.sequence_parallel asks."""
    return hasattr(model, "predict_part")


def serves_all(timesteps: Tensor) -> Tensor:
    """`FamilyModel.serves` of a model with one network."""
    return torch.ones(timesteps.shape, dtype=torch.bool)


def check_frames(frames: int, holds: bool, rule: str) -> None:
    """Raises ValueError for a number of frames, not 0, that the family's ``rule`` does not hold for."""
    if frames and not holds:
        raise ValueError(
            f"data.frames is {quoted(frames)}, expected {rule}, or 0 for the model's own. Correct the configuration."
        )


def check_sides(height: int, width: int, multiple: int) -> None:
    """Raises ValueError for pixels of which the family's network cannot make whole tokens."""
    for name, length in (("height", height), ("width", width)):
        if length % multiple:
            low = length // multiple * multiple
            nearest = f"{low} or {low + multiple}" if low else f"{multiple}"
            raise ValueError(
                f"data.{name} is {length}, expected a multiple of {multiple}, or 0 for the model's own: a token is that many pixels "
                f"high and wide. Set it to {nearest}."
            )


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the module, which lives on the CPU, is on ``device``."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


def sparse_options(model: FamilyModel, plan: TilePlan) -> Options:
    """The options of a forward pass under a plan. Raises ValueError where the plan does not fit the model."""
    model.check_plan(plan)
    return model.options_with(make_attention_override(plan, AttentionReport()))


def read_plan(text: str) -> TilePlan:
    """A plan file, or a uniform plan from ``k:T-k``."""
    if can_be_path(text) and Path(text).is_file():
        return TilePlan.load(text)
    if not text or text.endswith(".json"):
        raise ValueError(
            f"The plan (objective.plan) is {quoted(text)}, expected a plan file or a pattern such as 2:6. Search a plan, or name one."
        )
    return TilePlan(uniform_pattern=TilePattern.parse(text))
