"""A distillation's settings: a TOML file in sections, checked when read, saved with the run, compared on resume."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..generation.request import MAX_FRAMES, MAX_GUIDANCE, MAX_SIDE
from ..limits.documents import parse_toml, read_text
from ..limits.numbers import MAX_TORCH_SEED, number, whole
from ..limits.quote import named, quoted
from ..media.video import MAX_FPS
from ..storage.files import can_be_path, write_text
from .objectives.consistency import STUDENT, ConsistencyConfig
from .objectives.knowledge import KnowledgeConfig
from .objectives.score import ScoreConfig

OBJECTIVES: dict[str, type] = {"consistency": ConsistencyConfig, "knowledge": KnowledgeConfig, "score": ScoreConfig}
# What a resumed run may change: how often things are written and where they lie, never what is learnt.
FREE = {
    "training.save_every", "training.tensorboard", "training.samples_every", "training.host_average", "model.device",
    "model.host_teacher", "model.host_modulation", "model.gradient_checkpointing", "data.cache",
}  # fmt: skip

SOURCES = ("tinyworld", "videos", "teacher", "captions")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
PRECISIONS = ("float32", "bf16")
EXPERTS = ("", "high", "low")
DEVICES = ("auto", "cpu")
PLACE = "{}"  # of the caption in a template
# Beyond these a typing mistake is more likely than a plan: years of training, days of encoding.
MAX_TRAINING_STEPS, MAX_CLIPS, MAX_BATCH, MAX_PROCESSES = 10_000_000, 10_000_000, 65_536, 1024

T = TypeVar("T")


def _expect(holds: bool, settings: Any, section: str, name: str, expected: str) -> None:
    if not holds:
        raise ValueError(
            f"{section}.{name} is {quoted(getattr(settings, name))}, expected {expected}. Correct the configuration."
        )


def _paths(settings: Any, section: str, *names: str) -> None:
    for name in names:
        _expect(can_be_path(getattr(settings, name)), settings, section, name, "a path of names of 255 bytes at most")


def _between(settings: Any, section: str, ranges: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in ranges.items():
        whole(getattr(settings, name), f"{section}.{name}", low, high, "Correct the configuration.")


@dataclass(frozen=True)
class ModelConfig:
    """``path``: tiny, or a folder of Open-Sora-Plan or diffusers parts; ``transformer``: other weights than that
    folder's.

    ``transformer``, with ``loras`` of earlier trainings beside it, is the teacher; the student starts from ``init``, or
    from the teacher. expert: high or low, which of Wan 2.2's two networks is trained, that of the noisy steps or the
    other; each is a training of its own. train: full weights or a LoRA. host_modulation: MiniMax-H3's projections of the
    noise level, 13 of its 33 billion weights, stay in the host's memory and are computed there. host_teacher: the teacher of
    a full training stays there too, and its blocks come to the GPU one at a time.
    """

    path: str = "tiny"
    family: str = "opensora_plan"
    transformer: str = ""
    text_encoder: str = ""
    init: str = ""
    loras: tuple[str, ...] = ()
    expert: str = ""
    train: str = "full"
    lora_rank: int = 16
    lora_alpha: float = 0.0
    gradient_checkpointing: bool = False
    device: str = "auto"
    dtype: str = "float32"
    host_modulation: bool = False
    host_teacher: bool = False

    def __post_init__(self) -> None:
        _paths(self, "model", "path", "transformer", "text_encoder", "init")
        _expect(self.expert in EXPERTS, self, "model", "expert", "high, low or nothing")
        _expect(self.device in DEVICES, self, "model", "device", "auto or cpu; accelerate launch chooses among GPUs")
        for name in self.loras:
            _expect(can_be_path(name), self, "model", "loras", "paths of names of 255 bytes at most")
        _between(self, "model", {"lora_rank": (1, 4096)})
        number(self.lora_alpha, "model.lora_alpha", 0, 1e6)


@dataclass(frozen=True)
class DataConfig:
    """source: tinyworld, videos (a folder with captions), teacher (none: the teacher's own samples for ``captions``, a
    text file), or captions (none, and no samples before the run: score distillation learns from the student's own, as consistency does
    with ``states = "student"``).

    negative: the text of the unconditional half of guidance; negative_share of the clips, 0 to 1, learn it instead of
    their own caption, for students that are sampled with guidance. Where a recipe's base is distilled later with guidance, 0 is
    a tenth of them, for that base is asked without captions too. guidance: of the teacher's samples, and of such a student's sample
    videos. Sizes 0 are what the model was trained for.
    template: what the model's prompts are put into, with {} where the caption goes; guidance and result are those of
    such prompts. "" leaves captions as they are. Which numbers of frames there are is the model's to say. fps: the frames a
    second that videos are brought to, the model's; 0 takes each file's own frames, whatever their rate. ways: in how many equal
    parts of diffusion time the way from noise of each of the teacher's samples is kept beside it, for consistency's
    ``states = "teacher"``; 0 keeps the samples alone. teacher_order: of the teacher's steps to its samples, 1 (DDIM) or 2, see
    `half_a_step_on`.
    """

    source: str = "tinyworld"
    folder: str = ""
    captions: str = ""
    cache: str = ""
    clips: int = 4096
    seed: int = 1
    negative: str = ""
    negative_share: float = 0.0
    frames: int = 0
    height: int = 0
    width: int = 0
    teacher_steps: int = 50
    guidance: float = 3.0
    template: str = ""
    fps: float = 0.0
    ways: int = 0
    teacher_order: int = 1

    def prompt(self, caption: str) -> str:
        """The text that is encoded for a caption."""
        return self.template.replace(PLACE, caption) if self.template else caption

    def __post_init__(self) -> None:
        _expect(
            self.template.count(PLACE) == bool(self.template),
            self,
            "data",
            "template",
            f"{PLACE} once in it, or no text",
        )
        _expect(self.source in SOURCES, self, "data", "source", f"one of {', '.join(SOURCES)}")
        _paths(self, "data", "folder", "captions", "cache")
        _between(self, "data", {"clips": (1, MAX_CLIPS), "teacher_steps": (1, 1000), "seed": (0, 2**31 - 1)})
        number(self.negative_share, "data.negative_share", 0, 1)
        number(self.guidance, "data.guidance", 0, MAX_GUIDANCE)
        number(self.fps, "data.fps", 0, MAX_FPS)
        _between(self, "data", {"frames": (0, MAX_FRAMES), "height": (0, MAX_SIDE), "width": (0, MAX_SIDE)})
        _between(self, "data", {"ways": (0, self.teacher_steps), "teacher_order": (1, 2)})
        sampled = self.teacher_order == 1 or self.source == "teacher"
        _expect(
            sampled,
            self,
            "data",
            "teacher_order",
            '1, or source "teacher"; the order of a target\'s steps is objective.teacher_order',
        )
        divides = not self.ways or (self.source == "teacher" and self.teacher_steps % self.ways == 0)
        _expect(
            divides,
            self,
            "data",
            "ways",
            f'0, or with source "teacher" a number that divides its {self.teacher_steps} steps',
        )
        for name in ("height", "width"):
            multiple = getattr(self, name) % 16 == 0
            _expect(multiple, self, "data", name, "a multiple of 16, or 0 for the model's own")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation. precision: float32, or bf16 for bf16 autocast over float32 weights. sequence_parallel: how many
    processes share out the frames of one clip; groups of so many are data parallel. host_average: the average of the weights
    is kept in the host's memory."""

    steps: int = 1000
    batch: int = 32
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 20
    final_rate: float = 0.05
    ema: float = 0.99
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    save_every: int = 200
    tensorboard: bool = False
    samples_every: int = 0
    samples: tuple[str, ...] = ()
    sequence_parallel: int = 1
    host_average: bool = False

    def __post_init__(self) -> None:
        counted = {"steps": (1, MAX_TRAINING_STEPS), "save_every": (1, MAX_TRAINING_STEPS), "warmup": (0, MAX_TRAINING_STEPS),
                   "samples_every": (0, MAX_TRAINING_STEPS), "batch": (1, MAX_BATCH), "accumulate": (1, 65_536),
                   "seed": (0, MAX_TORCH_SEED), "sequence_parallel": (1, MAX_PROCESSES)}  # fmt: skip
        _between(self, "training", counted)
        for name in ("weight_decay", "final_rate"):
            number(getattr(self, name), f"training.{name}", 0, 1)
        number(self.learning_rate, "training.learning_rate", 0, 10, above=True)
        number(self.clip, "training.clip", 0, above=True)
        _expect(0 <= self.ema < 1, self, "training", "ema", "0 up to, but not, 1")
        _expect(self.optimizer in OPTIMIZERS, self, "training", "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        _expect(self.precision in PRECISIONS, self, "training", "precision", " or ".join(PRECISIONS))


@dataclass(frozen=True)
class DistillConfig:
    """One run: ``method`` is a name of `OBJECTIVES`, and says what ``objective`` holds.

    sampled_by: the model whose samples are the data of source "teacher", where that is not the run's own teacher: of a recipe's
    later stages it is the first one's. No setting of the file.
    """

    method: str
    objective: Any
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampled_by: ModelConfig | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any], method: str | None = None) -> DistillConfig:
        """Raises ValueError that names the section and key of what is unknown, mistyped or out of range."""
        method = values.get("method", method)
        if not isinstance(method, str) or method not in OBJECTIVES:
            raise ValueError(
                f"method is {quoted(method)}, expected one of {', '.join(OBJECTIVES)}. Correct the configuration."
            )
        sections = {
            "objective": OBJECTIVES[method],
            "model": ModelConfig,
            "data": DataConfig,
            "training": TrainingConfig,
        }
        unknown = sorted(values.keys() - sections.keys() - {"method"})
        if unknown:
            raise ValueError(
                f"The configuration has {quoted(unknown[0])}, expected only method and [{'], ['.join(sections)}]."
            )
        return cls(method, **{name: read_section(kind, values.get(name, {}), name) for name, kind in sections.items()})

    @classmethod
    def load(cls, path: str | Path, method: str | None = None) -> DistillConfig:
        return cls.from_dict(read_toml(path), method)

    def to_dict(self) -> dict[str, Any]:
        sections = {name: asdict(getattr(self, name)) for name in ("model", "data", "objective", "training")}
        return {"method": self.method, **sections}

    def save(self, path: str | Path) -> None:
        write_text(path, to_toml(self.to_dict()))

    def differences(self, other: DistillConfig) -> dict[str, str]:
        """``this -> other`` by ``section.key``, of all that differs and matters for what is learnt."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        keys = sorted((mine.keys() | theirs.keys()) - FREE)
        return {k: f"{quoted(mine.get(k))} -> {quoted(theirs.get(k))}" for k in keys if mine.get(k) != theirs.get(k)}


def learns_on_ways(config: DistillConfig) -> bool:
    """Whether a training asks no teacher and learns from the ways that its samples went, see `ConsistencyConfig.states`."""
    return isinstance(config.objective, ConsistencyConfig) and config.objective.on_ways


def needs_no_clips(config: DistillConfig) -> bool:
    """Whether a training's own samples can be all that it learns from."""
    return config.method == "score" or (config.method == "consistency" and config.objective.states == STUDENT)


def read_section(kind: type[T], values: Any, section: str) -> T:
    """A dataclass from a TOML table."""
    if not isinstance(values, dict):
        raise ValueError(f"[{section}] is {quoted(values)}, expected a table of settings. Correct the configuration.")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(
            f"[{section}] has {quoted(unknown[0])}, which is not a setting; expected {', '.join(sorted(known))}."
        )
    return kind(**{name: _typed(value, hints[name], f"{section}.{name}") for name, value in values.items()})


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list of these"}


def _typed(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            inner, count = typing.get_args(option)[0], len(typing.get_args(option))
            if typing.get_args(option)[-1] is Ellipsis or len(value) == count:
                return tuple(_typed(v, inner, name) for v in value)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < 2**1000 else math.inf  # what is too large for a float
        elif option is str and isinstance(value, str) and "\0" not in value:  # a NUL is in no path and no caption
            return value
        elif isinstance(option, type) and option is not str and type(value) is option:
            return value
    expected = " or ".join(_NAMES.get(typing.get_origin(o) or o, str(o)) for o in options if o is not types.NoneType)
    raise ValueError(f"{name} is {quoted(value)}, expected {expected}. Correct the configuration.")


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's content. Raises ValueError naming the file and line where it cannot be read."""
    return parse_toml(read_text(path, "The configuration"), named(Path(path).name))


def to_toml(values: dict[str, Any]) -> str:
    """Scalars first, then one table for each dictionary; what is None is left out."""
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict) and v is not None]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON lets stand and TOML does not


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, t in values.items() if isinstance(t, dict) for k, v in t.items()} | {
        "method": values["method"]
    }
