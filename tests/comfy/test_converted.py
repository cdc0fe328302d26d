"""Whole weights of diffusers' models, renamed by `evdit convert comfyui`, give the same in ComfyUI's own classes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from efficient_vdit_core.cli import main

diffusers = pytest.importorskip("diffusers")
SHAPE = {"in_channels": 16, "out_channels": 16, "num_layers": 3}
MODELS = {
    "wan": lambda: diffusers.WanTransformer3DModel(
        **SHAPE, num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=96, rope_max_seq_len=32
    ),
    "cogvideox": lambda: diffusers.CogVideoXTransformer3DModel(
        **SHAPE,
        num_attention_heads=3,
        attention_head_dim=16,
        text_embed_dim=32,
        time_embed_dim=24,
    ),
}


@pytest.fixture(scope="module")
def facts(in_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        config = json.dumps({**model.config, "_class_name": type(model).__name__}, default=list)
        state = {key: x.contiguous() for key, x in model.state_dict().items()}
        save_file(state, folder / "exported.safetensors", metadata={"config": config, "format": "pt"})
        assert (
            main(["convert", "comfyui", str(folder / "exported.safetensors"), str(folder / f"{name}.safetensors")]) == 0
        )
        # CogVideoX's table of positions is for the size that it was trained on, and for texts of 226 tokens.
        size, words = ((5, 6, 8), 7) if name == "wan" else ((13, 60, 90), 226)
        x, t, text = torch.randn(1, 16, *size), torch.tensor([700.0]), torch.randn(1, words, 32)
        given = x if name == "wan" else x.transpose(1, 2)
        with torch.no_grad():
            out = model(hidden_states=given, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
        out = (out if name == "wan" else out.transpose(1, 2)).contiguous()
        save_file({"x": x, "t": t, "text": text, "out": out}, folder / f"{name}.io.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVDIT_CONVERTED", str(folder))
        return in_process("converted")


@pytest.mark.parametrize("name", MODELS)
def test_the_same_comes_out(facts, name):
    found = facts[name]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["error"] < 1e-4 and found["tensors"] > 50


def test_what_names_no_model_is_refused(tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert main(["convert", "comfyui", str(tmp_path / "lora.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert "of no class that it names, expected whole weights" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
