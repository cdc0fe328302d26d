"""Small models with random weights of each family that is trained, written into a folder."""

import json
from dataclasses import replace

import pytest
import torch

from efficient_vdit_core.distill.config import ModelConfig
from efficient_vdit_core.models.opensora_plan.config import DiTConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.storage.weight_files import save_safetensors

LAYERS = 4
SHAPE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": LAYERS}


def opensora_plan(folder, layers=LAYERS):
    config = DiTConfig(**{**SHAPE, "num_layers": layers}, caption_channels=8, sample_size=(4, 4), sample_size_t=4)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, OpenSoraT2V(config).state_dict(), {"config": json.dumps(config.to_dict())})
    return ModelConfig(transformer=str(file))


def tiny(folder):
    return ModelConfig()


def wan(folder, channels=4):
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.WanTransformer3DModel(
        **SHAPE, in_channels=channels, out_channels=channels, text_dim=8, freq_dim=16, ffn_dim=32, rope_max_seq_len=32
    )
    return saved(kind, folder, {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"})


def wan_5b(folder):
    """Wan 2.2's 5B has 48 channels, and a VAE of 16 x 16 pixels."""
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"scale_factor_spatial": 16, "scale_factor_temporal": 4}))
    return wan(folder, 48)


def wan_22(folder):
    """Wan 2.2's 14B has two networks."""
    config = wan(folder)
    kind = pytest.importorskip("diffusers").WanTransformer3DModel.from_pretrained(folder / "transformer")
    for parameter in kind.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    kind.save_pretrained(folder / "transformer_2")
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return replace(config, expert="high")


def cogvideox(folder):
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.CogVideoXTransformer3DModel(
        **{**SHAPE, "attention_head_dim": 16}, in_channels=4, out_channels=4, text_embed_dim=8, time_embed_dim=16,
        max_text_seq_length=5, sample_width=8, sample_height=8, sample_frames=13, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return saved(kind, folder, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})


def saved(module, folder, scheduler):
    module.save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return ModelConfig(path=str(folder), family="diffusers")


def minimax_h3(folder, **changes):
    """Its two schedules, and the two VAEs as far as a folder's settings tell of them."""
    diffusers = pytest.importorskip("diffusers")
    shape = {
        "num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 48, "num_layers": LAYERS, "num_refiner_layers": 1,
        "ffn_dim": 96, "text_dim": 8, "freq_dim": 32, "time_embed_hidden_dim": 48, "time_embed_dim": 24, "rope_freq_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    kind = diffusers.MiniMaxH3Transformer3DModel(**{**shape, **changes})
    for name, values in {
        "audio_scheduler/scheduler_config": {"_class_name": "MiniMaxH3Scheduler", "shift": 3.0},
        "vae/config": {"_class_name": "AutoencoderKLMiniMaxH3"},
        "audio_vae/config": {"_class_name": "AutoencoderKLMiniMaxH3Audio", "sampling_rate": 32000},
    }.items():
        file = folder / f"{name}.json"
        file.parent.mkdir()
        file.write_text(json.dumps(values))
    return saved(kind, folder, {"_class_name": "MiniMaxH3Scheduler", "shift": 12.0})
