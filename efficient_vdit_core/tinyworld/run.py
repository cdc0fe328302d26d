"""One training run in one folder: seeds, optimiser steps, checkpoints that survive, exact resume, progress."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class TrainingRun:
    """Trains ``model`` for ``steps`` steps of ``loss_of(generator)`` and keeps its state in ``folder``.

    ``loss_of`` draws everything random from the generator it is given, so that a resumed run repeats the
    uninterrupted one. An exponential moving average of the weights (``ema``) is what gets exported.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, folder: Path, steps: int, seed: int,
                 ema_decay: float = 0.999, warmup: int = 100, tensorboard: bool = False) -> None:
        self.model, self.optimizers, self.steps, self.warmup = model, optimizers, steps, warmup
        self.folder, self.ema_decay = folder, ema_decay
        self.ema = {name: p.detach().clone() for name, p in model.state_dict().items()}
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.writer = _tensorboard(folder) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def train(self, loss_of: Callable[[torch.Generator], Tensor], *, save_every: int = 500,
              evaluate: Callable[[dict[str, Tensor]], str] | None = None, evaluate_every: int = 1000) -> dict[str, Tensor]:
        """Run to the end (or on from the last checkpoint) and return the averaged weights."""
        from tqdm import tqdm

        mean_loss = float("nan")
        with tqdm(total=self.steps, initial=self.step, desc=self.folder.name, mininterval=5.0) as bar:
            try:
                while self.step < self.steps:
                    loss = self._one_step(loss_of)
                    mean_loss = loss if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * loss
                    bar.update()
                    bar.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
                    if self.writer and self.step % 20 == 0:
                        self.writer.add_scalar("loss", mean_loss, self.step)
                    if self.step % save_every == 0:
                        self.save()
                    if evaluate and self.step % evaluate_every == 0:
                        bar.write(f"step {self.step}: loss {mean_loss:.4f} {evaluate(self.ema)}")
            finally:
                self.save()
        return self.ema

    def _one_step(self, loss_of: Callable[[torch.Generator], Tensor]) -> float:
        rate = min(1.0, (self.step + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        for optimizer, bases in zip(self.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * rate
        loss = loss_of(self.generator)
        if not loss.isfinite():
            # Before the weights are touched, so that what is saved next is the last good state.
            raise ValueError(
                f"The loss became {loss.item()} at step {self.step + 1}. {self.checkpoint} keeps the last good state; "
                "resume from it with a lower learning rate."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        # Averaging every fourth step costs a quarter and changes nothing that can be measured.
        if self.step % 4:
            return
        decay = min(self.ema_decay**4, self.step / (self.step + 40))
        state = self.model.state_dict()
        floating = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[n] for n in floating], [state[n] for n in floating], 1 - decay)

    def save(self) -> None:
        """Write the whole state to a temporary file, then move it over the previous one."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder))
