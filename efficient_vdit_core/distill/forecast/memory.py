"""What a training will hold on its GPU, found before it starts: one step of it on the meta device, where tensors have
shapes and no memory, with every live byte counted.

Counted is what tensors take; an allocator's slack, 5 to 10 % on GPUs, is not. Attention keeps q, k, v and its output, as
fused kernels do; sparse plans are counted as dense. Under bf16 autocast all activations count as bf16. Of processes that
share out a clip, it is the one with most frames, its exchanges counted as Ulysses'.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...training.live_bytes import LiveBytes, size_of
from ..config import DistillConfig, TrainingConfig, learns_on_ways
from ..families.cpu_offload import bytes_on_host, largest_block
from ..families.model import FamilyModel
from ..families.open_model import open_model
from ..lora.layers import STUDENT, adaptable
from ..objectives.features import LayerLosses, relative_square
from ..runs.alternating import add_learners
from ..runs.sequence_parallel import largest_share

META = torch.device("meta")
opened = lru_cache(maxsize=32)(open_model)  # a forecast asks dozens of times, and some adapters look at every weight
STATES = {"adamw": 8, "adamw8bit": 2, "muon": 4}  # bytes of optimiser state for each trained number
SHARED = ("weights", "teacher", "gradients", "optimiser", "average")  # what FSDP2 shares out


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for, on each GPU.

    ``held`` adds up to the peak of a training step; ``before`` are the weights of the parts that run and leave before
    it starts; ``host`` is the host's memory for the teacher's features and for weights that stay there.
    """

    held: dict[str, int]
    before: dict[str, int]
    host: int

    def step(self, gpus: int = 1) -> int:
        """The peak of a step on each GPU; several share the weights by FSDP2, whose block that is whole for a moment is
        not counted."""
        return sum(size // gpus if name in SHARED else size for name, size in self.held.items())

    def peak(self, gpus: int = 1) -> int:
        """Of the whole training on each GPU."""
        return max(self.step(gpus), *self.before.values(), 0)


def plan_memory(stage: DistillConfig, frozen: int = 0) -> MemoryPlan:
    """The memory of one stage's training, with captions as long as the model takes them. ``frozen``: how many LoRAs of earlier
    stages, which do not exist yet, it will have beside its weights."""
    model, t = opened(stage.model), stage.training
    student = meta_student(stage, model, frozen)
    trained = [p for p in student.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    gradients, weights = size_of(trained), size_of([*student.parameters(), *student.buffers()])
    moving, host = _one_step(_asked_of_a_step(stage), frozen)
    host += bytes_on_host(student) + gradients * t.host_average + weights * stage.model.host_teacher
    if t.optimizer == "adamw":  # its step takes a root of every second moment at once
        moving = max(moving, gradients + 4 * numbers)
    held = {
        "weights": weights,
        "teacher": _teacher(stage, student, weights),
        "gradients": gradients,
        "optimiser": STATES[t.optimizer] * numbers,
        "average": 0 if t.host_average else gradients,
        "activations": max(0, moving - gradients),
    }
    kinds = {"text encoder": 2}  # bytes of each number; VAEs are read in float32
    before = {name: kinds.get(name, 4) * count_numbers(path) for name, path in model.parts.items()}
    return MemoryPlan(held, before, host)


def _teacher(stage: DistillConfig, student: nn.Module, weights: int) -> int:
    if stage.model.train == "lora" or learns_on_ways(stage):  # it is the model without its LoRA, or not there
        return 0
    return largest_block(student) if stage.model.host_teacher else weights


def meta_student(stage: DistillConfig, model: FamilyModel, frozen: int = 0) -> nn.Module:
    """The student of a stage on the meta device; ``frozen`` as of `plan_memory`."""
    student = model.skeleton().requires_grad_(True)
    if stage.model.train == "lora":
        for name in add_learners(student, stage):
            layer = adaptable(student, name)
            down, up = layer.part(STUDENT)
            for _ in range(frozen):
                layer.attach_frozen(torch.empty_like(down), torch.empty_like(up), 1.0)
    if stage.model.gradient_checkpointing:
        model.checkpoint_blocks(student)
    return student


@lru_cache(maxsize=64)
def _one_step(stage: DistillConfig, frozen: int) -> tuple[int, int]:
    """Most bytes of activations and gradients that live at once, and the bytes of the features on the host."""
    t, model = stage.training, opened(stage.model)
    student = meta_student(stage, model, frozen)
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = size_of(trained)
    if t.precision == "bf16":
        model = opened(replace(stage.model, dtype="bfloat16"))
        nn.Module.to(student, torch.bfloat16)  # diffusers' own warns of what no forecast needs
    inputs = meta_inputs(stage, model, t.batch)
    if t.sequence_parallel > 1:  # activations are those of the frames that a process is given
        first, last = largest_share(stage, model).frames
        inputs = (inputs[0][:, :, first:last], *inputs[1:])
    layers = _Weightless()
    with LiveBytes() as counter:
        if t.accumulate > 1:  # from the second batch on, gradients stand beside activations
            for p in trained:
                p.grad = torch.empty_like(p)
        _backward(stage, model, student, layers, *inputs)
    return counter.peak + gradients - size_of(trained), layers.host


def _asked_of_a_step(stage: DistillConfig) -> DistillConfig:
    """``stage`` without what a step's activations do not depend on: much of the advice differs in that alone."""
    t = stage.training
    training = TrainingConfig(
        batch=t.batch, accumulate=min(t.accumulate, 2), precision=t.precision, sequence_parallel=t.sequence_parallel
    )
    return replace(stage, model=replace(stage.model, host_teacher=False), training=training)


def meta_inputs(stage: DistillConfig, model: FamilyModel, batch: int) -> tuple[Tensor, Tensor, Any]:
    """z, time and condition of ``batch`` examples, captions as long as the model takes them."""
    data = stage.data
    z = torch.randn(batch, *model.latent_shape(model.size(data.frames, data.height, data.width)), device=META)
    condition = (torch.empty(batch, *model.text_size, device=META), None)
    return z, torch.zeros(batch, device=META), condition


def _backward(
    stage: DistillConfig,
    model: FamilyModel,
    student: nn.Module,
    layers: _Weightless,
    z: Tensor,
    time: Tensor,
    condition: Any,
) -> None:
    options = model.options_with(FusedAttention(exchanging=stage.training.sequence_parallel > 1))
    objective = stage.objective
    names = [name for name in ("attention", "mlp") if getattr(objective, name, 0.0)]
    wanted = torch.empty_like(z, dtype=torch.float32)  # the teacher's forward never holds more than the student's
    with ExitStack() as listening:
        listening.enter_context(model.tap(student).open(layers.compare, names))
        # The student's turn of score distillation asks it twice, once for each loss.
        outs = [
            model.predict(student, z, time, condition, options(z)).float() for _ in range(1 + (stage.method == "score"))
        ]
        total = sum(relative_square(out, wanted) for out in outs) + sum(layers.mean(name) for name in names)
        total.backward()  # pyright: ignore[reportAttributeAccessIssue]
    layers.losses.clear()


class _Weightless(LayerLosses):
    """Compares with features that take no memory, and counts what they would take on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.host = 0
        self._seen: set[tuple[str, int]] = set()

    def compare(self, name: str, layer: int, feature: Tensor) -> None:
        self.waiting[name, layer] = torch.empty((), dtype=feature.dtype, device=META).expand(feature.shape)
        if (name, layer) not in self._seen:
            self._seen.add((name, layer))
            self.host += feature.numel() * feature.element_size()
        super().compare(name, layer, feature)


class _Fused(torch.autograd.Function):
    """What a fused kernel allocates and keeps: q, k, v, the output and one number a row."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, did: Callable[[float], None], travels: bool
    ) -> Tensor:
        did(4.0 * q.numel() * k.shape[-2])
        ctx.did, ctx.travels = did, travels and q.shape == k.shape
        _buffers(q, k, v) if ctx.travels else None
        out = torch.empty_like(q)
        rows = q.new_empty(q.shape[0], heads, q.numel() // q.shape[0] // q.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_ = ctx.saved_tensors
        ctx.did(10.0 * q.numel() * k.shape[-2])  # five products of the forward's two, one of them done again
        slopes = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _buffers(*slopes) if ctx.travels else None
        return *slopes, None, None, None


def _buffers(*tensors: Tensor) -> None:
    """What an exchange of these holds while it lasts: what is sent, what comes, and what is made of it."""
    _ = [torch.empty_like(x) for x in tensors for _ in range(3)]


class FusedAttention:
    """An attention override for the meta device, which allocates what fused kernels do. ``flops``: what they would have
    computed. Where processes share out a clip, ``exchanging`` their tokens takes memory too."""

    def __init__(self, *, exchanging: bool = False) -> None:
        self.flops, self.exchanging = 0.0, exchanging

    def __call__(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        return _Fused.apply(q, k, v, heads, self._did, self.exchanging)  # pyright: ignore[reportReturnType]

    def _did(self, flops: float) -> None:
        self.flops += flops


def gib(size: int) -> str:
    """Bytes as GiB: one digit, three where it is little."""
    return f"{size / 2**30:.{1 if size >= 2**28 else 3}f} GiB"


def count_numbers(path: Path) -> int:
    """How many numbers the safetensors files at ``path`` hold, read from their heads; 0 where there are none."""
    from safetensors import safe_open

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    total = 0
    for file in (f for f in files if f.suffix == ".safetensors"):
        with safe_open(str(file), framework="pt") as weights:
            total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
    return total
