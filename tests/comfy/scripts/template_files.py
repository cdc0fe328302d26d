"""Tiny random models under the names of the files that the templates load, for ComfyUI's own loaders.

$EVDIT_FILES names a JSON of paths, by which each is recognised; text encoders and what has one size only are left out.
Prints JSON, the paths written.
"""

import inspect
import json
import os
from fnmatch import fnmatch
from pathlib import Path

from host import torch  # isort: skip
import comfy.ops  # isort: skip
from safetensors.torch import save_file
from tiny_models import (
    HUNYUAN,
    LTX_25,
    LTX_AUDIO,
    MINIMAX_H3,
    NEWER_HUNYUAN,
    WAN,
    Case,
    build,
    comfyui_version,
    missing,
)

WIDTH = 256  # of Wan and HunyuanVideo: ComfyUI takes their heads as 128 wide
BLOCKS = [["res_x", {"num_layers": 1}], *[["compress_all", {"multiplier": 1}], ["res_x", {"num_layers": 1}]] * 3]
LTX_VAE = {
    "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "blocks": BLOCKS, "norm_layer": "pixel_norm",
    "patch_size": 4, "latent_log_var": "uniform", "encoder_base_channels": 16, "decoder_base_channels": 16,
}  # fmt: skip
LTX_SOUND = {
    "model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False, "in_channels": 2, "out_ch": 2,
        "ch": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": False,
        "norm_type": "pixel", "causality_axis": "height",
    }}},
    "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
}  # fmt: skip
VOCODER = {"upsample_initial_channel": 32}
UPSAMPLER = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3}


def wan(in_dim: int) -> Case:
    sizes = {"dim": WIDTH, "num_layers": 8, "in_dim": in_dim, "freq_dim": 256, "text_dim": 4096}
    return Case("WAN21_T2V", {**WAN, **sizes}, (), (0, 0, 0, 0))


def ltx(settings: dict) -> Case:
    requires = "comfy.ldm.lightricks.duration_head" if settings is LTX_25 else ""
    # Its connectors, which a text encoder's whole output does not go through, are 3840 wide by default.
    connectors = {
        f"{side}connector_{size}": 8
        for side in ("", "audio_")
        for size in ("attention_head_dim", "num_attention_heads")
    }
    return Case("LTXAV", {**settings, **connectors, "num_layers": 6}, (), (0, 0, 0, 0), requires=requires)


def hunyuan() -> Case:
    sizes = {
        "hidden_size": WIDTH,
        "axes_dim": [16, 56, 56],
        "vec_in_dim": 768,
        "mlp_ratio": 4.0,
        "depth_single_blocks": 4,
    }
    return Case("HunyuanVideo", {**HUNYUAN, **sizes}, (), (0, 0, 0, 0), newer=NEWER_HUNYUAN)


MODELS = {
    "wan2.2_i2v*": wan(36),
    "wan2.?_t2v*": wan(16),
    "ltx-2.3-22b*": ltx(LTX_AUDIO),
    "ltx-2.5-22b*": ltx(LTX_25),
    "minimax_h3_fl2va*": Case("MiniMaxH3", {**MINIMAX_H3, "num_layers": 6}, (), (0, 0, 0, 0)),
    "hunyuan_video_t2v*": hunyuan(),
}
ADAPTED = {"wan2.2_i2v*": wan(36), "wan*": wan(16), "ltx_2.3*": ltx(LTX_AUDIO), "minimax*": MODELS["minimax_h3_fl2va*"]}


def found(table: dict, name: str):
    return next((value for pattern, value in table.items() if fnmatch(name.lower(), pattern)), None)


def random(module, prefix: str = "") -> dict:
    torch.manual_seed(0)
    return {
        f"{prefix}{name}": torch.randn_like(value) * 0.05 if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def weights(case: Case, prefix: str = "") -> tuple[dict, dict]:
    """The state dict and the metadata that tell ComfyUI the sizes that it cannot read from the weights."""
    tensors = build(case).model.diffusion_model.state_dict()
    config = {"transformer": case.settings} if case.config == "LTXAV" else {}
    return {f"{prefix}{name}": value for name, value in tensors.items()}, config


def lora(case: Case) -> dict:
    """For every matrix of the blocks' attention over the video."""
    tensors, _ = weights(case)
    names = [n for n in tensors if ".1." in n and n.endswith("weight") and tensors[n].ndim == 2 and "attn" in n]
    made = {}
    for name in names:
        base = f"diffusion_model.{name.removesuffix('.weight')}"
        outputs, inputs = tensors[name].shape
        made[f"{base}.lora_A.weight"] = torch.randn(2, inputs) * 0.1
        made[f"{base}.lora_B.weight"] = torch.randn(outputs, 2) * 0.1
    return made


def ltx_vae(prefix: str = "") -> tuple[dict, dict]:
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    return random(VideoVAE(config=LTX_VAE), prefix), {"vae": LTX_VAE}


def ltx_sound() -> tuple[dict, dict]:
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE

    config = {"audio_vae": LTX_SOUND, "vocoder": VOCODER}
    tensors = random(AudioVAE(metadata={"config": json.dumps(config)}))
    return {name.replace("autoencoder.", "audio_vae.", 1): value for name, value in tensors.items()}, config


def ltx_upsampler() -> tuple[dict, dict]:
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler

    make = LatentUpsampler.from_config
    newer = {"operations": comfy.ops.disable_weight_init} if "operations" in inspect.signature(make).parameters else {}
    return random(make(UPSAMPLER, **newer)), UPSAMPLER


def wan_vae() -> dict:
    from comfy.ldm.wan.vae import WanVAE

    dim = 8 if comfyui_version() >= (0, 8) else 96  # earlier ones build no other
    return random(WanVAE(dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[]))


def contents(path: Path) -> tuple[dict, dict] | None:
    """Tensors and configuration of a file; None for one that is not made here."""
    kind, name = path.parent.name, path.name
    if kind in ("loras", "diffusion_models", "checkpoints"):
        case = found(ADAPTED if kind == "loras" else MODELS, name)
        if case is None or missing(case):
            raise ValueError(f"no tiny model for {path.name} {case and missing(case)}")
        if kind == "loras":
            return lora(case), {}
        if kind == "diffusion_models":
            return weights(case)
        parts = [weights(case, "model.diffusion_model."), ltx_vae("vae."), ltx_sound()]
        return {k: v for tensors, _ in parts for k, v in tensors.items()}, {
            k: v for _, c in parts for k, v in c.items()
        }
    if kind == "latent_upscale_models":
        return ltx_upsampler()
    made = {"wan_2.1_vae*": lambda: (wan_vae(), {}), "ltx-2.5-video-vae*": ltx_vae, "ltx-2.5-audio-vae*": ltx_sound}
    maker = found(made, name) if kind == "vae" else None
    return None if maker is None else maker()


written = []
for file in map(Path, json.loads(Path(os.environ["EVDIT_FILES"]).read_text())):
    made = contents(file)
    if made is None:
        continue
    tensors, config = made
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"config": json.dumps(config)} if config else None
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file, metadata)
    written.append(str(file))
print(json.dumps(written))
