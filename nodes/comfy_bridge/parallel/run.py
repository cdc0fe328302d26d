"""A sampling run of a shared out MODEL as ComfyUI's process sees it: each evaluation is sent to the workers, and the log
tells what the run took."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....efficient_vdit_core.parallel.pool.session import Launch, Session
from ....efficient_vdit_core.parallel.sharding.division import Division
from ..hook import Hook
from ..model_call import ModelCall, around_model
from .attention_counts import tell_report
from .branches import BRANCHES_OF, told
from .division import Divider
from .forecast import Measured
from .memory import WorkersWeights, offload
from .packing import pack
from .refusals import FORWARD_OPTIONS, Known
from .schedule import schedule_of

log = logging.getLogger("efficient_vdit")

SECOND_MODEL = (
    "The run samples with two models (such as Dual Model CFG Guider's), and the workers can be asked for one: the other would be "
    "computed with its weights. Bypass EVDiTSequenceParallel."
)
AFTER_RUN = ["keep", "offload", "stop"]


@dataclass
class Run:
    """What one sampling run took, for the log.

    ``name``: no other run's, of no process that uses the pool. ``going``: whether one goes on, with all that acts around it
    here. ``divisions``: how the evaluations of several branches were divided; ``single``: the branches that came alone.
    """

    name: str = ""
    going: bool = False
    steps: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    schemes: dict[str, int] = field(default_factory=dict)
    divisions: Counter[str] = field(default_factory=Counter)
    single: set[Any] = field(default_factory=set)

    def reset(self) -> None:
        self.name = uuid.uuid4().hex
        self.steps, self.sent, self.divisions, self.single = [], [], Counter(), set()

    def count_branches(self, division: Division, why: str, branches: Sequence[Any]) -> None:
        """``why`` as of ``Divider.division``; ``branches``: the numbers of ComfyUI's conditionings in the batch."""
        if division.branches == 1:
            self.single.update(branches)
            return
        how = f"by branch on {division.text()}" if division.by_branches else "by sequence"
        self.divisions[f"{how} ({why})" if why else how] += 1

    def summary(self, ranks: int) -> str:
        steady = self.steps[1:] or self.steps
        if not steady:
            return "no forward pass"
        mean, sent = 1000 * sum(steady) / len(steady), max(self.sent) / 2**20
        layers = ", ".join(f"{count} layers by {scheme}" for scheme, count in sorted(self.schemes.items()))
        divided = "".join(f"; {count} of them {how}" for how, count in sorted(self.divisions.items()))
        if len(self.single) > 1:
            divided += "; guidance branches came one at a time and went by sequence"
        return (
            f"{len(self.steps)} forward passes on {ranks} ranks, {mean:.0f} ms and up to {sent:.1f} MiB sent by a rank in each; "
            f"{layers}{divided}"
        )


@dataclass(frozen=True)
class Shared:
    """A shared out MODEL: the BaseModel of its own (a weak reference), its workers, what they know, how they share its
    evaluations out, what stands for their weights here, and its Sparse Attention, None where it has none."""

    made_for: Callable[[], Any]
    session: Session
    launch: Launch
    scheme: str
    known: Known
    divider: Divider
    weights: WorkersWeights
    hook: Hook | None
    run: Run = field(default_factory=Run)

    def evaluation(self) -> Any:
        """An APPLY_MODEL wrapper that ends the chain: the workers compute, this process waits and listens for Cancel."""

        def evaluate(call: ModelCall) -> Tensor:
            if call.model is not self.made_for() and not _acts_on(self, call.model):
                raise ValueError(SECOND_MODEL)
            self.known.check_evaluation(call.control, call.options)
            options = {name: value for name, value in call.options.items() if name in FORWARD_OPTIONS}
            inputs = {"x": call.x, "t": call.t, "c_concat": call.c_concat, "c_crossattn": call.c_crossattn}
            schedule = schedule_of(call.model.model_sampling)
            out, attention = self._computed({**inputs, **call.conds}, options, schedule)
            if self.hook is not None:
                tell_report(self.hook, call, attention)
            return out

        # Known by its mark, not by itself: a function that holds itself would keep the MODEL until Python looks for cycles.
        wrapper = around_model(evaluate)
        wrapper.shared = self
        return wrapper

    def before_run(self, _: Any) -> None:
        """An ON_PRE_RUN callback: refuses a run in which nothing of this MODEL acts, whose LoRAs would be missing too."""
        if not self.run.going:
            raise ValueError(SECOND_MODEL)

    def around_run(self, after_run: str) -> Any:
        """An OUTER_SAMPLE wrapper: refuses what would be lost on the way, and does what ``after_run`` says."""

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.known.check_run(executor.class_obj)
            self.run.reset()
            self.run.going = True
            self.session.forget_if_gone()
            try:
                return executor(*args, **kwargs)
            finally:
                self.run.going = False
                log.info("Efficient-vDiT: %s", self.run.summary(len(self.launch.devices)))
                if after_run == "stop":
                    self.session.stop()
                elif after_run == "offload":
                    offload(self.session)

        return wrapper

    def _computed(
        self, inputs: dict[str, Any], options: dict[str, Any], schedule: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the workers make of an evaluation, and the counts of its attention calls, which all ranks make together."""
        tensors: dict[str, Tensor] = {}
        given = pack({**inputs, "options": options}, tensors)
        levels = pack(schedule, tensors, "schedule")
        # A pool that starts anew measures anew.
        self.session.ready(self.launch, mm.throw_exception_if_processing_interrupted)
        measured = Measured.of(self.session.tests)
        division, why = self.divider.division(measured, inputs, options)
        self.run.count_branches(division, why, options.get(BRANCHES_OF) or ())
        about = {"run": self.run.name, "scheme": self.scheme, "weights": measured.weights}
        message = {"inputs": given, "schedule": levels, **about, **told(division)}
        start = time.perf_counter()
        poll = mm.throw_exception_if_processing_interrupted
        ranks, result = self.session.step(self.launch, message, tensors, poll)
        self.weights.arrived()
        self.run.steps.append(time.perf_counter() - start)
        self.run.sent.append(max(int(said["bytes"]) for said in ranks))
        self.run.schemes = ranks[0]["schemes"]
        return result["out"].to(inputs["x"].device), ranks[0]["attention"]


def _acts_on(shared: Shared, model: Any) -> bool:
    """Whether ``shared`` is the MODEL which has loaded ``model``: GPUs that share out a batch run copies of one."""
    patcher = getattr(model, "current_patcher", None)
    found = {} if patcher is None else patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    return any(getattr(act, "shared", None) is shared for functions in found.values() for act in functions)
