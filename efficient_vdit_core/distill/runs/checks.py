"""What a training refuses, asked before it does anything: settings that its model cannot meet."""

from __future__ import annotations

from pathlib import Path

from ...limits.packages import install
from ...limits.quote import quoted
from ...media.registry import check_reads_videos
from ...models.distilled import DistillMetadata
from ...sampling.schedule import segment_edges
from ..config import DistillConfig, learns_on_ways
from ..families.model import FamilyModel
from ..lora.files import start_from
from ..objectives.consistency import check_pair
from ..objectives.grid import SegmentGrid
from .alternating import add_learners


def check_training(config: DistillConfig) -> None:
    """Raises ValueError where the model's settings cannot be trained."""
    wanted = config.model
    if wanted.train not in ("full", "lora"):
        raise ValueError(f"model.train is {quoted(wanted.train)}, expected full or lora. Correct the configuration.")
    if wanted.train == "full" and wanted.dtype != "float32":
        raise ValueError(
            f"model.dtype is {quoted(wanted.dtype)}, expected float32 for full training: small steps vanish in lower "
            "precision. Set it to float32 with training.precision bf16, or train a LoRA."
        )
    if wanted.dtype == "float16":
        raise ValueError(
            "model.dtype is 'float16', in which the losses' gradients are smaller than its smallest number. Set it to bfloat16 or float32."
        )
    if wanted.loras and wanted.train != "lora":
        raise ValueError(
            "model.loras are kept beside the weights of a model that a LoRA is trained for, but model.train is "
            f"{quoted(wanted.train)}. Set it to lora, or name weights that hold them."
        )
    if config.method == "score" and wanted.train != "lora":
        raise ValueError(
            f"model.train is {quoted(wanted.train)}, expected lora for score distillation: student, fake score and teacher "
            "are one model with two LoRAs."
        )


def check_hosted(config: DistillConfig, *, sharded: bool = False) -> None:
    """Raises ValueError where nothing is there to stay in the host's memory, or FSDP2 has shared it out."""
    asked = {"model.host_teacher": config.model.host_teacher, "training.host_average": config.training.host_average}
    for name in (name for name, wanted in asked.items() if wanted and sharded):
        raise ValueError(
            f"{name} is true, but under FSDP2 every process holds its own part of teacher and average on its GPU. Leave it out."
        )
    if config.model.host_teacher and config.model.train == "lora":
        raise ValueError(
            "model.host_teacher is true, but the teacher of a LoRA is the student without it: there is no second model. Leave it out."
        )
    if config.model.host_teacher and learns_on_ways(config):
        raise ValueError(
            'model.host_teacher is true, but with states = "teacher" the training asks no teacher: its ways are sampled before. Leave '
            "it out."
        )


def check_objective(config: DistillConfig, model: FamilyModel, about: DistillMetadata) -> None:
    """Raises ValueError where the model's schedule has no room for the steps, the loss's weight suits another
    prediction, the plan was made for another model, the student takes no step, or the model takes no such batch or no
    guidance."""
    edges = segment_edges(about.segments, about.steps, start=model.path.start, clean=model.path.clean)
    if not model.serves(edges[:-1]).any():
        raise ValueError(
            f"None of the {about.steps} steps begins where the {model.expert} network is asked. Raise segments or steps, or train "
            "the other."
        )
    if config.method in ("consistency", "score"):
        SegmentGrid(model.path, about.segments, config.objective.teacher_steps, serves=model.serves)
        check_pair(config.objective, model.prediction)
    if config.method == "score":
        check_turns(config)
    if about.tile_plan is not None:
        model.check_plan(about.tile_plan)
    if config.training.batch > model.at_once:
        raise ValueError(
            f"training.batch is {config.training.batch}, but this model takes {model.at_once} clip in a forward. Set it to "
            f"{model.at_once} and training.accumulate to {config.training.batch * config.training.accumulate}."
        )
    if not model.guided:
        check_no_guidance(config)
    if config.model.host_modulation and not (model.can_host and config.model.train == "lora"):
        raise ValueError(
            "model.host_modulation keeps weights of MiniMax-H3 in the host's memory while a LoRA is trained. Leave it out for "
            "other models, and for full training."
        )
    if model.expert:
        check_expert(config)
    check_where_asked(config)


def check_where_asked(config: DistillConfig) -> None:
    """Raises ValueError where a consistency student that learns at the segments' beginnings alone is to be sampled elsewhere, or
    has no ways to learn from, and where there are ways that nothing is learnt from."""
    if config.method != "consistency":
        return
    if config.objective.at_beginnings:
        check_beginnings(config)
    if config.objective.on_ways:
        check_ways(config)
    elif config.data.ways:
        raise ValueError(
            f'data.ways is {config.data.ways}, but with states = "{config.objective.states}" nothing is learnt from the ways of the '
            'teacher\'s samples, which take their room on disk. Leave it out, or set objective.states = "teacher".'
        )


def check_beginnings(config: DistillConfig) -> None:
    """Raises ValueError where a student that learns where segments begin is to be sampled between."""
    steps, segments = config.objective.steps, config.objective.segments
    if steps not in (0, segments):
        raise ValueError(
            f'objective.steps is {steps}, but with states = "{config.objective.states}" the student learns at the beginnings of the '
            f"{segments} segments alone, and is asked between them in so many. Set objective.segments to {steps}, or leave steps out."
        )


def check_ways(config: DistillConfig) -> None:
    """Raises ValueError where the samples keep no ways that reach each segment's edges, or were drawn under other guidance than
    the student is to have inside."""
    data, objective = config.data, config.objective
    if not data.ways or data.ways % objective.segments:
        raise ValueError(
            f'data.ways is {data.ways}, expected a multiple of the {objective.segments} segments: with states = "teacher" the student '
            'learns where they begin, on the ways of the teacher\'s samples. Set data.source = "teacher", data.ways = '
            f"{objective.segments} and data.teacher_steps to a multiple of that."
        )
    inside = 1.0 if objective.guidance is None else objective.guidance
    if inside != data.guidance:
        raise ValueError(
            f"objective.guidance is {quoted(objective.guidance)} and data.guidance {data.guidance:g}, expected the same: with "
            'states = "teacher" the student takes over what the teacher\'s samples were drawn with. Set objective.guidance to that.'
        )
    if data.negative_share:
        raise ValueError(
            f'data.negative_share is {data.negative_share:g}, but with states = "teacher" the way of a sample belongs to its own '
            "caption alone. Leave it out."
        )


def check_turns(config: DistillConfig) -> None:
    """Raises ValueError where the fake score alone would learn."""
    steps, round_of_turns = config.training.steps, config.objective.fake_steps + 1
    if steps < round_of_turns:
        raise ValueError(
            f"training.steps is {steps}, of which the student takes none: it takes one in {round_of_turns}, after "
            f"{config.objective.fake_steps} of the fake score (objective.fake_steps). Set training.steps to {round_of_turns} times as many "
            "as the student is to take."
        )


def check_no_guidance(config: DistillConfig) -> None:
    """Raises ValueError where guidance is asked of a model whose weights have it inside."""
    scales = {"guidance": getattr(config.objective, "guidance", None)}
    if config.data.source == "teacher":
        scales["data.guidance"] = None if config.data.guidance == 1 else config.data.guidance
    for name, scale in scales.items():
        if scale is not None:
            advice = "Set it to 1" if name.startswith("data") else "Leave it out"
            raise ValueError(
                f"{name} is {quoted(scale)}, but this model's weights have guidance inside already. {advice}."
            )


def check_loras(config: DistillConfig, model: FamilyModel) -> None:
    """Raises ValueError where a frozen LoRA, or one gone on from, is missing or another model's."""
    wanted = config.model
    for file in filter(None, (*wanted.loras, wanted.init)):
        if not Path(file).exists():
            raise ValueError(f"{quoted(file, 120)} does not exist. Check model.loras and model.init.")
    if not wanted.loras and not (wanted.init and wanted.train == "lora"):
        return
    student = model.skeleton()  # it wears them
    if wanted.init:
        add_learners(student, config)
        start_from(student, Path(wanted.init), model.comfy_layer)


def check_tensorboard(config: DistillConfig) -> None:
    """Raises ValueError where its package is missing, which would be seen after the data were made."""
    if config.training.tensorboard:
        try:
            import tensorboard  # noqa: F401 # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise ValueError(
                "training.tensorboard is true, which needs the package 'tensorboard'. "
                f"{install('tensorboard', instead='Set it to false')}"
            ) from error


def check_reader(config: DistillConfig) -> None:
    """Raises ValueError where videos are to be learnt from, and this build of the pack reads none."""
    if config.data.source == "videos":
        check_reads_videos()


def check_expert(config: DistillConfig) -> None:
    """Raises ValueError for what one of two networks cannot do alone: sample."""
    what = {
        "method score, which samples": config.method == "score",
        "objective.states on the way down": getattr(config.objective, "states", "data") != "data",
        f'data.source "{config.data.source}", which samples': config.data.source == "teacher",
        "training.samples_every, which samples": bool(config.training.samples_every),
    }
    for name in (name for name, asked in what.items() if asked):
        raise ValueError(
            f"model.expert asks for one of two networks, and {name} with both. Take data.source videos, samples_every 0, "
            "objective.states data, and method consistency or knowledge."
        )
