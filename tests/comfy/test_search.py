"""The layer-wise search, plan files, tile map and report as a user meets them, over HTTP."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from comfyui_server import COMFYUI
from PIL import Image
from safetensors.torch import save_file
from tiny_wan import tiny_wan

from efficient_vdit_core.models.distilled import DistillMetadata
from efficient_vdit_core.plan import TilePlan

ROOT = Path(__file__).parents[2]
TINY = ROOT / "efficient_vdit_core" / "assets" / "tiny" / "transformer"
FULL_LAYERS, LAYERS = (1, 4), 6
FAMILY, HEADS = "opensora_plan", 4
PLAN = TilePlan.from_text("0:full 1-5:1")


@pytest.fixture(scope="module")
def built(server) -> str:
    """A model file in which only FULL_LAYERS need other frames: the rest give one and the same value for every
    token."""
    weights = safetensors.torch.load_file(TINY / "diffusion_pytorch_model.safetensors")
    for layer in range(LAYERS):
        name = f"transformer_blocks.{layer}.attn1."
        for part in ("to_q", "to_k"):  # each token attends to all alike
            weights[name + part + ".weight"].zero_()
            weights[name + part + ".bias"].zero_()
        if layer not in FULL_LAYERS:
            weights[name + "to_v.weight"].zero_()
            weights[name + "to_v.bias"].fill_(0.5)
    folder = server.base / "models" / "diffusion_models" / "built"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    return "built/diffusion_pytorch_model.safetensors"


def graph(model: str = "tiny (built in)") -> dict:
    """Loaders, two prompts and a latent of 8 latent frames of 4 x 4 tokens."""
    return {
        "model": {"class_type": "EVDiTModelLoader", "inputs": {"model_name": model, "weight_dtype": "default"}},
        "clip": {"class_type": "EVDiTTextEncoderLoader", "inputs": {"text_encoder_name": "tiny (built in)"}},
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["clip", 0], "text": "a red circle moving right"},
        },
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}},
        "latent": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 29, "batch_size": 1},
        },
    }


def searching(model: str = "tiny (built in)", **changes) -> dict:
    """A search whose plan is saved."""
    prompt = graph(model)
    inputs = {"model": ["model", 0], "positive": ["positive", 0], "latent": ["latent", 0], "seed": 3, "probes": 2}
    choice = {"threshold": 0.01, "target_speedup": 0.0, "candidates": "1,2"}
    prompt["search"] = {"class_type": "EVDiTSearchTilePlan", "inputs": {**inputs, **choice, **changes}}
    prompt["save"] = {
        "class_type": "EVDiTSaveTilePlan",
        "inputs": {"plan": ["search", 0], "filename_prefix": "searched"},
    }
    return prompt


def searched(server, prompt: dict) -> tuple[str, dict]:
    """The name and content of the file that the prompt saved."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    name = entry["outputs"]["save"]["text"][0].splitlines()[0]
    return name, json.loads((server.base / "models" / "evdit_plans" / name).read_text(encoding="utf-8"))


def test_a_page_that_is_loaded_anew_is_told_the_plan_that_comes_from_the_cache(server):
    if not server.get("/object_info/EVDiTSearchTilePlan")["EVDiTSearchTilePlan"].get("has_intermediate_output"):
        pytest.skip(
            "THIS COMFYUI TELLS NO PAGE WHAT IT TAKES FROM ITS CACHE: the chart stays empty until the search runs again"
        )
    prompt, told = searching(seed=11), []
    prompt["save"]["inputs"]["filename_prefix"] = "told again"
    for _ in range(2):  # each by a page of its own
        events = []
        assert server.run(prompt, events)["status"]["status_str"] == "success"
        told.append([d["output"]["evdit_plan"] for kind, d in events if kind == "executed" and d["node"] == "search"])
    assert "search" not in [data.get("node") for kind, data in events if kind == "executing"]
    assert told[0] == told[1] and len(told[1]) == 1


def sampling(model: str, plan: list) -> dict:
    """Two steps with Sparse Attention and a report behind them."""
    prompt = graph(model)
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, "decline_slow": False}
    prompt["sparse"] = {
        "class_type": "EVDiTSparseAttention",
        "inputs": {"model": ["model", 0], "plan": plan, **settings},
    }
    conditions = {
        "model": ["sparse", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
    }
    choices = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompt["sampled"] = {"class_type": "KSampler", "inputs": {**conditions, **choices}}
    prompt["report"] = {"class_type": "EVDiTReport", "inputs": {"model": ["sparse", 0], "after": ["sampled", 0]}}
    return prompt


@pytest.fixture(scope="module")
def found(server, built):
    """The plan of the built model, and what the page heard."""
    events = []
    prompt = searching(built)
    entry = server.run(prompt, events)
    assert entry["status"]["status_str"] == "success", entry["status"]
    name = entry["outputs"]["save"]["text"][0].splitlines()[0]
    return name, json.loads((server.base / "models" / "evdit_plans" / name).read_text(encoding="utf-8")), events


def test_exactly_the_layers_that_need_other_frames_stay_full(found):
    name, plan, _ = found
    assert plan["reference_frames"] == [None if i in FULL_LAYERS else 1 for i in range(LAYERS)]
    assert (plan["family"], plan["frames"], plan["heads"]) == (FAMILY, 8, HEADS) and name == "searched_00001.json"
    about = plan["provenance"]
    assert about["method"].startswith("searched") and len(about["sigmas"]) == 2 and about["seed"] == 3
    assert about["attention_speedup"] > 1 and all(len(e) == LAYERS for e in about["errors"].values())


def test_the_progress_bar_counts_every_layer_of_every_step(found):
    steps = [(d["value"], d["max"]) for kind, d in found[2] if kind == "progress" and d.get("node") == "search"]
    assert [m for _, m in steps] == [2 * LAYERS] * len(steps)
    values = [v for v, _ in steps]
    # Newer versions of ComfyUI send no more than ten values a second, but always the first and the last.
    assert values == sorted(values) and values[0] == 1 and values[-1] == 2 * LAYERS


def test_the_block_errors_find_the_same(server, built):
    _, plan = searched(server, searching(built, error="block", threshold=0.002))
    assert [k is None for k in plan["reference_frames"]] == [i in FULL_LAYERS for i in range(LAYERS)]


@pytest.mark.parametrize("head_groups", [1, 2])
def test_the_output_s_errors_find_the_same(server, built, head_groups):
    events = []
    prompt = searching(built, error="output", threshold=0.002, head_groups=head_groups)
    assert server.run(prompt, events)["status"]["status_str"] == "success"
    _, plan = searched(server, prompt)
    kept = TilePlan.from_json(json.dumps(plan)).patterns
    assert [p.is_full(plan["frames"]) for p in kept] == [i in FULL_LAYERS for i in range(LAYERS)]
    assert "model's output" in plan["provenance"]["error"]
    steps = [d["max"] for kind, d in events if kind == "progress" and d["node"] == "search"]
    assert set(steps) == {2 * LAYERS * 3}, "a forward for each layer and each of two candidates"


def test_the_output_is_not_measured_where_a_node_leaves_forwards_out(server):
    prompt = searching(error="output")
    settings = {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 1.0, "verbose": False}
    prompt["cached"] = {"class_type": "EasyCache", "inputs": {"model": ["model", 0], **settings}}
    prompt["search"]["inputs"]["model"] = ["cached", 0]
    status = server.run(prompt)["status"]
    (told,) = [data["exception_message"] for kind, data in status["messages"] if kind == "execution_error"]
    assert "easycache may keep something of each forward" in told and "set error to attention" in told


@pytest.mark.parametrize("what", ["search", "map"])
def test_levels_that_a_node_leaves_out_are_not_passed_over(server, what):
    prompt = searching(error="attention", probes=6)
    settings = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    prompt["cached"] = {"class_type": "EasyCache", "inputs": {"model": ["model", 0], **settings}}
    prompt["search"]["inputs"]["model"] = ["cached", 0]
    if what == "map":
        inputs = {"model": ["cached", 0], "positive": ["positive", 0], "latent": ["latent", 0]}
        choices = {"seed": 0, "rows": 4, "percent": 0.9, "layers": "0"}
        prompt = {**graph(), "cached": prompt["cached"]}
        prompt["map"] = {"class_type": "EVDiTAttentionTileMap", "inputs": {**inputs, **choices}}
        prompt["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["map", 1]}}
    status = server.run(prompt)["status"]
    (told,) = [data["exception_message"] for kind, data in status["messages"] if kind == "execution_error"]
    assert "no attention was asked for" in told and "as EasyCache" in told


def test_the_same_seed_gives_the_same_bytes(server):
    # Written in another order, the same candidates pass ComfyUI's cache and mean the same.
    first, second = (searched(server, searching(candidates=text, threshold=0.3))[1] for text in ("1,2", "2,1"))
    assert first == second
    assert (
        searched(server, searching(seed=4, threshold=0.3))[1]["provenance"]["errors"] != first["provenance"]["errors"]
    )


def test_a_target_speedup_is_reached(server):
    _, plan = searched(server, searching(target_speedup=1.5, negative=["negative", 0], costs="flops"))
    assert plan["provenance"]["attention_speedup"] >= 1.5 and plan["provenance"]["guidance"] == 5.0


def test_measured_costs_by_head_know_what_a_group_s_call_costs(server):
    _, plan = searched(server, searching(costs="measured", head_groups=2, seed=11))
    about = plan["provenance"]
    assert set(about["measured_call_costs"]) == {*about["measured_costs"], "full"}
    assert all(len(of_layers) == LAYERS for of_layers in about["measured_call_costs"].values())


def test_chosen_noise_levels_are_the_ones_measured(server):
    prompt = searching(sigmas=["part", 1])
    inputs = {"model": ["model", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}
    prompt["sigmas"] = {"class_type": "BasicScheduler", "inputs": inputs}
    prompt["part"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["sigmas", 0], "step": 2}}
    whole = searched(server, searching(probes=4))[1]["provenance"]["sigmas"]
    assert searched(server, prompt)[1]["provenance"]["sigmas"] == pytest.approx(whole[2:], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_speedup": 50.0}, "at most"),
        ({"target_speedup": 0.5}, "from 1 up"),
        ({"candidates": "1;2"}, "cannot be read"),
        ({"candidates": "9"}, "all mean full"),
        ({"length": 1}, "all mean full"),
    ],
)
def test_what_cannot_be_searched_is_said_before_the_model_runs(server, changes, message):
    prompt = searching()
    if "length" in changes:
        prompt["latent"]["inputs"]["length"] = changes["length"]
    else:
        prompt["search"]["inputs"].update(changes)
    assert message in server.error(prompt)


def test_cancel_ends_a_search_and_leaves_the_server_well(server, built):
    status, answer = server.post("/prompt", {"prompt": searching(probes=100, seed=9), "client_id": "stop"})
    assert status == 200
    while not server.get("/queue")["queue_running"]:
        pass
    for _ in range(500):
        server.post("/interrupt", {})
        if server.get(f"/history/{answer['prompt_id']}"):
            break
    messages = server.get(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]["status"]["messages"]
    assert "execution_interrupted" in [kind for kind, _ in messages]
    assert searched(server, searching(seed=9))[1]["provenance"]["seed"] == 9


def test_a_saved_plan_loads_runs_and_is_reported(server, built, found):
    prompt = sampling(built, ["plan", 0])
    prompt["plan"] = {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": found[0]}}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (text,) = entry["outputs"]["report"]["text"]
    sparse = LAYERS - len(FULL_LAYERS)
    assert f"Self-attention over the video: {2 * LAYERS} calls, {2 * sparse} of them sparse" in text
    assert f"{2 * len(FULL_LAYERS)} full in the plan" in text and f"{2 * LAYERS} cross-attention" in text
    assert "time:" in text and "from the dense calls of this run" in text


def test_a_plan_as_text_needs_no_file(server):
    """A graph that someone shared names a file that is not here."""
    load = {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": "nope_00001.json", "text": "all:2"}}
    prompt = {"plan": load, "text": {"class_type": "PreviewAny", "inputs": {"source": ["plan", 1]}}}
    assert server.run(prompt)["outputs"]["text"]["text"] == ["all:2"]
    for text in ("", " "):
        load["inputs"]["text"] = text
        status, answer = server.post("/prompt", {"prompt": prompt})
        assert status == 400 and "'nope_00001.json' is not in the list" in json.dumps(answer["node_errors"])
    load["inputs"]["text"] = ["given", 0]  # not known before the run
    prompt["given"] = {"class_type": "PrimitiveString", "inputs": {"value": "all:3"}}
    assert server.run(prompt)["outputs"]["text"]["text"] == ["all:3"]
    prompt["given"]["inputs"]["value"] = ""
    assert "was not found" in server.error(prompt)


def test_a_run_in_which_nothing_became_sparse_is_warned_of(server, built):
    prompt = sampling(built, ["plan", 0])
    prompt["plan"] = {
        "class_type": "EVDiTLoadTilePlan",
        "inputs": {"plan_name": "opensora_plan (preset)", "text": "all:full"},
    }
    (text,) = server.run(prompt)["outputs"]["report"]["text"]
    assert text.startswith("WARNING: nothing became sparse") and "nothing became sparse" in server.text()


def write_plan(server, name: str, **changes):
    folder = server.base / "models" / "evdit_plans"
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "schema_version": 1,
        "family": FAMILY,
        "frames": 8,
        "heads": HEADS,
        "reference_frames": [1] * LAYERS,
        "dense_layers": [],
    }
    (folder / name).write_text(json.dumps({**plan, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("newer", {"schema_version": 9}, "Update the node pack"),
        ("endless", {"reference_frames": [1] * 10_000}, "10000 layers"),
        ("nonsense", {"reference_frames": [1, "many"]}, "reference_frames[1]"),
        ("shallow", {"reference_frames": [1, 1]}, "2 layers"),
        ("other_heads", {"heads": 24}, "24 attention heads"),
        ("other_family", {"family": "wan"}, "wan"),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(server, name, changes, message):
    write_plan(server, f"{name}.json", **changes)
    prompt = sampling("tiny (built in)", ["plan", 0])
    prompt["plan"] = {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": f"{name}.json"}}
    assert message in server.error(prompt)


def test_the_plan_that_a_lora_was_distilled_under_comes_with_it(server):
    plan = TilePlan.from_text("0:full 1-5:1")
    about = DistillMetadata("knowledge", 8, 8, plan=json.loads(plan.to_json()))
    folder = server.base / "models" / "loras" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"x": torch.zeros(1)}
    save_file(weights, folder / "sparse.safetensors", metadata=about.to_entry())
    save_file(weights, folder / "other.safetensors")
    prompt = {"plan": {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": "loras/mine/sparse.safetensors"}}}
    prompt["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["plan", 1]}}
    shown = server.run(prompt)["outputs"]["show"]["text"]
    assert shown == [plan.to_text()]
    prompt["plan"]["inputs"]["plan_name"] = "loras/mine/other.safetensors"
    assert "'loras/mine/other.safetensors' carries no plan: it was not distilled under one" in server.error(prompt)


@pytest.fixture(scope="module")
def distilled(server) -> dict[str, dict]:
    """Nodes that load models whose files say that they were distilled under ``PLAN``: by this pack, and by core."""
    about = DistillMetadata("knowledge", 8, 8, plan=json.loads(PLAN.to_json())).to_entry()
    folder = server.base / "models" / "diffusion_models" / "distilled"
    folder.mkdir(parents=True)
    weights = safetensors.torch.load_file(TINY / "diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata=about)
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    save_file(tiny_wan(), folder / "wan.safetensors", metadata=about)
    return {
        "this pack's": graph("distilled/diffusion_pytorch_model.safetensors")["model"],
        "core's": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "distilled/wan.safetensors", "weight_dtype": "default"},
        },
    }


def carried(loader: dict, **inputs) -> dict:
    """The plan of a loader's MODEL, shown."""
    return {
        "model": loader,
        "plan": {"class_type": "EVDiTLoadTilePlan", "inputs": {"plan_name": "the loaded model", **inputs}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["plan", 1]}},
    }


@pytest.mark.parametrize("loader", ["this pack's", "core's"])
def test_the_plan_of_the_loaded_model_needs_no_second_file(server, distilled, loader):
    prompt = carried(distilled[loader], model=["model", 0])
    remembers = "cached_patcher_init" in (COMFYUI / "comfy" / "model_patcher.py").read_text(encoding="utf-8")
    if loader == "core's" and not remembers:
        assert "this ComfyUI does not keep its name" in server.error(prompt)
        return
    assert server.run(prompt)["outputs"]["show"]["text"] == [PLAN.to_text()]


def test_a_loaded_model_without_a_plan_is_refused(server, built):
    model = graph(built)["model"]
    assert "The loaded model's file carries no plan" in server.error(carried(model, model=["model", 0]))
    assert "no model is connected" in server.error(carried(model))


def test_presets_are_listed_and_marked(server):
    """A new node starts on the first entry: what was saved last, of whatever model, must not be that."""
    folder = server.base / "models" / "evdit_plans"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a_saved_plan.json").write_text(TilePlan.uniform(1).to_json(), encoding="utf-8")
    kind, *rest = server.get("/object_info/EVDiTLoadTilePlan")["EVDiTLoadTilePlan"]["input"]["required"]["plan_name"]
    options = kind if isinstance(kind, list) else rest[0]["options"]
    assert {"hunyuan_video (preset)", "opensora_plan (preset)"} <= set(options)
    presets = [name for name in options if name.endswith(" (preset)")]
    assert options[: len(presets)] == presets and "a_saved_plan.json" in options
    assert [presets.index(f"{name} (preset)") for name in ("minimax_h3", "wan", "ltx_av")] == [0, 3, 5]


@pytest.mark.parametrize("prefix", ["../out", "/var/out", "a/b", "", "..", "x" * 101])
def test_plans_are_saved_in_their_folder_only(server, prefix):
    prompt = {"plan": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 2}}}
    prompt["save"] = {"class_type": "EVDiTSaveTilePlan", "inputs": {"plan": ["plan", 0], "filename_prefix": prefix}}
    assert "filename_prefix" in server.error(prompt)


def test_the_tile_map_draws_the_layers_and_gives_their_shares(server, built):
    prompt = graph(built)
    inputs = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "latent": ["latent", 0],
        "seed": 0,
        "rows": 4,
        "percent": 0.3,
    }
    more = {"layers": "0,-1", "plan": ["plan", 0], "second_prompt": ["negative", 0]}
    prompt["plan"] = {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 2}}
    prompt["map"] = {"class_type": "EVDiTAttentionTileMap", "inputs": {**inputs, **more}}
    prompt["image"] = {"class_type": "SaveImage", "inputs": {"images": ["map", 0], "filename_prefix": "map"}}
    prompt["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["map", 1]}}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    picture = np.asarray(Image.open(next((server.base / "output").glob("map_*.png"))))
    assert picture.shape[1] > picture.shape[0] / 2 and picture.std() > 10
    (text,) = entry["outputs"]["text"]["text"]
    # Every token attends to all alike: each of the 8 frames gets an eighth, and 2:6 keeps 34 of the 64 tiles.
    assert (
        text.count("own frame 12.5%, another frame 12.50%") == 2 and "plan 2:6 keeps 53.1% in 53% of the tiles" in text
    )
    assert text.count("overlap at 90/95/99 %: 100% / 100% / 100%") == 2
    prompt["plan"]["inputs"]["text"] = "0-4:2:6 5:[0-2]1:7[3]full"
    (text,) = server.run(prompt)["outputs"]["text"]["text"]
    assert "Layer 5, heads 0-2\n" in text and "plan 1:7 keeps 34.4% in 34% of the tiles" in text.split("heads 0-2")[-1]
    prompt["map"]["inputs"]["layers"] = "17"
    assert "expected 1 to 12 of the model's 6" in server.error(prompt)
    prompt["plan"]["inputs"]["text"] = "0-1:2"  # said first, before the model runs
    assert "The plan has 2 layers, but the model has 6" in server.error(prompt)
    prompt["plan"]["inputs"]["text"] = "all:2 40:full"
    assert "the plan names layer 40, but the model has 6" in server.error(prompt)
