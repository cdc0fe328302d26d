"""The optimisers that a configuration can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...limits.packages import install
from ...training.muon import MUON_ABOVE, is_for_muon, muon_and_adamw
from ..config import DistillConfig, TrainingConfig


def make_optimizers(trained: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """adamw; adamw8bit, of bitsandbytes; muon, for the blocks' matrices, with adamw for the rest."""
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(trained.values(), **settings)]
    if config.optimizer == "adamw8bit":
        return [_adamw8bit()(trained.values(), **settings)]
    matrices = [p for name, p in trained.items() if "blocks." in name and is_for_muon(p)]
    rate, decay = config.learning_rate, config.weight_decay
    return muon_and_adamw(matrices, trained.values(), rates=(rate, rate), decays=(decay, decay))


def check_optimizer(config: DistillConfig, *, sharded: bool = False) -> None:
    """Raises ValueError where the optimiser cannot work on ``sharded`` weights, finds none that suit it, or its package is
    missing."""
    optimizer, wanted = config.training.optimizer, config.model
    if optimizer == "muon" and wanted.train == "lora" and wanted.lora_rank <= MUON_ABOVE:
        raise ValueError(
            f"training.optimizer is muon, which takes matrices of more than {MUON_ABOVE} rows and columns, but those of a LoRA of "
            f"rank {wanted.lora_rank} have fewer. Choose adamw, or a model.lora_rank above {MUON_ABOVE}."
        )
    if optimizer == "adamw8bit":
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
            f"training.optimizer adamw8bit needs the package 'bitsandbytes'. {install('bitsandbytes', instead='Choose adamw')}"
        ) from error
    return AdamW8bit
