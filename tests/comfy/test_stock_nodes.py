"""MODEL, CLIP and VAE of the loaders are ordinary ones: ComfyUI's own nodes take them."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from efficient_vdit_core.tinyworld.moving.reader import read_clip
from efficient_vdit_core.tinyworld.moving.scene import Scene

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "efficient_vdit_core" / "assets" / "tiny" / "transformer" / "config.json"
BUILT_IN = "tiny (built in)"
_number = itertools.count()


def graph(
    sampler: str = "euler", text: str = "a red circle moving right fast on a white background", steps: int = 2
) -> dict:
    """Loaders and a stock KSampler; add nodes that read ["sampled", 0] (LATENT), ["model", 0], ["clip", 0], ["vae",
    0]."""
    conditions = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
    }
    settings = {"seed": 3, "steps": steps, "cfg": 3.0, "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0}
    return {
        "model": {"class_type": "EVDiTModelLoader", "inputs": {"model_name": BUILT_IN, "weight_dtype": "default"}},
        "clip": {"class_type": "EVDiTTextEncoderLoader", "inputs": {"text_encoder_name": BUILT_IN}},
        "vae": {"class_type": "EVDiTVAELoader", "inputs": {"vae_name": BUILT_IN}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}},
        "latent": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 29, "batch_size": 1},
        },
        "sampled": {"class_type": "KSampler", "inputs": {**conditions, **settings}},
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0], "vae": ["vae", 0]}},
    }


def frames(server, prompt: dict, source: str = "decoded") -> np.ndarray:
    """Run the prompt and read the images of the node ``source``, saved losslessly: (F, H, W, 3) int."""
    prefix = f"frames{next(_number)}"
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    files = sorted((server.base / "output").glob(f"{prefix}_*.png"))
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


@pytest.fixture(scope="module")
def plain(server):
    return frames(server, graph())


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "lcm", "uni_pc"])
def test_stock_samplers_run(server, sampler):
    assert frames(server, graph(sampler)).shape == (29, 64, 64, 3)


def test_a_model_that_predicts_the_noise_draws_what_the_caption_says(server):
    """As Open-Sora-Plan does, under ComfyUI's own sampler and schedule."""
    prompt = graph(text="a blue square moving left slowly on a white background", steps=12)
    prompt["model"]["inputs"]["model_name"] = "tiny epsilon (built in)"
    seen = read_clip(frames(server, prompt).astype(np.uint8))
    assert (seen.shape, seen.color, seen.background) == ("square", "blue", "white")


def test_a_model_of_four_jumps_draws_what_the_caption_says(server):
    """In four steps without guidance, by the levels that its file names."""
    scene = Scene("square", "blue", "left", "slowly", "white", start=(32.0, 32.0), radius=9.0)
    prompt = graph(text=scene.caption())
    prompt["model"]["inputs"]["model_name"] = "tiny 4 steps (built in)"
    made_for = {
        "model": ["model", 0],
        "segments": 1,
        "steps": 1,
        "preset": "from checkpoint",
        "checkpoint": "the loaded model",
    }
    prompt["sigmas"] = {"class_type": "EVDiTConsistencySigmas", "inputs": made_for}
    prompt["sampler"] = {"class_type": "EVDiTConsistencySampler", "inputs": {"gamma": 0.0, "noise_seed": 0}}
    of_stock = {name: prompt["sampled"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    custom = {"add_noise": True, "noise_seed": 3, "cfg": 1.0, "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    prompt["sampled"] = {"class_type": "SamplerCustom", "inputs": {**of_stock, **custom}}
    found = read_clip(frames(server, prompt).astype(np.uint8)).verdict(scene)
    assert all(found[name] for name in ("shape", "color", "background", "track")), found


def test_the_tiled_decoder_gives_the_same_clip_where_one_tile_holds_it(server, plain):
    prompt = graph()
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    prompt["decoded"] = {
        "class_type": "VAEDecodeTiled",
        "inputs": {"samples": ["sampled", 0], "vae": ["vae", 0], **tiles},
    }
    assert np.abs(frames(server, prompt) - plain).max() <= 1


def test_the_encoder_goes_back_to_a_latent_of_the_same_length(server, plain):
    prompt = graph()
    prompt["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["decoded", 0], "vae": ["vae", 0]}}
    prompt["again"] = {"class_type": "VAEDecode", "inputs": {"samples": ["encoded", 0], "vae": ["vae", 0]}}
    assert frames(server, prompt, "again").shape == plain.shape


def sparse(prompt: dict, frames_kept: int) -> dict:
    """Put the sparse node between loader and sampler."""
    prompt["plan"] = {"class_type": "EVDiTTilePlan", "inputs": {"reference_frames": frames_kept}}
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    prompt["sparse"] = {
        "class_type": "EVDiTSparseAttention",
        "inputs": {"model": ["model", 0], "plan": ["plan", 0], **settings},
    }
    prompt["sampled"]["inputs"]["model"] = ["sparse", 0]
    return prompt


def test_sparsity_reaches_a_stock_sampler_and_leaves_with_the_node(server, plain):
    assert (frames(server, sparse(graph(), 8)) == plain).all()
    assert (frames(server, sparse(graph(), 1)) != plain).any()
    # As bypassed: the sampler gets the loader's MODEL again, the same object, since the loader's result is cached.
    assert (frames(server, graph()) == plain).all()


def test_a_lora_is_applied(server, plain):
    key = "diffusion_model.transformer_blocks.0.attn1.to_q"
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    width, generator = config["num_attention_heads"] * config["attention_head_dim"], torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator)
    lora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(lora, folder / "tiny.safetensors")
    prompt = graph()
    inputs = {"model": ["model", 0], "lora_name": "tiny.safetensors", "strength_model": 1.0}
    prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    prompt["sampled"]["inputs"]["model"] = ["lora", 0]
    assert (frames(server, prompt) != plain).any()
    assert "lora key not loaded" not in server.text()


def test_a_saved_model_loads_again(server, plain):
    prompt = {name: node for name, node in graph().items() if name == "model"}
    prompt["save"] = {
        "class_type": "ModelSave",
        "inputs": {"model": ["model", 0], "filename_prefix": "diffusion_models/saved"},
    }
    assert server.run(prompt)["status"]["status_str"] == "success"
    (saved,) = (server.base / "output" / "diffusion_models").glob("saved*.safetensors")
    shutil.copy(CONFIG, saved.with_name("config.json"))
    prompt = graph()
    prompt["model"]["inputs"]["model_name"] = saved.name
    assert np.abs(frames(server, prompt) - plain).max() <= 1


@pytest.mark.parametrize("size", [(72, 56, 13), (80, 64, 1)], ids=["odd latent", "one frame"])
def test_other_sizes_run_sparse(server, size):
    width, height, length = size
    prompt = sparse(graph(), 1)
    prompt["latent"]["inputs"].update(width=width, height=height, length=length)
    assert frames(server, prompt).shape == (length, height, width, 3)


def test_a_batch_of_two_runs_sparse(server):
    prompt = sparse(graph(), 2)
    prompt["latent"]["inputs"]["batch_size"] = 2
    assert len(frames(server, prompt)) == 58
