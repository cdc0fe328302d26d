"""The forecasts of a training's memory and work, against what the training itself holds and computes: every live byte and
product, counted on the CPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import SHAPE, opensora_plan, wan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from efficient_vdit_core.attention.backends import partial
from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.data.clips import ClipSet
from efficient_vdit_core.distill.data.prepare import PreparedData, prepare_data
from efficient_vdit_core.distill.families import opensora_plan as open_sora_plan
from efficient_vdit_core.distill.families.diffusers_model import DiffusersModel
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.families.texts import TextBank
from efficient_vdit_core.distill.forecast import memory as memory_plan
from efficient_vdit_core.distill.forecast import search as search_plan
from efficient_vdit_core.distill.forecast.advice import advice
from efficient_vdit_core.distill.forecast.memory import count_numbers, plan_memory
from efficient_vdit_core.distill.forecast.samples import plan_samples
from efficient_vdit_core.distill.forecast.search import plan_search
from efficient_vdit_core.distill.forecast.work import plan_work
from efficient_vdit_core.distill.lora.files import comfy_lora
from efficient_vdit_core.distill.lora.layers import add_lora
from efficient_vdit_core.distill.runs import trainer
from efficient_vdit_core.distill.runs.search_stage import SearchConfig, WatchedRun, probe
from efficient_vdit_core.storage.weight_files import save_safetensors
from efficient_vdit_core.training import average, run
from efficient_vdit_core.training.live_bytes import LiveBytes

LATENT = (4, 4, 8, 8)
WORDS = 5


@pytest.fixture(autouse=True)
def short_captions(monkeypatch):
    """As many tokens as those that `stand_in` trains with, of as many channels."""
    for kind in (OpenSoraPlanModel, DiffusersModel):
        monkeypatch.setattr(kind, "text_size", (WORDS, 8))


def stage(family, folder, method, batch=8, **model):
    where = family(folder)
    objective = {"segments": 2, "plan": "full"} if method == "knowledge" else {"segments": 2, "teacher_steps": 4}
    values = {
        "method": method,
        "objective": objective,
        "model": {
            "path": where.path,
            "family": where.family,
            "transformer": where.transformer,
            "device": "cpu",
            **model,
        },
        "data": {"frames": 13, "height": 64, "width": 64},
        "training": {"steps": 6 if method == "score" else 2, "batch": batch, "save_every": 10},
    }
    return DistillConfig.from_dict(values)


def stand_in(monkeypatch):
    """Random clips and texts, and nothing written."""
    words = {t: torch.randn(WORDS, 8) for t in ("a", "")}
    data = PreparedData(ClipSet(torch.randn(2, *LATENT), [("a",)] * 2), TextBank(words), "", torch.device("cpu"))
    monkeypatch.setattr(trainer, "prepare_data", lambda *args: data)
    monkeypatch.setattr(trainer, "check_data", lambda *args: None)
    monkeypatch.setattr(trainer, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(run, "write_checkpoint", lambda *args: None)


def measured(config, folder, monkeypatch):
    """The peak of two real steps: weights are read from files, which no operation makes, so they are counted by hand."""
    stand_in(monkeypatch)
    make_pair = trainer.make_pair

    def counted(*args):
        pair = make_pair(*args)
        for module in filter(None, pair):
            counter.count(x for x in (*module.parameters(), *module.buffers()) if x.device.type != "meta")
        return pair

    monkeypatch.setattr(trainer, "make_pair", counted)
    with LiveBytes() as counter:
        trainer.distill(config, folder)
    return counter.peak


CASES = {
    "consistency": (opensora_plan, "consistency", {}),
    "checkpoints": (opensora_plan, "consistency", {"gradient_checkpointing": True}),
    "weights": (opensora_plan, "consistency", {"batch": 1, "gradient_checkpointing": True}),
    "lora": (opensora_plan, "consistency", {"train": "lora", "lora_rank": 4}),
    "knowledge": (opensora_plan, "knowledge", {"train": "lora", "lora_rank": 4, "gradient_checkpointing": True}),
    "wan": (wan, "knowledge", {"gradient_checkpointing": True}),
    "score": (opensora_plan, "score", {"train": "lora", "lora_rank": 4}),
    "frozen": (opensora_plan, "knowledge", {"train": "lora", "lora_rank": 4, "gradient_checkpointing": True}),
    "hosted": (opensora_plan, "consistency", {"batch": 1, "gradient_checkpointing": True}),
    "hosted wan": (wan, "knowledge", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_training_holds(case, tmp_path, monkeypatch):
    from efficient_vdit_core.distill.objectives import features

    torch.manual_seed(0)
    family, method, model = CASES[case]
    config = stage(family, tmp_path, method, **model)
    if case.startswith("hosted"):
        config = hosted(config)
    # The host's memory is another: what numpy holds is not counted.
    waits = {}

    def keep(host, name, value):
        waits[name] = max(value.nbytes, waits.get(name, 0))
        return torch.from_numpy(value.numpy().copy())

    monkeypatch.setattr(features.HostFeatures, "keep", keep)
    monkeypatch.setattr(average, "host_copy", lambda value: torch.from_numpy(value.numpy().copy()))
    plan = plan_memory(config, frozen=int(case == "frozen"))
    if case == "frozen":
        module = open_model(config.model).load()
        add_lora(module, 4)
        save_safetensors(tmp_path / "lora.safetensors", comfy_lora(module, module.state_dict()), {})
        config = replace(config, model=replace(config.model, loras=(str(tmp_path / "lora.safetensors"),)))
    peak = measured(config, tmp_path / "run", monkeypatch)
    assert plan.step() == pytest.approx(peak, rel=0.1)
    assert plan.peak() == max(plan.step(), *plan.before.values())
    assert bool(plan.host) == (method == "knowledge" or case.startswith("hosted"))
    if not case.startswith("hosted"):
        assert plan.host == sum(waits.values()), "a teacher's features, each in a place of its own"


def hosted(config):
    return replace(
        config, model=replace(config.model, host_teacher=True), training=replace(config.training, host_average=True)
    )


def test_what_waits_on_the_host_leaves_the_gpu(tmp_path):
    """A full training's teacher but for its largest block, and its average."""
    config = stage(opensora_plan, tmp_path, "consistency")
    before, after = plan_memory(config), plan_memory(hosted(config))
    assert after.held["average"] == 0 and 0 < after.held["teacher"] < before.held["teacher"] / 3
    assert after.host == before.host + before.held["average"] + before.held["teacher"]
    same = ("weights", "gradients", "optimiser", "activations")
    assert all(after.held[name] == before.held[name] for name in same)


def flops_of_sdpa(q, k, v, *_, out_shape=None, **__):
    return sdpa_flop_count(q, k, v)


@pytest.mark.parametrize(
    ("family", "frozen", "error"),
    [
        (opensora_plan, False, "attention"),
        (opensora_plan, True, "attention"),
        (opensora_plan, True, "output"),
        (wan, False, "attention"),
        (wan, True, "attention"),
        (wan, False, "output"),
    ],
)
def test_the_search_holds_and_computes_what_is_planned(family, frozen, error, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = stage(family, tmp_path, "consistency", train="lora", lora_rank=4)
    monkeypatch.setattr(partial, "_plain", lambda *_: pytest.fail("what no GPU computes so"))
    search = SearchConfig(candidates="0,1+1,2~1", captions=8, error=error)
    grid = {"segments": 2, "steps": 2}
    memory, work = plan_search(search, config, **grid, wears_lora=frozen)
    assert work.examples == 16 and memory.peak() == memory.step() == sum(memory.held.values())
    if frozen:
        module = open_model(config.model).load()
        add_lora(module, 4)
        layer = open_model(config.model).comfy_layer
        save_safetensors(tmp_path / "lora.safetensors", comfy_lora(module, module.state_dict(), layer), {})
        config = replace(config, model=replace(config.model, loras=(str(tmp_path / "lora.safetensors"),)))
    model = open_model(config.model)
    module = model.load().eval()
    bank = TextBank({"a": torch.randn(WORDS, 8)})
    watched = WatchedRun(model, module, bank, ["a"] * 8, LATENT, **grid, at_once=8, device=torch.device("cpu"))
    partial.sdpa_partial(torch.device("cpu"), torch.float32, SHAPE["attention_head_dim"])  # kernels are tried once
    with LiveBytes() as counter:
        counter.count([*module.parameters(), *module.buffers()])
        probe(search, watched)
    of_parts = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flops_of_sdpa}  # is not counted
    with FlopCounterMode(display=False, custom_mapping=of_parts) as products, sdpa_kernel(SDPBackend.MATH):
        probe(search, watched)
    assert memory.peak() == pytest.approx(counter.peak, rel=0.1)
    assert work.flops * work.examples == pytest.approx(products.get_total_flops(), rel=0.1)


def test_the_search_looks_at_one_layer_for_its_memory_and_at_all_for_its_work(tmp_path, monkeypatch):
    """Each with two candidates; where the feed-forward sets the peak, what probing holds does not show in it."""
    config, compared = stage(opensora_plan, tmp_path, "consistency"), []
    monkeypatch.setattr(search_plan, "_compared", lambda a, e: compared.append(len(a)) or (0.0, np.zeros(a.shape[1])))
    plan_search(SearchConfig(candidates="1,2"), config, segments=2, steps=2, wears_lora=False)
    assert compared == [config.training.batch] * 2 + [1] * 2 * open_model(config.model).layers


def test_one_step_is_looked_at_once_whatever_is_stored_elsewhere(tmp_path, monkeypatch):
    """Optimiser, average and teacher on the host change no activation; full-size models take seconds a step."""
    config, steps = stage(opensora_plan, tmp_path, "consistency"), []
    backward = memory_plan._backward
    monkeypatch.setattr(memory_plan, "_backward", lambda *args: steps.append(1) or backward(*args))
    muon = replace(config, training=replace(config.training, optimizer="muon", steps=9))
    found = [plan_memory(asked).held["activations"] for asked in (config, muon, hosted(config))]
    assert len(set(found)) == 1 and len(steps) == 1
    plan_memory(replace(config, training=replace(config.training, batch=1)))
    assert len(steps) == 2


def test_a_forecast_looks_at_the_weights_once_for_each_way_to_load_them(tmp_path, monkeypatch):
    """Open-Sora-Plan's adapter looks at every one, 11 GB of them at full size."""
    config, read = stage(opensora_plan, tmp_path, "consistency"), []
    read_transformer = open_sora_plan.read_transformer
    monkeypatch.setattr(open_sora_plan, "read_transformer", lambda path: read.append(1) or read_transformer(path))
    monkeypatch.setattr(memory_plan, "count_numbers", lambda path: 0)
    asked = [plan_memory(config), plan_work(config), *advice(config, 2**10)]
    assert len(asked) > 8 and len(read) <= 8


def test_the_advice_goes_on_until_it_fits(tmp_path, monkeypatch):
    config = stage(opensora_plan, tmp_path, "consistency")
    assert [line[:27] for line in advice(config, 2**22)] == ["the VAE alone takes 0.007 G"]
    monkeypatch.setattr(memory_plan, "count_numbers", lambda path: 0)
    whole = plan_memory(config)
    *changes, gpus, together = advice(config, round(whole.step() / 1.5))
    assert changes[0].startswith("model.gradient_checkpointing = true: ") and changes[-1].endswith(", fits")
    assert not any(line.endswith(", fits") for line in changes[:-1])
    assert gpus.startswith("or 2 GPUs under FSDP2")
    assert together.startswith("or training.sequence_parallel = 2 on 2 GPUs with gradient_checkpointing: ")
    assert list(advice(config, 2**10))[-1].startswith("activations alone take ")


def test_shared_out_clips_hold_a_part_of_the_activations(tmp_path, monkeypatch):
    """Four latent frames over two processes; every GPU has all weights, and the whole caption, of full length here."""
    monkeypatch.undo()
    config = stage(opensora_plan, tmp_path, "knowledge", gradient_checkpointing=True)
    wide = replace(config, data=replace(config.data, height=256, width=256), training=replace(config.training, batch=1))
    alone, two = (
        plan_memory(replace(wide, training=replace(wide.training, sequence_parallel=processes))) for processes in (1, 2)
    )
    assert 0.5 < two.held["activations"] / alone.held["activations"] < 0.75
    assert two.held["weights"] == alone.held["weights"] and two.host == alone.host // 2


def test_numbers_are_counted_from_the_heads_of_files(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(3, 5), "b": torch.zeros(5)})
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert count_numbers(tmp_path) == count_numbers(tmp_path / "a.safetensors") == 20
    assert count_numbers(tmp_path / "none") == 0


@pytest.mark.parametrize("case", ["consistency", "guidance", "walk", "checkpoints", "lora", "knowledge", "score"])
def test_the_work_is_what_a_training_computes(case, tmp_path, monkeypatch):
    torch.manual_seed(0)
    family, method, model = CASES.get(case, (opensora_plan, "consistency", {}))
    config = stage(family, tmp_path, method, **model)
    # Many sub-steps: at the last of each segment the student's own target is not asked for, which the plan leaves aside.
    finer = {"teacher_steps": 16 if case == "walk" else 64} if method != "knowledge" else {}
    guided = {"guidance": 3.0} if case in ("guidance", "walk") else {}
    walking = {"target": "teacher"} if case == "walk" else {}
    config = replace(
        config,
        objective=replace(config.objective, **finer, **guided, **walking),
        training=replace(config.training, steps=5),
    )
    work = plan_work(config)
    assert work.examples == 5 * 8 and work.hours(1e-9) == pytest.approx(40 * work.flops / 3.6e6)
    stand_in(monkeypatch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.distill(config, tmp_path / "run")
    assert work.examples * work.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_states_on_the_way_cost_small_batches_more(tmp_path):
    """At batch 1 and 8 times 3.5 forwards in the mean, at batch 8 seven for eight examples."""
    config = stage(opensora_plan, tmp_path, "knowledge")

    def flops(states, batch):
        objective = replace(config.objective, segments=8, states=states)
        return plan_work(replace(config, objective=objective, training=replace(config.training, batch=batch))).flops

    of_ways = [flops("student", batch) - flops("data", batch) for batch in (1, 8)]
    assert of_ways[0] == pytest.approx(4 * of_ways[1]) and of_ways[1] > 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_samples_are_planned_as_they_are_made(guidance, tmp_path, monkeypatch):
    """Three of them, of two steps each, two at once."""
    states = lambda texts: (torch.ones(len(texts), WORDS, 8), torch.ones(len(texts), WORDS))  # noqa: E731
    monkeypatch.setattr(OpenSoraPlanModel, "text_encoder", lambda *_: states)
    (tmp_path / "captions.txt").write_text("a\n")
    config = stage(opensora_plan, tmp_path, "consistency", batch=2)
    asked = {"source": "teacher", "captions": str(tmp_path / "captions.txt"), "guidance": guidance}
    config = replace(config, data=replace(config.data, **asked, clips=3, teacher_steps=2))
    plan, work = plan_samples(config)
    model, load = open_model(config.model), OpenSoraPlanModel.load

    def counted(self, *args):
        module = load(self, *args)
        live.count([*module.parameters(), *module.buffers()])
        return module

    monkeypatch.setattr(OpenSoraPlanModel, "load", counted)
    with LiveBytes() as live:
        prepare_data(config, model, tmp_path / "cache", torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as products:
        prepare_data(config, model, tmp_path / "another cache", torch.device("cpu"))
    assert work.examples == 3 * 2 * (1 if guidance == 1 else 2)
    assert work.examples * work.flops == pytest.approx(products.get_total_flops(), rel=0.02)
    assert plan.peak() == pytest.approx(live.peak, rel=0.1)
