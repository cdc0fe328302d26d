"""Sequence parallelism as a user meets it: over HTTP, on two CPU ranks, in a ComfyUI with the whole pack.

The registry's archive starts no processes, so the other tests' server will not do.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pools
import pytest
import torch
from comfyui_server import COMFYUI, PYTHON, Server
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_h3 import TEXT as H3_TEXT
from tiny_h3 import tiny_h3, tiny_h3_lora
from tiny_wan import tiny_wan

ROOT = Path(__file__).parents[2]
SPARSE = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "1", "min_tokens": 0}
PARALLEL = {
    "devices": "cpu,cpu",
    "scheme": "auto",
    "start_timeout": 600,
    "step_timeout": 600,
    "after_run": "keep",
    "strict": True,
}
WEIGHTS = ("whole", "sharded")
# Wan's text is 4096 wide; only a file of gigabytes could give it here.
RANDOM_TEXT = """
import torch

class RandomText:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"seed": 0, "tokens": 7, "width": 4096}
        return {"required": {name: ("INT", {"default": value, "max": 10000}) for name, value in numbers.items()}}

    def make(self, seed, tokens, width):
        return ([[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]],)

NODE_CLASS_MAPPINGS = {"RandomText": RandomText}
"""


def tiny_lora():
    """For the first layer's queries of the built-in model, large enough to be seen."""
    name, random = "diffusion_model.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(3)
    return {
        f"{name}.lora_A.weight": torch.randn(4, 144, generator=random) * 0.3,
        f"{name}.lora_B.weight": torch.randn(144, 4, generator=random) * 0.3,
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("parallel")
    for folder in ("custom_nodes", "models/diffusion_models", "models/loras"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "random_text.py").write_text(RANDOM_TEXT, encoding="utf-8")
    shutil.copy(Path(__file__).parent / "stand_ins" / "other_packs.py", base / "custom_nodes")
    save_file(tiny_wan(), base / "models" / "diffusion_models" / "wan.safetensors")
    save_file(tiny_h3(), base / "models" / "diffusion_models" / "h3.safetensors")
    save_file(tiny_h3_lora(), base / "models" / "loras" / "h3.safetensors")
    save_file(tiny_lora(), base / "models" / "loras" / "tiny.safetensors")
    variables = {"EVDIT_CACHE_DIR": str(base / "cache"), "OMP_NUM_THREADS": "1"}
    running = Server(base, whole=True, more=variables, flags=("--preview-method", "latent2rgb"))
    yield running
    running.stop()


def prompt(name, loader, text, *, parallel=True, frames=29, steps=2, cfg=2.0, **changes):
    """Loader, sparse attention, perhaps the workers, KSampler, saved latents."""
    other = "10" if "10" in text else "6"
    nodes = {
        "1": loader,
        "2": {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": 1}},
        "3": {"class_type": "EVDiTSparseAttention", "inputs": {"model": ["1", 0], "plan": ["2", 0], **SPARSE}},
        "4": {"class_type": "EVDiTSequenceParallel", "inputs": {"model": ["3", 0], **PARALLEL, **changes}},
        **text,
        "7": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 48, "length": frames, "batch_size": 1}},
        "8": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4" if parallel else "3", 0], "positive": ["6", 0], "negative": [other, 0], "latent_image": ["7", 0], "seed": 5,
                "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": f"parallel/{name}"}},
    }  # fmt: skip
    return {key: node for key, node in nodes.items() if parallel or key != "4"}


OSP = {"class_type": "EVDiTModelLoader", "inputs": {"model_name": "tiny (built in)", "weight_dtype": "default"}}
TEXT = {
    "5": {"class_type": "EVDiTTextEncoderLoader", "inputs": {"text_encoder_name": "tiny (built in)"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["5", 0], "text": "a red circle"}},
}
WAN = {"class_type": "UNETLoader", "inputs": {"unet_name": "wan.safetensors", "weight_dtype": "default"}}
# Two lengths, so that CFG computes them one after the other.
WAN_TEXT = {
    "6": {"class_type": "RandomText", "inputs": {"seed": 1, "tokens": 7, "width": 4096}},
    "10": {"class_type": "RandomText", "inputs": {"seed": 2, "tokens": 9, "width": 4096}},
}
H3 = {"class_type": "UNETLoader", "inputs": {"unet_name": "h3.safetensors", "weight_dtype": "default"}}
H3_PROMPT = {"6": {"class_type": "RandomText", "inputs": {"seed": 1, "tokens": 7, "width": H3_TEXT}}}


def saved(server, entry, name):
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-3000:]
    (path,) = (server.base / "output" / "parallel").glob(f"{name}_0*.latent")
    return load_file(path)["latent_tensor"]


def latents(server, name, *args, events=None, **kwargs):
    return saved(server, server.run(prompt(name, *args, **kwargs), events), name)


def same(got, want):
    return bool(want.std() > 0.01) and bool((got - want).abs().max() <= 1e-4 * want.abs().max())


def worker_pids(server):
    """This server's own workers."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    return {
        int(pid)
        for pid, parent, text in rows
        if int(parent) == server.process.pid and text.endswith("parallel/boot.py")
    }


def gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def in_mid_run(server, graph, act):
    """Queue the prompt, call ``act`` in the midst of its steps; its history entry, and the seconds that it took to
    end."""
    events, entry = [], {}
    running = threading.Thread(target=lambda: entry.update(server.run(graph, events)))
    running.start()
    while not any(kind == "progress" and data["value"] >= 3 for kind, data in list(events)):
        assert running.is_alive(), entry or server.text()[-3000:]
        time.sleep(0.01)
    start = time.monotonic()
    act()
    running.join(60)
    return entry, time.monotonic() - start


def test_open_sora_plan_on_two_ranks_is_the_same_video(server):
    alone = latents(server, "alone", OSP, TEXT, parallel=False)
    events = []
    shared = latents(server, "shared", OSP, TEXT, events=events)
    assert same(shared, alone)
    (shown,) = [data for kind, data in events if kind == "text"]
    assert shown[0] == "4" and shown[1].startswith("2 ranks, scheme auto.")
    assert [data["value"] for kind, data in events if kind == "progress" and data["node"] == "8"][-1] == 2
    said = r"2 forward passes on 2 ranks, \d+ ms and up to 0\.\d MiB sent by a rank in each; 5 layers by rb, 1 layers by ulysses"
    assert re.search(said, server.text())
    assert "attention call over the video came by" not in server.text()
    started = worker_pids(server)
    assert len(started) == 2
    # A second run takes the pool and the model that are there, with other steps and another scheme too.
    three = latents(server, "three_alone", OSP, TEXT, parallel=False, steps=3)
    assert same(latents(server, "three", OSP, TEXT, steps=3, scheme="ulysses"), three)
    assert same(latents(server, "rb", OSP, TEXT, steps=3, scheme="rb"), three)
    assert worker_pids(server) == started
    # A prompt that was saved before branches were divided computes what it did.
    assert torch.equal(latents(server, "sequence", OSP, TEXT, division="sequence"), shared)
    assert same(latents(server, "branches", OSP, TEXT, division="auto"), alone)
    assert "6 layers by alone; 2 of them by branch on ranks 0 and 1" in server.text()
    assert worker_pids(server) == started


@pytest.mark.parametrize("division", ["sequence", "branches"])
def test_the_report_of_sparse_attention_counts_the_calls_of_the_workers(server, division):
    """As of one device, but for seconds, from either MODEL: dense layers and steps, and a guidance's branches in one call."""
    texts, events = {}, []
    for parallel in (False, True):
        name = f"report_{division}_{parallel}"
        graph = prompt(name, OSP, TEXT, parallel=parallel, steps=3, division=division)
        graph["3"]["inputs"].update(dense_first_steps=1, decline_slow=False, measure=parallel)
        for key, source in (("20", "3"), ("21", "4" if parallel else "3")):
            graph[key] = {"class_type": "EVDiTReport", "inputs": {"model": [source, 0], "after": ["8", 0]}}
        entry = server.run(graph, events)
        saved(server, entry, name)
        one, other = (entry["outputs"][key]["text"][0] for key in ("20", "21"))
        assert one == other
        texts[parallel] = one.splitlines()
    alike = ("Self-attention", "  work:", "  dense:", "The clip:", "  attention is")
    alone, shared = ([line for line in text if line.startswith(alike)] for text in texts.values())
    assert shared == alone and len(alone) == len(alike)
    assert alone[0] == "Self-attention over the video: 18 calls, 10 of them sparse"
    assert {*texts[True]} - {*alone} == {
        "  computed by rb on all ranks (10), ulysses on all ranks (8)"
        if division == "sequence"
        else "  computed by alone on rank 0 (18)",
        "Not measured: the workers compute each step once",
    }
    of_one, of_workers = [data for kind, data in events if kind == "efficient_vdit.report"]
    assert of_one["dense"].pop("cross-attention") == 18  # the workers count what is over the video
    same = ("node", "sparse", "dense", "bound", "layers", "frames")
    assert [of_workers[name] for name in same] == [of_one[name] for name in same]
    said = "10 attention calls sparse at mean density 0.34; dense: 6 outside the step window, 2 full in the plan"
    assert said in server.text()


def test_previews_show_the_run_of_all_ranks(server):
    shown = {}
    for name, parallel in (("preview_alone", False), ("preview_shared", True)):
        events = []
        latents(server, name, OSP, TEXT, parallel=parallel, events=events, steps=3, cfg=1.5)
        files = [data for kind, data in events if kind == "preview"]
        shown[parallel] = np.stack([np.asarray(Image.open(BytesIO(file)).convert("RGB"), dtype=int) for file in files])
    assert shown[True].shape == shown[False].shape and len(shown[True]) >= 3 and shown[True].std() > 5
    assert np.abs(shown[True] - shown[False]).max() <= 4  # JPEG


def test_wan_on_two_ranks_is_the_same_video(server):
    """CFG in two calls, for the texts differ in length; the pool holds this model beside the other."""
    alone = latents(server, "wan_alone", WAN, WAN_TEXT, parallel=False, frames=17)
    assert same(latents(server, "wan", WAN, WAN_TEXT, frames=17, division="branches"), alone)
    assert "guidance branches came one at a time and went by sequence" in server.text()


@pytest.mark.parametrize("scheme", ["rb", "ulysses"])
def test_minimax_h3_and_its_sound_on_two_ranks_are_the_same(server, scheme):
    """Text, sound and video are one sequence, which its payload describes; sigma shifts and a LoRA, of the text as well."""
    known = server.get("/object_info")
    if "EmptyMiniMaxH3LatentAV" not in known:
        pytest.skip("this ComfyUI has no MiniMax-H3")

    def graph(name, *, with_lora=True, **kwargs):
        nodes = prompt(name, H3, H3_PROMPT, cfg=1.0, **kwargs)
        shifts = {"model": ["1", 0], "shift_video": 6.0, "shift_audio": 2.0}
        nodes["20"] = {"class_type": "MiniMaxH3SigmaShift", "inputs": shifts}
        lora = {"model": ["20", 0], "lora_name": "h3.safetensors", "strength_model": 1.0}
        nodes["23"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
        nodes["3"]["inputs"]["model"] = ["23" if with_lora else "20", 0]
        nodes["7"] = {"class_type": "EmptyMiniMaxH3LatentAV", "inputs": {"width": 160, "height": 96, "length": 22}}
        nodes["21"] = {"class_type": "LTXVSeparateAVLatent", "inputs": {"av_latent": ["8", 0]}}
        nodes["9"]["inputs"]["samples"] = ["21", 0]
        nodes["22"] = {"class_type": "SaveLatent", "inputs": {"samples": ["21", 1]}}
        nodes["22"]["inputs"]["filename_prefix"] = f"parallel/{name}_sound"
        return nodes

    alone = server.run(graph(f"h3_alone_{scheme}", parallel=False))
    shared = server.run(graph(f"h3_{scheme}", scheme=scheme))
    plain = saved(
        server, server.run(graph(f"h3_plain_{scheme}", with_lora=False, parallel=False)), f"h3_plain_{scheme}"
    )
    assert not same(saved(server, alone, f"h3_alone_{scheme}"), plain)
    for what in ("", "_sound"):
        assert same(saved(server, shared, f"h3_{scheme}{what}"), saved(server, alone, f"h3_alone_{scheme}{what}"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_lora_acts_in_the_workers_and_so_does_another_strength(server, weights):
    def graph(name, strength, **kwargs):
        nodes = prompt(name, OSP, TEXT, **kwargs)
        lora = {"model": ["1", 0], "lora_name": "tiny.safetensors", "strength_model": strength}
        nodes["20"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
        nodes["3"]["inputs"]["model"] = ["20", 0]
        return nodes

    before = latents(server, f"no_lora_{weights}", OSP, TEXT, parallel=False)
    for strength in (1.0, 0.5):
        names = [f"lora_{kind}_{weights}_{int(10 * strength)}" for kind in ("alone", "shared")]
        alone, shared = (
            saved(server, server.run(graph(name, strength, parallel=name == names[1], weights=weights)), name)
            for name in names
        )
        assert not same(alone, before) and same(shared, alone)
        before = alone


def test_the_shipped_workflow_with_the_node_in_it(server):
    """Our own sampler and SamplerCustomAdvanced; the report promises a speed-up."""
    results = {}
    for name in ("template_alone", "template"):
        graph = json.loads((ROOT / "web" / "prompts" / "tiny_text_to_video.json").read_text(encoding="utf-8"))
        kinds = {node["class_type"]: key for key, node in graph.items()}
        graph[kinds["EVDiTConsistencySigmas"]]["inputs"].update(segments=2, steps=4)
        graph["99"] = {"class_type": "SaveLatent", "inputs": {"samples": [kinds["SamplerCustomAdvanced"], 0]}}
        graph["99"]["inputs"]["filename_prefix"] = f"parallel/{name}"
        if name == "template":
            for node in graph.values():
                for field, value in node["inputs"].items():
                    if value == [kinds["EVDiTSparseAttention"], 0]:
                        node["inputs"][field] = ["98", 0]
            inputs = {"model": [kinds["EVDiTSparseAttention"], 0], **PARALLEL}
            graph["98"] = {"class_type": "EVDiTSequenceParallel", "inputs": inputs}
            graph["97"] = {"class_type": "PreviewAny", "inputs": {"source": ["98", 1]}}
            graph[kinds["EVDiTSparseAttention"]]["inputs"]["measure"] = True
        events = []
        results[name] = saved(server, server.run(graph, events), name)
    assert same(results["template"], results["template_alone"])
    (report,) = [data["output"]["text"][0] for kind, data in events if kind == "executed" and data["node"] == "97"]
    assert re.search(r"rank 1: cpu, sends \d+\.\d+ GB/s", report)
    assert re.search(r"Expected speed-up.*: [01]\.\d\dx for 81 frames of 832x480, [01]\.\d\dx for 93 frames", report), (
        report
    )
    assert "Sparse Attention's measure has no effect here: the workers compute each step once." in report
    said = r"CFG above 1, .*: 2\.00x and 2\.00x by branch, [01]\.\d\dx and [01]\.\d\dx by sequence\. Taken is by sequence: division is"
    assert re.search(said, report), report


def test_cancel_ends_the_run_and_keeps_the_pool(server):
    """In the midst of a run by branch; the next one goes by sequence again, and another by branch."""
    latents(server, "before_cancel", OSP, TEXT, steps=1)
    before, long = worker_pids(server), prompt("cancel", OSP, TEXT, steps=2000, division="branches")
    entry, seconds = in_mid_run(server, long, lambda: server.post("/interrupt", {}))
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]] and seconds < 15.0
    alone = latents(server, "cancel_alone", OSP, TEXT, parallel=False, steps=2)
    for division in ("sequence", "branches"):
        assert same(latents(server, f"after_cancel_{division}", OSP, TEXT, steps=2, division=division), alone)
    assert worker_pids(server) == before


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_a_cancel_another_model_runs(server, weights):
    name, held = f"another_{weights}", {"weights": weights}
    latents(server, f"before_{name}", OSP, TEXT, steps=1, **held)
    in_mid_run(server, prompt("cancelled", OSP, TEXT, steps=2000, **held), lambda: server.post("/interrupt", {}))
    alone = latents(server, f"alone_{name}", WAN, WAN_TEXT, parallel=False, frames=9)
    assert same(latents(server, name, WAN, WAN_TEXT, frames=9, **held), alone)


def test_sharded_weights_give_the_bits_of_whole_ones(server):
    """A file of another kind than the built-in model's; the report tells the memory before the run."""
    whole, events = latents(server, "whole_wan", WAN, WAN_TEXT, frames=17), []
    graph = prompt("sharded_wan", WAN, WAN_TEXT, frames=17, weights="sharded")
    graph["97"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}}
    assert torch.equal(saved(server, server.run(graph, events), "sharded_wan"), whole)
    (report,) = [data["output"]["text"][0] for kind, data in events if kind == "executed" and data["node"] == "97"]
    assert report.startswith("2 ranks, scheme auto. The weights are shared out, the activations are divided.")
    said = r"Weights take \d+\.\d\d GiB on each device in place of \d+\.\d\d GiB; each gathers \d+\.\d\d GiB in every evaluation"
    assert re.search(said, report), report
    assert "with nothing overlapped but the weights' gather" in report


def test_two_prompts_queued_at_once_get_the_same_videos_as_one_after_the_other(server):
    chosen = {"queued_osp": (OSP, TEXT, {}), "queued_wan": (WAN, WAN_TEXT, {"frames": 9})}
    entries = {}

    def run(name):
        loader, text, more = chosen[name]
        entries[name] = server.run(prompt(name, loader, text, **more))

    both = [threading.Thread(target=run, args=(name,)) for name in chosen]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for name, (loader, text, more) in chosen.items():
        alone = latents(server, f"{name}_alone", loader, text, parallel=False, **more)
        assert same(saved(server, entries[name], name), alone)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_killed_rank_is_named_and_the_next_run_works(server, weights):
    latents(server, f"before_kill_{weights}", OSP, TEXT, steps=1, weights=weights)
    before = worker_pids(server)
    entry, seconds = in_mid_run(
        server,
        prompt("kill", OSP, TEXT, steps=2000, weights=weights, division="branches"),
        lambda: os.kill(max(before), signal.SIGKILL),
    )
    (message,) = [data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert "rank 1 ended without a word" in message and "killed by SIGKILL" in message
    assert "Requested to load" in message  # the rank's last lines
    assert seconds < 15.0  # the pool's own test holds the 5 s; this one runs beside a whole ComfyUI
    assert gone(before)
    # The same prompt, whose node is not run again: ComfyUI has its result.
    alone = latents(server, f"kill_alone_{weights}", OSP, TEXT, parallel=False, steps=2)
    more = {"weights": weights, "division": "branches"}
    assert same(latents(server, f"after_kill_{weights}", OSP, TEXT, steps=2, **more), alone)
    assert len(worker_pids(server)) == 2 and not worker_pids(server) & before


def test_a_rank_that_was_killed_between_two_runs_costs_none_of_them(server):
    latents(server, "before_idle_kill", OSP, TEXT, steps=1, cfg=1.0)
    before = worker_pids(server)
    os.kill(max(before), signal.SIGKILL)
    assert pools.gone(before)
    alone = latents(server, "idle_kill_alone", OSP, TEXT, steps=1, cfg=1.25, parallel=False)
    assert same(latents(server, "after_idle_kill", OSP, TEXT, steps=1, cfg=1.25), alone)
    assert len(worker_pids(server)) == 2
    assert "have ended since the last run and are sought anew: rank 1 ended without a word" in server.text()


def test_free_reaches_the_workers(server):
    """After /free the workers let go of their models too; the next run still works."""
    said = "the workers have moved their models to main memory"
    latents(server, "before_free", OSP, TEXT, steps=1, cfg=1.0)
    count = server.text().count(said)
    server.post("/free", {"unload_models": True, "free_memory": False})
    end = time.monotonic() + 20
    while server.text().count(said) == count:
        assert time.monotonic() < end, server.text()[-2000:]
        time.sleep(0.1)
    alone = latents(server, "free_alone", OSP, TEXT, steps=1, cfg=1.5, parallel=False)
    assert same(latents(server, "after_free", OSP, TEXT, steps=1, cfg=1.5), alone)


@pytest.mark.parametrize("after", ["offload", "stop"])
def test_what_the_workers_do_after_a_run(server, after):
    latents(server, f"then_{after}", OSP, TEXT, steps=1, after_run=after)
    assert len(worker_pids(server)) == (0 if after == "stop" else 2)


def test_one_device_passes_through(server):
    alone = latents(server, "one_alone", OSP, TEXT, parallel=False, steps=1)
    events = []
    one = latents(server, "one", OSP, TEXT, steps=1, devices="cpu", strict=False, events=events)
    assert (one == alone).all()
    shown = [data for kind, data in events if kind == "text"]
    assert len(shown) == 1 and shown[0][0] == "4"
    assert shown[0][1].startswith(
        "The model runs on one device as it was: One device was found (cpu), expected two or more"
    )
    assert "the model runs on one device: One device was found (cpu)" in server.text()


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("banana", "devices is 'banana', expected"),
        ("0,1", "devices names GPU 0, but this machine shows no GPU. Write auto."),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_devices_that_are_not_there_stop_the_run(server, devices, said, strict):
    assert said in server.error(prompt("devices", OSP, TEXT, devices=devices, strict=strict))


def test_strict_says_why_not(server):
    message = server.error(prompt("strict", OSP, TEXT, devices="cpu"))
    assert "One device was found (cpu), expected two or more" in message


def sampled_by(kind, name, text, *, parallel, start, **more):
    """A prompt with a stand-in of another pack's sampler, sparse from ``start`` of the schedule."""
    graph = prompt(name, WAN, text, parallel=parallel, frames=17, steps=6)
    kept = ("model", "positive", "negative", "latent_image", "seed", "steps", "cfg")
    inputs = {key: graph["8"]["inputs"][key] for key in kept}
    graph["8"] = {"class_type": kind, "inputs": {**inputs, **more}}
    graph["3"]["inputs"].update(start_percent=start, decline_slow=False)
    return graph


@pytest.mark.parametrize("text", ["one batch", "one after the other"])
def test_a_sampler_that_passes_values_of_its_own_gives_the_same_video(server, text):
    """As RES4LYF's do, for network classes that it puts in the place of ComfyUI's: with ComfyUI's own nothing reads them."""
    conditionings = {**WAN_TEXT, "10": WAN_TEXT["6"]} if text == "one batch" else WAN_TEXT
    alone, shared = (
        saved(server, server.run(sampled_by("MarkingSampler", name, conditionings, parallel=parallel, start=0.0)), name)
        for name, parallel in ((f"marks_alone_{text[4:]}", False), (f"marks_{text[4:]}", True))
    )
    assert same(shared, alone)


def test_a_sampler_that_changes_the_schedule_in_place_gives_the_same_video(server):
    """As WanMoeKSampler does: the workers' window has to lie where that of one device does, whatever ran before."""
    alone, shared, back = (
        saved(
            server,
            server.run(sampled_by("ShiftingSampler", name, WAN_TEXT, parallel=parallel, start=0.3, shift=shift)),
            name,
        )
        for name, parallel, shift in (("shift_alone", False, 3.0), ("shift", True, 3.0), ("shift_back", True, 8.0))
    )
    assert same(shared, alone)
    plain = prompt("shift_plain", WAN, WAN_TEXT, parallel=False, frames=17, steps=6)
    plain["3"]["inputs"].update(start_percent=0.3, decline_slow=False)
    assert same(back, saved(server, server.run(plain), "shift_plain"))


def test_the_workers_go_with_a_killed_comfyui(server):
    """The last test of this server."""
    latents(server, "before_the_end", OSP, TEXT, steps=1)
    started = worker_pids(server)
    assert len(started) == 2
    server.process.kill()
    server.process.wait()
    assert gone(started)


def test_the_registrys_pack_uses_a_pool_of_torchrun(tmp_path):
    """It starts none itself; the help page's command does, run in the pack's folder. ComfyUI lies elsewhere here."""
    variables = {"EVDIT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    running = Server(tmp_path / "base", more=variables)
    pack = tmp_path / "base" / "custom_nodes" / "efficient-vdit"
    command = [str(PYTHON), "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
    command += ["--nproc-per-node", "2", "efficient_vdit_core/parallel/boot.py"]
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "EVDIT_IMPORT": str(COMFYUI)}
    log = (tmp_path / "torchrun.log").open("w")
    pool = subprocess.Popen(
        command, cwd=pack, env={**os.environ, **variables, **more}, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "cache" / "workers" / "pool.json").exists():
            assert pool.poll() is None and time.monotonic() < end, (tmp_path / "torchrun.log").read_text()
            time.sleep(0.1)
        alone = latents(running, "registry_alone", OSP, TEXT, parallel=False)
        assert same(latents(running, "registry", OSP, TEXT, devices="auto"), alone)
        assert not worker_pids(running)
    finally:
        pool.terminate()
        pool.wait(40)
        running.stop()


@pytest.fixture(scope="module")
def facts(in_process):
    """Two ranks without a pool: each builds the models from a prompt and computes sharded and whole forwards."""
    return in_process("parallel_host")


@pytest.mark.parametrize("name", ["osp", "wan", "wan by frame", "wan with references"])
def test_a_rank_of_a_headless_comfyui_computes_the_same(facts, name):
    if name not in facts:
        pytest.skip("this ComfyUI knows no references in context")
    assert facts[name]["error"] <= 1e-4 and facts[name]["bytes"] > 0


def test_a_rank_tells_its_plan(facts):
    assert facts["plan of osp"] == facts["plan of wan"] == "all:1 1:full"


def test_both_schemes_were_used(facts):
    """dense_blocks keeps layer 1 full, the others are sparse."""
    assert facts["osp"]["by"]["rb partial rows"] and facts["osp"]["by"]["ulysses to heads"]


def test_a_server_that_asks_for_who_keeps_assets_is_told_that_nobody_does(facts):
    """As that of ComfyUI 0.36; here one of the two ranks has it."""
    assert facts["assets"][1]


def test_a_node_that_a_worker_lacks_is_named(facts):
    assert "The node NoSuchNode is missing in the workers" in facts["missing"]
    assert "UNETLoader" in facts["invalid"] and "gone.safetensors" in facts["invalid"]


def test_workers_that_outlive_a_comfyui_take_the_next_one_s_folders(facts):
    found = facts["mean weight"]
    assert found["of a second ComfyUI"] == pytest.approx(5 * found["wan"])


def test_workers_refuse_a_comfyui_that_they_cannot_follow(facts):
    assert "other options (--bf16-unet, --fp16-vae), and go on with those" in facts["others"]["argv"]
    assert re.search("run the ComfyUI in .*, expected .*elsewhere. End them", facts["others"]["root"])
    assert re.search("loaded the node EVDiTTilePlan from .*, expected .*nodes. End them", facts["another copy"])
    assert re.search(r"run ComfyUI [\d.]+, expected 9\.9, .*\. End them", facts["others"]["version"])
    assert re.search("The pack in .* has changed since the workers loaded it. End them", facts["other code"])


def test_of_two_experts_each_is_read_once_whatever_changes_behind_it(facts):
    """A model's nodes run alone in the workers; ComfyUI's cache would forget the other expert's loader meanwhile."""
    assert facts["files read"] == {"read": ["high.safetensors", "low.safetensors"], "whole models held": 2}


def test_a_file_that_was_replaced_under_its_name_is_read_anew(facts):
    assert facts["mean weight"]["replaced"] == pytest.approx(3 * facts["mean weight"]["wan"])


def test_a_pack_outside_the_pools_folders_is_refused(facts):
    """What the workers import is fixed when they start; a message cannot add to it."""
    assert "The workers may not import" in facts["another folder"]


@pytest.fixture(scope="module")
def steps(in_process):
    return in_process("worker_step")


def test_a_rank_asks_its_device_for_its_part_alone(steps):
    """And for the hidden state of all tokens, which each has behind the last block."""
    asked = steps["asked"]
    by_ranks = list(asked["by ranks"].values())
    assert by_ranks[0] == asked["whole"] and by_ranks == sorted(by_ranks, reverse=True)
    for size, found in asked["by ranks"].items():
        assert 1.0 <= found * int(size) / asked["whole"] < 1.5
    fast, slow = asked["by weights"]
    assert asked["whole"] * 3 / 4 <= fast < asked["whole"] and asked["whole"] / 4 <= slow < fast
    assert asked["by branch, two ranks"] == asked["whole"] / 2
    of_four = asked["by branch, four unlike ranks"]
    assert of_four[0] == of_four[1] > of_four[2] == of_four[3] >= asked["whole"] / 8


def test_a_rank_asks_for_what_comfyui_counts_beside_the_video(steps):
    assert steps["asked"]["with text"] == steps["asked"]["whole with text"] > steps["asked"]["whole"]


def test_runs_begin_and_end_for_other_nodes_in_a_worker(steps):
    """A step tells of which run it is; the last one ends when the devices are freed."""
    first, other = ([found[f"model {number}"] for found in steps["runs"].values()] for number in (0, 1))
    assert first == [{"on_pre_run": 2, "on_cleanup": 1}, *[{"on_pre_run": 2, "on_cleanup": 2}] * 2]
    assert other == [{}, {"on_pre_run": 1}, {"on_pre_run": 1, "on_cleanup": 1}]


def test_inputs_arrive_as_they_were(steps):
    assert steps["packed"] == [0.0, 1.0, 2.0, 3]
    for key, named in (("0", "0"), ("_tensor", "'_tensor'")):
        assert f"The input options.blocks of the model has the key {named}, expected a text" in steps["keys"][key]


@pytest.fixture(scope="module")
def limits(in_process):
    return in_process("parallel_limits")


BY_BRANCH, BY_SEQUENCE = ["((0,), (1,))"], ["((0, 1),)"]


@pytest.mark.parametrize(
    ("name", "groups", "said"),
    [
        ("auto", BY_BRANCH, "by branch (ranks 0 and 1): the faster."),
        ("sequence", BY_SEQUENCE, "by sequence: division is sequence."),
        ("sharded weights", BY_BRANCH, "by branch (ranks 0 and 1): the faster."),
        (
            "sharded weights, wrapped",
            BY_SEQUENCE,
            "by sequence: another node wraps the model, whose shared out weights",
        ),
        ("whole weights, wrapped", BY_BRANCH, "by branch (ranks 0 and 1): division is branches."),
        ("sparse", BY_BRANCH, "by branch (ranks 0 and 1): the faster."),
        ("a LoRA", BY_BRANCH, "by branch (ranks 0 and 1): the faster."),
        ("a file's own attention", BY_BRANCH, "by branch (ranks 0 and 1): the faster."),
        (
            "branches, one set off against the other",
            BY_BRANCH,
            "by branch (ranks 0 and 1): division is branches.",
        ),
    ],
)
def test_a_run_is_divided_as_the_report_foretells(limits, name, groups, said):
    """Ranks gather sharded weights in step, which a wrapper that leaves blocks out for one branch would break."""
    found = limits["divisions"][name]
    assert found["groups"] == groups and f"Taken is {said}" in found["report"]


@pytest.mark.parametrize(
    "name",
    [
        "one set off against the other",
        "attention",
        "attention under sparse",
        "a replaced part",
        "a patch",
        "whole weights, wrapped, auto",
    ],
)
def test_auto_keeps_branches_together_where_another_node_may_look_at_both(limits, name):
    """Guidance such as NAG acts where both are in the batch; parted, it would do nothing."""
    found, why = limits["divisions"][name], "another node acts inside the model and may need both branches at once"
    assert found["groups"] == BY_SEQUENCE and f"Taken is by sequence: {why}." in found["report"]
    assert f"by sequence ({why})" in found["log"]


def test_a_batch_that_cannot_be_cut_stays_together(limits):
    assert limits["why whole"] == {
        "nothing": "",
        "a table": "its input table has no entry for each branch",
        "a list of another length": "its input ref_latents has no entry for each branch",
        "unlike branches": "4 entries are not 3 branches of one size",
    }


def test_hooks_and_options_before_the_node_are_no_hindrance(limits):
    assert limits["hooks before it"] == 0 and limits["an option before it"] == ""


def test_a_schedule_that_the_workers_cannot_see_is_refused(limits):
    assert limits["a schedule, before"] == ""
    assert "changes the model's noise schedule" in limits["a schedule behind"]


def test_a_guidance_that_the_workers_cannot_see_is_refused(limits):
    """LTX-2's own tell their evaluations apart by an option alone, without which they would do nothing."""
    assert "A node marks evaluations by stg_blocks" in limits["an option of some evaluations"]


def test_values_of_another_packs_sampler_are_let_pass_where_nobody_reads_them(limits):
    """Those of RES4LYF, but not a guidance's beside them."""
    found = limits["values of a sampler"]
    assert found["nobody else inside"] == found["sparse attention"] == found["a LoRA"] == found["compiled"] == ""
    assert "A node marks evaluations by stg_blocks:" in found["a guidance too"]


@pytest.mark.parametrize("name", ["attention", "a replaced part", "hooks", "wrapped", "wrapped outside"])
def test_values_of_another_packs_sampler_are_refused_where_another_node_may_read_them(limits, name):
    said = limits["values of a sampler"][name]
    assert "A sampler of RES4LYF passes values of its own to the model, and another node" in said


def test_comfyui_reads_none_of_the_values_that_are_let_pass(limits):
    names = "|".join(sorted(limits["values of RES4LYF"]))
    reads = re.compile(
        rf"options(\.get|\.pop|\.setdefault)?[\[(]['\"]({names})['\"]|['\"]({names})['\"] (not )?in \w*options"
    )
    assert reads.search("transformer_options.get('row')") and reads.search('"x_init" in transformer_options')
    sources = [path for folder in ("comfy", "comfy_extras") for path in (COMFYUI / folder).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if reads.search(path.read_text(encoding="utf-8"))] == []


def test_another_nodes_attention_behind_is_refused(limits):
    assert "stands behind EVDiTSequenceParallel" in limits["attention behind"] and limits["attention before it"] == ""


def test_a_second_model_in_a_run_is_refused(limits):
    """Dual Model CFG Guider runs its negative model with the wrappers of the first: the workers would compute with that one's
    weights, or nothing would, without the LoRAs that they hold."""
    if "two models" not in limits:
        pytest.skip("this ComfyUI has no guider of two models")
    assert all("The run samples with two models" in said for said in limits["two models"].values())
    assert limits["one model as two"] == limits["after a refusal"] == 0


def test_a_model_whose_weights_are_streamed_stays_on_its_device(limits):
    """ComfyUI's patcher for it knows no CPU."""
    assert limits["where weights are streamed"] == ["cpu", "the GPU"]


def test_a_lora_of_what_runs_before_the_steps_stays_here(limits):
    """The text of MiniMax-H3 and LTX-2 is made ready in ComfyUI's own process; the blocks' part acts in the workers."""
    assert limits["LoRAs here"] == ["diffusion_model.caption_projection.linear_1.weight"]
    assert limits["runs with them"] == ""
    assert "where the workers cannot see it" in limits["a second text LoRA behind"]


@pytest.mark.parametrize("name", ["skipped layers, before", "skipped layers, behind"])
def test_hooks_that_come_with_a_call_are_refused(limits, name):
    """Skip-layer guidance calls the model a second time with hooks; without them it would do nothing, unseen."""
    assert "A node hooks the model's blocks in some of its evaluations" in limits[name]


def test_a_cache_between_sampler_and_model_is_refused(limits):
    assert "easycache shares what it remembers between the sampler and the model" in limits["EasyCache, before"]


@pytest.mark.parametrize("name", ["a LoRA behind", "sparse attention behind", "EasyCache, behind"])
def test_a_patch_behind_the_node_is_refused(limits, name):
    assert "where the workers cannot see it. Place EVDiTSequenceParallel last" in limits[name]


def test_a_second_node_is_refused_by_its_name(limits):
    said = "The model comes from another EVDiTSequenceParallel, whose workers compute it. Remove one of the two."
    assert limits["a second time"] == said
    assert limits["a second time, not strict"] == f"The model stays with its workers as it was: {said}"


def test_what_looks_into_a_model_is_told_where_to_connect(limits):
    said = "The model comes from EVDiTSequenceParallel, whose workers compute it, so that nothing inside it can be measured."
    assert all(message.startswith(said) for message in limits["measured behind it"])


def test_the_report_adds_up_what_the_workers_count_in_a_run(limits):
    """And forgets it with the next; the log tells it too."""
    one, other = limits["reports"]
    assert one == other and one.startswith("Self-attention over the video: 12 calls, 10 of them sparse\n  work: 50% of")
    said = "Efficient-vDiT: 10 attention calls sparse at mean density 0.40; dense: 2 full in the plan"
    assert limits["log of a run"][::2] == [said, said]


def test_a_model_and_its_workers_weights_go_with_the_last_reference(limits):
    """ComfyUI takes what is left to Python's search for cycles for a leak, and warns of it."""
    assert limits["freed with the last reference"] == [True, True, True]


def test_each_run_has_a_name_of_its_own(limits):
    assert limits["names of two runs"] == [1, 1, 2]


@pytest.mark.parametrize("way", ["scaling", "replacing", "bypassing", "weighing", "computing"])
def test_nothing_behind_the_node_is_lost(limits, way):
    """Nor where the same node stands before as well, with another setting: the names are then the same."""
    found = limits["by every way"][way]
    said = "where the workers cannot see it. Place EVDiTSequenceParallel last"
    assert said in found["behind"] and said in found["behind another setting"]
    assert found["before"] == found["before, copied behind"] == ""


@pytest.mark.parametrize("weights", WEIGHTS)
def test_comfyui_makes_room_for_the_weights_of_the_worker_on_its_gpu(limits, weights):
    """Once: they are there until the workers are offloaded, or others start, whatever else the node is set to."""
    found, size = limits["room on ComfyUI's GPU"][weights], limits["forecast"][weights]
    assert size > 2**20
    for when in ("before the first run", "offloaded", "other workers"):
        assert found[when] - found["behind it"] >= size
    assert found["by the node with another choice"] == found["behind it"]


def test_comfyui_makes_no_room_where_no_worker_is(limits):
    assert limits["room where no worker is"] < 100


def test_the_forecast_says_nothing_of_a_run(limits):
    """Its clips have fewer frames than the plan."""
    assert limits["log of a forecast"] == []


def test_tensors_of_a_foreign_class_are_held_whole(limits):
    """What cannot be shared out is no hindrance where nobody asks for it."""
    found = limits["foreign tensors"]
    assert found["whole"] == "" and "A block holds a weight of class Foreign" in found["sharded"]


def test_a_node_whose_workers_failed_runs_again(limits):
    """ComfyUI keeps the result of a node whose mark has stayed: else one device it would be for good."""
    assert limits["marks"] == [["cpu", "cpu", failures] for failures in (1, 1, 2, 2)]
    failed = limits["marks"][0]
    assert all("nan" not in str(mark) for mark in limits["marks of links"]) and len(limits["marks of links"]) == 3
    assert limits["mark of one device"] != failed and "devices is '?'" in limits["mark of a wrong text"][0]
