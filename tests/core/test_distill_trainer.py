"""Distillation runs as a user starts them, on a transformer of a few thousand weights: resume, refusals, export, LoRA,
knowledge."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pinning_driver import OnGpu, PinningDriver

from efficient_vdit_core.distill.config import DistillConfig, read_section, to_toml
from efficient_vdit_core.distill.data import prepare
from efficient_vdit_core.distill.data.clips import ClipSet
from efficient_vdit_core.distill.data.prepare import PreparedData
from efficient_vdit_core.distill.families.cpu_offload import largest_block, stream_blocks
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.texts import TextBank
from efficient_vdit_core.distill.lora.files import attach_frozen, comfy_lora, merged
from efficient_vdit_core.distill.lora.layers import (
    FAKE,
    STUDENT,
    active_adapter,
    adapted,
    add_lora,
    belongs_to,
    lora_off,
)
from efficient_vdit_core.distill.objectives import knowledge
from efficient_vdit_core.distill.objectives.consistency import ConsistencyLoss
from efficient_vdit_core.distill.objectives.features import FeatureTap, HostFeatures
from efficient_vdit_core.distill.objectives.knowledge import (
    KnowledgeConfig,
    KnowledgeLoss,
    forwards_of_ways,
    merge_deltas,
)
from efficient_vdit_core.distill.runs import export, trainer
from efficient_vdit_core.distill.runs.alternating import AlternatingLoss
from efficient_vdit_core.distill.runs.optimizers import check_optimizer
from efficient_vdit_core.distill.runs.recipe import RecipeConfig, ThreeStages
from efficient_vdit_core.distill.runs.resume_check import alone_in, claim_run
from efficient_vdit_core.models.distilled import DistillMetadata, read_metadata
from efficient_vdit_core.models.opensora_plan.checkpoint import load_transformer
from efficient_vdit_core.models.opensora_plan.config import DiTConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.sampling.path import FlowPath
from efficient_vdit_core.storage.locks import locked
from efficient_vdit_core.storage.weight_files import read_state_dict, save_safetensors
from efficient_vdit_core.training import StepLoss
from efficient_vdit_core.training.live_bytes import size_of
from efficient_vdit_core.training.run import seed_of

SMALL = DiTConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, caption_channels=8, sample_size=(4, 4), sample_size_t=4,
                  prediction_type="v_prediction")  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """A small transformer's file, of random weights."""
    torch.manual_seed(0)
    model = OpenSoraT2V(SMALL)
    file = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, model.state_dict(), {"config": json.dumps(SMALL.to_dict())})
    return file


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """Random latents and text states in place of the tiny world's."""

    def prepare(config, model, cache, device):
        g = torch.Generator().manual_seed(1)
        texts = ["a", "b c", ""]
        bank = TextBank({t: torch.randn(len(t) + 1, 8, generator=g) for t in texts})
        clips = ClipSet(torch.randn(6, 4, 4, 4, 4, generator=g), [("a",), ("b c", "a")] * 3)
        return PreparedData(clips, bank, "", torch.device("cpu"))

    monkeypatch.setattr(trainer, "prepare_data", prepare)
    monkeypatch.setattr("efficient_vdit_core.distill.data.tiny_world._check_size", lambda _: None)


def config(base, method="consistency", *, steps=4, objective=None, model=None, training=None, data=None):
    default = {
        "consistency": {"segments": 2, "teacher_steps": 8, "guidance": 2.0},
        "knowledge": {"segments": 2, "plan": "1:3"},
        "score": {"segments": 2, "teacher_steps": 4, "guidance": 2.0, "fake_steps": 2},
    }[method]
    if method == "score":
        model = {"train": "lora", "lora_rank": 3, **(model or {})}
    values = {
        "data": data or {},
        "method": method,
        "objective": {**default, **(objective or {})},
        "model": {"transformer": str(base), "device": "cpu", **(model or {})},
        "training": {"steps": steps, "batch": 4, "warmup": 2, "learning_rate": 0.01, **(training or {})},
    }
    return DistillConfig.from_dict(values)


def test_a_build_that_reads_no_videos_says_so_before_anything_is_made(base, tmp_path, monkeypatch):
    """The registry's, which starts no process."""
    monkeypatch.setitem(sys.modules, "efficient_vdit_core.media.read_video", None)
    with pytest.raises(ValueError, match=r"reads no videos\. Use a clone\.$"):
        trainer.distill(config(base, data={"source": "videos", "folder": str(tmp_path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_accelerate_it_is_told_how_to_get_it_for_this_python(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=" -m pip install accelerate tensorboard$"):
        trainer.distill(config(base), tmp_path / "run")


def test_the_result_loads_and_says_what_it_is(base, tmp_path):
    file = trainer.distill(config(base, objective={"segments": 2, "steps": 4}), tmp_path / "run")
    about = read_metadata(file)
    assert about == read_metadata(file.parent)
    assert (about.method, about.segments, about.steps, about.prediction, about.guidance) == (
        "consistency",
        2,
        4,
        "v_prediction",
        2.0,
    )
    assert about.schedule["kind"] == "vp" and about.plan is None
    student, teacher = load_transformer(file), load_transformer(base)
    assert student.config == SMALL
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert read_metadata(base) is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_stopped_run_goes_on_bit_for_bit(base, tmp_path, monkeypatch, request, name):
    """Also where the terminal closed."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    request.addfinalizer(lambda: signal.signal(number, before))
    whole = trainer.distill(config(base), tmp_path / "whole")
    seen = []
    compare = ConsistencyLoss.compare

    def stop_after_two(self, *args):
        seen.append(compare(self, *args))
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return seen[-1]

    monkeypatch.setattr(ConsistencyLoss, "compare", stop_after_two)
    with pytest.raises(SystemExit) as left:
        trainer.distill(config(base), tmp_path / "cut")
    assert left.value.code == 128 + number and len(seen) == 2
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    cut = trainer.distill(config(base), tmp_path / "cut")
    assert len(seen) == 4
    a, b = read_state_dict(whole)[0], read_state_dict(cut)[0]
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["consistency", "knowledge"])
def test_what_waits_on_the_host_changes_nothing_that_is_learnt(base, tmp_path, monkeypatch, method):
    """Also where a run goes on with it that ran out of memory before."""
    whole = trainer.distill(config(base, method), tmp_path / "whole")
    hosted = config(base, method, model={"host_teacher": True}, training={"host_average": True})
    (tmp_path / "gone on").mkdir()
    step = trainer.TrainingRun._one_step

    def stop_after_two(self, loss_of):
        if self.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, loss_of)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(trainer.TrainingRun, "_one_step", stop_after_two)
        trainer.distill(config(base, method), tmp_path / "gone on")
    for name in ("at once", "gone on"):
        found = trainer.distill(hosted, tmp_path / name)
        a, b = read_state_dict(whole)[0], read_state_dict(found)[0]
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def any_precision():
    """accelerate keeps one precision for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_student_and_teacher_compute_in_one_precision(
    base, tmp_path, monkeypatch, any_precision, hosted, precision, dtype
):
    seen, make_pair = {"student": set(), "teacher": set()}, trainer.make_pair

    def watched(*args):
        pair = make_pair(*args)
        for name, network in zip(seen, pair, strict=True):
            layer = network.transformer_blocks[0].attn1.to_q
            layer.register_forward_hook(lambda module, args, out, name=name: seen[name].add(out.dtype))
        return pair

    monkeypatch.setattr(trainer, "make_pair", watched)
    run = config(base, "knowledge", steps=1, model={"host_teacher": hosted}, training={"precision": precision})
    trainer.distill(run, tmp_path / "run")
    assert seen == {"student": {dtype}, "teacher": {dtype}}


def test_one_block_of_a_streamed_model_is_on_the_device_at_a_time(base):
    model = load_transformer(base).eval().requires_grad_(False)
    z, context = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 3, 8)
    asked = (z, torch.tensor([500.0]), context, torch.ones(1, 3))
    want = model(*asked)
    stream_blocks(model, torch.device("cpu"))
    sizes = []

    def count(*_):
        sizes.append(size_of(p for p in model.parameters() if p.device.type == "cpu"))

    count()
    for block in model.transformer_blocks:
        block.attn1.register_forward_pre_hook(count)
    assert torch.equal(model(*asked), want)
    count()
    # The model's own parameters, those that are in no module of it, come with its forward.
    own = size_of(model.parameters(recurse=False))
    assert sizes == [0, sizes[1], sizes[1], 0] and own < sizes[1] <= largest_block(model) + own


def test_a_finished_run_is_not_run_again(base, tmp_path, monkeypatch):
    file = trainer.distill(config(base, steps=2), tmp_path / "run")
    monkeypatch.setattr(trainer, "make_objective", None)
    assert trainer.distill(config(base, steps=2), tmp_path / "run") == file


def test_the_weights_are_written_last(base, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.distill(config(base, steps=1), tmp_path / "run")
    monkeypatch.undo()
    assert [f.name for f in (tmp_path / "run" / "transformer").iterdir()] == ["config.json"], (
        "weights without it would end the run"
    )


def test_no_process_draws_what_one_of_another_seed_draws():
    seeds = [seed_of(seed, share) for seed in range(20) for share in range(8)]
    assert len(set(seeds)) == len(seeds) and seeds[::8] == list(range(20))


def test_a_resume_with_another_configuration_is_refused(base, tmp_path):
    claim_run(config(base), tmp_path / "run")
    claim_run(config(base, training={"save_every": 7}), tmp_path / "run")  # only how often something is written
    with pytest.raises(ValueError, match=r"objective\.segments: 2 -> 3; training\.learning_rate: 0\.01 -> 0\.001"):
        claim_run(config(base, objective={"segments": 3}, training={"learning_rate": 0.001}), tmp_path / "run")


def test_a_folder_in_which_another_run_trains_is_refused_until_that_ends(base, tmp_path, monkeypatch):
    folder, second = tmp_path / "run", []
    train = trainer._train

    def meanwhile(*args):
        monkeypatch.setattr(trainer, "_train", train)
        with pytest.raises(ValueError, match="Another process trains in run"):
            trainer.distill(config(base, steps=1), folder)
        second.append("refused")
        train(*args)

    monkeypatch.setattr(trainer, "_train", meanwhile)
    result = trainer.distill(config(base, steps=1), folder)
    assert second == ["refused"] and trainer.distill(config(base, steps=1), folder) == result


def test_processes_of_one_run_hear_alike_that_another_is_in_its_folder(tmp_path):
    class Second:
        is_main_process, num_processes, device, told = False, 2, "cpu", 1

        def gather(self, value):
            return torch.tensor([self.told, *value.tolist()])

    with pytest.raises(ValueError, match="Another process trains"), alone_in(tmp_path / "run", Second()):
        pass
    Second.told = 0
    with alone_in(tmp_path / "run", Second()):
        assert not (tmp_path / "run").exists(), "only process 0 locks"


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none_here(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock") as second:
        assert first and second


def test_a_run_goes_on_with_a_lower_rate_but_not_with_a_higher_one(base, tmp_path):
    folder = tmp_path / "run"
    trainer.distill(config(base, steps=4), folder).unlink()  # as if it had ended before the export
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 2}, folder / "checkpoint.pt")
    with pytest.raises(
        ValueError, match=r"started with another configuration \(training\.learning_rate: 0\.01 -> 0\.5\)"
    ):
        trainer.distill(config(base, steps=4, training={"learning_rate": 0.5}), folder)
    trainer.distill(config(base, steps=4, training={"learning_rate": 0.001}), folder)
    after = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert after["step"] == 4
    rates = [max(g["lr"] for o in s["optimizers"] for g in o["param_groups"]) for s in (state, after)]
    assert rates[1] == pytest.approx(rates[0] / 10)
    kept = [DistillConfig.load(folder / name).training.learning_rate for name in ("config.1.toml", "config.toml")]
    assert kept == [0.01, 0.001]
    with pytest.raises(ValueError, match="was made with another configuration"):  # it is finished
        trainer.distill(config(base, steps=4, training={"learning_rate": 0.0001}), folder)


def test_a_loss_that_is_no_number_names_step_and_segment(base, tmp_path, monkeypatch):
    run = config(base, objective={"segments": 4, "teacher_steps": 4, "guidance": None})
    grid_losses = ConsistencyLoss.compare

    def spoiled(self, x, target, draw):
        if len(calls) == 2:
            x = x.clone()
            x[draw.segment == 2] = float("nan")
        calls.append(1)
        return grid_losses(self, x, target, draw)

    calls = []
    monkeypatch.setattr(ConsistencyLoss, "compare", spoiled)
    with pytest.raises(ValueError, match=r"loss became nan at step 3 \(segment 2\)"):
        trainer.distill(run, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_full_disk_keeps_the_previous_checkpoint(base, tmp_path, monkeypatch):
    trainer.distill(config(base, steps=2), tmp_path / "run").unlink()  # as if it had been stopped before the export
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left on device.*previous one is kept"):
        trainer.distill(config(base, steps=2), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))  # hidden ones are matched too


def test_muon_takes_what_is_wide_enough(base, tmp_path, monkeypatch):
    muon = {"optimizer": "muon"}
    monkeypatch.setattr(trainer, "make_pair", None)
    with pytest.raises(ValueError, match=r"optimizer is muon.*more than 6 .*rank 6.*Choose adamw"):
        trainer.distill(config(base, model={"train": "lora", "lora_rank": 6}, training=muon), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    check_optimizer(config(base, model={"train": "lora", "lora_rank": 7}, training=muon))
    check_optimizer(config(base, model={"lora_rank": 6}, training=muon))


def test_lora_keeps_the_base_and_exports_comfyuis_names(base, tmp_path):
    file = trainer.distill(config(base, model={"train": "lora", "lora_rank": 2, "lora_alpha": 4.0}), tmp_path / "run")
    lora, entries = read_state_dict(file)
    assert file.name == "lora.safetensors" and "evdit" in entries
    stem = "diffusion_model.transformer_blocks.1.attn1.to_out.0"
    assert lora[f"{stem}.lora_down.weight"].shape == (2, 24) and lora[f"{stem}.lora_up.weight"].shape == (24, 2)
    assert float(lora[f"{stem}.alpha"]) == 4.0
    weights = read_state_dict(base)[0]
    names = {k.removeprefix("diffusion_model.").removesuffix(".alpha") for k in lora if k.endswith(".alpha")}
    assert all(f"{n}.weight" in weights for n in names) and len(names) == 2 * (4 + 4 + 2)
    full = merged(weights, lora)
    name = "transformer_blocks.1.attn1.to_out.0.weight"
    expected = weights[name] + 2.0 * lora[f"{stem}.lora_up.weight"] @ lora[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(full[name], expected)
    assert torch.equal(full["proj_out.weight"], weights["proj_out.weight"])


def test_lora_off_is_the_base_and_merged_is_lora_on(base):
    torch.manual_seed(0)
    plain, module = load_transformer(base), load_transformer(base)
    names = add_lora(module, 3)
    for p in (p for p in module.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1)
    inputs = (torch.randn(1, 4, 4, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 8))
    with lora_off(module):
        assert torch.equal(module(*inputs), plain(*inputs))
    out = module(*inputs)
    assert not torch.allclose(out, plain(*inputs)) and len(names) == 20
    plain.load_state_dict(merged(plain.state_dict(), comfy_lora(module, module.state_dict())))
    torch.testing.assert_close(plain(*inputs), out, rtol=1e-4, atol=1e-5)


def exported_lora(base, folder, seed=0, size=0.05):
    """A LoRA of random numbers for the weights in ``base``."""
    settings = config(base, model={"train": "lora", "lora_rank": 3})
    model = open_model(settings.model)
    student, _ = trainer.make_pair(settings, model, None)
    g = torch.Generator().manual_seed(seed)
    ema = {n: size * torch.randn(p.shape, generator=g) for n, p in student.named_parameters() if p.requires_grad}
    return export.export(model, student, ema, folder, trainer.describe(settings, model), lora=True)


def rewritten(base, file, change):
    """The weights in ``base`` as another program may keep them."""
    weights, about = read_state_dict(base)
    save_safetensors(file, dict(change(name, value) for name, value in weights.items()), about)
    return file


def test_what_is_learnt_is_kept_in_16_bits_beside_weights_of_8(base, tmp_path):
    small = rewritten(base, tmp_path / "8.safetensors", lambda name, value: (name, value.to(torch.float8_e4m3fn)))
    lora = read_state_dict(exported_lora(small, tmp_path / "run", size=4e-4))[0]
    found = [value for name, value in lora.items() if "lora_up" in name]
    assert all(value.dtype == torch.bfloat16 and value.count_nonzero() == value.numel() for value in found)


def test_stages_are_merged_into_weights_under_comfyuis_names(base, tmp_path):
    named_so = rewritten(
        base, tmp_path / "comfy.safetensors", lambda name, value: (f"model.diffusion_model.{name}", value)
    )
    loras = [exported_lora(named_so, tmp_path / str(seed), seed) for seed in (1, 2)]
    values = {"order": "merge", "model": {"transformer": str(named_so), "train": "lora", "lora_rank": 3}}
    found = read_state_dict(ThreeStages(RecipeConfig.from_dict(values), tmp_path / "run").merge("merged", *loras))[0]
    expected = read_state_dict(base)[0]
    for lora in loras:
        expected = merged(expected, read_state_dict(lora)[0])
    torch.testing.assert_close(found, expected)
    with pytest.raises(
        ValueError, match=r"have none of 20 layers that the LoRA changes, such as 'diffusion_model\.trans"
    ):
        merged(read_state_dict(named_so)[0], read_state_dict(loras[0])[0])


def test_a_lora_keeps_its_input_once_and_in_its_own_precision():
    module = torch.nn.Sequential(torch.nn.Linear(16, 16, dtype=torch.bfloat16))
    add_lora(module, 2, targets="0$")
    kept = []
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x).float().square().sum().backward()
    assert {t.dtype for t in kept if t.shape == x.shape} <= {torch.bfloat16, torch.float32}
    inputs = [t for t in kept if t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()]
    assert inputs and all(t.dtype == torch.bfloat16 for t in inputs)
    float32 = [t for t in kept if t.dtype == torch.float32 and t.shape == x.shape]
    assert len(float32) == 1, "the output that the test squares, and no copy of the input"
    assert module.get_submodule("0").lora_up.grad.dtype == torch.float32


def test_a_change_that_rounding_would_eat_is_kept_in_float32():
    weights = {"a.to_q.weight": torch.full((8, 8), 1.0, dtype=torch.bfloat16)}
    for size, dtype in ((1e-3, torch.float32), (0.5, torch.bfloat16)):  # a step of bf16 at 1 is 1 / 128
        lora = {
            "lora_down.weight": torch.ones(1, 8),
            "lora_up.weight": torch.full((8, 1), size),
            "alpha": torch.tensor(1.0),
        }
        out = merged(weights, {f"diffusion_model.a.to_q.{name}": value for name, value in lora.items()})
        assert out["a.to_q.weight"].dtype == dtype
        torch.testing.assert_close(out["a.to_q.weight"].float(), torch.full((8, 8), 1 + size))
        deltas = merge_deltas(weights, {n: w.float() + size for n, w in weights.items()})
        assert deltas["a.to_q.weight"].dtype == dtype


def test_checkpointed_blocks_give_the_same_gradients(base):
    model = open_model(config(base).model)
    grads = []
    for checkpointed in (False, True):
        module = model.load()
        if checkpointed:
            model.checkpoint_blocks(module)
        z, text = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2, 8)
        model.predict(module, z, torch.tensor([3.0]), (text, None)).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_knowledge_inherits_segments_and_changes_the_student_alone(base, tmp_path):
    dense = trainer.distill(config(base, steps=2), tmp_path / "dense")
    before = dense.read_bytes()
    file = trainer.distill(config(dense, "knowledge", objective={"segments": 0}), tmp_path / "sparse")
    about = read_metadata(file)
    assert (about.method, about.segments, about.guidance) == ("knowledge", 2, 2.0)
    assert about.plan["reference_frames"] == 1 and dense.read_bytes() == before
    with pytest.raises(ValueError, match="does not say for how many segments"):
        trainer.distill(config(base, "knowledge", objective={"segments": 0}), tmp_path / "other")


def test_knowledge_keeps_the_steps_that_its_teacher_was_made_for(base, tmp_path):
    """Twice as many as segments: the plan's training learns at all of them, and its result says so."""
    dense = trainer.distill(config(base, steps=1, objective={"segments": 2, "steps": 4}), tmp_path / "dense")
    run = config(dense, "knowledge", steps=1, objective={"segments": 0})
    about = read_metadata(trainer.distill(run, tmp_path / "sparse"))
    assert about is not None and (about.segments, about.steps) == (2, 4)
    once_a_segment = config(dense, "knowledge", steps=1, objective={"segments": 0, "steps": 2})
    with pytest.raises(ValueError, match=r"objective\.steps: 4 -> 2"):
        trainer.distill(once_a_segment, tmp_path / "sparse")
    model = open_model(run.model)
    student, teacher = model.load(), model.load()
    data = trainer.prepare_data(None, None, None, None)
    assert len(trainer.make_objective(run, model, student, student, teacher, about, data).times) == 4
    for objective, steps in (({"segments": 2, "steps": 2}, 2), ({"segments": 3}, 3)):  # its own word goes first
        assert trainer.describe(config(dense, "knowledge", objective=objective), model).steps == steps


def test_knowledge_distillation_brings_the_sparse_model_nearer(base, tmp_path):
    run = config(base, "knowledge", steps=15, training={"learning_rate": 0.005})
    model = open_model(run.model)
    data = trainer.prepare_data(None, None, None, None)
    about = trainer.describe(run, model)
    losses = []
    for weights in ("", str(trainer.distill(run, tmp_path / "run"))):
        student, teacher = model.load(weights), model.load()
        loss = trainer.make_objective(run, model, student, student, teacher, about, data)
        x, texts = data.clips.batch(16, torch.Generator().manual_seed(5))
        losses.append(loss(x, data.bank.batch(texts), torch.Generator().manual_seed(6)))
    assert float(losses[1].total) < 0.9 * float(losses[0].total)
    assert set(losses[0].parts) == {"attention", "mlp", "prediction"}


@pytest.mark.parametrize("breaks_off", [False, True])
def test_features_wait_in_the_same_memory_in_every_step_and_give_it_back(base, tmp_path, monkeypatch, breaks_off):
    """As on a GPU, with a stand-in for its driver; the weights are those of features that lie in memory anyway."""
    run = config(base, "knowledge", steps=3)
    expected, _ = read_state_dict(trainer.distill(run, tmp_path / "plain"))
    driver, keep, compare = PinningDriver(monkeypatch), HostFeatures.keep, knowledge.relative_square
    seen = []

    def watched(value, wanted):
        seen.append(len(driver.pinned))
        if breaks_off and len(seen) == 2:
            raise KeyboardInterrupt
        return compare(value, wanted)

    monkeypatch.setattr(HostFeatures, "keep", lambda host, name, value: keep(host, name, value.as_subclass(OnGpu)))
    monkeypatch.setattr(knowledge, "relative_square", watched)
    with pytest.raises(KeyboardInterrupt) if breaks_off else nullcontext():
        got, _ = read_state_dict(trainer.distill(run, tmp_path / "pinned"))
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert driver.asked.count("register") == 4 and set(seen) == {4}, "two features of two layers"
    assert not driver.pinned and driver.none_was_freed()


def test_knowledge_loss_is_zero_for_equals_and_weighs_its_parts():
    layer = torch.nn.Linear(3, 3)
    net = lambda z, time, condition: layer(z)  # noqa: E731
    tap = FeatureTap({"attention": [layer], "mlp": [layer]})
    open_sora = open_path()
    loss = KnowledgeLoss(
        KnowledgeConfig(), open_sora, segments=2, student=net, teacher=net, student_tap=tap, teacher_tap=tap
    )
    result = loss(torch.randn(4, 3), None, torch.Generator().manual_seed(0))
    assert float(result.total) == 0 and set(result.parts) == {"attention", "mlp", "prediction"}
    result.release()
    assert not layer._forward_hooks
    other = torch.nn.Linear(3, 3)
    loss.student, loss.student_tap = (
        lambda z, time, condition: other(z),
        FeatureTap({"attention": [other], "mlp": [other]}),
    )
    loss.config = dataclasses.replace(loss.config, attention=2.0, mlp=0.0, prediction=3.0)
    result = loss(torch.randn(4, 3), None, torch.Generator().manual_seed(0))
    assert set(result.parts) == {"attention", "prediction"}
    torch.testing.assert_close(result.total, 5 * result.parts["prediction"])
    with pytest.raises(ValueError, match="weights"):
        KnowledgeConfig(attention=0, mlp=0, prediction=0)


def open_path():
    from efficient_vdit_core.sampling.path import VPPath

    return VPPath()


def test_merged_deltas_add_up():
    base = {"w": torch.tensor([1.0, 2.0])}
    out = merge_deltas(base, {"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([1.0, 5.0])})
    assert out["w"].tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="different models"):
        merge_deltas(base, {"v": base["w"]})


def test_configuration_survives_toml(base):
    import tomllib

    written = config(base, objective={"guidance": [1.0, 5.0]}, training={"samples": ['say "hi"', "b\\c", "\x7f\x1f"]})
    assert DistillConfig.from_dict(tomllib.loads(to_toml(written.to_dict()))) == written


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "method is 'magic'"),
        ({"method": "consistency", "modle": {}}, "'modle'"),
        ({"method": "consistency", "training": {"step": 3}}, r"\[training\] has 'step'"),
        ({"method": "consistency", "training": {"steps": "3"}}, r"training.steps is '3', expected a whole number"),
        ({"method": "consistency", "training": {"steps": 0}}, r"training.steps is 0"),
        ({"method": "consistency", "objective": {"guidance": [1.0]}}, "objective.guidance"),
        ({"method": "consistency", "objective": {"guidance": [1.0, -4.0]}}, "guidance is"),
        ({"method": "knowledge", "training": {"optimizer": "sgd"}}, "training.optimizer is 'sgd'"),
        ({"method": "knowledge", "training": {"precision": "fp16"}}, "training.precision is 'fp16'"),
        ({"method": "knowledge", "training": {"warmup": -1}}, "training.warmup is -1"),
        ({"method": "knowledge", "training": {"learning_rate": 0}}, "training.learning_rate is 0"),
        ({"method": "knowledge", "training": {"ema": 1}}, "training.ema is 1"),
        ({"method": "knowledge", "training": {"sequence_parallel": 0}}, "training.sequence_parallel is 0"),
        ({"method": "knowledge", "data": {"source": "web"}}, "data.source is 'web'"),
        ({"method": "knowledge", "data": {"width": 100}}, "data.width is 100"),
        ({"method": "knowledge", "data": {"clips": 0}}, "data.clips is 0"),
        ({"method": "knowledge", "model": {"device": "cuda"}}, "model.device is 'cuda', expected auto or cpu"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.from_dict(values)


def test_a_number_of_frames_that_the_model_cannot_make_is_named(base, tmp_path):
    with pytest.raises(ValueError, match=r"data.frames is 30, expected 4k \+ 1, or 0 for the model's own"):
        trainer.distill(config(base, data={"frames": 30}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_may_be_written_without_a_point():
    assert read_section(KnowledgeConfig, {"mlp": 2}, "objective").mlp == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "half"}, "train"),
        ({"dtype": "bfloat16"}, "float32"),
        ({"train": "lora", "init": "x"}, "init"),
        ({"train": "lora", "host_teacher": True}, "there is no second model"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_impossible_models_are_refused(base, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer.distill(config(base, model=change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "objective", "message"),
    [
        ("consistency", {"segments": 8, "steps": 4}, "at least segments"),  # its metadata could not be read back
        ("consistency", {"teacher_steps": 1280}, "noise levels"),
        ("knowledge", {"segments": 8, "steps": 4}, "at least segments"),
        ("knowledge", {"plan": "other.json"}, "32"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_folder_is_claimed(
    base, tmp_path, monkeypatch, method, objective, message
):
    monkeypatch.chdir(tmp_path)
    TilePlan.uniform(1, layers=32).save("other.json")
    with pytest.raises(ValueError, match=message):
        trainer.distill(config(base, method, objective=objective), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "videos", "folder": "gone"}, "no folder 'gone'"),
        ({"source": "teacher", "captions": "gone"}, "no file"),
    ],
)
def test_missing_data_leave_the_folder_free(base, tmp_path, data, message):
    run = config(base)
    with pytest.raises(ValueError, match=message):
        trainer.distill(dataclasses.replace(run, data=dataclasses.replace(run.data, **data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_guidance_stays_known_when_a_distilled_model_is_distilled_on(base, tmp_path):
    first = trainer.distill(config(base, steps=1), tmp_path / "first")
    second = trainer.distill(config(first, steps=1, objective={"segments": 1, "guidance": None}), tmp_path / "second")
    about = read_metadata(second)
    assert about is not None and (about.segments, about.guidance) == (1, 2.0)


def test_no_warmup_is_no_division(base, tmp_path):
    trainer.distill(config(base, steps=1, training={"warmup": 0}), tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"segments": 4}',
        '{"method": "x", "segments": 1e400, "steps": 4}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": 5}',
        '{"method": "x", "segments": 4, "steps": 4, "guidance": [1]}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": {"shift": [1]}}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": {"shift": "NaN"}}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": {"shift": -3}}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": {"shift": 0}}',
        '{"method": "x", "segments": 4, "steps": 4, "schedule": {"shift": 101}}',
        "[" * 100_000,
        '{"method": "x", "segments": true, "steps": 4}',
        '{"method": "x", "segments": 8, "steps": 4}',
    ],
)
def test_damaged_metadata_is_refused(text):
    with pytest.raises(ValueError, match="metadata is damaged"):
        DistillMetadata.from_entries({"evdit": text})


def test_no_metadata_is_none(tmp_path):
    assert DistillMetadata.from_entries({}) is None and read_metadata(Path(tmp_path)) is None
    assert read_metadata(tmp_path / "not there") is None


@pytest.mark.parametrize("beside", ["a-few-steps.safetensors", "a.safetensors.index.json"])
def test_the_metadata_are_those_of_the_weights_that_are_loaded(tmp_path, beside):
    about = {"method": "consistency", "segments": 8, "steps": 8}
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {"x": torch.zeros(1)})
    save_safetensors(tmp_path / "a-few-steps.safetensors", {"x": torch.ones(1)}, {"evdit": json.dumps(about)})
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a-few-steps.safetensors"}}))
    assert read_state_dict(tmp_path)[0]["x"] == 0 and read_metadata(tmp_path) is None
    assert read_state_dict(tmp_path / beside)[0]["x"] == 1 and read_metadata(tmp_path / beside).segments == 8


def test_the_pipeline_samples_a_distilled_model_as_it_was_made(base, tmp_path):
    from efficient_vdit_core.pipeline import Pipeline

    file = trainer.distill(config(base, steps=1, objective={"segments": 2, "steps": 4}), tmp_path / "run")
    pipeline = Pipeline(load_transformer(file), None, None)
    assert (pipeline.request("a", sampler="consistency").steps, pipeline.request("a").guidance) == (20, 7.5)
    pipeline.distilled = read_metadata(file)
    request = pipeline.request("a")
    assert (request.segments, request.steps, request.guidance) == (2, 4, 1.0)
    assert pipeline.request("a", guidance=3.0).guidance == 3.0
    assert pipeline.request("a", sampler="ddim").steps == 100


def test_score_distillation_trains_two_loras_in_turn_and_writes_the_students(base, tmp_path):
    folder = tmp_path / "run"
    file = trainer.distill(config(base, "score", steps=6, model={"gradient_checkpointing": True}), folder)
    about = read_metadata(file)
    assert (about.method, about.segments, about.steps, about.guidance, about.plan) == ("score", 2, 2, 2.0, None)
    lora = read_state_dict(file)[0]
    assert len(lora) == 3 * 20 and not any("fake" in name for name in lora)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    fake = {name: value for name, value in state["model"].items() if "fake" in name}
    assert len(fake) == 2 * 20 and len(state["optimizers"]) == 2
    steps = [{int(s["step"]) for s in o["state"].values()} for o in state["optimizers"]]
    assert steps == [{2}, {4}]  # the student's every third
    assert all(value.abs().max() > 0 for name, value in fake.items() if name.endswith("attn1.to_q.fake_up"))
    assert any(value.abs().max() > 0 for name, value in lora.items() if name.endswith("attn1.to_q.lora_up.weight"))


def test_a_stopped_score_distillation_goes_on_bit_for_bit(base, tmp_path, monkeypatch):
    whole = trainer.distill(config(base, "score", steps=6), tmp_path / "whole")
    calls = []
    call = trainer.ScoreLoss.__call__

    def stop_after_four(self, *args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *args)

    monkeypatch.setattr(trainer.ScoreLoss, "__call__", stop_after_four)
    with pytest.raises(SystemExit):
        trainer.distill(config(base, "score", steps=6), tmp_path / "cut")
    cut = trainer.distill(config(base, "score", steps=6), tmp_path / "cut")
    assert len(calls) == 6
    a, b = read_state_dict(whole)[0], read_state_dict(cut)[0]
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_turn_lasts_until_the_gradient_is_taken(base, checkpointing):
    """Checkpointed blocks run again on the way back, with the same adapter, or the gradient is another's."""
    model = open_model(config(base).model)
    grads = {}
    for turn in (STUDENT, FAKE):
        torch.manual_seed(0)
        module = model.load()
        add_lora(module, 3, learners=(STUDENT, FAKE))
        for p in (p for p in module.parameters() if p.requires_grad):
            torch.nn.init.normal_(p, std=0.1)
        if checkpointing:
            model.checkpoint_blocks(module)

        class Loss:
            def students_step(self):
                return int(turn == STUDENT)  # noqa: B023

            def __call__(self, x, condition, generator):
                with active_adapter(module, turn):  # noqa: B023
                    out = model.predict(module, x, torch.tensor([3.0]), condition)  # noqa: B023
                return StepLoss(out.square().sum())

        z = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        result = AlternatingLoss(Loss(), module, 1, data_parallel=False)(z, (torch.ones(1, 2, 8), None), None)
        result.total.backward()
        result.release()
        grads[turn] = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        idle = FAKE if turn == STUDENT else STUDENT
        assert all((g is None) == belongs_to(idle, name) for name, g in grads[turn].items())
        assert result.optimizers == (range(1) if turn == STUDENT else range(1, 2))
        assert {layer.learner for layer in adapted(module).values()} == {STUDENT}
        assert len({float(g.norm()) for g in grads[turn].values() if g is not None}) > 20


def test_a_lora_goes_on_from_one_of_its_own_rank(base, tmp_path):
    first = trainer.distill(config(base, model={"train": "lora", "lora_rank": 3}), tmp_path / "first")
    still = {"ema": 0.0, "learning_rate": 1e-30}
    second = trainer.distill(
        config(base, "score", steps=3, model={"init": str(first)}, training=still), tmp_path / "second"
    )
    a, b = read_state_dict(first)[0], read_state_dict(second)[0]
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match=r"lora.safetensors does not fit layer .* wants rank 2 and alpha 2"):
        trainer.distill(config(base, "score", model={"init": str(first), "lora_rank": 2}), tmp_path / "other")


def test_score_distillation_asks_for_a_lora(base, tmp_path):
    with pytest.raises(ValueError, match="model.train is 'full', expected lora for score distillation"):
        trainer.distill(config(base, "score", model={"train": "full"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_that_takes_no_step_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"training\.steps is 2, of which the student takes none: it takes one in 3"):
        trainer.distill(config(base, "score", steps=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_captions_alone_are_for_score_distillation(base, tmp_path, monkeypatch):
    captions = tmp_path / "captions.txt"
    captions.write_text("a\nb c\n")
    data = {"source": "captions", "captions": str(captions), "frames": 13, "height": 32, "width": 32}
    monkeypatch.setattr(trainer, "prepare_data", prepare.prepare_data)
    encoder = lambda device: lambda texts: (torch.ones(len(texts), 3, 8), torch.ones(len(texts), 3))  # noqa: E731
    monkeypatch.setattr(
        "efficient_vdit_core.distill.families.opensora_plan.OpenSoraPlanModel.text_encoder", lambda self, d: encoder(d)
    )
    seen = []
    call = ConsistencyLoss.__call__
    monkeypatch.setattr(ConsistencyLoss, "__call__", lambda self, x, *a: seen.append(x) or call(self, x, *a))
    file = trainer.distill(config(base, "score", steps=3, data=data), tmp_path / "run")
    assert read_metadata(file).method == "score"
    assert [tuple(x.shape) for x in seen] == [(4, 4, 4, 4, 4)] and float(seen[0].std()) > 0.1, (
        "its own clips, not zeros"
    )
    with pytest.raises(ValueError, match="captions.*learns from clips"):
        trainer.distill(config(base, data=data), tmp_path / "other")


def test_what_is_worn_counts_whatever_learns_and_is_frozen(base, tmp_path):
    first = trainer.distill(
        config(base, model={"train": "lora", "lora_rank": 3, "lora_alpha": 6.0}), tmp_path / "first"
    )
    whole = load_transformer(base)
    whole.load_state_dict(merged(whole.state_dict(), read_state_dict(first)[0]))
    module = open_model(config(base, model={"loras": [str(first)]}).model).load().eval()
    add_lora(module, 2)
    inputs = (torch.randn(1, 4, 4, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 8))
    assert not torch.allclose(whole(*inputs), load_transformer(base)(*inputs), atol=1e-4)
    for learner in (STUDENT, None):
        with active_adapter(module, learner):
            torch.testing.assert_close(module(*inputs), whole(*inputs), rtol=1e-4, atol=1e-5)
    trained = {name.rpartition(".")[2] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"lora_down", "lora_up"}
    assert len(comfy_lora(module, module.state_dict())) == 3 * 20, "what is frozen is in its own file"


def test_a_change_that_weights_in_bf16_would_lose_is_worn_whole(tmp_path):
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    module, x = torch.nn.Sequential(layer), torch.eye(8)[:1]
    up, down = torch.full((8, 1), 1e-3), torch.ones(1, 8)
    lora = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    file = tmp_path / "lora.safetensors"
    save_safetensors(file, {f"diffusion_model.0.{name}": value for name, value in lora.items()}, {})
    weights = merged({"0.weight": layer.weight.detach()}, read_state_dict(file)[0])["0.weight"]
    assert torch.equal(weights.bfloat16(), layer.weight), "a step of bf16 at 1 is 1 / 128"
    attach_frozen(module, [file])
    with torch.autocast("cpu", torch.bfloat16):
        frozen = module.get_submodule("0").part("frozen0")
        assert torch.equal(frozen[1].detach() @ frozen[0].detach(), up @ down)
    both = torch.nn.functional.linear(x, layer.weight.float() + up @ down)
    got = module.get_submodule("0").float()(x)
    torch.testing.assert_close(got, both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lora: {f"x{k}": v for k, v in lora.items()}, "no LoRA of this model.*21 of its parts do not fit"),
        (lambda lora: {}, "no LoRA of this model as evdit distill writes it .1 of its parts do not fit, such as 'x'"),
        (lambda lora: {k: v[:, :5] if "lora_down" in k else v for k, v in lora.items()}, "of its parts do not fit"),
        (
            lambda lora: {**lora, "diffusion_model.transformer_blocks.0.attn1.to_q.diff_b": torch.ones(1)},
            "2 of its parts",
        ),
        (
            lambda lora: dict(list(lora.items())[:-3] + [i for i in list(lora.items())[-3:] if "alpha" not in i[0]]),
            "3 of its",
        ),
    ],
)
def test_a_lora_of_another_model_is_not_worn(base, tmp_path, change, message):
    module = load_transformer(base)
    add_lora(module, 2)
    file = tmp_path / "lora.safetensors"
    save_safetensors(file, {"x": torch.zeros(1), **change(comfy_lora(module, module.state_dict()))}, {})
    with pytest.raises(ValueError, match=message):
        open_model(config(base, model={"loras": [str(file)]}).model).load()


@pytest.mark.parametrize("layer", ["proj_out", "caption_projection.linear_1"])
def test_a_student_learns_beside_a_lora_of_more_layers_than_its_own(base, tmp_path, layer):
    """Such as one of a style, behind the student's layers or before all of them."""
    module = load_transformer(base)
    add_lora(module, 2, targets=rf"(\.to_q|{layer})$")
    file = tmp_path / "style.safetensors"
    save_safetensors(file, comfy_lora(module, module.state_dict()), {})
    wanted = {"train": "lora", "lora_rank": 2, "loras": [str(file)]}
    made = trainer.distill(config(base, model=wanted, steps=1), tmp_path / "run")
    assert len(read_state_dict(made)[0]) == 3 * 20


def test_a_lora_that_says_nothing_leaves_what_its_model_says(base, tmp_path):
    """A style on a model that was distilled with guidance inside: the result has it inside too."""
    few = trainer.distill(config(base, steps=1), tmp_path / "few")
    module = load_transformer(base)
    add_lora(module, 2)
    style = tmp_path / "style.safetensors"
    save_safetensors(style, comfy_lora(module, module.state_dict()), {})
    lora = {"transformer": str(few), "train": "lora", "lora_rank": 2, "loras": [str(style)]}
    wanted = config(base, "knowledge", model=lora, objective={"segments": 0, "plan": "full"})
    about, said = trainer.describe(wanted, open_model(wanted.model)), read_metadata(few)
    assert said is not None and (about.segments, about.guidance) == (said.segments, said.guidance) == (2, 2.0)


def test_float16_is_refused_for_a_lora_too(base, tmp_path):
    with pytest.raises(ValueError, match="model.dtype is 'float16', in which the losses' gradients"):
        trainer.distill(config(base, model={"train": "lora", "dtype": "float16"}), tmp_path / "run")


def test_a_run_that_found_no_memory_goes_on_with_checkpointed_gradients(base, tmp_path):
    trainer.distill(config(base, steps=1), tmp_path / "run")
    trainer.distill(config(base, steps=1, model={"gradient_checkpointing": True}), tmp_path / "run")


def test_stage_3_starts_where_the_lora_of_stage_1_ended(base, tmp_path, monkeypatch):
    """Teacher and student both wear it: under a plan that leaves nothing out there is nothing to learn."""
    lora = {"train": "lora", "lora_rank": 3}
    first = trainer.distill(config(base, model=lora), tmp_path / "first")
    losses = []
    call = KnowledgeLoss.__call__

    def noted(self, *args):
        result = call(self, *args)
        losses.append(float(result.total))
        return result

    monkeypatch.setattr(KnowledgeLoss, "__call__", noted)
    wanted = {"model": {**lora, "loras": [str(first)]}, "objective": {"segments": 0, "plan": "full"}, "steps": 1}
    about = read_metadata(trainer.distill(config(base, "knowledge", **wanted), tmp_path / "second"))
    assert losses[0] < 1e-10 and (about.segments, about.guidance) == (2, 2.0), "as the LoRA says"
    with pytest.raises(ValueError, match="model.loras are kept beside the weights.*model.train is 'full'"):
        trainer.distill(config(base, "knowledge", model={"loras": [str(first)]}), tmp_path / "third")


@pytest.mark.parametrize(("rank", "alpha"), [(3, 0.1), (3, 10.1), (5, 0.3)])
def test_an_alpha_that_is_not_exact_goes_on_too(base, tmp_path, rank, alpha):
    lora = {"train": "lora", "lora_rank": rank, "lora_alpha": alpha}
    first = trainer.distill(config(base, steps=1, model=lora), tmp_path / "first")
    kept = [v for name, v in read_state_dict(first)[0].items() if name.endswith(".alpha")]
    assert {float(v) for v in kept} == {float(torch.tensor(alpha))} and kept[0].dtype == torch.float32
    trainer.distill(config(base, "score", steps=3, model={**lora, "init": str(first)}), tmp_path / "second")


@pytest.mark.parametrize("name", ["loras", "init"])
def test_a_wrong_lora_is_refused_before_the_folder_is_claimed(base, tmp_path, name):
    wrong = tmp_path / "lora.safetensors"
    save_safetensors(wrong, {"x": torch.zeros(1)}, DistillMetadata("consistency", 2, 2).to_entry())
    for file, message in ((tmp_path / "gone.safetensors", "does not exist"), (wrong, "no LoRA of this model")):
        value = [str(file)] if name == "loras" else str(file)
        with pytest.raises(ValueError, match=message):
            trainer.distill(config(base, "score", model={name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_counts_the_students_steps_alone(base, tmp_path):
    """With no more than four of its own steps all of them count, whatever the fake score does in between."""
    folder = tmp_path / "run"
    trainer.distill(config(base, "score", steps=9, training={"ema": 0.0}), folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    name = next(n for n in state["ema"] if n.endswith("attn1.to_q.lora_up"))
    assert torch.equal(state["ema"][name], state["model"][name])


@pytest.mark.parametrize("states", ["teacher", "student"])
@pytest.mark.parametrize("batch", [1, 3, 4, 10])
def test_knowledge_is_learnt_at_what_a_network_meets_on_its_way(states, batch):
    """By hand: the flow path's clean guess, put back onto the next edge with the noise that it implies."""
    asked, path, edges = [], FlowPath(), [1.0, 0.75, 0.5, 0.25]
    layer = torch.nn.Linear(3, 3)
    nets = {"teacher": lambda z, time, c: z * 0.5 + c[0], "student": lambda z, time, c: layer(z) * 0 + z * 0.2 - c[0]}

    def noted(name):
        def net(z, time, condition):
            asked.append((name, z.detach().clone(), time, condition))
            return nets[name](z, time, condition)

        return net

    loss = KnowledgeLoss(
        KnowledgeConfig(attention=0, mlp=0, states=states), path, segments=4, student=noted("student"), teacher=noted("teacher"),
        student_tap=FeatureTap({}), teacher_tap=FeatureTap({}), prediction="flow",
    )  # fmt: skip
    captions = (torch.arange(batch, dtype=torch.float32)[:, None], [None])
    loss(torch.zeros(batch, 3), captions, torch.Generator().manual_seed(4)).release()
    *ways, (_, z, time, condition), (_, same, *_) = asked
    sigmas = time / path.network_time(torch.tensor([path.start], dtype=torch.float64))
    walked = sum(edge > float(sigmas.min()) + 1e-6 for edge in edges)  # no further than the last state that is met
    assert {name for name, *_ in ways} <= {states} and len(ways) == walked and torch.equal(z, same)
    assert all(len(met) == -(-batch // 4) for _, met, *_ in ways) and len(z) == batch
    for row, sigma in zip(range(batch), sigmas.tolist(), strict=True):
        caption = condition[0][row]
        assert caption == row // 4
        state = ways[0][1][row // 4] if ways else z[row]
        for here, there in itertools.pairwise(edges):
            if here <= sigma + 1e-6:
                break
            out = nets[states](state, None, (caption,)).detach()
            state = state - (here - there) * out
        torch.testing.assert_close(z[row], state, atol=1e-5, rtol=1e-5)
    if batch >= 4:
        assert set(sigmas.tolist()) == set(edges)


def test_a_run_on_the_students_ways_goes_on_bit_for_bit(base, tmp_path, monkeypatch):
    run = config(base, "knowledge", steps=4, objective={"states": "student"}, training={"save_every": 2})
    whole, _ = read_state_dict(trainer.distill(run, tmp_path / "whole"))
    call = KnowledgeLoss.__call__
    calls = []

    def stopped(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeLoss, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer.distill(run, tmp_path / "parts")
    again, _ = read_state_dict(trainer.distill(run, tmp_path / "parts"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("batch", [1, 3, 4, 10])
@pytest.mark.parametrize("alone", [True, False])
def test_a_way_ends_at_the_last_state_that_is_met(batch, alone):
    """Among processes it is walked to its end: all of them call the networks as often. The random numbers are the same."""
    walked, drawn, layer = [], [], torch.nn.Linear(3, 3)

    def student(z, time, condition):
        if not torch.is_grad_enabled():
            walked.append(len(z))
        return layer(z)

    loss = KnowledgeLoss(
        KnowledgeConfig(attention=0, mlp=0, states="student"), FlowPath(), segments=4, student=student,
        teacher=lambda z, time, c: z, student_tap=FeatureTap({}), teacher_tap=FeatureTap({}), prediction="flow", alone=alone,
    )  # fmt: skip
    captions = (torch.zeros(batch, 1), [None])
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        loss(torch.zeros(batch, 3), captions, generator).release()
        drawn.append(int(torch.randint(2**40, (1,), generator=generator)))
    steps = 3 * -(-batch // 4) / batch
    expected = forwards_of_ways(batch, 4) if alone else steps
    assert sum(walked) / 200 / batch == pytest.approx(expected, rel=0.15) and expected <= steps
    reference = torch.Generator().manual_seed(0)
    torch.randint(4, (1,), generator=reference)
    torch.randn(-(-batch // 4), 3, generator=reference)
    assert drawn[0] == int(torch.randint(2**40, (1,), generator=reference))


def test_unknown_states_are_refused():
    with pytest.raises(ValueError, match="states is 'dream', expected one of data, teacher, student"):
        KnowledgeConfig(states="dream")
