"""Whole distillations whose clips are shared out over processes, against the same ones on fewer processes."""

import sys
from pathlib import Path

import pytest
import torch

from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.forecast.memory import plan_memory
from efficient_vdit_core.storage.weight_files import read_state_dict

sys.path.insert(0, str(Path(__file__).parent))
from ranks import through_crashes  # noqa: E402
from small_models import LAYERS  # noqa: E402
from test_sharded_training import LORA, SMALL, apart, checkpoint, compare, save_bases, settings, start_of  # noqa: E402
from training_ranks import train_on_ranks  # noqa: E402

pytest.importorskip("accelerate")

FRAMES = 5
KINDS = {
    "full": {"training": {"steps": 5, "clip": 0.3, "accumulate": 2}},
    "knowledge": {
        "method": "knowledge",
        "objective": {"plan": "1:4~1"},
        "model": {**LORA, "gradient_checkpointing": True},
    },
    "score": {
        "method": "score",
        "objective": {"segments": 2, "teacher_steps": 4, "guidance": 2.0, "fake_steps": 2},
        "model": LORA,
        "training": {"steps": 6},
    },
    "wan": {"method": "knowledge", "model": {"family": "diffusers", "train": "full", "gradient_checkpointing": True}},
    "cogvideox": {"method": "knowledge", "model": {"family": "diffusers", **LORA}, "beside": "cogvideox"},
}
WORDS = 5
# Clips whose activations count for more than the weights, and what is told of them in pixels.
LARGE = {"frames": 6, "side": 16, "words": WORDS, "counted": True}
PIXELS = {"frames": 21, "height": 128, "width": 128}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs by name."""
    return through_crashes(lambda: all_runs(tmp_path_factory.mktemp("sequence")))


def all_runs(folder):
    torch.manual_seed(0)
    base = save_bases(folder / "base")

    def job(name, kind, processes, *, sharded=False, stop=0, out=""):
        chosen = dict(KINDS[kind])
        chosen["training"] = {**chosen.get("training", {}), "sequence_parallel": processes}
        place = {"config": settings(base, **chosen), "out": str(folder / (out or name))}
        clips = {"frames": FRAMES, **({"words": WORDS} if kind == "cogvideox" else {})}
        return {"name": name, **place, "sharded": sharded, "stop": stop, **clips}

    def large(name, processes):
        chosen = {**KINDS["knowledge"], "data": PIXELS, "training": {"steps": 2, "sequence_parallel": processes}}
        chosen["objective"] = {"plan": "full"}  # as a forecast counts all plans
        return {**job(name, "knowledge", 1), **LARGE, "config": settings(base, **chosen)}

    one = [job(f"{kind} alone", kind, 1) for kind in KINDS]
    two = [job(f"{kind} {way}", kind, 2, sharded=way == "sharded") for kind in KINDS for way in ("shared", "sharded")]
    two += [
        job("cut 1", "full", 2, stop=3, out="cut"),
        job("cut 2", "full", 2, out="cut"),
        job("full parallel", "full", 1),
    ]
    two.append(job("three", "full", 3))
    one.append(large("large alone", 1))
    two.append(large("large shared", 2))
    lost = [{**job("lost", "full", 2), "dies": 2}]
    four = [job("full groups", "full", 2)]
    ran = [*train_on_ranks(one, 1), *train_on_ranks(two, 2), *train_on_ranks(four, 4), *train_on_ranks(lost, 2)]
    return {run["name"]: run for run in ran}


def same(got, want):
    """Courses and exported weights to rounding."""
    assert len(got["course"]) == len(want["course"]) > 3
    for mine, theirs in zip(got["course"], want["course"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6)
    a, b = read_state_dict(got["file"])[0], read_state_dict(want["file"])[0]
    assert list(a) == list(b) and read_state_dict(got["file"])[1] == read_state_dict(want["file"])[1]
    for name, value in b.items():
        furthest, mean = apart("", name, value)
        torch.testing.assert_close(a[name], value, rtol=0, atol=furthest)
        assert float((a[name] - value).abs().mean()) < mean
    moved = [float(v.abs().max()) for n, v in a.items() if "lora_up" in n]
    if not moved:
        start = read_state_dict(start_of(got["config"]["model"]))[0]
        moved = [float((a[n] - v).abs().max()) for n, v in start.items() if "attn1" in n and "to_" in n]
    assert len(moved) > 5 and min(moved) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_one_clip_learn_what_one_process_learns(runs, kind):
    same(runs[f"{kind} shared"], runs[f"{kind} alone"])


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_shared_out_under_sharded_weights_too(runs, kind):
    sharded = runs[f"{kind} sharded"]
    assert sharded["weights"] > 50 and sharded["blocks"] == (LAYERS if kind == "cogvideox" else SMALL.num_layers)
    same(sharded, runs[f"{kind} alone"])


def test_each_of_them_holds_what_is_planned(runs, monkeypatch):
    monkeypatch.setattr(OpenSoraPlanModel, "text_size", (WORDS, 8))
    peaks = [runs[f"large {way}"]["peak"] for way in ("alone", "shared")]
    plans = [plan_memory(DistillConfig.from_dict(runs[f"large {way}"]["config"])) for way in ("alone", "shared")]
    assert [plan.step() for plan in plans] == pytest.approx(peaks, rel=0.1) and peaks[1] < 0.75 * peaks[0]


def test_groups_are_data_parallel(runs):
    """Two groups of two, against two processes with a clip each."""
    same(runs["full groups"], runs["full parallel"])


def test_a_stopped_run_goes_on_bit_for_bit(runs):
    assert runs["cut 1"]["left"] == 128 + 15 and len(runs["cut 2"]["course"]) == 2
    compare(checkpoint(runs["cut 2"]), checkpoint(runs["full shared"]), rtol=0, atol=0)


def test_processes_that_are_no_whole_groups_are_refused_before_the_folder_is_claimed(runs):
    assert "sequence_parallel is 3, expected a divisor of the 2 processes" in runs["three"]["left"]
    assert not Path(runs["three"]["out"]).exists()


def test_the_others_end_with_a_sentence_where_a_process_dies(runs):
    assert "Another process of this training ended after step 2" in runs["lost"]["left"]
    assert len(runs["lost"]["course"]) == 2
