"""The optimisers that a configuration can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig


def make_optimizers(trained: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """adamw; adamw8bit, of bitsandbytes; muon, for the blocks' matrices, with adamw for the rest."""
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(trained.values(), **settings)]
    if config.optimizer == "adamw8bit":
        return [_adamw8bit()(trained.values(), **settings)]
    matrices = {name: p for name, p in trained.items() if "blocks." in name and p.ndim == 2 and min(p.shape) > 6}
    rest = [p for name, p in trained.items() if name not in matrices]
    muon = torch.optim.Muon(list(matrices.values()), lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    return [muon, torch.optim.AdamW(rest, **settings)] if rest else [muon]


def check_optimizer(config: TrainingConfig, *, sharded: bool = False) -> None:
    """Raises ValueError where the optimiser cannot work on ``sharded`` weights, or its package is missing."""
    if config.optimizer == "adamw8bit":
        if sharded:
            raise ValueError(
                "training.optimizer is adamw8bit, whose kernels do not know FSDP2's sharded weights. Choose adamw."
            )
        _adamw8bit()


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "training.optimizer adamw8bit needs the package 'bitsandbytes'. Install it, or choose adamw."
        ) from error
    return AdamW8bit
