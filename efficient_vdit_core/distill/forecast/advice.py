"""What to change in a training that does not fit into its GPU, each change with what it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..config import DistillConfig, learns_on_ways
from ..families.model import can_share
from .memory import MemoryPlan, gib, opened, plan_memory

GPUS = (2, 4, 8, 16)
LEAST_RANK = 16
ROOM = 0.9  # share of a GPU that tensors may take; the rest is the driver's and the allocator's


def fits(plan: MemoryPlan, size: int, gpus: int = 1) -> bool:
    """Whether a training's tensors leave a GPU of ``size`` bytes some room."""
    return plan.peak(gpus) <= ROOM * size


def advice(stage: DistillConfig, size: int, frozen: int = 0, section: str = "training") -> Iterator[str]:
    """Changes and the peak that follows, each on top of those before it, until it fits; then how many GPUs would do
    without them, or what is left where nothing does. ``frozen`` as of `plan_memory`; ``section``: where its file has the training."""
    before = plan_memory(stage, frozen=frozen).before
    largest = max(before, key=lambda name: before[name])
    if before[largest] > ROOM * size:
        yield f"the {largest} alone takes {gib(before[largest])}: fill data.cache on a larger GPU, where it runs once"
        return
    helped = False
    for text, changed in _changes(stage, section):
        plan = plan_memory(changed, frozen=frozen)
        helped = fits(plan, size)
        yield f"{text}: {gib(plan.peak())}{', fits' if helped else ''}"
        if helped:
            break
    shared = plan_memory(_for_sharding(stage), frozen=frozen)
    gpus = next((n for n in GPUS if fits(shared, size, n)), 0)
    if gpus:
        yield f"or {gpus} GPUs under FSDP2 with gradient_checkpointing and adamw: {gib(shared.peak(gpus))} on each, fits"
    together = _sharing_clips(stage, size, frozen, section)
    if together:
        yield together
    if not (gpus or helped or together):
        activations = gib(shared.held["activations"])
        yield f"activations alone take {activations}: fewer data.frames, or a smaller data.height and data.width"


def _sharing_clips(stage: DistillConfig, size: int, frozen: int, section: str) -> str:
    """The fewest GPUs that do where they share out each clip, weights whole on each or, where that is not enough, shared out
    too; "" where none do."""
    model = opened(stage.model)
    if not can_share(model):
        return ""
    most = min(model.heads, model.latent_shape(model.size(stage.data.frames, stage.data.height, stage.data.width))[1])
    for gpus in (n for n in GPUS if n <= most):
        for kind, weights, start in (("", 1, _checkpointed(stage)), (" under FSDP2", gpus, _for_sharding(stage))):
            plan = plan_memory(replace(start, training=replace(start.training, sequence_parallel=gpus)), frozen=frozen)
            if fits(plan, size, weights):
                what = "gradient_checkpointing and adamw" if kind else "gradient_checkpointing"
                return (
                    f"or {section}.sequence_parallel = {gpus} on {gpus} GPUs{kind} with {what}: {gib(plan.peak(weights))} on each, "
                    "fits"
                )
    return ""


def _checkpointed(stage: DistillConfig) -> DistillConfig:
    return replace(stage, model=replace(stage.model, gradient_checkpointing=True))


def _for_sharding(stage: DistillConfig) -> DistillConfig:
    """8-bit Adam does not know sharded weights, and what is shared out does not wait on the host."""
    optimizer = stage.training.optimizer.replace("adamw8bit", "adamw")
    return replace(
        stage,
        model=replace(_checkpointed(stage).model, host_teacher=False),
        training=replace(stage.training, optimizer=optimizer, host_average=False),
    )


def _changes(stage: DistillConfig, section: str) -> Iterator[tuple[str, DistillConfig]]:
    if not stage.model.gradient_checkpointing:
        stage = replace(stage, model=replace(stage.model, gradient_checkpointing=True))
        yield "model.gradient_checkpointing = true", stage
    if stage.training.batch > 1:
        t = stage.training
        stage = replace(stage, training=replace(t, batch=1, accumulate=t.accumulate * t.batch))
        yield f"{section}.batch = 1 and accumulate = {stage.training.accumulate}", stage
    if stage.training.precision == "float32":
        stage = replace(stage, training=replace(stage.training, precision="bf16"))
        yield f'{section}.precision = "bf16" (in both trainings of a recipe)', stage
    if stage.training.optimizer == "adamw":
        stage = replace(stage, training=replace(stage.training, optimizer="adamw8bit"))
        yield f'{section}.optimizer = "adamw8bit"', stage
    if opened(stage.model).can_host and stage.model.train == "lora" and not stage.model.host_modulation:
        stage = replace(stage, model=replace(stage.model, host_modulation=True))
        yield "model.host_modulation = true", stage
    if stage.model.train == "full" and not stage.training.host_average:
        stage = replace(stage, training=replace(stage.training, host_average=True))
        yield f"{section}.host_average = true", stage
    if stage.model.train == "full" and not (stage.model.host_teacher or learns_on_ways(stage)):
        stage = replace(stage, model=replace(stage.model, host_teacher=True))
        yield "model.host_teacher = true", stage
    if stage.model.train == "full":
        lora = replace(stage.model, train="lora", dtype="bfloat16", init="", host_teacher=False)
        stage = replace(stage, model=lora)
        yield 'model.train = "lora" and dtype = "bfloat16"', stage
    if stage.model.train == "lora" and stage.model.lora_rank > LEAST_RANK:
        stage = replace(stage, model=replace(stage.model, lora_rank=LEAST_RANK))
        yield f"model.lora_rank = {LEAST_RANK}", stage
