"""Nothing that is not finite passes without a word: settings, weights, latents, pictures, training steps, exports."""

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from efficient_vdit_core.assets import recipe_path, tiny_path
from efficient_vdit_core.cli import main
from efficient_vdit_core.distill.config import DistillConfig, read_section, read_toml
from efficient_vdit_core.distill.data.clips import _finite
from efficient_vdit_core.distill.runs.export import export
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.media.video import to_frames
from efficient_vdit_core.models.distilled import DistillMetadata
from efficient_vdit_core.models.opensora_plan.checkpoint import read_transformer, read_vae
from efficient_vdit_core.models.opensora_plan.text import read_text_encoder
from efficient_vdit_core.models.opensora_plan.weights import check_weights, is_finite
from efficient_vdit_core.storage.files import write_torch
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors
from efficient_vdit_core.tinyworld.tables.stages import TableConfig
from efficient_vdit_core.training import StepLoss, TrainingRun

READERS = {"transformer": read_transformer, "vae": read_vae, "text_encoder": read_text_encoder}


def spoiled(part, folder, change):
    """A copy of the built-in model's part with its last large tensor changed."""
    weights, metadata = read_state_dict(tiny_path(part, "tiny"))
    name = [n for n, v in weights.items() if v.ndim > 1][-1]
    weights[name] = change(weights[name].clone())
    file = folder / part / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, weights, metadata)
    return file


def nan_inside(value):
    value.view(-1)[value.numel() // 2] = math.nan
    return value


@pytest.mark.parametrize("part", READERS)
@pytest.mark.parametrize(
    ("change", "said"),
    [(nan_inside, "NaN or infinite"), (lambda v: v * math.inf, "NaN or infinite"), (lambda v: v > 0, "is bool"),
     (lambda v: v.int(), "is int32")],
    ids=["nan", "infinite", "bool", "int"],
)  # fmt: skip
def test_weights_that_make_black_or_wrong_clips_are_refused(tmp_path, part, change, said):
    with pytest.raises(ValueError, match=f"diffusion_pytorch_model.safetensors is damaged: the tensor .*{said}"):
        READERS[part](spoiled(part, tmp_path, change))


def test_a_model_with_such_a_vae_makes_no_video(tmp_path, capsys):
    spoiled("vae", tmp_path, nan_inside)
    for part in ("transformer", "text_encoder"):
        spoiled(part, tmp_path, lambda v: v)
    out = tmp_path / "a.webp"
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x", "--out", str(out)]) == 2
    assert "NaN or infinite weights" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_finiteness_is_seen_in_every_type(dtype):
    good = torch.linspace(-4, 4, 1000).to(dtype)
    assert is_finite(good) and is_finite(torch.full((1000,), 3e38)) and is_finite(torch.empty(0))
    bad = good.float().clone()
    bad[500] = math.nan
    assert not is_finite(bad.to(dtype))
    check_weights({"a": good}, "file")


def test_pictures_that_are_not_finite_are_no_black_clip():
    assert to_frames(torch.zeros(3, 1, 2, 2)).tolist() == [[[[128] * 3] * 2] * 2]
    with pytest.raises(ValueError, match="pictures are not finite in float16"):
        to_frames(nan_inside(torch.zeros(3, 1, 2, 2, dtype=torch.float16)))


def test_latents_that_are_not_finite_reach_no_cache():
    with pytest.raises(ValueError, match="a.mp4 holds NaN or infinite latents"):
        _finite(nan_inside(torch.zeros(4, 2)), "a.mp4")


class Exploding(nn.Module):
    """One step of the optimiser below takes its weight beyond float32, from a finite loss and gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1e38, 0.0]))


def run(folder, good_steps):
    """A run whose steps change nothing at first; the one after them is of length 3e38."""
    model = Exploding()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e38)
    run = TrainingRun(model, [optimizer], folder=folder, steps=3, seed=0, warmup=0, final_rate=1.0)
    run.train(lambda generator: model.weight[0] * (0.0 if run.step < good_steps else 1.0), save_every=1)


def test_a_step_that_loses_the_weights_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match="weights became infinite or nan at step 2, so nothing is exported.*earlier state"
    ):
        run(tmp_path, good_steps=1)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 1 and all(v.isfinite().all() for part in ("model", "ema") for v in kept[part].values())


def test_the_first_step_may_lose_them_too(tmp_path):
    with pytest.raises(ValueError, match="at step 1, so nothing is exported. Start again"):
        run(tmp_path, good_steps=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [{}, [], {"model": {}}, None, "x"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    write_torch(tmp_path / "checkpoint.pt", content)
    with pytest.raises(ValueError, match="is no checkpoint of a training run.*Delete it"):
        run(tmp_path, good_steps=3)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    run(tmp_path, good_steps=3)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["weight"] = torch.zeros(5)
    write_torch(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="of another shape than this run's"):
        run(tmp_path, good_steps=3)


def test_a_watch_that_is_none_is_refused(tmp_path):
    run(tmp_path, good_steps=3)
    write_torch(tmp_path / "checkpoint.pt", {**torch.load(tmp_path / "checkpoint.pt", weights_only=True), "watch": "x"})
    with pytest.raises(ValueError, match=r"is no checkpoint of a training run.*Delete it"):
        run(tmp_path, good_steps=3)


def test_nothing_is_exported_where_the_average_is_not_finite(tmp_path):
    module = nn.Linear(2, 2)
    model = type("M", (), {"saved_dtype": torch.float32, "config_entry": lambda self: {}})()
    average = {"weight": torch.full((2, 2), math.nan)}
    with pytest.raises(ValueError, match=r"not finite \(1 tensors, such as weight\), so nothing is exported"):
        export(model, module, average, tmp_path, DistillMetadata("consistency", 1, 1), lora=False)  # pyright: ignore
    assert not list(tmp_path.iterdir())


def test_what_overflows_in_the_files_precision_is_not_exported(tmp_path):
    model = type("M", (), {"saved_dtype": torch.float16, "config_entry": lambda self: {}})()
    with pytest.raises(ValueError, match="nothing is exported"):
        export(model, nn.Linear(2, 2), {"weight": torch.full((2, 2), 1e6)}, tmp_path, DistillMetadata("consistency", 1, 1),
               lora=False)  # fmt: skip


BAD_NUMBERS = {
    "training": [("learning_rate", "inf"), ("learning_rate", "nan"), ("learning_rate", 0.0), ("clip", "nan"), ("weight_decay", "inf"),
                 ("steps", 10**30), ("accumulate", 10**9), ("batch", 10**9), ("seed", -1), ("seed", 2**32), ("warmup", -1), ("ema", "nan")],
    "data": [("clips", 10**12), ("guidance", "nan"), ("frames", 100_001), ("width", 8192), ("seed", 2**40),
             ("negative_share", "nan")],
    "model": [("lora_rank", 0), ("lora_rank", 10**9), ("lora_alpha", "inf"), ("path", "a\0b")],
    "objective": [("segments", 0), ("segments", 10**9), ("steps", 10**30), ("teacher_steps", 10**9), ("loss_scale", "nan"),
                  ("data_side", "inf")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "name", "value"), [(s, *pair) for s, pairs in BAD_NUMBERS.items() for pair in pairs], ids=str
)
def test_settings_out_of_range_are_refused_by_name(section, name, value):
    value = float(value) if value in ("inf", "nan") else value
    with pytest.raises(ValueError, match=rf"{name} .*expected|There are .* segments"):
        DistillConfig.from_dict({"method": "consistency", section: {name: value}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"knowledge": {"steps": 5000}}, "steps is 5000"),
        ({"knowledge": {"steps": 2}}, "at least segments"),
        ({"consistency": {"teacher_steps": 1600}}, "do not fit into 1000 trained noise levels"),
        ({"knowledge_training": {"steps": 10**30}}, "training.steps"),
        ({"search": {"captions": 10**9}}, "search.captions"),
        (
            {"knowledge_training": {"batch": 65_536}, "data": {"frames": 4093, "height": 4096, "width": 4096}},
            "A batch of",
        ),
        ({"data": {"clips": 10_000_000}}, "data.clips = 10000000"),
        ({"data": {"frames": 30}}, r"data.frames is 30, expected 4k \+ 1"),
    ],
)
def test_a_recipe_is_checked_to_its_end_before_it_begins(tmp_path, monkeypatch, values, message):
    monkeypatch.setattr("efficient_vdit_core.limits.memory.free_bytes", lambda device="cpu": 16 * 2**30)
    with pytest.raises(ValueError, match=message):
        ThreeStages(RecipeConfig.from_dict(values), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [{"seeds": -1}, {"seeds": 0}, {"captions": 10**9}, {"noises": 0}, {"students": []}, {"students": [0]}, {"students": [8, 8]},
     {"headline": 3}, {"headline_plan": "x-9"}, {"uniform": ["../x"]}, {"base_steps": [5000]}, {"reference_steps": 0},
     {"guidance": math.nan}, {"students": [128, 8]}],
    ids=str,
)  # fmt: skip
def test_the_tables_settings_are_checked_too(tmp_path, changes):
    values = read_toml(recipe_path("tiny"))
    with pytest.raises(ValueError, match=r"table\.|pattern|segments"):
        table = read_section(TableConfig, {**values.pop("table"), **changes}, "table")
        table.check(RecipeConfig.from_dict(values))


def test_the_shipped_recipe_passes(tmp_path):
    values = read_toml(recipe_path("tiny"))
    table = read_section(TableConfig, values.pop("table"), "table")
    recipe = RecipeConfig.from_dict(values)
    table.check(recipe)
    ThreeStages(recipe, tmp_path).check()
    assert json.dumps(table.students)


def slope(folder, height, steps=400, save_every=50, rate=1e-6):
    """A run whose loss at step n is ``height(n)``, with a part that rises and one that does not."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    run = TrainingRun(model, [optimizer], folder=folder, steps=steps, seed=0, warmup=0)

    def loss_of(generator):
        value = height(run.step) + 0.0 * model(torch.ones(1)).sum()
        return StepLoss(value, {"still": torch.tensor(1.0), "wild": value})

    run.train(loss_of, save_every=save_every)


def test_a_loss_that_rises_and_stays_up_ends_the_run_and_keeps_the_state_before(tmp_path):
    with pytest.raises(
        ValueError, match=r"diverges: the loss rose from 0\.1\d* to \S+ \(wild: from .*lower learning rate"
    ):
        slope(tmp_path, lambda step: 0.1 if step < 210 else 50.0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 200


@pytest.mark.parametrize(
    "height",
    [
        lambda step: 0.1 if step < 210 or step > 250 else 50.0,  # a rise that passes
        lambda step: 50.0 if step < 90 else 0.01 if step < 250 else 5.0,  # still below where it began
        lambda step: 1e-6 * step,  # a student that begins as its teacher
        lambda step: 1.0 + 0.9 * (-1) ** step,
    ],
    ids=["passing", "below", "from nothing", "noisy"],
)
def test_a_loss_that_rises_for_a_while_ends_nothing(tmp_path, height):
    slope(tmp_path, height)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 400


@pytest.mark.parametrize("steps", [400, 20])
def test_a_run_that_ends_while_its_loss_is_up_exports_nothing(tmp_path, steps):
    """Too late for its patience; of a short run as of a long one."""
    with pytest.raises(
        ValueError, match=r"may be diverging where it ends: the loss rose from 0\.1\d* to .*nothing is exported"
    ):
        slope(tmp_path, lambda step: 0.1 if step < steps - 3 else 50.0, steps=steps, save_every=steps // 4)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == steps * 3 // 4


@pytest.mark.parametrize("rise", [210, 330, 390], ids=["early", "too late to settle anew", "near the end"])
def test_the_same_command_again_exports_no_more_than_before(tmp_path, rise):
    """Nor does a lower rate that is still too high: the scale of the loss is that of the steps before its rise."""
    for rate in (1e-6, 1e-6, 1e-7):
        with pytest.raises(ValueError, match=r"diverg.*: the loss rose from 0\.1\d* to "):
            slope(tmp_path, lambda step: 0.1 if step < rise else 50.0 * (step - rise + 1), rate=rate)
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == rise // 50 * 50


def test_a_run_that_was_saved_while_its_loss_was_up_is_not_exported_either(tmp_path):
    """Where nothing was saved before the rise, Ctrl-C saves what there is."""

    def height(step):
        if step == 399:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.1 if step < 390 else 50.0

    with pytest.raises(KeyboardInterrupt):
        slope(tmp_path, height, save_every=500)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 400
    with pytest.raises(ValueError, match=r"may be diverging where it ends: the loss rose from 0\.1"):
        slope(tmp_path, height, save_every=500)


@pytest.mark.parametrize(
    "watch", [None, torch.zeros(12, dtype=torch.float64)], ids=["of an earlier version", "of two processes"]
)
def test_a_checkpoint_without_a_watch_of_this_process_settles_anew(tmp_path, watch):
    slope(tmp_path, lambda step: 0.1, steps=400)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["step"] = 150
    _ = state.pop("watch") if watch is None else state.update(watch=watch)
    write_torch(tmp_path / "checkpoint.pt", state)
    slope(tmp_path, lambda step: 50.0)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 400 and kept["watch"].tolist() == [250, 50.0, 50.0, 50.0, 50.0, 0]


def test_a_short_run_is_watched_too(tmp_path):
    with pytest.raises(ValueError, match=r"diverges: the loss rose from .* stayed there for 10 steps, to step 30"):
        slope(tmp_path, lambda step: 0.1 if step < 20 else 50.0, steps=40, save_every=10)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40])
def test_a_short_run_may_be_noisy(tmp_path, steps):
    """As batches of one example are, each at another time of diffusion."""
    draw = torch.Generator().manual_seed(0)
    losses = (10 ** (3 * torch.rand(steps, generator=draw, dtype=torch.float64) - 3)).tolist()
    slope(tmp_path, lambda step: losses[step], steps=steps)


class Interrupted(torch.optim.SGD):
    """Ctrl-C, a second time, when the weights are changed and the step is not over."""

    def step(self, closure=None):
        super().step(closure)
        if len(self.param_groups) and self.param_groups[0].setdefault("steps", 0) == 1:
            raise KeyboardInterrupt
        self.param_groups[0]["steps"] += 1


def test_a_step_that_ends_in_the_middle_keeps_the_checkpoint_before_it(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    before = []
    run = TrainingRun(model, [Interrupted(model.parameters(), lr=0.1)], folder=tmp_path, steps=3, seed=0, warmup=0)

    def loss_of(generator):
        before.append(model.weight.detach().clone())
        return model(torch.randn(1, 2, generator=generator)).square().sum()

    with pytest.raises(KeyboardInterrupt):
        run.train(loss_of, save_every=1)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (
        kept["step"] == 1
        and torch.equal(kept["model"]["weight"], before[1])
        and not torch.equal(model.weight, before[1])
    )


@pytest.mark.parametrize(
    "interrupted", [0, 1, 2], ids=["while sampling", "while the average goes in", "while it goes out"]
)
def test_no_mixture_of_weights_and_their_average_is_kept(tmp_path, interrupted):
    """A second Ctrl-C while samples are made, and a third while weights are copied."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    run = TrainingRun(model, [torch.optim.SGD(model.parameters(), lr=0.1)], folder=tmp_path, steps=4, seed=0, warmup=0)
    load, calls = model.load_state_dict, []

    def half(state, **options):
        calls.append(len(calls) + 1)
        if calls[-1] != interrupted:
            return load(state, **options)
        load(dict(list(state.items())[:2]), **options)
        raise KeyboardInterrupt

    def evaluate(_):
        own.update({name: value.clone() for name, value in model.state_dict().items()})
        model.load_state_dict = half
        with run.averaged():
            raise KeyboardInterrupt

    own = {}
    with pytest.raises(KeyboardInterrupt):
        run.train(
            lambda g: model(torch.randn(1, 2, generator=g)).square().sum(),
            save_every=2,
            evaluate=evaluate,
            evaluate_every=3,
        )
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == (2 if interrupted == 2 else 3)
    assert interrupted == 2 or all(torch.equal(value, own[name]) for name, value in kept["model"].items())
