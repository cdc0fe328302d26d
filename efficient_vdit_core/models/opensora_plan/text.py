"""The mT5 text encoder of Open-Sora-Plan v1.2, by transformers, with its sentencepiece tokenizer.

A text encoder is a safetensors file (or a folder with one) under Hugging Face's T5 names. The tokenizer is the uint8
tensor ``spiece_model`` inside the file, or spiece.model beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...limits.documents import parse_json, read_text
from ...limits.numbers import number, whole
from ...limits.quote import named, quoted
from ...limits.texts import checked_prompt
from ...storage.weight_files import read_state_dict
from .captions import NEGATIVE_PROMPT, TEMPLATES, clean_caption
from .weights import check_weights

__all__ = ["NEGATIVE_PROMPT", "TEMPLATES", "TextEncoder", "clean_caption", "read_text_encoder"]

log = logging.getLogger("efficient_vdit")

MAX_TOKENS = 512
SPIECE_KEY = "spiece_model"
MT5_XXL: dict[str, Any] = {
    "model_type": "mt5", "vocab_size": 250112, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "is_encoder_decoder": False,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0,
    "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


_MOST = {
    "vocab_size": 2**22,
    "num_layers": 256,
    "num_heads": 1024,
    "d_kv": 4096,
    "relative_attention_num_buckets": 4096,
}


def read_text_encoder(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Encoder weights, mT5 configuration and sentencepiece model (uint8) of a file or folder.

    Raises ValueError where it is no mT5 encoder, or where the tokenizer is missing.
    """
    path = Path(path)
    state_dict, metadata = read_state_dict(path)
    folder = path if path.is_dir() else path.parent
    config = _checked_config(_config_values(metadata, folder / "config.json"), named(path.name))
    spiece = state_dict.pop(SPIECE_KEY, None)
    weights = {name: value for name, value in state_dict.items() if not name.startswith(("decoder.", "lm_head."))}
    _check(weights, config, named(path.name))  # before the tokenizer, which another encoder need not bring
    if spiece is None:
        beside = folder / "spiece.model"
        if not beside.is_file():
            raise ValueError(
                f"{named(path.name)} has no tokenizer: expected a tensor {SPIECE_KEY} inside, or spiece.model beside it. "
                "Copy spiece.model of google/mt5-xxl there, or convert with 'evdit convert text-encoder'."
            )
        spiece = torch.frombuffer(bytearray(beside.read_bytes() or b"\n"), dtype=torch.uint8)
    _processor(spiece, named(path.name))
    check_weights(weights, path.name)
    return weights, config, spiece


def pad_rows(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token rows as ids and mask, each (B, L): padded with 0 to the longest row."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


class TextEncoder:
    """Prompts in, text states out. ``model`` is transformers' MT5EncoderModel."""

    def __init__(self, model: nn.Module, spiece: Tensor) -> None:
        self.model = model
        self.processor = _processor(spiece, "the text encoder")
        self._warned = False

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype | None = None, device: Any = "cpu") -> TextEncoder:
        """Load a folder or file; ``dtype`` None keeps the file's. In place of float16, in which mT5's feed-forward layers
        overflow, and of 8 bits, in which nothing is computed, it is bfloat16."""
        from transformers import MT5Config, MT5EncoderModel

        weights, config, spiece = read_text_encoder(path)
        dtype = dtype or weights["shared.weight"].dtype
        if dtype.itemsize == 1 or dtype == torch.float16:
            dtype = torch.bfloat16
        with torch.device("meta"):
            model = MT5EncoderModel(MT5Config(**config))
        cast = {name: value.to(device=device, dtype=dtype) for name, value in weights.items()}
        # transformers lists the shared embedding twice.
        cast["encoder.embed_tokens.weight"] = cast["shared.weight"]
        try:
            model.load_state_dict(cast, assign=True)
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise ValueError(
                f"{named(Path(path).name)} is not the encoder that its configuration describes: {named(lines[-1].strip(), 150)} "
                "Keep its config.json beside it, or download both again."
            ) from error
        return cls(model.eval().requires_grad_(False), spiece)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L): each prompt ends with the end token 1, is padded with 0, and has at most 512 tokens."""
        rows = []
        for prompt in map(checked_prompt, prompts):
            ids = self.processor.encode(prompt)
            if len(ids) >= MAX_TOKENS:
                self._warn_about_length(len(ids) + 1)
            rows.append([*ids[: MAX_TOKENS - 1], 1])
        return pad_rows(rows)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text states (B, L, C) and their mask (B, L), L the longest prompt's tokens. Padding is to be masked, not
        read."""
        if not prompts:
            raise ValueError("There are no prompts to encode, expected at least one (it may be empty).")
        device = next(self.model.parameters()).device
        ids, mask = (x.to(device) for x in self.tokenize(prompts))
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _warn_about_length(self, tokens: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning("The prompt has %d tokens, the model reads %d: the end of it is cut off.", tokens, MAX_TOKENS)


def _processor(spiece: Tensor, name: str) -> Any:
    """sentencepiece's tokenizer of a model file's bytes."""
    from sentencepiece import SentencePieceProcessor

    try:
        # An empty one would be taken for none, and every prompt be refused later.
        found = SentencePieceProcessor(model_proto=_bytes(spiece) or b"\n")
        if found.vocab_size() < 1:
            raise RuntimeError("no pieces")
        return found
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The tokenizer of {name} cannot be read: its spiece.model is damaged, or only the pointer that git leaves in its place. "
            "Download spiece.model of google/mt5-xxl (4.3 MB) again."
        ) from error


def _bytes(spiece: Tensor) -> bytes:
    if spiece.dtype != torch.uint8:
        raise TypeError(f"{spiece.dtype} is no tensor of bytes")
    return spiece.cpu().numpy().tobytes()


def _config_values(metadata: dict[str, str], beside: Path) -> dict[str, Any]:
    text = metadata.get("config") or (read_text(beside, "The configuration") if beside.is_file() else "{}")
    values = parse_json(text, "The configuration of the text encoder", advice="Download it again.")
    # A folder that collects many models' files may hold a config.json of something else.
    return values if isinstance(values, dict) and values.get("model_type") in ("mt5", "t5") else {}


def _checked_config(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of an mT5 encoder, those that ``values`` leaves out as in mT5-xxl. Unknown ones change nothing here.

    Raises ValueError for a value of another kind or out of range, before a network of that size is built.
    """
    config = {key: values.get(key, default) for key, default in MT5_XXL.items()}
    for key, default in MT5_XXL.items():
        what = f"The configuration of {name} cannot be used: {key}"
        if isinstance(default, str):
            choices = {"model_type": ("mt5", "t5")}.get(key, (default,))
            if config[key] not in choices:
                raise ValueError(
                    f"{what} is {quoted(config[key])}, expected {' or '.join(choices)}. Choose an mT5 encoder."
                )
        elif isinstance(default, bool):
            if config[key] not in (True, False):
                raise ValueError(f"{what} is {quoted(config[key])}, expected true or false. Download it again.")
        elif isinstance(default, float):
            number(config[key], what, 0, 1, why="Download it again.")
        else:
            whole(config[key], what, 0 if key.endswith("token_id") else 1, _MOST.get(key, 65_536), "Download it again.")
    return config


def _check(weights: dict[str, Tensor], config: dict[str, Any], name: str) -> None:
    tied = weights.pop("encoder.embed_tokens.weight", None)
    if tied is not None:  # the same tensor under a second name, which some tools keep in place of the first
        weights.setdefault("shared.weight", tied)
    embedding = weights.get("shared.weight")
    if embedding is None or "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in weights:
        raise ValueError(
            f"{name} is not an mT5 encoder: it has no shared.weight or no gated feed-forward layers. "
            "Choose google/mt5-xxl, converted with 'evdit convert text-encoder'."
        )
    wanted = (config["vocab_size"], config["d_model"])
    if tuple(embedding.shape) != wanted:
        raise ValueError(
            f"{name} has an embedding of {tuple(embedding.shape)}, expected {wanted} as its configuration says. "
            "It is another text encoder than mT5-xxl; keep its config.json beside it, or choose the right file."
        )
    depth = len({key.split(".")[2] for key in weights if key.startswith("encoder.block.")})
    if depth != config["num_layers"]:
        raise ValueError(
            f"{name} is not the encoder that its configuration describes: {depth} layers, not {config['num_layers']}. "
            "Keep its config.json beside it, or download both again."
        )
    missing = sorted(_names(depth) - weights.keys())
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of the encoder's tensors, such as {named(missing[0])}: it is one part of several, or "
            "damaged. Use the whole encoder in one file, or safetensors with their index beside them."
        )


def _names(layers: int) -> set[str]:
    """What the tensors of an encoder with gated feed-forward layers are called."""
    attention = [f"0.SelfAttention.{part}" for part in "qkvo"]
    parts = [
        *attention,
        "0.layer_norm",
        *(f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
        "1.layer_norm",
    ]
    names = {f"encoder.block.{i}.layer.{part}.weight" for i in range(layers) for part in parts}
    position = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {"shared.weight", "encoder.final_layer_norm.weight", position, *names}
