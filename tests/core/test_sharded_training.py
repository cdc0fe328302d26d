"""Distillation with weights sharded by FSDP2 over two gloo ranks, against the same two ranks data parallel."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig, ConsistencyLoss
from efficient_vdit_core.distill.runs.launch import make_accelerator
from efficient_vdit_core.models.opensora_plan.config import DiTConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.sampling.path import VPPath
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors

sys.path.insert(0, str(Path(__file__).parent))
from ranks import RankCrashed, run_together, through_crashes  # noqa: E402
from rounding import drift  # noqa: E402
from small_models import cogvideox  # noqa: E402
from training_ranks import train_on_ranks  # noqa: E402

pytest.importorskip("accelerate")

SMALL = DiTConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, caption_channels=8, sample_size=(4, 4), sample_size_t=4,
                  prediction_type="v_prediction")  # fmt: skip
LORA = {"train": "lora", "lora_rank": 3}
KINDS = {
    "full": {"training": {"steps": 5, "clip": 0.3, "accumulate": 2, "samples_every": 3, "samples": ["a"]}},
    "lora": {"model": {**LORA, "gradient_checkpointing": True}},
    "knowledge": {"method": "knowledge"},
    # Nothing of the last block's output is in this loss, and the frozen weights are in another precision than the
    # LoRA's.
    "taps": {
        "method": "knowledge",
        "objective": {"prediction": 0.0, "mlp": 0.0},
        "model": {**LORA, "dtype": "bfloat16"},
    },
    "muon": {"training": {"optimizer": "muon"}},
    "bf16": {"training": {"precision": "bf16"}},
    # One example a rank: in a step the student's own target is wanted by one rank and not by the other.
    "single": {"training": {"batch": 1, "steps": 8}},
    # Two adapters in turn, of which each step leaves one without a gradient.
    "score": {
        "method": "score",
        "objective": {"teacher_steps": 4, "guidance": 2.0, "fake_steps": 2},
        "model": {**LORA, "gradient_checkpointing": True},
        "training": {"steps": 9},
    },
    "wan": {"method": "knowledge", "model": {"family": "diffusers", "train": "full"}},
}


# In bf16 a product of matrices is rounded: 11 of them in a block and 3 beside the blocks, forward and backward; in Muon's
# orthogonalisation 5 times 3.
DRIFT = {
    "bf16": drift(torch.bfloat16, 2 * (11 * SMALL.num_layers + 3)),
    "muon": drift(torch.bfloat16, 5 * 3),
}
STEPS = 0.01 * (0.5 + 1 + 1 + 1)  # half and whole while the rate warms up


def apart(kind, name, value):
    """How far a weight of two runs may lie apart after 4 steps: the furthest entry, and all in the mean.

    In bf16 rounding decides the sign of gradients near 0, which Adam's first steps take, and the directions of small
    singular values, which Muon's iteration enlarges threefold each time: such an entry may go the other way, all steps
    long. These are few; a fault of the sharding moves all of them.
    """
    if kind not in DRIFT:
        return 5e-4, 5e-4
    if kind == "muon" and "blocks." in name and value.ndim == 2:  # an orthogonal matrix, times 0.2 sqrt(widest side)
        return 2 * STEPS * 0.2 * max(value.shape) ** 0.5, 0.2 * STEPS / 4
    return 2 * STEPS, STEPS / 4


def settings(base, method="consistency", *, objective=None, model=None, training=None, data=None, beside="wan"):
    family = (model or {}).get("family", "opensora_plan")
    weights = {"transformer": str(base)} if family == "opensora_plan" else {"path": str(Path(base).parent / beside)}
    default = (
        {"segments": 2, "teacher_steps": 4, "guidance": 2.0}
        if method == "consistency"
        else {"segments": 2, "plan": "1:3"}
    )
    return {
        "method": method,
        "objective": {**default, **(objective or {})},
        "model": {**weights, "device": "cpu", **(model or {})},
        "data": data or {},
        "training": {"steps": 4, "batch": 2, "warmup": 2, "learning_rate": 0.01, "ema": 0.5, **(training or {})},
    }


def start_of(model):
    return model.get("transformer") or next((Path(model["path"]) / "transformer").glob("*.safetensors"))


def save_wan(folder):
    from diffusers import WanTransformer3DModel

    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": SMALL.num_layers,
        "ffn_dim": 32,
        "rope_max_seq_len": 32,
    }
    WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, freq_dim=16, **shape).save_pretrained(
        folder / "transformer"
    )
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs by name, made by one pair of ranks."""
    return through_crashes(lambda: all_runs(tmp_path_factory.mktemp("sharded")))


def save_bases(folder):
    """A small Open-Sora-Plan, whose file is returned, and beside it a small Wan and a small CogVideoX."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, OpenSoraT2V(SMALL).state_dict(), {"config": json.dumps(SMALL.to_dict())})
    save_wan(folder / "wan")
    cogvideox(folder / "cogvideox")
    return file


def all_runs(folder):
    torch.manual_seed(0)
    base = save_bases(folder / "base")

    def job(name, chosen, sharded, *, out="", stop=0):
        return {
            "name": name,
            "config": settings(base, **chosen),
            "out": str(folder / (out or name)),
            "sharded": sharded,
            "stop": stop,
        }

    jobs = [job(f"{kind} {way}", KINDS[kind], way == "sharded") for kind in KINDS for way in ("parallel", "sharded")]
    for first, second in ((True, True), (True, False), (False, True)):
        out = f"cut {first} {second}"
        jobs += [
            job(f"{out} 1", KINDS["full"], first, out=out, stop=4),
            job(f"{out} 2", KINDS["full"], second, out=out),
        ]
    jobs.append(job("adamw8bit", {"training": {"optimizer": "adamw8bit"}}, True))
    small = {"segments": 2, "teacher_steps": 4}
    training = settings(base)["training"]
    recipe = {"order": "merge", "model": settings(base)["model"], "consistency": small, "consistency_training": training,
              "search": {"captions": 1, "candidates": "1", "thresholds": [10.0]}, "knowledge_training": training}  # fmt: skip
    jobs.append({"name": "recipe", "recipe": recipe, "out": str(folder / "recipe"), "sharded": False})
    jobs.append(job("hosted", {"training": {"host_average": True}}, True))
    return {run["name"]: run for run in train_on_ranks(jobs)}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_ranks_learn_what_parallel_ranks_learn(runs, kind):
    parallel, sharded = runs[f"{kind} parallel"], runs[f"{kind} sharded"]
    assert (parallel["weights"], parallel["blocks"]) == (0, 0) and sharded["blocks"] == SMALL.num_layers
    assert sharded["weights"] > 50 and sharded["average"] > 20
    assert (sharded["teacher"] > 50) == (KINDS[kind].get("model", {}).get("train") != "lora")
    assert sharded["times"] == ["torch.float32"], "times of 0..999 are rounded in bf16"
    if kind in ("full", "bf16"):
        wanted = ["torch.bfloat16" if kind == "bf16" else "torch.float32"]
        assert parallel["teacher_computes"] == sharded["teacher_computes"] == wanted
    loose = DRIFT.get(kind, 1e-6)
    assert len(sharded["course"]) == len(parallel["course"])
    for got, wanted in zip(sharded["course"], parallel["course"], strict=True):
        assert got == pytest.approx(wanted, rel=loose, abs=loose)
    a, b = read_state_dict(sharded["file"])[0], read_state_dict(parallel["file"])[0]
    assert list(a) == list(b) and read_state_dict(sharded["file"])[1] == read_state_dict(parallel["file"])[1]
    for name, value in b.items():
        furthest, mean = apart(kind, name, value)
        torch.testing.assert_close(a[name], value, rtol=0, atol=furthest)
        assert float((a[name] - value).abs().mean()) < mean
    moved = [float(v.abs().max()) for n, v in a.items() if "attn1" in n and "lora_up" in n]
    if not moved:
        start = read_state_dict(start_of(sharded["config"]["model"]))[0]
        moved = [float((a[n] - v).abs().max()) for n, v in start.items() if "attn1" in n and "to_" in n]
    assert len(moved) > 5 and min(moved) > 3e-3


def checkpoint(run):
    return torch.load(f"{run['out']}/checkpoint.pt", weights_only=True)


def compare(a, b, **tolerance):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, **tolerance)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            compare(a[name], b[name], **tolerance)
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            compare(x, y, **tolerance)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("ways", "as_if"), [("True True", "sharded"), ("True False", "parallel"), ("False True", "parallel")]
)
def test_a_stopped_run_goes_on_whichever_way_it_is_started_again(runs, ways, as_if):
    """Bit for bit where both parts are sharded. It is stopped after the average's first change, and before the last
    step."""
    first, second, whole = runs[f"cut {ways} 1"], runs[f"cut {ways} 2"], runs[f"full {as_if}"]
    assert first["left"] == 128 + 15 and (len(first["course"]), len(second["course"])) == (4, 1)
    tolerance = {"rtol": 0, "atol": 0} if as_if == "sharded" else {"rtol": 1e-3, "atol": 5e-4}
    compare(checkpoint(second), checkpoint(whole), **tolerance)
    mine, others = checkpoint(second)["watch"].view(2, -1).tolist()
    assert mine[0] == others[0] == 5 and mine[1:] != others[1:], "each judges by losses of its own, before the stop too"
    compare(read_state_dict(second["file"])[0], read_state_dict(whole["file"])[0], **tolerance)


def test_the_checkpoint_has_one_form(runs):
    compare(checkpoint(runs["full sharded"]), checkpoint(runs["full parallel"]), rtol=1e-3, atol=5e-4)


def test_samples_are_those_of_a_parallel_run(runs):
    from PIL import Image

    pictures = []
    for way in ("parallel", "sharded"):
        files = sorted(os.listdir(f"{runs[f'full {way}']['out']}/samples"))
        assert files == ["step-000003"]
        with Image.open(f"{runs[f'full {way}']['out']}/samples/{files[-1]}/00.gif") as gif:
            gif.seek(gif.n_frames - 1)
            pictures.append(torch.tensor(list(gif.convert("RGB").tobytes())).float())
    assert float(pictures[0].std()) > 1 and float((pictures[0] - pictures[1]).abs().mean()) < 2


def test_a_recipe_is_searched_and_merged_by_one_process(runs):
    """It knows of the others by then, which is what gives each its own GPU."""
    calls = [json.loads(Path(runs["recipe"]["out"], f"calls-{rank}.json").read_text()) for rank in range(2)]
    assert calls == [[["search_plans", 2], ["save_safetensors", 2]], []]
    ((merged,),) = runs["recipe"]["results"].values()
    assert Path(merged).is_file()


def test_what_is_shared_out_does_not_wait_on_the_host(runs):
    assert "training.host_average is true, but under FSDP2" in runs["hosted"]["left"]


def test_adamw8bit_is_refused_on_sharded_weights(runs):
    assert "adamw8bit" in runs["adamw8bit"]["left"] and "Choose adamw" in runs["adamw8bit"]["left"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "started with DeepSpeed, expected plain data parallelism or FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "started with Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "Add --fsdp_version 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "model.gradient_checkpointing",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "over GPUs only.*without --use_fsdp"),
    ],
)
def test_launches_that_cannot_be_met_are_refused(monkeypatch, environment, message):
    # Set by accelerate's plugin too; named here, so that it is set back.
    for name, value in {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(DistillConfig.from_dict(settings("base")))


@pytest.mark.parametrize("addim", [False, True])
def test_a_target_that_nobody_wants_is_asked_among_processes(addim):
    """It changes nothing; but as many calls are made in every process."""
    path, calls = VPPath(), []

    def student(z, time, condition):
        calls.append(len(z))
        return torch.tanh(z)

    config = ConsistencyConfig(segments=4, teacher_steps=4, addim=addim)
    results = []
    for alone in (True, False):
        loss = ConsistencyLoss(
            config, path, "v_prediction", student=student, teacher=lambda z, t, c, g: (z, z), alone=alone
        )
        draw = loss.grid.draw(3, torch.Generator().manual_seed(0))
        assert bool(draw.first.all())
        results.append(loss.target_of(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), None, draw))
    assert torch.equal(*results) and calls == [1]


@pytest.mark.parametrize(
    ("work", "well", "badly", "kind", "message"),
    [
        (signal.raise_signal, signal.SIGCONT, signal.SIGABRT, RankCrashed, "rank 1, exit -6"),
        (int, "1", "x", AssertionError, "invalid literal for int"),
    ],
)
def test_a_crash_is_told_from_a_failure(work, well, badly, kind, message):
    with pytest.raises(AssertionError, match=message) as caught:
        run_together(work, [(well,), (badly,)], timeout=60)
    assert caught.type is kind
