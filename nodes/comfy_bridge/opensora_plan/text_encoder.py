"""mT5 as a native ComfyUI CLIP.

ComfyUI has the T5 network but neither the mT5-xxl configuration nor its tokenizer; both come from the checkpoint.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer
from comfy.text_encoders.t5 import T5
from torch import Tensor

from ....efficient_vdit_core.limits.quote import named
from ....efficient_vdit_core.limits.texts import checked_prompt
from ....efficient_vdit_core.models.opensora_plan import text as captions
from ..paths import resolve

log = logging.getLogger("efficient_vdit")

NAME = "mt5xxl"  # the key of the token lists, as ComfyUI's other encoders have one
END, PAD = 1, 0
NO_TEMPLATE = "none"
TEMPLATE_NAMES = [NO_TEMPLATE, *captions.TEMPLATES]
MAX_TOKENS = captions.MAX_TOKENS


def load_text_encoder(
    name: str, template: str = NO_TEMPLATE, clean: bool = True, *, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """A CLIP from a list entry; ``disable_dynamic`` as in ComfyUI's own loaders.

    Raises ValueError where the file is no mT5 encoder or its tokenizer is missing.
    """
    weights, config, spiece = captions.read_text_encoder(resolve("text_encoders", name, "text_encoder"))
    config = comfy_config(config)
    # Large fp32 files are stored as ComfyUI prefers (fp16); activations are fp32 in any case.
    dtype = comfy.utils.weight_dtype(weights)
    if dtype == torch.float32 and comfy.utils.calculate_parameters(weights) > 1e9:
        dtype = mm.text_encoder_dtype(mm.text_encoder_device())
    target = ClipTarget(_tokenizer_class(config["d_model"], template, clean), _model_class(config))
    clip = comfy.sd.CLIP(
        target=target,
        tokenizer_data={"spiece_model": spiece},
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"dtype": dtype},
        **({"disable_dynamic": True} if disable_dynamic else {}),  # older versions know no dynamic memory
    )
    missing, unexpected = clip.load_sd(weights)
    if missing or unexpected:
        raise ValueError(
            f"{named(name)} does not hold the encoder that its configuration describes: {len(missing)} tensors are missing and "
            f"{len(unexpected)} unknown, such as {named(min([*missing, *unexpected]))}. Use an mT5 encoder in its original form."
        )
    clip.patcher.cached_patcher_init = (_reload_patcher, (name, template, clean))  # how ComfyUI loads it once more
    return clip


def _reload_patcher(name: str, template: str, clean: bool, disable_dynamic: bool = False) -> Any:
    return load_text_encoder(name, template, clean, disable_dynamic=disable_dynamic).patcher


def comfy_config(config: dict[str, Any]) -> dict[str, Any]:
    """An mT5 configuration with the one name that ComfyUI spells in another way."""
    activations = {"gelu_new": "gelu_pytorch_tanh"}
    return {**config, "dense_act_fn": activations.get(config["dense_act_fn"], config["dense_act_fn"])}


def prepare(text: str, template: str, clean: bool) -> str:
    """The caption as the encoder sees it. Empty text stays empty: it is the unconditional prompt of the training."""
    if not text.strip():
        return ""
    text = checked_prompt(text)
    if template != NO_TEMPLATE:
        text = captions.TEMPLATES[template].format(text)
    # Open-Sora-Plan cleans twice; the second pass catches what the first uncovers.
    return captions.clean_caption(captions.clean_caption(text)) if clean else text


class _MT5Tokenizer(sd1_clip.SDTokenizer):
    """sentencepiece ids of one caption with an end token, cut at MAX_TOKENS."""

    template = NO_TEMPLATE
    clean = True
    width = 4096

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = tokenizer_data or {}
        super().__init__(
            data.get("spiece_model"),
            pad_with_end=False,
            embedding_size=self.width,
            embedding_key=NAME,
            tokenizer_class=SPieceTokenizer,  # pyright: ignore[reportArgumentType]
            has_start_token=False,
            pad_to_max_length=False,
            max_length=99999999,
            pad_token=PAD,
            tokenizer_data=data,
        )
        self.told: list[Any] = []  # what was last said to be cut: samplers may ask for a prompt more than once

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        # The quality words of Open-Sora-Plan stand in brackets that mean nothing; "(word:1.2)" must not be a weight.
        kwargs.setdefault("disable_weights", True)
        rows = super().tokenize_with_weights(prepare(text, self.template, self.clean), return_word_ids, **kwargs)
        return [self._cut(row) for row in rows]

    def _cut(self, row: list[Any]) -> list[Any]:
        if len(row) <= MAX_TOKENS:
            return row
        if self.told != row:
            log.warning("The prompt has %d tokens, the model reads %d: the end of it is cut off.", len(row), MAX_TOKENS)
            self.told = row
        return [*row[: MAX_TOKENS - 1], row[-1]]

    def state_dict(self) -> dict[str, Tensor]:
        """What CLIPSave writes beside the weights, and this loader reads back."""
        return {"spiece_model": self.tokenizer.serialize_model()}


def _tokenizer_class(width: int, template: str, clean: bool) -> type[sd1_clip.SD1Tokenizer]:
    chosen = type("MT5Tokenizer", (_MT5Tokenizer,), {"width": width, "template": template, "clean": clean})

    class Tokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, name=NAME, tokenizer=chosen)

    return Tokenizer


def _model_class(config: dict[str, Any]) -> type[sd1_clip.SD1ClipModel]:
    class MT5(sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(
                device=device,
                layer="last",
                textmodel_json_config=config,  # pyright: ignore[reportArgumentType]
                dtype=dtype,
                special_tokens={"end": END, "pad": PAD},
                model_class=T5,  # pyright: ignore[reportArgumentType]
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class OpenSoraPlanTextEncoder(sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, name=NAME, clip_model=MT5)  # pyright: ignore[reportArgumentType]

    return OpenSoraPlanTextEncoder
