"""Kinds of plans on the tiny model at equal cost: by layer or by head, with or without neighbours and mean frames; and what
knowledge distillation wins back under them.

folder/seed-0/plans/KIND-COST.json   the plans, from a probing run with mean frames and one without
folder/seed-0/rows/NAME.json         one row's figures; a finished row is never computed again, and belongs to rows/settings.json
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import assets
from ...bench.machine import describe_machine
from ...bench.oracle import OracleRecord
from ...distill.families.model import sparse_options
from ...distill.families.opensora_plan import OpenSoraPlanModel
from ...distill.families.texts import TextBank
from ...distill.runs.recipe import RecipeConfig, ThreeStages
from ...distill.runs.search_stage import SearchConfig, WatchedRun, probe
from ...limits.quote import quoted
from ...plan import TilePlan
from ...search import ProbeRecord, SearchSettings, parse_candidates, plan_from_record
from ...search.plan_from_record import layer_errors
from ...search.record import ATTENTION, OUTPUT
from ...search.watch import make_watching_override
from ...storage.rows_file import RowsFile
from ..moving.scene import is_held_out, random_scene
from .judge import Judge
from .rows import claim_rows, kept

ARROW = "0,1,2,3,4"
NEAR = ARROW + ",0~1,1~1,2~1,0~2,1~2"
MEANS = "0,1,2,0~1,1~1,0~2,0+1,1+1,2+1,0~1+1,1~1+1,0~2+1,0+2,1+2,0~1+2,1~1+2"
DEFAULT = "by layer, 1 2 4"  # the candidates that a search has where none are given
KINDS = {
    DEFAULT: ("1,2,4", 1),
    "by layer": (ARROW, 1),
    "by head": (ARROW, 3),
    "by layer, neighbours": (NEAR, 1),
    "by head, neighbours": (NEAR, 3),
    "by layer, means": (MEANS, 1),
    "by head, means": (MEANS, 3),
}
# By what it does to the model's output, in place of the attention's error.
BY_OUTPUT = "by head, means, by the output"
UNIFORM = {f"uniform {pattern}": (pattern, 1) for pattern in ("2", "0~1+1", "1+1", "0+2")}
ALL_KINDS = KINDS | UNIFORM | {BY_OUTPUT: KINDS["by head, means"]}
TRAINED = (DEFAULT, "by layer", "by head, neighbours", "by head, means")
SPEEDUPS = (2.3, 3.3, 5.0)  # of the attention, by FLOPs
# The same pattern in every layer, at its own cost, and what is searched for that cost.
AT_EQUAL_COST = {
    1.88: ("uniform 2", DEFAULT, "by head, means", BY_OUTPUT),
    2.13: ("uniform 0~1+1", "by head, means", BY_OUTPUT),
    2.2: ("uniform 1+1", "by head, means", BY_OUTPUT),
    2.66: ("uniform 0+2", "by head, means", BY_OUTPUT),
}
STEPS = 8
PROBED_CAPTIONS = 16
BEST_TILES = "best tiles of each head and frame (no plan can)"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlanTableConfig:
    """captions x noises clips judge a row; ``train``: also after knowledge distillation; ``only``: the rows whose names
    hold one of these texts, all where there is none."""

    captions: int = 32
    noises: int = 3
    seeds: int = 3
    train: bool = True
    only: tuple[str, ...] = ()

    def wants(self, row: str) -> bool:
        """Whether the row of this name is asked for."""
        return not self.only or any(text in row for text in self.only)


@dataclass(frozen=True)
class Row:
    """``speedup`` 0 is dense attention; ``trained``: after knowledge distillation under the plan."""

    kind: str
    speedup: float = 0.0
    trained: bool = False

    @property
    def name(self) -> str:
        cost = f", {self.speedup:g}x less" if self.speedup else ""
        return f"{self.kind}{cost}{' + KD' if self.trained else ''}"


class PlanTable:
    """The rows of one seed in ``folder``: noise, probing and training take the seed."""

    def __init__(self, table: PlanTableConfig, recipe: RecipeConfig, folder: Path, seed: int) -> None:
        data = recipe.data if recipe.data.cache else replace(recipe.data, cache=str(folder / "cache"))
        training = replace(recipe.knowledge_training, seed=recipe.knowledge_training.seed + seed)
        self.table, self.seed, self.folder = table, seed, folder / f"seed-{seed}"
        self.probing_seed = 7_000 + seed
        self.recipe = replace(recipe, data=data, knowledge_training=training)
        self.student = assets.tiny_path("transformer", "tiny-8-steps")
        self.stages = ThreeStages(self.recipe, self.folder)
        self.model = OpenSoraPlanModel(self.recipe.model)
        self._records: dict[tuple[str, str], ProbeRecord] = {}

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.model, captions=self.table.captions, noises=self.table.noises, seed=self.seed)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The student that ships, which was never trained for sparsity."""
        return self.model.load(str(self.student)).eval().requires_grad_(False)

    @cached_property
    def texts(self) -> list[str]:
        """Captions to probe with, none of those that judge."""
        rng = np.random.default_rng(91_000 + self.seed)
        scenes = (random_scene(rng) for _ in iter(int, 1))
        found = (scene.caption() for scene in scenes if not is_held_out(scene))
        return [next(found) for _ in range(PROBED_CAPTIONS)]

    def record(self, candidates: str, error: str = ATTENTION) -> ProbeRecord:
        """Errors of every candidate, from one dense run for those with mean frames and one for the others."""
        probed = MEANS if "+" in candidates else NEAR, error
        if probed not in self._records:
            config = SearchConfig(candidates=probed[0], captions=len(self.texts), seed=self.probing_seed, error=error)
            self._records[probed] = probe(config, self._probed)
        return replace(self._records[probed], candidates=parse_candidates(candidates))

    @cached_property
    def _probed(self) -> WatchedRun:
        bank, texts = TextBank.build([*self.texts, ""], partial(self.model.text_encoder, CPU)), self.texts
        return WatchedRun(self.model, self.module, bank, texts, self.shape, STEPS, STEPS, len(texts), CPU)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.latent_shape(self.model.size(0, 0, 0))

    def plan(self, kind: str, speedup: float) -> Path:
        """The plan file of a kind at a cost."""
        file = self.folder / "plans" / f"{_file_name(kind)}-{speedup:g}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            candidates, groups = ALL_KINDS[kind]
            error = OUTPUT if kind == BY_OUTPUT else ATTENTION
            record, model = self.record(candidates, error), self.model
            settings = SearchSettings(record.candidates, speedup=speedup, error=error, head_groups=groups)
            about = {"captions": self.texts, "seed": self.seed, "steps": STEPS}
            of_model = {"layers": model.layers, "family": model.family, "heads": model.heads}
            plan_from_record(record, settings, **of_model, about=about).save(file)
        return file

    def rows(self) -> Iterator[Row]:
        """Those that are asked for: all kinds before training first, then uniform plans beside searched ones, then the trained
        ones, the mildest first."""
        return (row for row in self._all_rows() if self.table.wants(row.name))

    def check_names(self) -> None:
        """Raises ValueError where a text of ``only`` is in the name of no row."""
        names = [*(row.name for row in self._all_rows()), BEST_TILES]
        for text in self.table.only:
            if not any(text in name for name in names):
                raise ValueError(
                    f"--only is {quoted(text)}, which is in the name of no row that is measured here, such as {quoted(names[1])}. "
                    "Correct it."
                )

    def _all_rows(self) -> Iterator[Row]:
        yield Row("dense")
        yield from (Row(kind, speedup) for speedup in SPEEDUPS for kind in KINDS if self._reaches(kind, speedup))
        yield from (Row(kind, speedup) for speedup, kinds in AT_EQUAL_COST.items() for kind in kinds)
        if self.table.train:
            trained = (Row(kind, speedup, trained=True) for speedup in SPEEDUPS for kind in TRAINED)
            yield from (row for row in trained if self._reaches(row.kind, row.speedup))

    def _reaches(self, kind: str, speedup: float) -> bool:
        return min(p.density(self.shape[1]) for p in parse_candidates(KINDS[kind][0])) <= 1 / speedup

    def claim(self) -> None:
        """Raises ValueError where the finished rows are those of other settings."""
        claim_rows(self.folder / "rows", self.recipe, captions=self.table.captions, noises=self.table.noises)

    def measure(self, row: Row) -> dict[str, Any]:
        """One row's figures, from its file where that stands."""
        self.claim()
        return kept(self.folder / "rows" / f"{_file_name(row.name)}.json", lambda: self._figures(row))

    def _figures(self, row: Row) -> dict[str, Any]:
        plan = TilePlan.load(self.plan(row.kind, row.speedup)) if row.speedup else None
        module = self._trained(row) if row.trained else self.module
        options = sparse_options(self.model, plan) if plan else None
        latents = self.judge.sample(module, steps=STEPS, options=options)
        about, found = self._about(row.kind, plan), self.judge.figures(latents, self.dense)
        return {"row": row.name, "seed": self.seed, **about, **found}

    @cached_property
    def dense(self) -> Tensor:
        """What the dense student makes of the judge's noise: endpoint errors are distances to it."""
        return self.judge.sample(self.module, steps=STEPS)

    def _trained(self, row: Row) -> torch.nn.Module:
        file = self.stages.knowledge(
            f"knowledge-{_file_name(row.name)}", self.student, self.plan(row.kind, row.speedup)
        )
        return self.model.load(str(file)).eval().requires_grad_(False)

    def _about(self, kind: str, plan: TilePlan | None) -> dict[str, Any]:
        """The plan, its density, and its squared error of the attention before training, a mean over layers."""
        if plan is None:
            return {"plan": "dense", "density": 1.0, "squared_attention_error": 0.0}
        errors = layer_errors(self.record(ALL_KINDS[kind][0]), plan.patterns, self.model.heads)
        about = {"plan": plan.to_text(), "density": plan.density(plan.frames or 1)}
        return about | {"squared_attention_error": sum(e**2 for e in errors) / len(errors)}

    def oracle(self) -> dict[str, Any]:
        """The squared error of the attention where each head and query frame keeps its best tiles, at each cost."""
        record = OracleRecord(tuple(1 / s for s in SPEEDUPS))
        self._probed.watch(make_watching_override(record.add), self.probing_seed)
        errors = {f"{s:g}": record.squared(1 / s) for s in SPEEDUPS}
        return {"row": BEST_TILES, "seed": self.seed, "squared_attention_error": errors}


def run_plan_table(
    table: PlanTableConfig,
    recipe: RecipeConfig,
    folder: Path,
    out: RowsFile,
    command: str,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Measures, and trains, everything; ``out`` keeps every row, so that a stopped run leaves what it has. Raises ValueError
    before the first where a recipe or a name of ``only`` cannot be."""
    about, rows = {"command": command, "machine": describe_machine(CPU)}, []
    tables = [PlanTable(table, recipe, folder, seed) for seed in range(table.seeds)]
    tables[0].check_names()
    for one in tables:
        one.stages.check()
        one.claim()
    for row in tables[0].rows():
        for one in tables:
            rows.append(one.measure(row))
            out.keep(about, rows)
            report(rows[-1])
    if table.wants(BEST_TILES):
        rows += [one.oracle() for one in tables]
    out.finish(about, rows)


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
