"""The optimisers that a configuration can name."""

from __future__ import annotations

import torch
from torch import nn

from .config import TrainingConfig

OPTIMIZERS = ("adamw", "adamw8bit", "muon")


def make_optimizers(module: nn.Module, config: TrainingConfig, *, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """adamw; adamw8bit, of bitsandbytes; muon, for the blocks' matrices, with adamw for the rest. Frozen weights are left out.

    Raises ValueError where one is unknown, missing, or cannot work on ``sharded`` weights.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(trained.values(), **settings)]
    if config.optimizer == "adamw8bit":
        if sharded:
            raise ValueError("training.optimizer is adamw8bit, whose kernels do not know FSDP2's sharded weights. Choose adamw.")
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("training.optimizer adamw8bit needs the package 'bitsandbytes'. Install it, or choose adamw.") from error
        return [AdamW8bit(trained.values(), **settings)]
    if config.optimizer == "muon":
        matrices = {name: p for name, p in trained.items() if "blocks." in name and p.ndim == 2 and min(p.shape) > 6}
        rest = [p for name, p in trained.items() if name not in matrices]
        muon = torch.optim.Muon(list(matrices.values()), lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95,
                                adjust_lr_fn="match_rms_adamw")  # fmt: skip
        return [muon, torch.optim.AdamW(rest, **settings)] if rest else [muon]
    raise ValueError(f"training.optimizer is {config.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}. Correct the configuration.")
