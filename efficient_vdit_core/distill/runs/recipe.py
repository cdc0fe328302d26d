"""The paper's three stages as one resumable run: few steps, a plan for each threshold, quality won back under each
plan.

consistency-first   consistency -> search -> knowledge (the paper's order)
knowledge-first     search on the base -> knowledge -> consistency under the plan
merge               consistency and knowledge apart, both from the base, their changes added
knowledge-only      search on the base -> knowledge: many steps and guidance as before (the paper's Table 4)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...limits.quote import quoted
from ...models.distilled import DistillMetadata
from ...models.opensora_plan.detect import unify_names
from ...storage.weight_files import read_state_dict, save_safetensors
from ..config import DataConfig, DistillConfig, ModelConfig, TrainingConfig, read_section
from ..data.prepare import check_data, prepare_data
from ..families.model import FamilyModel
from ..families.open_model import open_model
from ..lora.files import merged
from ..objectives.consistency import ConsistencyConfig
from ..objectives.grid import sub_steps
from ..objectives.knowledge import KnowledgeConfig, merge_deltas
from .checks import check_reader
from .export import LORA, result_file
from .launch import (
    by_first_process,
    free_memory,
    launched_processes,
    launched_sharding,
    make_accelerator,
    share_samples,
)
from .search_stage import SearchConfig, check_targets, found_plans, search_plans
from .trainer import check_run, distill

BASE_NEGATIVE_SHARE = 0.1
ANY_PLAN = "full"  # in a check, for a plan that is searched later
ORDERS = ("consistency-first", "knowledge-first", "merge", "knowledge-only")


@dataclass(frozen=True)
class RecipeConfig:
    """The sections of a recipe's TOML file; ``order`` stands above them."""

    order: str = "consistency-first"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    consistency_training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    knowledge_training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RecipeConfig:
        """Raises ValueError that names the section and key of what is unknown or out of range."""
        sections = {
            "model": ModelConfig, "data": DataConfig, "consistency": ConsistencyConfig, "consistency_training": TrainingConfig,
            "search": SearchConfig, "knowledge": KnowledgeConfig, "knowledge_training": TrainingConfig,
        }  # fmt: skip
        unknown = sorted(values.keys() - sections.keys() - {"order"})
        if unknown:
            raise ValueError(
                f"The recipe has {quoted(unknown[0])}, expected order and the sections {', '.join(sections)}."
            )
        order = values.get("order", cls.order)
        if not isinstance(order, str) or order not in ORDERS:
            raise ValueError(f"order is {quoted(order)}, expected one of {', '.join(ORDERS)}. Correct the recipe.")
        recipe = cls(
            order=order, **{name: read_section(kind, values.get(name, {}), name) for name, kind in sections.items()}
        )
        recipe._check_order()
        return recipe

    def _check_order(self) -> None:
        """Raises ValueError where what the sections ask for is not to be had in this order, or in any."""
        for stage, plan in (("consistency", self.consistency.plan), ("knowledge", self.knowledge.plan)):
            if plan:
                raise ValueError(
                    f"{stage}.plan is {quoted(plan)}, but a recipe searches its plans itself, by what [search] says. Leave it out, or "
                    f"train under that plan with `evdit distill {stage}`."
                )
        few = self.consistency
        for name in ("segments", "steps"):
            asked = getattr(self.knowledge, name)
            if self.order == "consistency-first" and few.at_beginnings and asked not in (0, few.segments):
                raise ValueError(
                    f'knowledge.{name} is {asked}, but with consistency.states = "{few.states}" stage 1 teaches the beginnings of its '
                    f"{few.segments} segments alone, and stage 3 would ask it elsewhere. Leave it out."
                )
        precisions = self.consistency_training.precision, self.knowledge_training.precision
        if self.order == "merge" and self.model.loras:
            raise ValueError(
                'order is "merge", which adds results to the model\'s own weights, but model.loras lie beside these. Take another order.'
            )
        if self.order == "merge" and self.model.init:
            raise ValueError(
                'order is "merge", which adds what both trainings changed, and both begin with model.init, whose changes would count '
                "twice. Make full weights of it for model.transformer, or take another order."
            )
        if self.order in ("knowledge-first", "merge") and self.knowledge.steps:
            raise ValueError(
                f"knowledge.steps is {self.knowledge.steps}, but with the order {self.order} the plan's training learns at all of stage "
                "1's times, because few steps are taught to it later. Leave it out."
            )
        if (
            self.order != "knowledge-only" and precisions[0] != precisions[1]
        ):  # accelerate keeps one for the whole process
            raise ValueError(
                f"The trainings' precisions are {' and '.join(precisions)}, expected the same. Correct the recipe."
            )


class ThreeStages:
    """The stages of one recipe in ``folder``; each is skipped where it is finished, and resumed where it was
    stopped."""

    def __init__(self, config: RecipeConfig, folder: Path) -> None:
        data = config.data if config.data.cache else replace(config.data, cache=str(folder / "cache"))
        self.config, self.folder = replace(config, data=data), folder

    def run(self) -> dict[str, list[Path]]:
        """Results by the plan's name: full weights, or the LoRAs of both stages, which belong together."""
        check_targets(self.config.search)
        self.check()
        c = self.config
        if c.order == "consistency-first":
            dense = self.consistency("consistency")
            plans = self.plans("plans", dense)
            return {
                name: _result(dense, self.knowledge(f"knowledge-{name}", dense, plan)) for name, plan in plans.items()
            }
        plans = self.plans("plans", "")
        alone = c.order == "knowledge-only"
        tuned = {name: self.knowledge(f"knowledge-{name}", "", plan, alone=alone) for name, plan in plans.items()}
        if alone:
            return {name: [file] for name, file in tuned.items()}
        if c.order == "knowledge-first":
            return {
                name: _result(file, self.consistency(f"consistency-{name}", file, plans[name]))
                for name, file in tuned.items()
            }
        dense = self.consistency("consistency")
        return {name: [self.merge(f"merged-{name}", dense, weights)] for name, weights in tuned.items()}

    def check(self) -> None:
        """Raises ValueError now for what a later stage would refuse after hours."""
        c, data = self.config, self.config.data
        model = open_model(c.model)
        c.search.check(model.latent_shape(model.size(data.frames, data.height, data.width))[1])
        for stage in self.planned():
            check_run(stage, model, sharded=launched_sharding(), processes=launched_processes())
            check_reader(stage)
            check_data(stage, model)

    def planned(self) -> list[DistillConfig]:
        """The trainings' configurations as far as they are known before there are results: under no plan yet."""
        c = self.config
        knowledge = replace(c.knowledge, plan="", segments=c.knowledge.segments or c.consistency.segments)
        if c.order != "consistency-first":
            knowledge = self._of_base(knowledge, alone=c.order == "knowledge-only")
        elif knowledge.segments == c.consistency.segments:  # what stage 1's result will say
            knowledge = replace(knowledge, steps=knowledge.steps or c.consistency.steps)
        stages = [
            self._stage("consistency", replace(c.consistency, plan=""), c.consistency_training, ""),
            self._stage("knowledge", replace(knowledge, plan=ANY_PLAN), c.knowledge_training, ""),
        ]
        return stages[1:] if c.order == "knowledge-only" else stages

    def frozen_loras(self, stage: DistillConfig) -> int:
        """How many LoRAs of earlier stages a planned stage will have beside its weights."""
        second = {"consistency-first": "knowledge", "knowledge-first": "consistency"}.get(self.config.order)
        return int(self.config.model.train == "lora" and stage.method == second)

    @property
    def segments(self) -> int:
        """Of the model that the plans are for."""
        c = self.config
        own = c.knowledge.segments if c.order == "knowledge-only" else 0
        return own or c.consistency.segments

    def _of_base(self, objective: KnowledgeConfig, *, alone: bool) -> KnowledgeConfig:
        """For a teacher that nobody distilled: the student learns at all times of the consistency that is taught to it later,
        or ``alone`` at the sampler's."""
        segments = objective.segments or self.config.consistency.segments
        if alone:
            return replace(objective, segments=segments, steps=self.search_schedule(segments)["steps"])
        few = self.config.consistency
        steps = segments * (1 if few.at_beginnings else sub_steps(few.teacher_steps, segments))
        return replace(objective, segments=segments, steps=steps)

    def consistency(
        self, name: str, teacher: str | Path = "", plan: str | Path = "", *, init: str | Path = "", **changes: Any
    ) -> Path:
        """Stage 1 in the subfolder ``name``; the student starts from ``init`` or the teacher. ``changes`` are of the
        objective."""
        c = self.config
        stage = self._stage(
            "consistency", replace(c.consistency, plan=str(plan), **changes), c.consistency_training, teacher
        )
        if init:
            stage = replace(stage, model=replace(stage.model, init=str(init)))
        return self._train(name, stage)

    def knowledge(
        self, name: str, teacher: str | Path, plan: str | Path, *, alone: bool = False, **changes: Any
    ) -> Path:
        """Stage 3 in the subfolder ``name``, under a plan file or pattern.

        A base teacher's student is to be distilled later, unless ``alone``: it learns at all of stage 1's times. Both learn
            without captions too, for the guidance.
        """
        c = self.config
        objective = replace(c.knowledge, plan=str(plan), **changes)
        if teacher:
            return self._train(name, self._stage("knowledge", objective, c.knowledge_training, teacher))
        stage = self._stage("knowledge", self._of_base(objective, alone=alone), c.knowledge_training, "")
        share = c.data.negative_share or (BASE_NEGATIVE_SHARE if c.consistency.guidance is not None else 0.0)
        return self._train(name, replace(stage, data=replace(stage.data, negative_share=share)))

    def plans(self, name: str, weights: str | Path, segments: int = 0) -> dict[str, Path]:
        """Stage 2 of a model's weights in the subfolder ``name``; the plan files. Of several processes one searches."""
        config, folder = self.search_stage(), self.folder / name
        accelerator = make_accelerator(config)  # before a network is moved: it gives each process its own device

        share_samples(config, Path(self.config.data.cache), accelerator)

        def search() -> None:
            model = open_model(self._taught_by(weights))
            data = prepare_data(config, model, Path(self.config.data.cache), accelerator.device)
            search_plans(
                self.config.search,
                model,
                lambda: model.load().eval().to(accelerator.device),
                data.clips,
                data.bank,
                folder,
                **self.search_schedule(segments or self.segments),
                at_once=config.training.batch,
                device=accelerator.device,
            )

        by_first_process(accelerator, search)
        free_memory(accelerator)
        return found_plans(self.config.search, folder)

    def search_stage(self) -> DistillConfig:
        """The training whose data and batch the search shares."""
        c = self.config
        training = c.knowledge_training if c.order == "knowledge-only" else c.consistency_training
        return self._stage("consistency", c.consistency, training, "")

    def search_schedule(self, segments: int) -> dict[str, int]:
        """The schedule of the search's samples: that of the model that the plan is for."""
        c = self.config
        asked = c.knowledge.steps if c.order == "knowledge-only" else 0
        return {"segments": segments, "steps": asked or max(c.consistency.steps, segments)}

    def merge(self, name: str, consistency: str | Path, knowledge: str | Path) -> Path:
        """The changes of both stages added to the base: to be sampled as the first says, under the plan of the
        second."""
        target = result_file(self.folder / name, lora=False)
        by_first_process(make_accelerator(self.search_stage()), lambda: self._merge(target, consistency, knowledge))
        return target

    def _merge(self, target: Path, consistency: str | Path, knowledge: str | Path) -> None:
        model = open_model(self.config.model)
        base = _base_of(model)
        (few, about), (sparse, about_plan) = (read_state_dict(self.full(file)) for file in (consistency, knowledge))
        steps, plan = (DistillMetadata.from_entries(entries) for entries in (about, about_plan))
        if steps is None or plan is None:
            raise ValueError(
                "The stages to merge do not say how they were distilled: they are no results of this recipe."
            )
        save_safetensors(
            target, merge_deltas(base, few, sparse), {**replace(steps, plan=plan.plan).to_entry(), **_config_of(model)}
        )

    def full(self, weights: str | Path) -> Path:
        """Full weights of a stage's result, to be added to others: itself, or the base with its LoRA merged."""
        file = Path(weights)
        if file.name != LORA:
            return file
        target = result_file(file.parent, lora=False)
        if not target.is_file():
            model = open_model(self.config.model)
            base = _base_of(model)
            lora, about = read_state_dict(file)
            save_safetensors(target, merged(base, lora, model.comfy_layer), {**about, **_config_of(model)})
        return target

    def _train(self, name: str, stage: DistillConfig) -> Path:
        """A training in the subfolder ``name``. One section is for the trainings under all plans: where its rate is lowered
        for the one that diverged, those that are finished stay."""
        return distill(stage, self.folder / name, any_rate=True)

    def _stage(self, method: str, objective: Any, training: TrainingConfig, teacher: str | Path) -> DistillConfig:
        return DistillConfig(method, objective, self._taught_by(teacher), self.config.data, training, self.config.model)

    def _taught_by(self, teacher: str | Path) -> ModelConfig:
        """The model with another stage's result as its teacher, or as it is. A LoRA stays beside the weights, since their
        precision may not hold what it changes."""
        model = self.config.model
        if not teacher:
            return model
        if Path(teacher).name == LORA:
            return replace(model, loras=(*model.loras, str(teacher)), init="")
        return replace(model, transformer=str(teacher), init="")


def _result(first: Path, second: Path) -> list[Path]:
    """What is to be loaded: full weights hold both stages, a LoRA holds its own."""
    return [first, second] if second.name == LORA else [second]


def _base_of(model: FamilyModel) -> dict[str, Tensor]:
    """The weights that all stages change, under the names that results have."""
    return unify_names(read_state_dict(model.transformer_file)[0])


def _config_of(model: FamilyModel) -> dict[str, str]:
    return {"config": json.dumps(model.config_entry()), "format": "pt"}
