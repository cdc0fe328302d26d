"""MiniMax-H3's text to video with sound, read through diffusers, as distillation sees it.

Pictures and sound are distilled together; `minimax_h3_clip` says how both are one tensor. Prompt, sound and pictures are
one sequence without padding, so a forward takes one clip; the prompt and the sound, which stand before the pictures, stay
exact under a plan. The weights have guidance inside already: there is none to distil and no negative prompt.

A folder in diffusers' layout: transformer, scheduler, audio_scheduler, vae, audio_vae, text_encoder, tokenizer, processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.dense_call import Override
from ...attention.hook.state import FORWARD_KEY, ForwardState
from ...attention.layout import TokenLayout
from ...limits.numbers import number
from ...limits.quote import named, quoted
from ...sampling.path import FLOW, FlowPath
from ...tiles import TokenGrid
from ..config import ModelConfig
from ..lora.comfy_names import MINIMAX_H3
from ..objectives.features import FeatureTap
from .cpu_offload import OnHost
from .diffusers_folder import DiffusersFolder, read_json
from .intercept import OVERRIDE, Intercepted
from .minimax_h3_clip import (
    CHUNK,
    FIRST,
    PATCH,
    PIXELS,
    SIDES,
    ClipShape,
    TwoLevels,
    from_rows,
    latent_frames,
    sound_latents,
    to_rows,
)
from .minimax_h3_parts import H3Encoder, h3_pictures, h3_text_encoder, read_vae
from .model import Options, check_frames, check_sides, serves_all
from .texts import Encode

TRAINED = (124, 768, 1344)  # frames, height and width that diffusers' blocks make where none are asked for
WORDS = 512  # of the longest prompt that a forecast reckons with; the model itself sets no bound
VIDEO, TEXT, SOUND = 0, 1, 2  # what a row of the sequence is
INPUTS = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")


class MiniMaxH3Model(DiffusersFolder):
    """See `model.FamilyModel`. Raises ValueError where the folder lacks one of the two schedules."""

    FAMILIES: ClassVar = {MINIMAX_H3: "minimax_h3"}
    guided, can_host, at_once, serves = False, True, 1, staticmethod(serves_all)
    prediction, text_padding, fps = FLOW, 0, 24
    encoder_packages = ("torchvision",)  # transformers' Qwen3VLProcessor holds one for videos

    def __init__(self, config: ModelConfig) -> None:
        if config.expert:
            raise ValueError(f"model.expert is {quoted(config.expert)}, but MiniMax-H3 has one network. Leave it out.")
        super().__init__(config)
        self.host_modulation = config.host_modulation
        self.shift, self.sound_shift = (_shift(self.folder / name) for name in ("scheduler", "audio_scheduler"))
        self.path = FlowPath(self.shift, multiplier=1.0)

    def load(self, weights: str = "") -> nn.Module:
        return self._hosted(super().load(weights))

    def skeleton(self) -> nn.Module:
        return self._hosted(super().skeleton())

    def _hosted(self, module: Any) -> nn.Module:
        """The noise level's projections take two rows in each forward, and a third of the memory."""
        for block in module.transformer_blocks if self.host_modulation else ():
            block.adaln_proj = OnHost(block.adaln_proj)
        return module

    @property
    def sound_rate(self) -> int:
        return int(read_json(self.folder / "audio_vae" / "config.json").get("sampling_rate", 32000))

    @property
    def schedules(self) -> list[Any]:
        return [self.shift, self.sound_shift]

    @property
    def text_size(self) -> tuple[int, int]:
        return WORDS, int(self.config["text_dim"])

    @property
    def parts(self) -> dict[str, Path]:
        names = {"text encoder": "text_encoder", "VAE": "vae", "sound VAE": "audio_vae"}
        return {name: self.folder / folder for name, folder in names.items()}

    def size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        check_frames(frames, frames % CHUNK == FIRST, f"{CHUNK}k + {FIRST}")
        check_sides(height, width, PIXELS * PATCH)
        return frames or TRAINED[0], height or TRAINED[1], width or TRAINED[2]

    def latent_shape(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        frames, height, width = size
        return self._clip(latent_frames(frames), height // PIXELS, width // PIXELS).state

    def _clip(self, t: int, h: int, w: int) -> ClipShape:
        return ClipShape(int(self.config["in_channels"]), int(self.config["audio_in_channels"]), t, h, w)

    def predict(
        self, module: nn.Module, z: Tensor, time: Tensor, condition: Any, options: dict[str, Any] | None = None
    ) -> Tensor:
        """Clip by clip: a batch gives what each gives alone."""
        context, mask = condition
        lengths = [context.shape[1]] * len(z) if mask is None else mask.sum(1).tolist()
        found = [
            self._predict(module, clip, level, words[:length], options)
            for clip, level, words, length in zip(z, time, context, lengths, strict=True)
        ]
        return torch.stack(found)

    def _predict(
        self, module: nn.Module, z: Tensor, level: Tensor, words: Tensor, options: dict[str, Any] | None
    ) -> Tensor:
        shape = self._clip(*z.shape[1:])
        levels = TwoLevels.at(level.float(), self.shift, self.sound_shift)
        video, sound, rest = shape.unpack(z.float())
        inputs = {name: x.to(z.device) for name, x in packed(len(words), shape).items()}
        with Intercepted(options and _behind_words(options, len(words))):
            to_data, sound_to_data = module(
                hidden_states=to_rows(video)[None],
                audio_hidden_states=(levels.ratio * sound)[None],
                encoder_hidden_states=words[None].to(self.dtype),
                timestep=levels.times,
                timestep_indices=(inputs["token_tags"] == SOUND).long(),  # the prompt has the pictures' time
                return_dict=False,
                **inputs,
            )
        flow = levels.flow(from_rows(to_data[0].float(), shape))
        return shape.pack(flow, levels.sound_flow(sound_to_data[0].float(), sound), rest / levels.s)

    def options_with(self, override: Override) -> Options:
        def options(z: Tensor) -> dict[str, Any]:
            shape = self._clip(*z.shape[-3:])
            grid = TokenGrid(shape.t, shape.h // PATCH, shape.w // PATCH)
            layout = TokenLayout(grid, prefix=shape.sound_rows)  # and the words, whose number ``predict`` knows
            return {FORWARD_KEY: ForwardState(layout), OVERRIDE: override, "total_blocks": self.layers}

        return options

    def tap(self, module: nn.Module) -> FeatureTap:
        blocks: Any = module.transformer_blocks
        return FeatureTap({"attention": [b.attn for b in blocks], "mlp": [b.ff for b in blocks]})

    def text_encoder(self, device: torch.device) -> Encode:
        return h3_text_encoder(self.folder, device, int(self.config["text_dim"]))

    def video_encoder(self, device: torch.device) -> Callable[..., Tensor]:
        encoder, k = H3Encoder(self.folder, device), self.shift / self.sound_shift

        def encode(frames: np.ndarray, sound: np.ndarray | None = None) -> Tensor:
            """Without ``sound`` the clip is silent."""
            video = encoder.pictures(frames)
            shape = self._clip(*video.shape[1:])
            length = sound_latents(shape.t)
            return shape.pack(video, k * encoder.sound(sound, length).transpose(1, 2).reshape(SIDES * length, -1))

        return encode

    def video_decoder(self, device: torch.device) -> Callable[[Tensor], np.ndarray]:
        """Of the pictures; the sound is left out."""
        vae = self._vae
        return lambda latents: h3_pictures(vae, self._clip(*latents.shape[1:]).unpack(latents)[0], device)

    @cached_property
    def _vae(self) -> Any:
        """The decoder's: samples are decoded time and again during a training."""
        return read_vae(self.folder)


def _shift(folder: Path) -> float:
    found = read_json(folder / "scheduler_config.json").get("shift")
    return number(found, f"The shift in {named(folder.name)}", 0, above=True, why="Correct scheduler_config.json.")


@lru_cache(maxsize=64)
def packed(words: int, shape: ClipShape) -> dict[str, Tensor]:
    """The sequence as the transformer is told of it: [words | sound | pictures], by the names of its arguments."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    tags = torch.full((words,), TEXT)
    found: Any = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, shape.t, shape.h, shape.w, sound_latents(shape.t), (1, PATCH, PATCH), SIDES, SOUND, VIDEO
    )
    return {name: x.float() if name == "position_ids" else x for name, x in zip(INPUTS, found, strict=False)}


def _behind_words(options: dict[str, Any], words: int) -> dict[str, Any]:
    """The options of one clip's forward: its words stand before the sound, and have attention of their own before that."""
    state: ForwardState = options[FORWARD_KEY]
    assert state.layout is not None
    layout = replace(state.layout, prefix=state.layout.prefix + words)
    return {**options, FORWARD_KEY: state.again(layout=layout, others=frozenset({words}))}
