"""evdit recipe: the three stages of Efficient-vDiT in one resumable run, or the tiny world's tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import INTERRUPTED, recipe_forecast, say
from .arguments import check_chart, count, seed_number
from .command_line import command_line
from .distill import override
from .results import results_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the commands three-stage, tiny-table, tiny-plans and tiny-residual."""
    commands = parser.add_subparsers(dest="recipe_command", required=True, metavar="COMMAND")
    stages = commands.add_parser(
        "three-stage", help="consistency, search, knowledge; run it again to go on where it stopped"
    )
    stages.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe in TOML")
    recipe_forecast.add_arguments(stages)
    table = commands.add_parser("tiny-table", help="train and judge every row on the tiny world; run it again to go on")
    plans = commands.add_parser("tiny-plans", help="judge plans by layer and by head, with and without neighbours and mean frames, on the "
                                "tiny world; run it again to go on")  # fmt: skip
    plans.add_argument("--seeds", type=count(1, 1000), default=3, help="default: %(default)s")
    plans.add_argument(
        "--captions",
        type=count(1, 10_000),
        default=32,
        help="held-out ones, of which there are 72, three clips each, default: %(default)s",
    )
    plans.add_argument("--no-training", action="store_true", help="leave out the rows after knowledge distillation")
    plans.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="the rows whose names hold this; may be repeated"
    )
    residual = commands.add_parser("tiny-residual", help="what the cached residual wins back on the tiny base model")
    residual.add_argument(
        "--captions",
        type=count(1, 10_000),
        default=32,
        help="held-out ones, of which there are 72, default: %(default)s",
    )
    residual.add_argument("--seed", type=seed_number, default=0, help="of the noise, default: %(default)s")
    residual.add_argument("--json", type=Path, default=Path("tiny-residual.json"), metavar="FILE",
                          help="results; rows so far stand in FILE.part; default: %(default)s")  # fmt: skip
    for command in (table, plans):
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="default: the recipe that comes with the package"
        )
        command.add_argument("--json", type=Path, default=Path(f"{command.prog.split()[-1]}.json"), metavar="FILE",
                             help="results; rows so far stand in FILE.part; default: %(default)s")  # fmt: skip
    table.add_argument("--chart", type=Path, metavar="FILE", help="also draw them, as .svg")
    for command in (stages, table, plans):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the runs' folder")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                             help="one setting, over the file's; may be repeated")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; Ctrl-C saves and leaves."""
    try:
        return RECIPES[args.recipe_command](args)
    except KeyboardInterrupt:
        if getattr(args, "plan_memory", False) or "out" not in args:  # there is nothing to go on from
            raise
        say(f"interrupted; the same command goes on from {args.out}")
        return INTERRUPTED


def _three_stages(args: argparse.Namespace) -> int:
    from ..distill.runs.recipe import RecipeConfig, ThreeStages

    stages = ThreeStages(RecipeConfig.from_dict(_values(args, args.config)), args.out)
    if args.plan_memory:
        return recipe_forecast.say_forecast(stages, args)
    recipe_forecast.refuse_alone(args)
    for name, files in stages.run().items():
        say(f"{name}: {' with '.join(map(str, files))}")
    return 0


def _tiny_table(args: argparse.Namespace) -> int:
    from .. import assets
    from ..distill.config import read_section
    from ..distill.runs.recipe import RecipeConfig
    from ..storage.files import write_text
    from ..tinyworld.tables.chart import draw
    from ..tinyworld.tables.stages import TableConfig, run_table

    if args.chart:
        check_chart(args.chart, "--chart", args.json)
    values = _values(args, args.config or assets.recipe_path("tiny"))
    table = read_section(TableConfig, values.pop("table", {}), "table")
    say(
        f"{'row':<36} {'right':>6} {'95 %':>13} {'overlap':>7} {'endpoint':>8} {'motion':>7} {'divers.':>7} {'sparse':>6}"
    )
    with results_file(args.json) as out:
        results = run_table(table, RecipeConfig.from_dict(values), args.out, out, command_line(), _say_row)
    if args.chart:
        write_text(args.chart, draw(results))
    return 0


def _tiny_plans(args: argparse.Namespace) -> int:
    from .. import assets
    from ..distill.runs.recipe import RecipeConfig
    from ..tinyworld.tables.plans import PlanTableConfig, run_plan_table

    values = _values(args, args.config or assets.recipe_path("tiny"))
    values.pop("table", None)
    table = PlanTableConfig(captions=args.captions, seeds=args.seeds, train=not args.no_training, only=tuple(args.only))
    say(f"{'row':<40} {'error^2':>8} {'right':>6} {'endpoint':>8} {'motion':>7} {'overlap':>7} {'density':>7}")

    def row(found: dict[str, Any]) -> None:
        say(
            f"{found['row'] + ' (seed ' + str(found['seed']) + ')':<40} {_figure(found, 'squared_attention_error', 8, '.4f')} "
            f"{found['all_right']:>6.3f} {_figure(found, 'endpoint_error', 8)} {_figure(found, 'motion', 7)} "
            f"{found['overlap']:>7.3f} {found['density']:>7.2f}"
        )

    with results_file(args.json) as out:
        run_plan_table(table, RecipeConfig.from_dict(values), args.out, out, command_line(), row)
    return 0


def _tiny_residual(args: argparse.Namespace) -> int:
    from ..tinyworld.tables.residual import run_residual_table

    say(f"{'plan':<8} {'every':>5} {'work':>5} {'endpoint':>8} {'right':>6} {'motion':>7}")

    def row(found: dict[str, Any]) -> None:
        say(
            f"{found['plan']:<8} {found['every']:>5} {found['work']:>5.2f} {_figure(found, 'endpoint_error', 8)} "
            f"{found['all_right']:>6.3f} {_figure(found, 'motion', 7)}"
        )

    with results_file(args.json) as out:
        run_residual_table(args.captions, args.seed, out, command_line(), row)
    return 0


def _say_row(row: dict[str, Any]) -> None:
    name = row["row"] + (f" (seed {row['seed']})" if row["seed"] else "")
    bounds = row["all_right_interval"]
    between = "{:.3f}-{:.3f}".format(*bounds) if bounds else "-"
    say(
        f"{name:<36} {_figure(row, 'all_right', 6)} {between:>13} {_figure(row, 'overlap', 7)} "
        f"{_figure(row, 'endpoint_error', 8)} {_figure(row, 'motion', 7)} {_figure(row, 'diversity', 7, '.2f')} "
        f"{_figure(row, 'sparsity', 6, '.2f')}"
    )


def _figure(row: dict[str, Any], name: str, width: int, form: str = ".3f") -> str:
    """One that was measured, or a dash."""
    value = row.get(name)
    return f"{'-' if value is None else format(value, form):>{width}}"


def _values(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    from ..distill.config import read_toml

    values = read_toml(file)
    for text in args.overrides:
        override(values, text)
    return values


RECIPES = {
    "three-stage": _three_stages,
    "tiny-table": _tiny_table,
    "tiny-plans": _tiny_plans,
    "tiny-residual": _tiny_residual,
}
