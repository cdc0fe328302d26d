"""Makes the tiny mT5: a sentencepiece model of the captions, and an encoder that learns what they say.

The encoder is taught to tell every attribute from every one of its output tokens, so that the transformer's
cross-attention finds the whole caption wherever it looks.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.opensora_plan.text import pad_rows
from ...training import TrainingRun
from ..worlds import MOVING, World
from .vae import numpy_rng

WIDTH = 64
_EXTRA_TEXT = "the one big small blurry low quality worst video of clip frames shows with and is in at to from static"


def train_sentencepiece(world: World = MOVING, seed: int = 0) -> bytes:
    """Of the captions of ``world``: a sentencepiece model (pad 0, end 1, unknown 2 as in mT5) that spells unknown words byte by byte."""
    import sentencepiece

    rng = numpy_rng(torch.Generator().manual_seed(seed))
    lines = [world.random_words(rng).caption(i) for i in range(3000)] + [_EXTRA_TEXT] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def encoder_config(vocab_size: int) -> dict[str, Any]:
    """The mT5 config of the tiny encoder, in transformers' terms."""
    return {
        "model_type": "mt5", "architectures": ["MT5EncoderModel"], "vocab_size": vocab_size, "d_model": WIDTH, "d_kv": 16,
        "d_ff": 128, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
        "is_gated_act": True, "is_encoder_decoder": False, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


class Captions:
    """Turns captions into padded ids and masks."""

    def __init__(self, spiece: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)

    def ids(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, each (B, L), an end token after each caption, 0 as padding."""
        return pad_rows([[*self.processor.encode(c), 1] for c in captions])


def train_text_encoder(
    folder: Path,
    spiece: bytes,
    *,
    world: World = MOVING,
    steps: int = 1500,
    batch: int = 64,
    seed: int = 0,
    device: str = "cpu",
) -> nn.Module:
    """Train (or resume) in ``folder`` on captions of ``world``; returns transformers' MT5EncoderModel, on the CPU."""
    from transformers import MT5Config, MT5EncoderModel

    torch.manual_seed(seed)
    captions = Captions(spiece)
    encoder = MT5EncoderModel(MT5Config(**encoder_config(captions.processor.get_piece_size())))
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in world.vocabulary.items()})
    both = nn.ModuleList([encoder, heads]).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    run = TrainingRun(both, [optimizer], folder=folder, steps=steps, seed=seed, ema_decay=0.99)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = numpy_rng(generator)
        scenes = [world.trained_on(world.random_words, rng) for _ in range(batch)]
        ids, mask = (x.to(device) for x in captions.ids([s.caption(int(rng.integers(3))) for s in scenes]))
        named = [world.named(s) for s in scenes]
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        losses = []
        for name, values in world.vocabulary.items():
            target = torch.tensor([values.index(n[name]) for n in named], device=device)[:, None].expand_as(ids)
            loss = F.cross_entropy(heads[name](states).transpose(1, 2), target, reduction="none")
            losses.append((loss * mask).sum() / mask.sum())
        return torch.stack(losses).mean()

    both.load_state_dict(run.train(loss_of))
    return encoder.cpu().eval()
