"""How much a training will compute, found before it starts: the FLOPs of one example, counted on the meta device. Sparse
plans are counted as dense, so that under one it takes less; one process is reckoned with."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from ..config import DistillConfig, learns_on_ways
from ..objectives.consistency import STUDENT, TEACHER
from ..objectives.grid import sub_steps
from ..objectives.knowledge import DATA, forwards_of_ways
from .memory import FusedAttention, meta_inputs, meta_student, opened


@dataclass(frozen=True)
class WorkPlan:
    """examples: that the whole training sees. flops: of each."""

    examples: int
    flops: float

    def hours(self, tflops: float) -> float:
        """On one GPU that computes so many TFLOP a second."""
        return self.examples * self.flops / (tflops * 1e12) / 3600


def plan_work(stage: DistillConfig, frozen: int = 0) -> WorkPlan:
    """The work of one stage's training; ``frozen`` as of `memory.plan_memory`."""
    model, t = opened(stage.model), stage.training
    student, inputs = meta_student(stage, model, frozen), meta_inputs(stage, model, 1)
    attention = FusedAttention()
    with FlopCounterMode(display=False) as counter:
        out = model.predict(student, *inputs, model.options_with(attention)(inputs[0]))
        asked = counter.get_total_flops() + attention.flops
        out.float().square().sum().backward()
        learnt = counter.get_total_flops() + attention.flops
    return WorkPlan(t.steps * t.batch * t.accumulate, _example(stage, asked, learnt))


def _example(stage: DistillConfig, asked: float, learnt: float) -> float:
    """FLOPs of one example, from those of a forward without gradient and of one with its backward."""
    objective = stage.objective
    if stage.method == "knowledge":
        times = objective.steps or objective.segments
        ways = forwards_of_ways(stage.training.batch, times) if objective.states != DATA else 0.0
        return asked + learnt + ways * asked
    if learns_on_ways(stage):
        return learnt
    teacher = asked if objective.guidance is None else 2 * asked
    per_segment = sub_steps(objective.teacher_steps, objective.segments)
    walk = teacher * (per_segment + 1) / 2  # the mean over a segment's places
    if objective.states == STUDENT:
        jumps = forwards_of_ways(1, objective.segments) if stage.training.batch == 1 else objective.segments - 1
        return learnt + jumps * asked + teacher * per_segment
    consistency = learnt + (walk if objective.target == TEACHER else teacher + asked)
    if stage.method == "consistency":
        return consistency
    rollout = objective.segments * asked
    students_turn = rollout + consistency + teacher + asked + learnt
    return (objective.fake_steps * (rollout + learnt) + students_turn) / (objective.fake_steps + 1)
