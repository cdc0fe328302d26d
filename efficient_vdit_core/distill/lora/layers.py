"""Low-rank adapters on a model's linear layers: y = W x + sum of (alpha / rank) up(down(x))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = r"\.(to_[qkv]|to_out\.0|proj|net\.0\.proj|net\.2)$"  # attention and feed-forward of transformer blocks
STUDENT, FAKE = "lora", "fake"  # the names of what learns
FROZEN = "frozen"


class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank parts in float32. Those that it wears are frozen too and always count; of those
    that learn, the one that is named in ``learner``, or none."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scales: dict[str, float] = {}
        self.frozen: tuple[str, ...] = ()
        self.learner: str | None = None

    def learn(self, name: str, rank: int, alpha: float) -> None:
        """Add a part that learns; at the start it changes nothing."""
        factory = {"device": self.base.weight.device, "dtype": torch.float32}
        down = nn.Parameter(torch.empty(rank, self.base.in_features, **factory))
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self._add(name, down, nn.Parameter(torch.zeros(self.base.out_features, rank, **factory)), alpha / rank)
        self.learner = self.learner or name

    def attach_frozen(self, down: Tensor, up: Tensor, scale: float) -> None:
        """Add a frozen part, down (rank, in) and up (out, rank)."""
        name = f"{FROZEN}{len(self.frozen)}"
        parts = (value.to(self.base.weight.device, torch.float32) for value in (down, up))
        self._add(name, *(nn.Parameter(value, requires_grad=False) for value in parts), scale=scale)
        self.frozen += (name,)

    def _add(self, name: str, down: nn.Parameter, up: nn.Parameter, scale: float) -> None:
        self.register_parameter(f"{name}_down", down)
        self.register_parameter(f"{name}_up", up)
        self.scales[name] = scale

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """down and up."""
        return self.get_parameter(f"{name}_down"), self.get_parameter(f"{name}_up")

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for name in (*self.frozen, *([self.learner] if self.learner else [])):
            down, up = self.part(name)
            # In the input's precision: a copy of it in float32 would be kept for the gradient in every layer.
            low = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
            out = out + (self.scales[name] * low).to(out.dtype)
        return out


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str = TARGETS,
    learners: tuple[str, ...] = (STUDENT,),
) -> list[str]:
    """Freeze ``module`` and put ``learners`` on the linear layers whose names match, of which the first counts; returns
    these names.

    Raises ValueError where no layer matches.
    """
    if rank < 1:
        raise ValueError(f"The LoRA's rank is {rank}, expected at least 1. Correct lora_rank.")
    names = [
        n for n, m in module.named_modules() if isinstance(m, nn.Linear | LoRALinear) and re.search(targets, "." + n)
    ]
    if not names:
        raise ValueError(
            f"No linear layer of {type(module).__name__} matches the LoRA targets {targets!r}. Correct them."
        )
    module.requires_grad_(False)
    for name in names:
        for learner in learners:
            adaptable(module, name).learn(learner, rank, float(alpha or rank))
    return names


def adaptable(module: nn.Module, name: str) -> LoRALinear:
    """The layer of this name, made one that takes adapters where it is none yet."""
    layer = module.get_submodule(name)
    if isinstance(layer, LoRALinear):
        return layer
    parent, _, last = name.rpartition(".")
    wrapped = LoRALinear(layer)  # pyright: ignore[reportArgumentType]
    module.get_submodule(parent).register_module(last, wrapped)
    return wrapped


def adapted(module: nn.Module, part: str = STUDENT) -> dict[str, LoRALinear]:
    """The layers that have this part, by name; others may wear what is frozen alone."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear) and part in m.scales}


def belongs_to(learner: str, weight: str) -> bool:
    """Whether the weight of this name belongs to the learner."""
    return weight.rpartition(".")[2] in (f"{learner}_down", f"{learner}_up")


def set_active(module: nn.Module, learner: str | None) -> None:
    """From now on this learner counts, or none."""
    for layer in adapted(module).values():
        layer.learner = learner


@contextmanager
def active_adapter(module: nn.Module, learner: str | None) -> Iterator[None]:
    """Within it this learner counts, or none; then the one that did before."""
    before = next(layer.learner for layer in adapted(module).values())
    set_active(module, learner)
    try:
        yield
    finally:
        set_active(module, before)


def lora_off(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the module is the one that the LoRA was put on, with all that it wears."""
    return active_adapter(module, None)
