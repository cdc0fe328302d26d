"""What the cached residual wins back on the tiny base model, which nobody distilled: distance to its dense clips against
the work of the attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.call_shape import CallShape
from ...attention.hook.override import attention_override
from ...attention.hook.prepare import Preparation
from ...attention.hook.state import FORWARD_KEY, ForwardState
from ...attention.report.report import AttentionReport
from ...bench.machine import describe_machine
from ...distill.config import ModelConfig
from ...distill.families.model import Options
from ...distill.families.opensora_plan import OpenSoraPlanModel
from ...plan import TilePlan
from ...storage.rows_file import RowsFile
from ...tiles import TilePattern
from .judge import Judge

STEPS, GUIDANCE = 20, 3.0
# The base's own, at the work of 1:7: evdit search --model tiny --frames 29 --probes 4 --speedup 2.9 --head-groups 3
# --candidates 0,0~1,0~2,1,2,0+1,0~1+1,0~2+1,1+1,1~1+1 --prompt "a red circle moving right"
# --prompt "two green squares moving up slowly"
BY_HEAD = (
    "0:[0,2]0:8+1[1,3]0:8~1+1 1:[0,2]0:8~1+1[1,3]0:8+1 2:[0]0:8~2[1]0:8~1+1[2-3]0:8+1 "
    "3:[0]0:8~1[1-3]0:8+1 4:[0-2]0:8+1[3]0:8~1+1 5:[0]0:8~1+1[1-2]0:8+1[3]0:8~2"
)
PLANS = {
    **{name: TilePlan(uniform_pattern=TilePattern.parse(name)) for name in ("1:7", "2:6", "4:4", "0:8~1")},
    "by head": TilePlan.from_text(BY_HEAD),
}
EVERY = (0, 6, 4, 3, 2)
CPU = torch.device("cpu")


def run_residual_table(
    captions: int, seed: int, out: RowsFile, command: str, report: Callable[[dict[str, Any]], None]
) -> None:
    """Samples, judges and measures every plan with every residual; ``out`` keeps every row."""
    model = OpenSoraPlanModel(ModelConfig(path="tiny", device="cpu"))
    judge = Judge(model, captions=captions, noises=1, seed=seed)
    base = model.load().eval().requires_grad_(False)
    rows: list[dict[str, Any]] = []
    about = {
        "command": command,
        "machine": describe_machine(CPU),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "by_head": BY_HEAD,
    }

    def add(row: dict[str, Any], latents: Tensor, dense: Tensor) -> None:
        rows.append({**row, **judge.figures(latents, dense)})
        out.keep(about, rows)
        report(rows[-1])

    dense = judge.sample(base, steps=STEPS, guidance=GUIDANCE)
    add({"plan": "dense", "every": 0, "work": 1.0}, dense, dense)
    for (name, plan), every in itertools.product(PLANS.items(), EVERY):
        counts = AttentionReport()
        preparation = Preparation(plan, counts, residual_every=every)
        latents = judge.sample(base, steps=STEPS, guidance=GUIDANCE, options=guided_options(model, preparation))
        add({"plan": name, "every": every, "work": counts.snapshot().density}, latents, dense)
    out.finish(about, rows)


def guided_options(model: OpenSoraPlanModel, preparation: Preparation) -> Options:
    """The options of each forward of a run under guidance, which has two a step: with the prompt, then without."""
    plain, counted = model.options_with(attention_override(preparation)), itertools.count()

    def options(z: Tensor) -> dict[str, Any]:
        step, branch = divmod(next(counted), 2)
        if step % STEPS == 0 and branch == 0:
            preparation.forget()  # the next clips begin
        found = plain(z)
        state: ForwardState = replace(
            found[FORWARD_KEY], depth=model.layers, step=step % STEPS, steps=STEPS, branches=((branch, len(z)),)
        )
        shape = CallShape(len(z), model.heads, model.config.attention_head_dim, torch.float32, CPU)
        return {**found, FORWARD_KEY: preparation.keep_residual(state, shape)}

    return options
