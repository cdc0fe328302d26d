"""Chooses, for each evaluation of a shared out MODEL, whether its guidance branches go to groups of ranks. Runs in
ComfyUI's process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....efficient_vdit_core.attention import TokenLayout
from ....efficient_vdit_core.parallel.sharding.division import (
    AUTO,
    SEQUENCE,
    Division,
    Seconds,
    by_sequence,
    choose_division,
)
from ..families import uncompiled
from ..forward import forward_state
from .branches import BRANCHES_OF, why_whole
from .forecast import Layers, Measured
from .refusals import others_act_inside, wrapped
from .sharding import find_shardable


class Divider:
    """For the evaluations of one MODEL. ``asked``: one of ``DIVISIONS``; ``gathered``: the bytes of weights that a rank
    gathers in each, 0 where all have them whole."""

    def __init__(self, model: Any, asked: str, scheme: str, gathered: int) -> None:
        self.model, self.asked, self.scheme, self.gathered = model, asked, scheme, gathered
        self.family, _ = find_shardable(model)
        self.never = "division is sequence" if asked == SEQUENCE else self._why_never()
        self.chosen: dict[tuple[TokenLayout, int, Measured], tuple[Division, Seconds]] = {}

    def division(
        self, measured: Measured, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Division, str]:
        """How the ranks take an evaluation, and why its branches stay together, "" where nothing hinders them.

        ``inputs``: as of ``apply_model``, by name.
        """
        branches = max(1, len(options.get(BRANCHES_OF) or ()))
        why = self.never or ("" if branches > 1 else "one branch") or why_whole(inputs, branches)
        if not why:
            model = uncompiled(self.model.get_model_object("diffusion_model"))
            state = forward_state(self.family, model, inputs["x"], inputs["c_crossattn"], dict(inputs))
            why = state.reason if state.layout is None else ""
            if state.layout is not None:
                return self.of(measured, state.layout, branches)[0], ""
        return by_sequence(len(measured.rates), branches), why

    def of(self, measured: Measured, layout: TokenLayout, branches: int) -> tuple[Division, Seconds]:
        """The division of so many branches over these tokens, and the seconds of a group."""
        key = layout, branches, measured
        if key not in self.chosen:
            asked = SEQUENCE if self.never else self.asked
            seconds = Layers.of(self.model, layout, self.gathered).seconds(measured, self.scheme)
            self.chosen[key] = choose_division(asked, measured.rates, branches, seconds), seconds
        return self.chosen[key]

    def _why_never(self) -> str:
        """Ranks gather sharded weights together: all must run the same blocks, and another node may leave some out for one
        branch alone. What acts inside the model may also set one branch off against the other, as NAG does."""
        if self.gathered and wrapped(self.model):
            return "another node wraps the model, whose shared out weights all ranks gather in step"
        if self.asked == AUTO and others_act_inside(self.model):
            return "another node acts inside the model and may need both branches at once"
        return ""
