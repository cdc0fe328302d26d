"""One training run in one folder: optimiser steps, checkpoints that survive, exact resume, clean stops, progress.

With an ``accelerator`` (Hugging Face accelerate, started by `accelerate launch`) the same run spreads over processes
and GPUs, weights staying in float32 under bf16 autocast; without one it is a plain loop on the model's own device.
Under FSDP2 weights, average and optimiser state live sharded, and the checkpoint is the same as that of any other run.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..storage.saving_times import SavingTimes
from .average import WeightAverage
from .checkpoint import read_checkpoint, write_checkpoint
from .fsdp import cut, cut_optimizer, gathered, is_sharding, run_in_autocast
from .guard import Guard, NotANumber
from .lost_process import is_lost_process
from .pace import Pace
from .processes import Processes
from .stop_request import StopRequest, stop_request


@dataclass
class StepLoss:
    """The loss that is descended, and named ``parts`` of it for the log; a part that this batch lacks is left out.

    ``release`` is called once the gradient has been taken. Where networks learn in turn, ``optimizers`` are those that
    take the step, and ``averaged`` is the number of the step among those that the average takes in, 0 for none of them.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None
    optimizers: range | None = None
    averaged: int | None = None


CHECKPOINT = "checkpoint.pt"
SAVE_EVERY = 900.0  # seconds; steps of a large model take minutes each
LossOf = Callable[[torch.Generator], Tensor | StepLoss]


class TrainingRun:
    """Trains ``model`` for ``steps`` steps of ``loss_of(generator)`` and keeps its state in ``folder``.

    ``loss_of`` draws everything random from the generator it is given, so that a resumed run repeats the
    uninterrupted one bit for bit. An exponential moving average of the trained weights (``ema``) is what gets exported;
    frozen parameters are neither averaged nor saved.

    Args:
        steps: optimiser steps in all; the rate warms up over ``warmup`` of them (0: not at all), then
            falls as a cosine to ``final_rate`` of it.
        accumulate: calls of ``loss_of`` whose gradients make one step.
        clip: largest norm of the gradient.
        accelerator: accelerate's Accelerator; ``run.model`` is then the prepared model.
        alike: how many processes, one behind another, draw the same random numbers.
        host_average: keep the average in the host's memory; not for weights that are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        folder: Path,
        steps: int,
        seed: int,
        ema_decay: float = 0.999,
        warmup: int = 100,
        final_rate: float = 0.02,
        accumulate: int = 1,
        clip: float = 1.0,
        tensorboard: bool = False,
        accelerator: Any = None,
        alike: int = 1,
        host_average: bool = False,
    ) -> None:
        self.bare, self.steps, self.warmup, self.final_rate = model, steps, warmup, final_rate
        self.folder, self.accumulate, self.clip, self.accelerator = folder, accumulate, clip, accelerator
        self.rank, self.processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.sharded = is_sharding(accelerator)
        if self.sharded and accelerator.mixed_precision == "bf16":
            run_in_autocast(model, accelerator.device.type, torch.bfloat16)
        prepared = accelerator.prepare(model, *optimizers) if accelerator else (model, *optimizers)
        self.model: nn.Module = prepared[0]
        self.optimizers: list[Any] = list(prepared[1:])
        self.average = WeightAverage(self._trained(), ema_decay, on_host=host_average)
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.generator = torch.Generator().manual_seed(seed_of(seed, self.rank // alike))
        self.step = 0
        self._half_made = False  # while weights are changing: neither the state before a step nor the one after it
        self._all = Processes(accelerator)
        self.saving_times = SavingTimes(SAVE_EVERY)
        # Nothing that it keeps may lead back to this run: a cycle would hold the networks until Python looks for cycles.
        self.guard = Guard(folder / CHECKPOINT, self._all, steps)
        self.means: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = _tensorboard(folder) if tensorboard and self.rank == 0 else None
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    @property
    def ema(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's names; sharded where the model is."""
        return self.average.state

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with nothing sharded. Called by every process; process 0 alone gets what was."""
        return gathered(state, keep=self.rank == 0) if self.sharded else state

    def train(
        self,
        loss_of: LossOf,
        *,
        save_every: int = 500,
        evaluate: Callable[[dict[str, Tensor]], str] | None = None,
        evaluate_every: int = 1000,
    ) -> dict[str, Tensor]:
        """Run to the end (or on from the last checkpoint) and return the averaged weights.

        The state is saved after ``save_every`` steps, and after a quarter of an hour. SIGTERM, Ctrl-C and a terminal that
        closes end the step, save and leave (SystemExit, KeyboardInterrupt). A loss or gradient that is no number raises
        ValueError before it reaches the weights, and the last whole step is saved; so it is whatever else ends a run of one
        process. A loss that rises and stays up raises ValueError too (`divergence`), also where it is up at the end;
        meanwhile nothing is saved over the state before.
        ``evaluate`` is called by process 0; by every process where the weights are sharded, since no one has them
        whole.
        """
        from tqdm import tqdm

        pace = Pace(self.steps, self.step, self.processes)
        with (
            self._together(),
            stop_request() as asked,
            tqdm(
                total=self.steps, initial=self.step, desc=self.folder.name, mininterval=5.0, disable=self.rank > 0
            ) as bar,
        ):
            while self.step < self.steps:
                with self._kept():
                    self._one_step(loss_of)
                self.guard.divergence(self.step)  # here, where nothing is saved on the way out
                leave, due = self._all.any_of_each(asked.signal is not None, self.saving_times.due())
                if leave:  # before anything is written to a terminal that may be gone
                    self._leave(asked)
                if due or self.step % save_every == 0:
                    self.save()
                with self._kept():
                    bar.update()
                    if (told := pace.after_step()) and self.rank == 0:
                        bar.write(told, file=sys.stderr)
                    bar.set_postfix_str(f"loss {self.means['loss']:.4f}", refresh=False)
                    self._log()
                if evaluate and self.step % evaluate_every == 0 and (self.sharded or self.rank == 0):
                    with self._kept():
                        found = evaluate(self.ema)
                    if self.rank == 0:
                        bar.write(f"step {self.step}: {self.describe()} {found}")
        self.guard.end(self.step)
        self.save()
        return self.ema

    def describe(self) -> str:
        """The running means of the loss and of its parts."""
        return ", ".join(f"{name} {value:.4f}" for name, value in sorted(self.means.items()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model holds the average; its own weights come back afterwards. Until they are back, nothing is saved."""
        own = {name: value.detach().clone() for name, value in self.bare.state_dict().items() if name in self.ema}
        self._half_made = True
        try:
            self.bare.load_state_dict(self.ema, strict=False)
            yield
        finally:
            self.bare.load_state_dict(own, strict=False)
            self._half_made = False

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Where the block fails, what is saved is the state before it, its random numbers included. In the middle of an
        optimiser's step that state is gone, and the last checkpoint stays."""
        before = self.generator.get_state()
        try:
            yield
        except BaseException as error:
            self.generator.set_state(before)
            # Saving needs all processes, and the others may be in another place.
            if not self._half_made and (self.processes == 1 or isinstance(error, NotANumber)):
                self.save()
            raise

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Where another process is gone, this one ends with a sentence."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            kept = f"{self.checkpoint} keeps the last state" if self.checkpoint.exists() else "Nothing was saved yet"
            raise ValueError(
                f"Another process of this training ended after step {self.step}, and none goes on without it: its own last "
                f"words say why. {kept}; the same command goes on from there."
            ) from error

    def _one_step(self, loss_of: LossOf) -> None:
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        seen: dict[str, list[float]] = {}
        turn, averaged = range(len(self.optimizers)), None
        for _ in range(self.accumulate):
            result = loss_of(self.generator)
            loss = result if isinstance(result, StepLoss) else StepLoss(result)
            values = {"loss": loss.total, **loss.parts}
            numbers = dict(
                zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist(), strict=True)
            )
            self.guard.numbers(numbers, self.step + 1)
            (loss.total / self.accumulate).backward()
            loss.release()
            turn, averaged = turn if loss.optimizers is None else loss.optimizers, loss.averaged
            for name, number in numbers.items():
                seen.setdefault(name, []).append(number)
        norm = self._clipped()
        self.guard.numbers({"gradient's norm": norm}, self.step + 1)
        self._half_made = True
        for index in turn:
            self.optimizers[index].step()
        trained = (_local(p).detach() for p in self.bare.parameters() if p.requires_grad)
        self.guard.weights(trained, self.step + 1)
        self.step += 1
        if averaged != 0:
            self.average.update(self._trained(), self.step if averaged is None else averaged)
        self._half_made = False
        values = {name: sum(numbers) / len(numbers) for name, numbers in seen.items()}
        self.guard.watch.add(values["loss"], {name: value for name, value in values.items() if name != "loss"})
        for name, value in {**values, "gradient": norm}.items():
            self.means[name] = 0.98 * self.means[name] + 0.02 * value if name in self.means else value

    def _clipped(self) -> float:
        """Shorten the gradient to ``clip``; returns the norm that it had."""
        norm = nn.utils.clip_grad_norm_(self.bare.parameters(), self.clip)
        return float(norm.full_tensor() if self.sharded else norm)  # pyright: ignore[reportAttributeAccessIssue]

    def _set_rates(self) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        rate = min(1.0, (self.step + 1) / max(1, self.warmup)) * (self.final_rate + (1 - self.final_rate) * cosine)
        for optimizer, bases in zip(self.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * rate

    def _leave(self, asked: StopRequest) -> None:
        self.save()
        if asked.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (asked.signal or signal.SIGTERM))

    def _log(self) -> None:
        if self.writer and self.step % 20 == 0:
            for name, value in self.means.items():
                self.writer.add_scalar(name, value, self.step)

    def _trained(self) -> dict[str, Tensor]:
        """The state dict without frozen parameters."""
        frozen = {name for name, p in self.bare.named_parameters() if not p.requires_grad}
        return {name: value for name, value in self.bare.state_dict().items() if name not in frozen}

    def save(self) -> None:
        """Write the whole state to a temporary file, then move it over the previous one. Called by every process.

        A state that may be a diverging run's is not put in the place of one that is not.
        """
        if self.guard.rising and self.checkpoint.exists():
            return
        with self.saving_times.saving():
            state = self.whole({
                "model": self._trained(),
                "ema": self.ema,
                "optimizers": [o.state_dict() for o in self.optimizers],
                "generator": self._all.gather(self.generator.get_state()),
                "watch": self.guard.state(),
                "step": self.step,
            })  # fmt: skip
            if self.rank == 0:
                write_checkpoint(self.checkpoint, state)

    def _load(self) -> None:
        own = self.generator.get_state().numel()
        # Sharded processes need a part of each tensor only.
        state = read_checkpoint(
            self.checkpoint, self.ema.keys(), processes=self.processes, random=own, mmap=self.sharded
        )
        if self.sharded:
            state["model"], state["ema"] = (
                {n: cut(v, self.ema[n]) for n, v in state[part].items()} for part in ("model", "ema")
            )
            state["optimizers"] = [
                cut_optimizer(s, o) for s, o in zip(state["optimizers"], self.optimizers, strict=True)
            ]
        try:
            self.bare.load_state_dict(state["model"], strict=False)
            for name, value in state["ema"].items():
                self.ema[name].copy_(value)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.generator.set_state(self._all.local(state["generator"]))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.checkpoint} holds weights, an optimiser or random numbers of another shape than this run's. "
                "Delete it to train anew."
            ) from error
        self.guard.restore(state.get("watch"))
        self.step = state["step"]


def seed_of(seed: int, share: int) -> int:
    """What the processes of one ``share`` of the batch draw from; the first as a run of one process does. Sums would not do:
    the second process of a run would draw as the first of the next seed's."""
    return seed if share == 0 else int(np.random.SeedSequence([seed, share]).generate_state(1)[0])


def _local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value  # pyright: ignore[reportAttributeAccessIssue]


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder))
