"""Consistency distillation at the segments' beginnings, on ways that the teacher went before: what is kept of a way, what is
learnt from it, and what such a training refuses."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_together
from small_models import opensora_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from efficient_vdit_core import cli
from efficient_vdit_core.distill.config import DataConfig, DistillConfig
from efficient_vdit_core.distill.data.clips import LatentFiles
from efficient_vdit_core.distill.data.noise import numbered_noise
from efficient_vdit_core.distill.data.prepare import prepare_data
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.forecast.memory import plan_memory
from efficient_vdit_core.distill.forecast.work import plan_work
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig, ConsistencyLoss
from efficient_vdit_core.distill.objectives.score import ScoreConfig
from efficient_vdit_core.distill.runs import trainer
from efficient_vdit_core.distill.runs.checks import check_ways
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.distill.runs.resume_check import CONFIG
from efficient_vdit_core.models.distilled import read_metadata
from efficient_vdit_core.sampling import segment_edges
from efficient_vdit_core.sampling.path import FlowPath, VPPath, clean_between, ddim_step, predict_x0
from efficient_vdit_core.storage.weight_files import read_state_dict
from efficient_vdit_core.tinyworld.worlds import WORLDS

sys.path.insert(0, str(Path(__file__).parent))
from training_ranks import sample_and_train  # noqa: E402

PATHS = {"vp": (VPPath(), "v_prediction"), "flow": (FlowPath(), "flow"), "flow shift 17": (FlowPath(17.0), "flow")}
LATENT = (4, 4, 8, 8)  # of 13 frames of 64 x 64
WORDS = 2


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("below", [0.0, 0.25, 0.7])
def test_what_leads_between_two_states_is_what_a_step_was_taken_with(name, below):
    path, _ = PATHS[name]
    times = path.clean + (path.start - path.clean) * torch.tensor([0.9, below], dtype=torch.float64)
    (a, a_to), (s, s_to) = path.coefficients(times)
    z, x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = ddim_step(z, x, a, s, a_to, s_to)
    torch.testing.assert_close(clean_between(z, there, a, s, a_to, s_to), x, rtol=1e-9, atol=1e-9)


def gaussian(path, prediction, scale=1.0):
    """The raw output of E[x | z] for data N(0, 0.6), of the network's time; one that errs says ``scale`` times that."""
    variance = 0.6

    def predict(z, time, condition=None):
        if path.kind == "vp":
            a, s = path.coefficients(time)
        else:
            s = time.double() / path.start
            a = 1 - s
        a, s = (c.view(-1, *[1] * (z.ndim - 1)) for c in (a, s))
        x = scale * z * a * variance / (a**2 * variance + s**2)
        noise = (z - a * x) / s
        return (a * noise - s * x if prediction == "v_prediction" else noise - x).to(z)

    return predict


def way_of(path, prediction, noise, steps, parts):
    """(B, parts + 1, ...): the DDIM way from noise in ``steps``, one by one, kept at ``parts`` edges."""
    predict, times = gaussian(path, prediction), segment_edges(steps, start=path.start, clean=path.clean)
    a, s = path.coefficients(times)
    z, kept = noise, [noise]
    for i in range(steps):
        out = predict(z, path.network_time(times[i : i + 1]).expand(len(z)))
        z = ddim_step(z, predict_x0(prediction, z, out, a[i], s[i]), a[i], s[i], a[i + 1], s[i + 1])
        if (i + 1) % (steps // parts) == 0:
            kept.append(z)
    return torch.stack(kept, 1)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("segments", [1, 3, 6])
def test_the_target_is_where_a_teacher_lands_that_walks_the_segment(name, segments):
    """The same as `target = "teacher"` has it, which asks the teacher anew at each sub-step."""
    path, prediction = PATHS[name]
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ways, predict = way_of(path, prediction, noise, 24, segments), gaussian(path, prediction)
    asked = ConsistencyConfig(segments=segments, teacher_steps=24, target="teacher")
    walking = ConsistencyLoss(asked, path, prediction, student=predict, teacher=lambda *args: (predict(*args[:3]),) * 2)
    learnt = ConsistencyLoss(
        ConsistencyConfig(segments=segments, states="teacher", teacher_steps=24), path, prediction, student=predict,
        teacher=None,  # nobody asks it
    )  # fmt: skip
    for segment in range(segments):
        z, target = learnt._on_way(ways, learnt.grid.at(torch.full((5,), segment + 1)))
        assert torch.equal(z, ways[:, segments - 1 - segment])
        begin = walking.grid.at(torch.full((5,), (segment + 1) * walking.grid.per_segment))
        # A flow's network is given its time in float32.
        torch.testing.assert_close(target, walking.target_of(z, None, begin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_a_student_that_jumps_as_the_teacher_went_has_no_loss(name):
    """And it is asked at the segments' beginnings alone, at the sampler's own times, each as often as the others."""
    path, prediction = PATHS[name]
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    ways, asked = way_of(path, prediction, noise, 24, 4), []
    times = segment_edges(4, start=path.start, clean=path.clean)
    a, s = (c.float() for c in path.coefficients(times))

    def jumps(z, time, condition):
        asked.append((z, time, condition))
        outs = []
        for z_one, t in zip(z, time, strict=True):
            k = int((path.network_time(times[:-1]) - t).abs().argmin())
            row = int((ways[:, k] - z_one).abs().sum(-1).argmin())
            kept = s[k + 1] / s[k]
            x = (ways[row, k + 1] - kept * z_one) / (a[k + 1] - kept * a[k])
            at = (z_one - a[k] * x) / s[k]
            outs.append(a[k] * at - s[k] * x if prediction == "v_prediction" else at - x)
        return torch.stack(outs)

    config = ConsistencyConfig(segments=4, states="teacher", loss="squared", weight="none")
    loss = ConsistencyLoss(config, path, prediction, student=jumps, teacher=None)
    found = loss(ways, torch.arange(8), torch.Generator().manual_seed(3))
    ((z, time, condition),) = asked
    assert float(found.total) < 1e-9 and set(found.parts) == {f"segment {k}" for k in range(4)}
    assert sorted(time.tolist()) == sorted(path.network_time(times[:-1]).tolist() * 2)
    assert condition.tolist() == list(range(8)), "each state goes with its own caption"
    assert all((ways[row] == z[row]).all(-1).any() for row in range(8))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("segments", [1, 3, 4])
def test_on_its_own_way_a_student_learns_where_it_is_led_and_how_the_teacher_goes_on(name, segments):
    """The states by hand, jump by jump; the target is that of a walking teacher there."""
    path, prediction = PATHS[name]
    student, teacher, asked = gaussian(path, prediction, 1.2), gaussian(path, prediction), []
    config = ConsistencyConfig(
        segments=segments, teacher_steps=12, states="student", target="teacher", loss="squared", weight="none"
    )
    loss = ConsistencyLoss(
        config, path, prediction, student=lambda z, *rest: asked.append((z, *rest)) or student(z, *rest), target=student,
        teacher=lambda *args: (teacher(*args[:3]),) * 2,
    )  # fmt: skip
    found = loss(torch.zeros(8, 3), torch.arange(8), torch.Generator().manual_seed(4))
    ((z, time, condition),) = asked
    again = torch.Generator().manual_seed(4)
    segment = loss.grid.draw(8, again).segment
    noise, times = torch.randn(8, 3, generator=again), segment_edges(segments, start=path.start, clean=path.clean)
    a, s = (c.float() for c in path.coefficients(times))
    own = [noise]
    for k in range(segments - 1):
        x = predict_x0(prediction, own[-1], student(own[-1], path.network_time(times[k : k + 1]).expand(8)), a[k], s[k])
        own.append(ddim_step(own[-1], x, a[k], s[k], a[k + 1], s[k + 1]))
    places = segments - 1 - segment
    expected = torch.stack([own[place][row] for row, place in enumerate(places.tolist())])
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(time, path.network_time(times[places])) and condition.tolist() == list(range(8))
    walking = ConsistencyLoss(
        replace(config, states="data"),
        path,
        prediction,
        student=student,
        teacher=lambda *args: (teacher(*args[:3]),) * 2,
    )
    target = walking.target_of(z, condition, walking.grid.beginning(segment))
    x = predict_x0(prediction, z, student(z, time), *(c.float()[:, None] for c in path.coefficients(times[places])))
    torch.testing.assert_close(found.total, (x - target).square().mean(), rtol=1e-4, atol=1e-6)


def test_processes_that_learn_on_their_own_ways_ask_equally_often():
    """Those that share a sharded network wait for one another in each call, wherever their examples stand."""
    path, prediction = PATHS["flow"]
    calls = {}
    for alone in (True, False):
        for seed in range(6):
            count, student, teacher = [], gaussian(path, prediction, 1.2), gaussian(path, prediction)
            loss = ConsistencyLoss(
                ConsistencyConfig(segments=4, teacher_steps=8, states="student", target="teacher"), path, prediction,
                student=student, alone=alone, target=lambda *args, c=count, s=student: c.append("student") or s(*args),
                teacher=lambda *args, c=count, t=teacher: c.append("teacher") or (t(*args[:3]),) * 2,
            )  # fmt: skip
            loss(torch.zeros(1, 3), torch.arange(1), torch.Generator().manual_seed(seed))
            calls.setdefault(alone, []).append((count.count("student"), count.count("teacher")))
    assert len(set(calls[True])) > 1 and set(calls[False]) == {(3, 2)}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A small model, and the configuration of a training on its ways by section."""
    words = lambda texts: (torch.ones(len(texts), WORDS, 8), torch.ones(len(texts), WORDS))  # noqa: E731
    monkeypatch.setattr(OpenSoraPlanModel, "text_encoder", lambda *_: words)
    monkeypatch.setattr(OpenSoraPlanModel, "text_size", (WORDS, 8))
    torch.manual_seed(0)
    model = opensora_plan(tmp_path, layers=1)
    (tmp_path / "captions.txt").write_text("a\nb\n")
    values = {
        "model": {"path": model.path, "transformer": model.transformer, "device": "cpu"},
        "data": {
            "source": "teacher", "captions": str(tmp_path / "captions.txt"), "cache": str(tmp_path / "cache"), "clips": 5,
            "teacher_steps": 8, "ways": 4, "frames": 13, "height": 64, "width": 64,
        },
        "objective": {"segments": 2, "states": "teacher", "guidance": 3.0},
        "training": {"steps": 3, "batch": 4},
    }  # fmt: skip

    def make(**changes):
        asked = {section: {**table, **changes.get(section, {})} for section, table in values.items()}
        return DistillConfig.from_dict({"method": "consistency", **asked})

    make.values = values
    return make


def prepared(config):
    return prepare_data(config, open_model(config.model), Path(config.data.cache), torch.device("cpu"))


@pytest.mark.parametrize("order", [1, 2])
def test_a_samples_way_is_kept_beside_it_from_its_noise_on(made, order):
    """Each state is where steps one by one from the numbered noise lead, those of second order by the answer half a step on; the
    clip is that of samples without ways, which are files of their own."""
    config = made(data={"teacher_order": order})
    alone = torch.stack(list(prepared(made(data={"ways": 0, "teacher_order": order})).clips.latents))
    data, model = prepared(config), open_model(config.model)
    ways, halves = data.clips.on_ways(4), data.clips.on_ways(2)
    assert len(sorted(Path(config.data.cache).glob("sample-*"))) == 10
    clips = torch.stack(list(data.clips.latents))
    assert torch.equal(clips, alone) and ways.captions == data.clips.captions == [("a",), ("b",)] * 2 + [("a",)]
    network, condition, negative = model.load().eval(), data.bank.batch(["a"], data.device), data.negative(1)
    times = segment_edges(8)
    levels = list(zip(*(c.tolist() for c in model.path.coefficients(times)), strict=True))
    for number in (0, 4):
        way, z = ways.latents[number], numbered_noise((1, *LATENT), "teacher", number, config.data.seed)
        assert way.shape == (5, *LATENT) and torch.equal(way[0], numbered_noise(LATENT, "teacher", number, 1))
        assert torch.equal(way[-1], clips[number]) and torch.equal(halves.latents[number], way[::2])
        slope, before = 0.0, None
        with torch.no_grad():
            for step, ((a, s), (a_to, s_to)) in enumerate(zip(levels[:-1], levels[1:], strict=True), start=1):
                time = times[step - 1 : step].float()
                without, out = (model.predict(network, z, time, c) for c in (negative, condition))
                x = predict_x0(model.prediction, z, without + 3.0 * (out - without), torch.tensor(a), torch.tensor(s))
                if before is not None and order == 2:
                    slope = (x - before) / float(times[step - 1] - times[step - 2])
                z, before = ddim_step(z, x + slope * float(times[step] - times[step - 1]) / 2, a, s, a_to, s_to), x
                if step % 2 == 0:
                    torch.testing.assert_close(way[step // 2], z[0], rtol=1e-4, atol=1e-4)


def test_samples_of_one_order_do_not_serve_another(made):
    first, second = (torch.stack(list(prepared(made(data={"teacher_order": n})).clips.latents)) for n in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.stack(list(prepared(made()).clips.latents)))


def test_ways_that_are_missing_are_gone_again_and_no_others(made, tmp_path):
    before = torch.stack(list(prepared(made()).clips.on_ways(4).latents))
    files = sorted((tmp_path / "cache").glob("sample-*"))
    old = files[0].stat().st_mtime_ns
    files[3].unlink()
    torch.testing.assert_close(
        torch.stack(list(prepared(made()).clips.on_ways(4).latents)), before, rtol=1e-4, atol=1e-3
    )
    assert files[0].stat().st_mtime_ns == old and len(sorted((tmp_path / "cache").glob("sample-*"))) == len(files)
    files[1].write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is damaged or half written\. Delete it"):
        list(prepared(made()).clips.on_ways(4).latents)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_student_is_trained_and_its_teacher_is_not_asked(made, tmp_path, monkeypatch, train):
    """It is read once for the samples, and once as the student; a resumed run reads no more."""
    config = made(model={"train": train, **({"lora_rank": 2} if train == "lora" else {})})
    read, load = [], OpenSoraPlanModel.load
    monkeypatch.setattr(OpenSoraPlanModel, "load", lambda self, *args: read.append(args) or load(self, *args))
    asked, call = [], ConsistencyLoss.__call__
    monkeypatch.setattr(
        ConsistencyLoss, "__call__", lambda self, x, *args: asked.append((self, x.shape)) or call(self, x, *args)
    )
    monkeypatch.setattr(trainer.nn.Module, "eval", lambda self: self)  # a teacher would be told to
    result = trainer.distill(config, tmp_path / "run")
    about = read_metadata(result)
    assert (about.segments, about.steps, about.guidance, about.jumps_only) == (2, 2, 3.0, True)
    assert len(read) == 2 and [shape for _, shape in asked] == [(4, 3, *LATENT)] * 3
    changed = [float(value.float().abs().max()) for name, value in read_state_dict(result)[0].items() if "up" in name]
    assert train == "full" or (changed and max(changed) > 0)


@pytest.fixture
def on_its_own_ways(made):
    """The same on the student's ways, without a clip."""
    return lambda **changes: made(**{
        "data": {"source": "captions", "ways": 0},
        "objective": {"states": "student", "target": "teacher", "teacher_steps": 8, **changes.pop("objective", {})}, **changes,
    })  # fmt: skip


def test_a_plan_is_trained_at_the_jumps_of_its_teacher(made, tmp_path):
    """Who learns a plan from such a student is such a student; asked elsewhere, its teacher knows nothing."""
    student = str(trainer.distill(made(), tmp_path / "student"))
    values = {
        **made.values,
        "model": {**made.values["model"], "transformer": student},
        "training": {"steps": 1, "batch": 2},
    }

    def knowledge(**objective):
        return DistillConfig.from_dict({**values, "method": "knowledge", "objective": {"plan": "1:3", **objective}})

    about = read_metadata(trainer.distill(knowledge(), tmp_path / "sparse"))
    assert (about.segments, about.steps, about.jumps_only) == (2, 2, True)
    for objective in ({"steps": 4}, {"segments": 4}, {"segments": 1}):
        with pytest.raises(ValueError, match="the teacher has learnt 2 jumps and nothing between"):
            trainer.distill(knowledge(**objective), tmp_path / "refused")


def test_a_student_learns_on_its_own_ways_from_captions_alone(on_its_own_ways, tmp_path):
    result = trainer.distill(on_its_own_ways(), tmp_path / "run")
    about = read_metadata(result)
    assert (about.segments, about.steps, about.guidance, about.jumps_only) == (2, 2, 3.0, True)
    assert not sorted((tmp_path / "cache").glob("sample-*"))
    work = plan_work(on_its_own_ways())
    with FlopCounterMode(display=False) as products, sdpa_kernel(SDPBackend.MATH):
        trainer.distill(on_its_own_ways(), tmp_path / "another run")
    assert work.examples * work.flops == pytest.approx(products.get_total_flops(), rel=0.1)
    with pytest.raises(ValueError, match=r"objective\.steps is 4, but with states = \"student\" the student learns"):
        trainer.distill(on_its_own_ways(objective={"steps": 4}), tmp_path / "steps")
    with pytest.raises(ValueError, match=r'or consistency with states = "student"'):
        trainer.distill(on_its_own_ways(objective={"states": "data"}), tmp_path / "data")


@pytest.mark.parametrize("settings", [{}, {"target": "teacher", "addim": True}], ids=str)
def test_on_its_own_ways_a_student_is_taught_by_the_teacher_alone(settings):
    with pytest.raises(ValueError, match=r'states is "student" with .* Set target = "teacher"\.$'):
        ConsistencyConfig(states="student", **settings)


def test_a_run_on_ways_goes_on_bit_for_bit(made, tmp_path, monkeypatch):
    whole = read_state_dict(trainer.distill(made(), tmp_path / "whole"))[0]
    compare = ConsistencyLoss.compare
    calls = []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(self, *args)

    monkeypatch.setattr(ConsistencyLoss, "compare", stop)
    stepwise = made(training={"save_every": 1})
    with pytest.raises(KeyboardInterrupt):
        trainer.distill(stepwise, tmp_path / "stopped")
    monkeypatch.setattr(ConsistencyLoss, "compare", compare)
    again = read_state_dict(trainer.distill(stepwise, tmp_path / "stopped"))[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_that_train_together_share_out_the_sampling(made, tmp_path, ranks):
    """Every number is drawn once, by one of them; the texts are encoded by the first. All train on all samples."""
    config = made(training={"batch": 3}).to_dict()
    (tmp_path / "cache").mkdir()
    found = run_together(
        sample_and_train, [(config, str(tmp_path / "run"), rank, ranks, str(tmp_path)) for rank in range(ranks)], 300.0
    )
    assert [told["drawn"] for told in found] == [list(range(rank, 5, ranks)) for rank in range(ranks)]
    assert [told["encoded"] for told in found] == [1, 0, 0][:ranks]
    assert len(sorted((tmp_path / "cache").glob("sample-*"))) == 5 and len({told["file"] for told in found}) == 1
    assert read_metadata(Path(found[0]["file"])).segments == 2
    together = torch.stack(list(prepared(made()).clips.on_ways(4).latents))
    shutil.rmtree(tmp_path / "cache")
    torch.testing.assert_close(
        together, torch.stack(list(prepared(made()).clips.on_ways(4).latents)), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data": {"ways": 0}},
            r"data\.ways is 0, expected a multiple of the 2 segments.*data\.ways = 2 and data\.teacher_steps to a",
        ),
        ({"objective": {"segments": 3}}, r"data\.ways is 4, expected a multiple of the 3 segments"),
        (
            {"objective": {"steps": 4}},
            r"objective\.steps is 4, but .* asked between them in so many\. Set objective\.segments to 4",
        ),
        ({"objective": {"guidance": 2.0}}, r"objective\.guidance is 2\.0 and data\.guidance 3, expected the same"),
        ({"data": {"guidance": 4.0}}, r"objective\.guidance is 3\.0 and data\.guidance 4, expected the same"),
        ({"data": {"negative_share": 0.1}}, r"data\.negative_share is 0\.1, but .* Leave it out\.$"),
        ({"model": {"host_teacher": True}}, r"asks no teacher"),
        ({"data": {"ways": 3}}, r"data\.ways is 3, expected 0, or .* a number that divides its 8 steps"),
        ({"data": {"source": "videos"}}, r"data\.ways is 4, expected 0, or with source \"teacher\""),
        ({"data": {"ways": 9}}, r"data\.ways"),
        ({"objective": {"addim": True}}, r"no step of it to correct \(addim\)"),
        ({"objective": {"target": "teacher"}}, r"none to walk on \(target\)"),
        ({"objective": {"teacher_order": 2}}, r"the order of its steps is that of the samples, data\.teacher_order"),
        ({"data": {"teacher_order": 3}}, r"data\.teacher_order"),
        (
            {"data": {"teacher_order": 2, "source": "captions", "ways": 0}},
            r"data\.teacher_order is 2, expected 1, or source .*teacher",
        ),
        ({"objective": {"states": "noise"}}, r"states is 'noise', expected one of data, teacher, student"),
        ({"objective": {"states": "data"}}, r'data\.ways is 4, but with states = "data" nothing is learnt from'),
        (
            {"objective": {"states": "student", "target": "teacher"}},
            r'data\.ways is 4, but with states = "student".* Leave it out, or set objective\.states = "teacher"\.$',
        ),
    ],
    ids=str,
)
def test_what_cannot_be_learnt_from_ways_is_refused_before_anything_is_made(made, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        trainer.distill(made(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("settings", [{"states": "teacher"}, {"states": "student", "target": "teacher"}], ids=str)
def test_a_score_starts_from_such_a_student_but_does_not_learn_so(settings):
    with pytest.raises(ValueError, match=r"states is '\w+', but score distillation"):
        ScoreConfig(**settings)


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_ways_without_guidance_make_a_student_without(made, guidance):
    objective = {"guidance": guidance} if guidance else {}
    config = made(data={"guidance": 1.0})
    check_ways(replace(config, objective=ConsistencyConfig(segments=2, states="teacher", **objective)))


def test_a_configuration_of_before_there_were_ways_goes_on(made, tmp_path):
    """Neither setting stands in its file."""
    (tmp_path / "run").mkdir()
    text = '[data]\nsource = "teacher"\ncaptions = "c.txt"\nteacher_steps = 8\n[objective]\nsegments = 2\n'
    (tmp_path / "run" / CONFIG).write_text('method = "consistency"\n' + text)
    before = DistillConfig.load(tmp_path / "run" / CONFIG)
    assert before.data.ways == 0 and before.objective.states == "data" and not before.objective.on_ways
    now = DistillConfig("consistency", ConsistencyConfig(segments=2),
                        data=DataConfig(source="teacher", captions="c.txt", teacher_steps=8))  # fmt: skip
    assert before.differences(now) == {}


def test_the_forecast_counts_no_teacher(made, tmp_path, monkeypatch):
    """Its memory is not held, and a step is the student's forward and backward alone."""
    on_ways, noised = made(), made(objective={"states": "data"})
    assert plan_memory(on_ways).held["teacher"] == 0 < plan_memory(noised).held["teacher"]
    work = plan_work(on_ways)
    prepared(on_ways)
    with FlopCounterMode(display=False) as products, sdpa_kernel(SDPBackend.MATH):
        trainer.distill(on_ways, tmp_path / "run")
    assert work.examples == 12 and work.examples * work.flops == pytest.approx(products.get_total_flops(), rel=0.1)
    assert work.flops < plan_work(noised).flops / 1.5


@pytest.mark.parametrize(("batch", "jumps"), [(1, 1.5), (4, 3), (8, 3)])
def test_the_forecast_of_a_students_own_ways_counts_its_jumps(on_its_own_ways, batch, jumps):
    """At four segments, beside the teacher's two steps of two forwards each."""
    asked = {"segments": 4, "teacher_steps": 8}
    of = {n: on_its_own_ways(objective={**asked, "guidance": n}, training={"batch": batch}) for n in (None, 3.0)}
    on_ways = plan_work(made_on_ways(of[3.0])).flops
    once = (
        plan_work(of[3.0]).flops - plan_work(of[None]).flops
    ) / 2  # guidance asks the teacher once more at each step
    assert plan_work(of[None]).flops == pytest.approx(on_ways + (jumps + 2) * once)


def made_on_ways(config):
    objective = ConsistencyConfig(segments=config.objective.segments, states="teacher", guidance=3.0)
    return replace(config, objective=objective)


@pytest.mark.parametrize("settings", [{"segments": 4}, {"segments": 1}, {"steps": 4}], ids=str)
@pytest.mark.parametrize("states", ["teacher", "student"])
def test_a_recipe_does_not_ask_such_a_student_elsewhere_in_stage_3(made, settings, states):
    values = {key: dict(table) for key, table in made.values.items()}
    few = {**values["objective"], "states": states, **({"target": "teacher"} if states == "student" else {})}
    asked = {"model": values["model"], "data": values["data"], "consistency": few}
    (name,) = settings
    with pytest.raises(ValueError, match=rf"knowledge\.{name} is \d, but with consistency\.states = \"{states}\""):
        RecipeConfig.from_dict({**asked, "knowledge": settings})
    fitting = RecipeConfig.from_dict({**asked, "knowledge": {name: 2}})
    assert RecipeConfig.from_dict({**asked, "order": "knowledge-only", "knowledge": settings})
    assert fitting.knowledge.steps in (0, 2)
    first = RecipeConfig.from_dict({**asked, "order": "knowledge-first"})
    assert [stage.objective.steps for stage in ThreeStages(first, Path()).planned()] == [0, 2]


def test_a_recipes_other_stages_take_the_clips_of_the_same_files(made, tmp_path):
    """The search and the plan's training see clips, not ways, and nothing is sampled twice."""
    values = {key: dict(table) for key, table in made.values.items()}
    config = RecipeConfig.from_dict({
        "model": values["model"], "data": values["data"], "consistency": values["objective"],
        "consistency_training": {"steps": 1, "batch": 2}, "knowledge_training": {"steps": 1, "batch": 2},
        "search": {"thresholds": [0.5], "captions": 1, "candidates": "1"},
    })  # fmt: skip
    results = ThreeStages(config, tmp_path / "recipe").run()
    assert [file.is_file() for files in results.values() for file in files] == [True]
    samples = sorted((tmp_path / "cache").glob("sample-*"))
    assert len(samples) == 5
    clips = prepared(made(objective={"states": "data"})).clips
    assert isinstance(clips.latents, LatentFiles) and clips.latents[0].shape == LATENT


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_captions_for_a_teachers_samples_are_none_that_are_judged(world, tmp_path):
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for file, seed in zip(files, (5, 5, 6), strict=True):
        asked = ["--world", world, "--count", "100", "--seed", str(seed), "--out", str(file)]
        assert cli.main(["tinyworld", "captions", *asked]) == 0
    lines = files[0].read_text().splitlines()
    assert len(lines) == 100 and files[0].read_text() == files[1].read_text() != files[2].read_text()
    held_out = {scene.caption(i) for scene in WORLDS[world].held_out_scenes(8) for i in range(3)}
    assert not held_out & set(lines)
    drawn = WORLDS[world].random_words(np.random.default_rng(0))
    assert any(word in " ".join(lines) for word in drawn.caption().split())


def test_captions_are_not_written_over_a_folder(tmp_path, capsys):
    assert cli.main(["tinyworld", "captions", "--count", "3", "--out", str(tmp_path)]) == 2
    assert "folder" in capsys.readouterr().err
