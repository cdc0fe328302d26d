"""Tables of README and of docs/measurements.md say what the results files hold."""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "efficient_vdit_core/bench/results"
README, MEASURED = ROOT / "README.md", ROOT / "docs/measurements.md"
Row = dict[str, Any]
COLUMNS = ("shape", "color", "track", "outline", "identity", "clean", "steady")


# Of the H200's table: latent frames, tokens a frame, tokens before the video, heads
SHAPE = re.compile(r"(\d+) x (\d+)(?: behind (\d+))?, (\d+) x \d+$")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rows(name: str, key: str = "rows") -> dict[str, Row]:
    return {row["row"]: row for row in read(name)[key]}


def percent(share: float) -> str:
    return f"{100 * share:.0f}"


def judged(row: Row) -> str:
    low, high = row["all_right_interval"]
    columns = " | ".join(percent(row["columns"][name]) for name in COLUMNS)
    return f"{percent(row['all_right'])} ({percent(low)} to {percent(high)}) | {columns}"


def few_steps() -> Iterator[str]:
    names = {
        "Teacher, 100 steps": "teacher, 100 steps",
        "Teacher, 48 steps, those of the students' training": "teacher, 48 steps, those of the students' training",
        "Teacher, 24 steps": "teacher, 24 steps at the students' edges",
        "Teacher, 16 steps": "teacher, 16 steps at the students' edges",
        "Teacher, 4 steps": "teacher, 4 steps at the students' edges",
        "Student, 8 steps": "student, 8 steps",
        "Teacher, 2 steps": "teacher, 2 steps at the students' edges",
        "Student, 4 steps": "student, 4 steps",
        "Walking teacher, seed 1, 8 steps": "student, 8 steps, the teacher walking on, seed 1",
        "seed 2": "student, 8 steps, the teacher walking on, seed 2",
        "seed 3": "student, 8 steps, the teacher walking on, seed 3",
        "Seed 1, 4 steps": "student, 4 steps, the teacher walking on, seed 1",
        "from it a student of 4 segments, 300 steps, 4 steps": "student of 4 segments, 4 steps, the teacher walking on",
        "Seed 1, 600 steps more, 8 steps": "student, 8 steps, the teacher walking on, seed 1, 600 steps more",
        "On the teacher's ways, 1,500 steps of batch 32": "student of 4 segments on the teacher's ways, 4 steps, seed 0",
        "3,000 steps of batch 16": "student of 4 segments on the teacher's ways, 4 steps, seed 2",
        "The first, then on its own ways": "student of 4 segments on the teacher's ways, then on its own, 4 steps, seed 11",
        "the second, at twice the rate": "student of 4 segments on the teacher's ways, then on its own, 4 steps, seed 12",
        "On its own ways alone, seed 21": "student of 4 segments on its own ways, 4 steps, seed 21",
        "seed 22": "student of 4 segments on its own ways, 4 steps, seed 22",
        "Seed 21, 500 steps more": "student of 4 segments on its own ways, 500 steps more, 4 steps, seed 31",
        "seed 22, 500 steps more": "student of 4 segments on its own ways, 500 steps more, 4 steps, seed 32",
        "A finer walk, seed 21": "student of 4 segments on its own ways, the teacher's 24 steps of second order, 4 steps, seed 21",
    }
    found = rows("few_steps_tiny.json")
    for shown, name in names.items():
        row = found[name]
        yield f"| {shown} | {row['evaluations']} | {judged(row)} | {row['overlap']:.2f} |"
    for seed in (2, 3):
        row = found[f"student, 8 steps, the teacher walking on, seed {seed}, 600 steps more"]
        yield f"| seed {seed} | 8 | {judged(row)} | {row['overlap']:.2f} |"
    for seed in (22, 23):
        row = found[
            f"student of 4 segments on its own ways, the teacher's 24 steps of second order, 4 steps, seed {seed}"
        ]
        yield f"| seed {seed} | 4 | {judged(row)} | {row['overlap']:.2f} |"


def in_pairs() -> Iterator[str]:
    names = {
        "Teacher, 100 steps": "teacher, 100 steps",
        "Teacher, 4 steps": "teacher, 4 steps at the students' edges",
        "Student, 8 steps (`tiny 8 steps`)": "student, 8 steps",
        "the same, 4 steps": "student, 4 steps",
        "On its own ways, a finer walk, seed 21": "student of 4 segments on its own ways, seed 21",
        "seed 22": "student of 4 segments on its own ways, seed 22",
        "seed 23": "student of 4 segments on its own ways, seed 23",
        "the mean of the weights of the three": "the mean of the weights of the three",
        "and 1,200 steps more from there (`tiny 4 steps`)": "from that mean, 1,200 steps more, seed 41",
    }
    found = rows("four_steps_tiny.json")
    pairs = {(pair["one"], pair["other"]): pair for pair in read("four_steps_tiny.json")["differences"]}
    for shown, name in names.items():
        row, beside = found[name], pairs.get((name, "teacher, 100 steps"))
        share = f"{100 * row['all_right']:.1f} ({' to '.join(map(percent, row['all_right_interval']))})"
        yield f"| {shown} | {row['evaluations']} | {share} | {points(beside) if beside else ''} |"


def points(pair: Row) -> str:
    low, high = (100 * bound for bound in pair["all_right_interval"])
    return f"{100 * pair['all_right']:.1f} ({low:.1f} to {high:.1f})"


def epsilon() -> Iterator[str]:
    names = {
        "`tiny epsilon`, 50 steps": "tiny epsilon, 50 steps",
        "`tiny epsilon`, 4 steps": "tiny epsilon, 4 steps at the students' edges",
        "Student, 8 steps": "student of 8 segments, 8 steps",
        "Walking teacher, 8 steps": "student of 8 segments, the teacher walking on, 8 steps",
        "`tiny epsilon`, 2 steps": "tiny epsilon, 2 steps at the students' edges",
        "Student, 4 steps": "student of 8 segments, 4 steps",
        "Walking teacher, 4 steps": "student of 8 segments, the teacher walking on, 4 steps",
    }
    found = rows("epsilon_tiny.json")
    for shown, name in names.items():
        row = found[name]
        yield f"| {shown} | {row['evaluations']} | {judged(row)} | {row['overlap']:.2f} |"


def walk() -> Iterator[str]:
    kept = [
        {(row["order"], row["steps"]): row for row in read(f"walk_{name}.json")["rows"]} for name in ("tiny", "epsilon")
    ]
    for steps in (16, 24, 32, 48):
        cells = [f"{found[order, steps]['clip']:.3f}" for found in kept for order in (1, 2)]
        yield f"| {steps} | {' | '.join(cells)} |"


def sparse_student() -> Iterator[str]:
    shown = (
        "8 steps (`tiny 8 steps`)",
        "the same under the shipped plan, 30 % of the attention",
        "and after knowledge distillation (`tiny 8 steps sparse`)",
    )
    for name, row in zip(shown, read("sparse_student_tiny.json")["rows"], strict=False):  # behind them other seeds
        yield f"| {name} | {judged(row)} | {row['overlap']:.2f} |"


def score() -> Iterator[str]:
    found = rows("score_tiny.json")
    shown = {
        "Before": "start",
        "Consistency alone, 9 minutes of one core": "consistency alone",
        "With the score's term, 72 minutes": "with the score's term",
    }
    for name, row in ((name, found[kept]) for name, kept in shown.items()):
        yield f"| {name} | {judged(row)} | {row['overlap']:.3f} | {row['diversity']:.1f} |"


def score_of_the_mixture() -> Iterator[str]:
    kept = read("mixture_score.json")["rows"]
    for path in ("flow", "vp"):
        for segments in (2, 4):
            cells = []
            for weight in (0.0, 0.1, 1.0):
                of = [r for r in kept if (r["path"], r["segments"], r["score_weight"]) == (path, segments, weight)]
                distance, off, deviation = (
                    statistics.mean(r[name] for r in of) for name in ("energy_distance", "off_percent", "deviation")
                )
                cells.append(f"{distance:.4f}, {off:.0f} %, {deviation:.2f}")
            yield f"| {path}, {segments} steps | {' | '.join(cells)} |"


def residual() -> Iterator[str]:
    kept = {(row["plan"], row["every"]): row for row in read("residual_tiny.json")["rows"]}
    for plan in ("1:7", "0:8~1", "by head", "2:6", "4:4"):
        cells = []
        for every in (0, 6, 4, 3, 2):
            row = kept[plan, every]
            work = f"{'' if cells or plan != '1:7' else 'work '}{row['work']:.2f}"
            cells.append(f"{row['endpoint_error']:.2f}, {percent(row['all_right'])} %, {work}")
        yield f"| {plan if plan == 'by head' else f'`{plan}`'} | {' | '.join(cells)} |"


def searched_plans() -> Iterator[str]:
    kept = read("plan_table_tiny.json")["rows"]
    kinds = ("", ", neighbours", ", means")
    plans = ["by layer, 1 2 4", *(f"by {what}{kind}" for kind in kinds for what in ("layer", "head"))]
    for cost in ("2.3x", "3.3x", "5x"):
        for plan in plans:
            of = [row for row in kept if row["row"] == f"{plan}, {cost} less"]
            if not of or (cost, plan) in {("5x", "by head"), ("5x", "by layer, neighbours")}:  # not in the table
                continue
            assert len(of) == 3
            error, right, motion, distance = (
                statistics.mean(r[key] for r in of)
                for key in ("squared_attention_error", "all_right", "motion", "endpoint_error")
            )
            clean, way = (percent(statistics.mean(r["columns"][key] for r in of)) for key in ("clean", "track"))
            shown = plan.replace("1 2 4", "k = 1, 2, 4")
            yield f"| {shown} | {error:.3f} | {100 * right:.1f} | {clean} | {way} | {motion:.2f} | {distance:.2f} |"


def uniform_plans() -> Iterator[str]:
    file = read("plan_table_tiny.json")
    kept = file["rows_of_uniform_plans_beside_searched_ones"] + file["rows_of_plans_by_the_output"]
    shown = {
        "uniform 2, 1.88x less": "`2:6`",
        "by layer, 1 2 4, 1.88x less": "searched by layer, k = 1, 2, 4",
        "uniform 0~1+1, 2.13x less": "`0:8~1+1`",
        "uniform 1+1, 2.2x less": "`1:7+1`",
        "uniform 0+2, 2.66x less": "`0:8+2`",
    }
    for name in dict.fromkeys(row["row"] for row in kept):
        of = [row for row in kept if row["row"] == name]
        error, distance = (statistics.mean(r[key] for r in of) for key in ("squared_attention_error", "endpoint_error"))
        clean, way = (percent(statistics.mean(r["columns"][key] for r in of)) for key in ("clean", "track"))
        right = ", ".join(f"{100 * r['all_right']:.1f}" for r in of)
        plan = shown.get(name, "by the output" if "by the output" in name else "searched by head, means")
        yield f"{plan} | {error:.3f} | {right} | {clean} | {way} | {distance:.2f} |"


def sentences() -> Iterator[str]:
    now, before = (read(name) for name in ("read_back_tiny.json", "v0.1.0/read_back_tiny.json"))
    times = f"({now['psnr_last']:.1f}) as in the first ({now['psnr_first']:.1f})"
    yield f"come back with {now['psnr']:.1f} dB, as good in the last frames {times}"
    yield f"overlap by {now['overlap']:.2f}, and all {now['clips']} are all right"
    yield f"come back with {before['psnr']:.1f} dB, {before['psnr_last']:.1f} in the last frames, {before['overlap']:.2f}, and"
    for name in ("read_back_crossing.json", "read_back_crossing_16_channels.json"):
        crossing = read(name)
        low, high = (f"{100 * share:.1f}".removesuffix(".0") for share in crossing["all_right_interval"])
        yield f"{crossing['clips']} clips come back with {crossing['psnr']:.1f} dB"
        yield f"{percent(crossing['all_right'])} % of them all right ({low} to {high})"
    anew = [100 * row["judged_anew"]["all_right"] for row in read("judged_anew_tiny.json")["rows"]]
    yield "({:.1f}, {:.1f} and {:.1f} % of 216 clips".format(*anew)


def bounds() -> Iterator[str]:
    clips = {
        "MiniMax-H3, 864x480, 5 s": ("minimax_h3", "864x480-5s"),
        "1344x768, 5 s": ("minimax_h3", "1344x768-5s"),
        "1344x768, 10 s": ("minimax_h3", "1344x768-10s"),
        "1344x768, 15 s": ("minimax_h3", "1344x768-15s"),
        "1344x768, 5 s with a reference video of 5 s": ("minimax_h3", "1344x768-5s-reference-video"),
        "Wan 2.2 14B, 832x480, 81 frames": ("wan_14b", "832x480-81f"),
        "1280x720, 81 frames": ("wan_14b", "1280x720-81f"),
        "LTX-2, 1280x704, 121 frames": ("ltx2", "1280x704-121f"),
        "1920x1088, 121 frames": ("ltx2", "1920x1088-121f"),
        "1920x1088, 241 frames": ("ltx2", "1920x1088-241f"),
    }
    for shown, (model, clip) in clips.items():
        kept = {
            r["preset"]: r for r in read(f"bounds_{model}.json")["rows"] if (r["clip"], r["kind"]) == (clip, "preset")
        }
        first = min(kept, key=len)
        row = kept.pop(first)
        yield (
            f"| {shown} | {percent(row['attention_share'])} % | `{first}` | {_gains(row)} | {row['int8_alone']:.2f}x | "
            f"{row['with_int8']:.2f}x |"
        )
        for preset, row in kept.items() if "reference" not in clip else ():
            note = ", for weights distilled under it" if preset.endswith("strong") else ""
            yield f"| | | `{preset}`{note} | {_gains(row)} | | {row['with_int8']:.2f}x |"


def several_gpus() -> Iterator[str]:
    clips = {
        "MiniMax-H3 1344x768, 5 s": ("minimax_h3", "1344x768-5s", "minimax_h3_strong"),
        "the same, 10 s": ("minimax_h3", "1344x768-10s", "minimax_h3_strong"),
        "the same, 15 s": ("minimax_h3", "1344x768-15s", "minimax_h3_strong"),
        "Wan 2.2 14B, 1280x720, 81 frames": ("wan_14b", "1280x720-81f", "wan"),
        "LTX-2, 1920x1088, 241 frames": ("ltx2", "1920x1088-241f", "ltx_av"),
    }
    for shown, (model, clip, preset) in clips.items():
        rows = [r for r in read(f"bounds_{model}.json")["rows"] if r["clip"] == clip and "gpus" in r]
        for plan, head in (("none", f"{shown} | none"), (preset, f"| `{preset}`")):
            gains = (
                " / ".join(
                    f"{r['speedup']:.2f}-{r['speedup_overlapped']:.2f}x"
                    for r in rows
                    if (r["plan"], r["gpus"]) == (plan, gpus)
                )
                for gpus in (2, 4)
            )
            yield f"| {head} | {' | '.join(gains)} |"


def _gains(row: dict[str, Any]) -> str:
    """Of a step, and of runs of so many whose first stays dense."""
    runs = (steps / (1 + (steps - 1) / row["bound"]) for steps in (4, 8))
    return " | ".join(f"{gain:.2f}x" for gain in (row["bound"], *runs))


@pytest.mark.parametrize(
    ("document", "lines", "count"),
    [
        (MEASURED, few_steps, 27),
        (MEASURED, in_pairs, 9),
        (MEASURED, epsilon, 7),
        (MEASURED, walk, 4),
        (MEASURED, sparse_student, 3),
        (MEASURED, score, 3),
        (MEASURED, score_of_the_mixture, 4),
        (MEASURED, residual, 5),
        (MEASURED, searched_plans, 15),
        (MEASURED, uniform_plans, 13),
        (MEASURED, sentences, 8),
        (README, bounds, 23),
        (README.parent / "docs" / "several_gpus.md", several_gpus, 10),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_table_holds_what_was_measured(document: Path, lines: Callable[[], Iterator[str]], count: int):
    text = document.read_text(encoding="utf-8").replace("**", "")
    text, expected = text if lines is not sentences else " ".join(text.split()), list(lines())
    assert len(expected) == count, "rows of the results are gone"
    missing = [line for line in expected if line not in text]
    assert not missing, "\n".join([f"{document.name} lacks", *missing])


def test_no_file_tells_a_diversity_that_one_clip_of_each_caption_cannot_have():
    assert {row["diversity"] for row in read("residual_tiny.json")["rows"]} == {None}
    of_one = [row for row in read("few_steps_tiny.json")["rows"] if row["clips"] <= 72]
    assert {row["diversity"] for row in of_one} == {None}


def test_the_tables_of_attention_on_the_h200_hold_what_was_measured():
    kept = read("h200/attention_alone.json")["rows"]
    shape, checked = (), 0
    section = MEASURED.read_text(encoding="utf-8").split("## On a GPU")[1].split("Over all 23 rows")[0]
    for line in section.splitlines():
        if not re.search(r"`\d+:\d+`", line):
            continue
        model, dense, pattern, fastest, gain, ideal = (cell.strip(" `") for cell in line.strip("|").split("|"))
        if model:
            found = SHAPE.search(model)
            assert found, model
            shape = tuple(int(number or 0) for number in found.groups())
        of = [
            r
            for r in kept
            if (r["frames"], r["tokens_per_frame"], r["prefix"], r["heads"]) == shape and "error" not in r
        ]
        if dense:
            assert_shown(dense, min(r["milliseconds"] for r in of if r["pattern"] == "full"))
        ours = [r for r in of if r["pattern"] == pattern and r["backend"] in ("frames", "parts", "triton", "flex")]
        best = min(ours, key=lambda row: row["milliseconds"])
        assert_shown(fastest, best["milliseconds"])
        assert f"(`{best['backend']}" in fastest, line
        assert_shown(gain, best["speedup"])
        assert_shown(ideal, best["ideal_speedup"])
        checked += 1
    assert checked == 15


def test_the_steps_on_the_h200_are_as_measured():
    kept = {(r["size"], r["pattern"]): r for r in read("h200/model_step.json")["rows"]}
    (line,) = (line for line in README.read_text(encoding="utf-8").splitlines() if "A whole step of Open-Sora" in line)
    patterns = ("full", "4:20", "2:22", "1:23")
    seconds = [kept["93x720p", pattern]["seconds"] for pattern in patterns]
    gains = ", ".join(f"{kept['93x720p', pattern]['speedup']:.1f}x" for pattern in patterns[1:])
    assert f"| {seconds[0]:.1f} s | {', '.join(f'{s:.1f}' for s in seconds[1:])} s (four, two, one) | {gains} |" in line


def assert_shown(shown: str, value: float) -> None:
    """A figure with as many digits as the document shows."""
    number = re.match(r"[\d.]+", shown)
    assert number, shown
    digits = len(number[0].partition(".")[2])
    assert f"{value:.{digits}f}" == number[0], f"{shown} is shown, {value} was measured"
