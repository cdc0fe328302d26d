"""Sequence parallelism as a user meets it: over HTTP, on two CPU ranks."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SPARSE = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "1", "min_tokens": 0}
PARALLEL = {"devices": "cpu,cpu", "scheme": "auto", "start_timeout": 600, "step_timeout": 600, "after_run": "keep", "strict": True}


def prompt(name, loader, text, *, parallel=True, frames=29, steps=2, cfg=2.0, **changes):
    """Loader, sparse attention, perhaps the workers, KSampler, saved latents."""
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
                "model": ["4" if parallel else "3", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["7", 0], "seed": 5,
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


def latents(server, name, *args, **kwargs):
    entry = server.run(prompt(name, *args, **kwargs))
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-3000:]
    (saved,) = (server.base / "output" / "parallel").glob(f"{name}_*.latent")
    return load_file(saved)["latent_tensor"]


def worker_pids():
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {int(line.split()[0]) for line in found.splitlines() if line.endswith(f"{ROOT}/efficient_vdit_core/parallel/boot.py")}


def test_open_sora_plan_on_two_ranks_is_the_same_video(server):
    alone = latents(server, "alone", OSP, TEXT, parallel=False)
    before = worker_pids()
    shared = latents(server, "shared", OSP, TEXT)
    assert (shared - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert re.search(r"Efficient-vDiT: 2 forward passes on 2 ranks, \d+ ms and up to 0\.\d MiB", server.text())
    started = worker_pids() - before
    assert len(started) == 2
    # A second run with another number of steps takes the pool that is there, and so does another scheme.
    again = latents(server, "again", OSP, TEXT, steps=3, scheme="ulysses")
    assert again.isfinite().all() and worker_pids() - before == started


def test_a_fault_of_the_workers_is_told_and_the_next_run_works(server):
    before = worker_pids()
    assert before
    for pid in before:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    assert latents(server, "after", OSP, TEXT, steps=1).isfinite().all()
    assert not worker_pids() & before


def test_free_reaches_the_workers(server):
    """After /free ComfyUI lets go of its models, and the workers of theirs; the next run still works."""
    latents(server, "before_free", OSP, TEXT, steps=1, cfg=1.0)
    server.post("/free", {"unload_models": True, "free_memory": False})
    assert latents(server, "after_free", OSP, TEXT, steps=1, cfg=1.5).isfinite().all()


def test_one_device_passes_through(server):
    alone = latents(server, "one_alone", OSP, TEXT, parallel=False, steps=1)
    one = latents(server, "one", OSP, TEXT, steps=1, devices="cpu", strict=False)
    assert (one == alone).all()
    assert "the model runs on one device: One device was found (cpu)" in server.text()


def test_strict_says_why_not(server):
    message = server.error(prompt("strict", OSP, TEXT, devices="cpu"))
    assert "One device was found (cpu), expected two or more" in message


@pytest.fixture(scope="module")
def facts(in_process):
    """Two ranks without a pool: each builds the models from a prompt and computes sharded and whole forwards."""
    return in_process("parallel_host")


@pytest.mark.parametrize("name", ["osp", "wan", "wan by frame"])
def test_a_rank_of_a_headless_comfyui_computes_the_same(facts, name):
    assert facts[name]["error"] <= 1e-4 and facts[name]["bytes"] > 0


def test_both_schemes_were_used(facts):
    """dense_blocks keeps layer 1 full, the others are sparse."""
    assert facts["osp"]["by"]["rb partial rows"] and facts["osp"]["by"]["ulysses to heads"]


def test_a_node_that_a_worker_lacks_is_named(facts):
    assert "The node NoSuchNode is missing in the workers" in facts["missing"]
    assert "UNETLoader" in facts["invalid"] and "gone.safetensors" in facts["invalid"]
