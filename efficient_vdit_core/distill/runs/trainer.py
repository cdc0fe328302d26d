"""One distillation run in one folder: model, data, objective and optimiser from a configuration, then checkpoint and
export.

    folder/config.toml        the configuration of the run, see resume_check.py; what it names held, see referenced_files.py
    folder/checkpoint.pt      everything a resumed run needs
    folder/cache/             latents and text states
    folder/transformer/       the result as full weights, or folder/lora.safetensors

More GPUs or machines: the same command under `accelerate launch`, data parallel or with FSDP2's sharded weights; groups
of processes may share out each clip (`sequence_parallel`).
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...limits.quote import named
from ...models.distilled import DistillMetadata, metadata_of
from ...training import StepLoss, TrainingRun
from ...training.fsdp import is_sharding, run_in_autocast, shard_frozen
from ..config import DistillConfig, learns_on_ways
from ..data.prepare import check_data, prepare_data
from ..families.cpu_offload import stream_blocks
from ..families.model import FamilyModel, read_plan
from ..families.open_model import open_model
from ..lora.files import start_from
from ..lora.layers import FAKE, belongs_to
from ..objectives.knowledge import KnowledgeLoss
from ..objectives.score import ScoreLoss
from .alternating import AlternatingLoss, add_learners
from .checks import check_hosted, check_loras, check_objective, check_reader, check_tensorboard, check_training
from .export import export, result_file
from .launch import free_memory, make_accelerator, share_samples
from .objective import make_objective
from .optimizers import check_optimizer, make_optimizers
from .resume_check import CONFIG, alone_in, claim_run
from .samples import write_samples
from .sequence_parallel import check_processes, check_shares, make_group


def distill(config: DistillConfig, folder: Path, *, any_rate: bool = False) -> Path:
    """Run, or go on with, the distillation in ``folder``; returns the exported file. With ``any_rate`` that of a finished run
    whatever its learning rate was: trainings that share a configuration go on with a lower one where a single one diverged.

    Raises ValueError where the configuration cannot be met, or differs from the one that the folder was started with.
    """
    # All that can be refused is refused before the folder is claimed.
    accelerator, model = make_accelerator(config), open_model(config.model)
    about = check_run(config, model, sharded=is_sharding(accelerator), processes=accelerator.num_processes)
    if config.method == "knowledge" and about.steps != about.segments:
        # Written down with the rest, so that no run goes on at other times than it was begun at.
        config = replace(config, objective=replace(config.objective, steps=about.steps))
    if not (folder / CONFIG).is_file():
        check_reader(config)
        check_data(config, model)
    result = result_file(folder, lora=config.model.train == "lora")
    # A finished run is only read, and so are folders where nothing can be written.
    with nullcontext() if result.is_file() else alone_in(folder, accelerator):
        with accelerator.main_process_first():
            claim_run(config, folder, finished=result.is_file(), any_rate=any_rate)
        if result.is_file():  # it is written at the end, whole
            return result
        _train(config, model, about, folder, accelerator)
    free_memory(accelerator)  # here, where nothing names the networks any more
    return result


def check_run(config: DistillConfig, model: FamilyModel, *, sharded: bool, processes: int) -> DistillMetadata:
    """What the result will say of itself. Raises ValueError for what so many processes, ``sharded`` by FSDP2 or not, cannot
    do, before they have done anything."""
    check_training(config)
    about = describe(config, model)
    check_objective(config, model, about)
    check_optimizer(config, sharded=sharded)
    check_hosted(config, sharded=sharded)
    check_loras(config, model)
    model.check_weights()
    if config.model.train == "full" and config.model.init:
        model.check_weights(config.model.init)
    check_processes(config, processes)
    check_shares(config, model)
    check_tensorboard(config)
    return about


def _train(config: DistillConfig, model: FamilyModel, about: DistillMetadata, folder: Path, accelerator: Any) -> None:
    """All steps that are left, and the export."""
    share_samples(config, folder / "cache", accelerator)
    with accelerator.main_process_first():  # the others read its cache
        data = prepare_data(config, model, folder / "cache", accelerator.device)
    # Here, so that a LoRA starts alike in every process, whichever made the data.
    torch.manual_seed(config.training.seed)
    student, teacher = make_pair(config, model, accelerator)
    group = make_group(config, model, filter(None, (student, teacher)))
    t = config.training
    optimizers = [optimizer for part in learners(student) for optimizer in make_optimizers(part, t)]
    run = TrainingRun(
        student, optimizers, folder=folder, steps=t.steps, seed=t.seed, ema_decay=t.ema, warmup=t.warmup,
        final_rate=t.final_rate, accumulate=t.accumulate, clip=t.clip, tensorboard=t.tensorboard, accelerator=accelerator,
        alike=t.sequence_parallel, host_average=t.host_average,
    )  # fmt: skip
    objective = make_objective(
        config, model, run.model, student, teacher, about, data, lambda: run.step, alone=run.processes == 1, group=group
    )
    if isinstance(objective, ScoreLoss):
        data_parallel = run.processes > 1 and not run.sharded
        objective = AlternatingLoss(objective, student, len(optimizers) // 2, data_parallel=data_parallel)

    clips = data.clips.on_ways(about.segments) if learns_on_ways(config) else data.clips

    def loss_of(generator: torch.Generator) -> StepLoss:
        x, texts = clips.batch(t.batch, generator)
        if config.data.negative_share:
            without = torch.rand(t.batch, generator=generator) < config.data.negative_share
            texts = [config.data.negative if w else text for w, text in zip(without.tolist(), texts, strict=True)]
        return objective(x.to(accelerator.device), data.bank.batch(texts, accelerator.device), generator)

    def evaluate(_: dict[str, Tensor]) -> str:
        with run.averaged():
            where = folder / "samples" / f"step-{run.step:06d}"
            return write_samples(config, model, student, data, about, where, write=run.rank == 0)

    try:
        run.train(
            loss_of,
            save_every=t.save_every,
            evaluate=evaluate if t.samples_every else None,
            evaluate_every=t.samples_every or t.steps,
        )
    finally:
        if isinstance(objective, KnowledgeLoss):
            objective.close()
    export(model, student, run.whole(run.ema), folder, about, lora=config.model.train == "lora", rank=run.rank)
    accelerator.wait_for_everyone()


def make_pair(config: DistillConfig, model: FamilyModel, accelerator: Any) -> tuple[nn.Module, nn.Module | None]:
    """Student and teacher; None is the student itself with its LoRA off, which saves a copy of the model, or nobody where
    the teacher's ways are all that is learnt from.

    The teacher is sharded where the student is going to be, or stays on the host.
    """
    wanted = config.model
    lora = wanted.train == "lora"
    student = model.load("" if lora else wanted.init)
    teacher = None
    if lora:
        add_learners(student, config)
        if wanted.init:
            start_from(student, Path(wanted.init), model.comfy_layer)
    elif not learns_on_ways(config):
        teacher = model.load().eval().requires_grad_(False)
        if config.training.precision == "bf16":  # accelerate sees to what it prepares, which is the student alone
            run_in_autocast(teacher, accelerator.device.type, torch.bfloat16)
        if wanted.host_teacher:
            stream_blocks(teacher, accelerator.device)
        elif is_sharding(accelerator):
            shard_frozen(teacher, accelerator)
        else:
            teacher.to(accelerator.device)
    if wanted.gradient_checkpointing:
        model.checkpoint_blocks(student)
    return student, teacher


def learners(student: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The weights that are trained, by name: the student's, and the fake score's where there is one."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    fake = {name: p for name, p in trained.items() if belongs_to(FAKE, name)}
    own = {name: p for name, p in trained.items() if name not in fake}
    return [own, fake] if fake else [own]


def describe(config: DistillConfig, model: FamilyModel) -> DistillMetadata:
    """The metadata of the result. What the run does not say itself, segments and guidance, its teacher's says; of a plan's
    training also the steps, which do not change by it."""
    from ... import __version__

    objective, inherited = config.objective, metadata_of(model.transformer_file, config.model.loras)
    segments = objective.segments or (inherited.segments if inherited else 0)
    if not segments:
        source = Path(config.model.loras[-1]) if config.model.loras else model.transformer_file
        raise ValueError(
            f"{named(source.name)} does not say for how many segments it was distilled. Set "
            "objective.segments; for a model that is not distilled it is the number of sampling steps."
        )
    kept = inherited if config.method == "knowledge" and inherited and inherited.segments == segments else None
    steps = objective.steps or (kept.steps if kept else segments)
    plan = read_plan(objective.plan) if objective.plan or config.method == "knowledge" else None
    guidance = getattr(objective, "guidance", None)  # a teacher that has some inside hands it on
    if guidance is None and inherited:
        guidance = inherited.guidance
    return DistillMetadata(
        method=config.method, segments=segments, steps=steps, schedule=model.path.describe(),
        prediction=model.prediction, guidance=guidance, plan=json.loads(plan.to_json()) if plan else None, version=__version__,
        expert=model.expert, jumps_only=_jumps_only(config, inherited, segments, steps),
    )  # fmt: skip


def _jumps_only(config: DistillConfig, inherited: DistillMetadata | None, segments: int, steps: int) -> bool:
    """Whether the result is asked in its own jumps alone, as its teacher is whose plan is trained. Raises ValueError where that
    teacher would be asked elsewhere."""
    if config.method != "knowledge":
        return config.objective.at_beginnings
    if inherited is None or not inherited.jumps_only:
        return False
    if (segments, steps) != (inherited.segments, inherited.segments):
        raise ValueError(
            f"The plan is to be trained at {steps} steps in {segments} segments, but the teacher has learnt {inherited.segments} jumps "
            "and nothing between. Leave out objective.segments and objective.steps."
        )
    return True
