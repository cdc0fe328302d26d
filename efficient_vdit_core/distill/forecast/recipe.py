"""What each part of a recipe will hold and compute, found before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import DistillConfig
from ..runs.recipe import ThreeStages
from ..runs.search_stage import check_targets, plan_names
from .memory import MemoryPlan, plan_memory
from .samples import plan_samples
from .search import plan_search
from .work import WorkPlan, plan_work

SAMPLES, SEARCH = "teacher's samples", "search"


@dataclass(frozen=True)
class Part:
    """``times``: how often it runs, once for each plan or once for all. stage: a training's configuration, None of the
    search and of the teacher's samples; ``frozen``: how many LoRAs of earlier stages it has beside its weights."""

    name: str
    memory: MemoryPlan
    work: WorkPlan
    times: int = 1
    stage: DistillConfig | None = None
    frozen: int = 0

    def hours(self, tflops: float) -> float:
        """All its runs, on GPUs that together compute so many TFLOP a second."""
        return self.times * self.work.hours(tflops)


def forecast(stages: ThreeStages) -> Iterator[Part]:
    """The trainings and the search of a recipe, in its order, each as it is found: that takes a large model seconds. The
    teacher's samples, where they are the data, come first."""
    check_targets(stages.config.search)
    if stages.config.data.source == "teacher":
        yield Part(SAMPLES, *plan_samples(stages.search_stage()))
    order, trainings = stages.config.order, {stage.method: stage for stage in stages.planned()}
    few_steps_first = ("consistency", SEARCH, "knowledge")
    for name in few_steps_first if order == "consistency-first" else (SEARCH, "knowledge", "consistency"):
        if name == SEARCH:
            yield Part(name, *_plan_search(stages))
        elif stage := trainings.get(name):
            frozen = stages.frozen_loras(stage)
            for_each_plan = name == "knowledge" or order == "knowledge-first"
            times = len(plan_names(stages.config.search)) if for_each_plan else 1
            yield Part(name, plan_memory(stage, frozen=frozen), plan_work(stage, frozen=frozen), times, stage, frozen)


def _plan_search(stages: ThreeStages) -> tuple[MemoryPlan, WorkPlan]:
    c = stages.config
    learnt = c.order == "consistency-first" and c.model.train == "lora"
    schedule = stages.search_schedule(stages.segments)
    return plan_search(c.search, stages.search_stage(), **schedule, wears_lora=learnt)


def steps_within(parts: list[Part], hours: float, tflops: float) -> dict[str, int]:
    """The steps of each training with which all parts take ``hours``, each shortened alike; its own where they take less,
    none where what is not training alone takes more."""
    trainings = [part for part in parts if part.stage is not None]
    left = hours - sum(part.hours(tflops) for part in parts if part.stage is None)
    share = min(1.0, left / sum(part.hours(tflops) for part in trainings))
    return {p.name: int(p.stage.training.steps * share) for p in trainings if p.stage} if share > 0 else {}
