"""The loss of a run: what its objective asks of student and teacher, and how these are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...models.distilled import DistillMetadata
from ..config import DistillConfig
from ..data.prepare import PreparedData
from ..families.model import FamilyModel, read_plan
from ..lora.layers import FAKE, STUDENT, active_adapter, lora_off
from ..objectives.consistency import ConsistencyLoss
from ..objectives.knowledge import KnowledgeLoss
from ..objectives.score import ScoreLoss
from .sequence_parallel import Ask, ClipGroup, asking


@dataclass(frozen=True)
class Networks:
    """The networks as an objective calls them: on noisy clips ``z`` at ``time`` under ``condition``.

    Attributes:
        student: as accelerate prepared it, and ``bare`` as it was.
        teacher: None is the student with its LoRA off.
        negative: the condition of as many clips that guidance leaves.
        ask, ask_teacher: under the run's plan, or without one where the teacher has none; ``ask_dense`` never has one.
    """

    student: nn.Module
    bare: nn.Module
    teacher: nn.Module | None
    negative: Callable[[int], Any]
    ask: Ask
    ask_teacher: Ask
    ask_dense: Ask

    def learn(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        return self.ask(self.student, z, time, condition)

    def teach(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        if self.teacher is not None:
            return self.ask_teacher(self.teacher, z, time, condition)
        with lora_off(self.bare):
            return self.ask_teacher(self.student, z, time, condition)

    def guided(self, z: Tensor, time: Tensor, condition: Any, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the teacher says under guidance (B,), and without it."""
        plain = self.teach(z, time, condition).float()
        if guidance is None:
            return plain, plain
        without = self.teach(z, time, self.negative(len(z))).float()
        return without + guidance.view(-1, *[1] * (z.ndim - 1)) * (plain - without), plain

    def learn_alone(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The student's LoRA without that of the fake score."""
        with active_adapter(self.bare, STUDENT):
            return self.learn(z, time, condition)

    def fake(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The score of the student's own clips, by a LoRA of its own."""
        with active_adapter(self.bare, FAKE):
            return self.ask_dense(self.student, z, time, condition)


def make_objective(
    config: DistillConfig,
    model: FamilyModel,
    student: nn.Module,
    bare: nn.Module,
    teacher: nn.Module | None,
    about: DistillMetadata,
    data: PreparedData,
    step: Callable[[], int] = lambda: 0,
    *,
    alone: bool = True,
    group: ClipGroup | None = None,
) -> Any:
    """The loss of one batch: ``objective(x, condition, generator)``. ``student`` is ``bare`` as accelerate prepared it;
    ``step`` tells how many steps of the run are done.

    Without ``alone`` there are other processes, which call the networks as often as this one; those of ``group`` share its
    clips.
    """
    plan = read_plan(config.objective.plan) if about.plan is not None else None
    ask, ask_dense = asking(model, plan, group), asking(model, None, group)
    ask_teacher = ask_dense if config.method in ("knowledge", "score") else ask
    networks = Networks(student, bare, teacher, data.negative, ask, ask_teacher, ask_dense)
    described = (config.objective, model.path, model.prediction)
    if config.method == "consistency":
        return ConsistencyLoss(
            *described, teacher=networks.guided, student=networks.learn, alone=alone, serves=model.serves
        )
    if config.method == "score":
        return ScoreLoss(
            *described, teacher=networks.guided, student=networks.learn_alone, fake=networks.fake, alone=alone,
            students_step=lambda: config.objective.students_step(step()), own_samples=config.data.source == "captions",
        )  # fmt: skip
    return KnowledgeLoss(
        replace(config.objective, steps=about.steps), model.path, segments=about.segments, teacher=networks.teach, student=networks.learn,
        serves=model.serves, student_tap=model.tap(bare), teacher_tap=model.tap(bare if teacher is None else teacher),
        prediction=model.prediction, comm=group.comm if group else None, alone=alone,
    )  # fmt: skip
