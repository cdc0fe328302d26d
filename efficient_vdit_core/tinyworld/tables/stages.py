"""The tiny world's table: every stage of the recipe, trained and judged, row by row, resumable at any point.

folder/seed-0/consistency-8/...   the runs, see `distill.recipe`
folder/seed-0/rows/NAME.json      one row's figures; a finished row is never computed again, and belongs to rows/settings.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...distill.families.model import read_plan, sparse_options
from ...distill.families.opensora_plan import OpenSoraPlanModel
from ...distill.runs.recipe import RecipeConfig, ThreeStages
from ...distill.runs.search_stage import plan_names
from ...generation.request import MAX_GUIDANCE
from ...limits.numbers import number, whole
from ...limits.quote import quoted
from ...storage.rows_file import RowsFile
from ...tiles import TilePattern, TokenGrid
from .judge import Judge, attention_speeds
from .rows import claim_rows, kept

GRID_720P = TokenGrid(8, 45, 80)  # the paper's 29 frames


@dataclass(frozen=True)
class TableConfig:
    """students: segments of the consistency models, trained one from the other in this order. headline: the student
    that is made sparse. captions x noises clips judge a row. guidance: the base's. headline_plan: the name of a
    searched plan.
    """

    students: tuple[int, ...] = (8, 20, 4)
    headline: int = 8
    headline_plan: str = "x-2.3"
    uniform: tuple[str, ...] = ("1:7", "2:6", "4:4")
    guidance: float = 3.0
    base_steps: tuple[int, ...] = (100, 20, 8, 4)
    reference_steps: int = 200
    captions: int = 64
    noises: int = 8
    seeds: int = 3

    def __post_init__(self) -> None:
        counts = {"captions": 10_000, "noises": 1000, "seeds": 1000, "reference_steps": 1000}
        for name, high in counts.items():
            whole(getattr(self, name), f"table.{name}", 1, high, "Correct the recipe.")
        number(self.guidance, "table.guidance", 0, MAX_GUIDANCE, why="Correct the recipe.")
        for name in ("students", "base_steps", "uniform"):
            values = getattr(self, name)
            if not 1 <= len(values) <= 64 or len(set(values)) < len(values):
                raise ValueError(
                    f"table.{name} is {quoted(values)}, expected 1 to 64 different values. Correct the recipe."
                )
        for name in ("students", "base_steps"):
            for count in getattr(self, name):
                whole(count, f"table.{name}", 1, 1000, "Correct the recipe.")
        for pattern in self.uniform:
            TilePattern.parse(pattern)
        if self.headline not in self.students:
            raise ValueError(
                f"table.headline is {quoted(self.headline)}, expected one of the students {quoted(self.students)}. Correct the recipe."
            )

    def check(self, recipe: RecipeConfig) -> None:
        """Raises ValueError now for what a later row would refuse: a plan that is not searched, steps beyond the model."""
        names = plan_names(recipe.search)
        if self.headline_plan not in names:
            raise ValueError(
                f"table.headline_plan is {quoted(self.headline_plan)}, expected one of the searched plans {quoted(names)}: "
                "r- and a threshold, or x- and a speed-up. Correct the recipe."
            )
        for segments in self.students:
            replace(recipe.consistency, segments=segments)  # refuses more segments than teacher_steps


@dataclass(frozen=True)
class Row:
    """``weights()`` trains what is not trained yet; an empty text is the base model. ``plan`` is a file, a pattern or
    nothing."""

    name: str
    steps: int
    weights: Callable[[], str | Path]
    guidance: float = 1.0
    plan: Callable[[], str | Path] | None = None
    headline: bool = False


class TinyTable:
    """All rows of one seed in ``folder``; training and noise both take the seed."""

    def __init__(self, table: TableConfig, recipe: RecipeConfig, folder: Path, seed: int = 0) -> None:
        training = {
            name: replace(getattr(recipe, name), seed=getattr(recipe, name).seed + seed)
            for name in ("consistency_training", "knowledge_training")
        }
        data = recipe.data if recipe.data.cache else replace(recipe.data, cache=str(folder / "cache"))
        self.table, self.seed, self.folder = table, seed, folder / f"seed-{seed}"
        self.recipe = replace(recipe, data=data, **training)
        self.stages = ThreeStages(self.recipe, self.folder)
        self._judge: Judge | None = None

    def rows(self) -> Iterator[Row]:
        """The rows in the order of their worth: a run that is stopped early has the first ones."""
        t = self.table
        base = lambda: ""  # noqa: E731
        dense = lambda: self.student(t.headline)  # noqa: E731
        yield from (Row(f"base, {n} steps", n, base, t.guidance, headline=n == t.base_steps[0]) for n in t.base_steps)
        for n in t.students:
            yield Row(f"consistency, {n} steps", n, lambda n=n: self.student(n), headline=n == t.headline)
        plan = lambda: self.plans()[t.headline_plan]  # noqa: E731
        yield Row(f"searched {t.headline_plan}", t.headline, dense, plan=plan, headline=True)
        yield Row(
            f"searched {t.headline_plan} + KD",
            t.headline,
            lambda: self.tuned(t.headline_plan, plan()),
            plan=plan,
            headline=True,
        )
        for pattern in t.uniform:
            yield Row(f"uniform {pattern}", t.headline, dense, plan=lambda p=pattern: p)
        others = {f"r-{r:g}": lambda n=f"r-{r:g}": self.plans()[n] for r in self.recipe.search.thresholds}
        for name, found in others.items():
            yield Row(f"searched {name}", t.headline, dense, plan=found)
        for name, found in others.items():
            yield Row(f"searched {name} + KD", t.headline, lambda n=name, p=found: self.tuned(n, p()), plan=found)
        for pattern in t.uniform[:2]:
            yield Row(
                f"uniform {pattern} + KD",
                t.headline,
                lambda p=pattern: self.tuned(p.replace(":", "-"), p),
                plan=lambda p=pattern: p,
            )
        yield Row(
            f"KD before consistency, {t.headline_plan}", t.headline, lambda: self.knowledge_first(plan()), plan=plan
        )

    def student(self, segments: int) -> Path:
        """The consistency model of so many segments; it starts from the one before it in ``students``."""
        order = self.table.students
        before = order.index(segments) - 1
        init = self.student(order[before]) if before >= 0 else ""
        return self.stages.consistency(f"consistency-{segments}", init=init, segments=segments)

    def plans(self) -> dict[str, Path]:
        return self.stages.plans("plans", self.student(self.table.headline), self.table.headline)

    def tuned(self, name: str, plan: str | Path) -> Path:
        return self.stages.knowledge(f"knowledge-{name}", self.student(self.table.headline), plan)

    def knowledge_first(self, plan: str | Path) -> Path:
        """The other order, under the same plan: knowledge distillation of the base, then consistency with the sparse
        model."""
        segments = self.table.headline
        tuned = self.stages.knowledge("first-knowledge", "", plan, segments=segments)
        return self.stages.consistency("then-consistency", tuned, plan, segments=segments)

    def judge(self) -> Judge:
        if self._judge is None:
            model = OpenSoraPlanModel(self.recipe.model)
            self._judge = Judge(model, captions=self.table.captions, noises=self.table.noises, seed=self.seed)
        return self._judge

    def claim(self) -> None:
        """Raises ValueError where the finished rows, or the reference beside them, are those of other settings."""
        names = ("captions", "noises", "guidance", "reference_steps", "students", "headline")
        judged = {name: getattr(self.table, name) for name in names}
        claim_rows(self.folder / "rows", self.recipe, **judged)

    def measure(self, row: Row) -> dict[str, Any]:
        """One row's figures, from its file where that stands."""
        self.claim()
        name = row.name.replace(" ", "-").replace(":", "-").replace(",", "")
        return kept(self.folder / "rows" / f"{name}.json", lambda: self._figures(row))

    def _figures(self, row: Row) -> dict[str, Any]:
        weights, plan = row.weights(), row.plan() if row.plan else None
        judge, t = self.judge(), self.table
        tile_plan = read_plan(str(plan)) if plan else None
        options = sparse_options(judge.model, tile_plan) if tile_plan else None
        module = judge.model.load(str(weights)).eval().requires_grad_(False)
        base = judge.model.load().eval().requires_grad_(False)
        reference = judge.reference(base, t.reference_steps, t.guidance, self.folder / "rows" / "reference.pt")
        latents = judge.sample(module, steps=row.steps, guidance=row.guidance, options=options)
        return {
            "row": row.name, "seed": self.seed, "steps": row.steps, "guidance": row.guidance,
            "evaluations": row.steps * (1 if row.guidance == 1.0 else 2), **judge.figures(latents, reference), **self._speed(tile_plan),
        }  # fmt: skip

    def bounds(self) -> list[dict[str, Any]]:
        """The rows of clips that no model made, see `Judge.bounds`; from their file where that stands."""
        self.claim()
        return kept(
            self.folder / "rows" / "bounds.json",
            lambda: [{"row": name, "seed": self.seed, **found} for name, found in self.judge().bounds().items()],
        )

    def _speed(self, plan: Any) -> dict[str, Any]:
        layers = self.judge().model.layers
        if plan is None:
            return {"plan": "dense", "sparsity": 0.0, "attention_ideal_speedup": 1.0, "attention_measured_speedup": 1.0}
        patterns = [plan.pattern(i, layers) for i in range(layers)]
        plain = [p for p in patterns if isinstance(p, TilePattern) and not (p.window or p.means)]
        counts = tuple(sorted({p.k for p in plain if p.k is not None and not p.is_full(GRID_720P.t)}))
        measured = attention_speeds(self.folder.parent / "attention-720p.json", tuple(sorted({1, 2, 4, *counts})))
        density = sum(p.density(GRID_720P.t) for p in patterns) / layers
        speeds = [1.0 if p.k is None or p.is_full(GRID_720P.t) else measured.get(p.k) for p in plain]
        # Windows, mean frames and heads that differ are not timed; a plan that has what is not timed claims no measured speed-up.
        timed = len(plain) == layers and None not in speeds
        share = sum(1 / speed for speed in speeds if speed) / layers if timed else None
        names = [p.name(GRID_720P.t) for p in patterns]
        return {
            "plan": " ".join(names), "sparsity": 1 - density,
            "attention_ideal_speedup": 1 / density, "attention_measured_speedup": 1 / share if share else None,
        }  # fmt: skip


def run_table(
    table: TableConfig,
    recipe: RecipeConfig,
    folder: Path,
    out: RowsFile,
    command: str,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train and judge everything; ``out`` keeps every row, so that a stopped run leaves what it has. Returns what the finished
    file holds."""
    import torch

    from ...bench.machine import describe_machine

    about: dict[str, Any] = {"command": command, "machine": describe_machine(torch.device("cpu"))}
    rows: list[dict[str, Any]] = []
    table.check(recipe)
    tables = [TinyTable(table, recipe, folder, seed) for seed in range(table.seeds)]
    for one in tables:
        one.stages.check()
        one.claim()
    for seed, one in enumerate(tables):
        if seed == 0:
            for found in one.bounds():
                rows.append(found)
                report(found)
        for row in one.rows():
            if seed and not row.headline:
                continue
            rows.append(one.measure(row))
            out.keep(about, rows)
            report(rows[-1])
    out.finish(about, rows)
    return {**about, "rows": rows}
