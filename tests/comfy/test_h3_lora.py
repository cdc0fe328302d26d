"""A LoRA for MiniMax-H3 from the trainer does in ComfyUI what it did there: diffusers' three projections are one layer in
ComfyUI, and the halves of the feed-forward stand the other way round. Both sides sample, so that schedules, the sound's
scale and the sign of the velocity are compared too."""

import pytest
import torch
from safetensors.torch import save_file
from small_models import minimax_h3
from tiny_h3 import TEXT, tiny_h3

from efficient_vdit_core.distill.families.minimax_h3_clip import ClipShape
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.lora.files import comfy_lora
from efficient_vdit_core.distill.lora.layers import adapted, add_lora
from efficient_vdit_core.distill.objectives.rollout import roll_down
from efficient_vdit_core.sampling.schedule import segment_edges

pytest.importorskip("diffusers")
ROUNDING = 1e-4
SHAPE = ClipShape(24, 32, 7, 6, 10)
SEGMENTS = 4


@pytest.fixture(scope="module")
def facts(in_process, tmp_path_factory):
    import comfyui_server
    from diffusers.loaders.single_file_utils import convert_minimax_h3_transformer_checkpoint_to_diffusers

    if not (comfyui_server.COMFYUI / "comfy" / "ldm" / "minimax").is_dir():
        pytest.skip("this ComfyUI has no MiniMax-H3")
    folder = tmp_path_factory.mktemp("h3")
    weights = tiny_h3(layers=4)
    save_file(weights, folder / "weights.safetensors")
    model = open_model(minimax_h3(folder, text_dim=TEXT))
    module = model.load().eval()
    module.load_state_dict(convert_minimax_h3_transformer_checkpoint_to_diffusers(dict(weights), model.config))
    random = torch.Generator().manual_seed(2)
    video, sound, words = (torch.randn(s, generator=random) for s in ((24, 7, 6, 10), (74, 32), (1, 5, TEXT)))
    start = SHAPE.pack(video, sound)[None]

    def rolled(name):
        """The sound as ComfyUI has it, (1, channels, sides, length), off its scale on the pictures' path."""
        z = roll_down(lambda z, t: model.predict(module, z, t, (words, None)), model.path, model.prediction, start,
                      segments=SEGMENTS)  # fmt: skip
        pictures, heard, _ = SHAPE.unpack(z[0])
        return {f"{name} video": pictures[None], f"{name} sound": as_comfy(heard) * model.sound_shift / model.shift}

    def as_comfy(rows):
        return rows.view(2, 37, 32).permute(2, 0, 1)[None]

    io = {"video": video[None], "sound": as_comfy(sound), "words": words, **rolled("dense")}
    add_lora(module, 3, alpha=2.0)
    for layer in adapted(module).values():
        for part in layer.part("lora"):
            torch.nn.init.normal_(part, std=0.3, generator=random)
    io |= rolled("lora")
    edges = segment_edges(SEGMENTS, start=model.path.start, clean=model.path.clean)
    io["levels"] = model.path.coefficients(edges)[1].float()
    save_file({name: x.contiguous() for name, x in io.items()}, folder / "io.safetensors")
    lora = comfy_lora(module, module.state_dict(), model.comfy_layer)
    save_file({name: x.contiguous() for name, x in lora.items()}, folder / "lora.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVDIT_H3_LORA", str(folder))
        return in_process("h3_lora")


def test_the_rollout_is_comfyuis_own_without_a_lora(facts):
    assert max(facts["dense"]) < ROUNDING


def test_the_lora_acts_as_it_did_in_training(facts):
    assert max(facts["lora"]) < ROUNDING < 1e-2 < min(facts["effect"])


def test_every_layer_of_the_lora_is_loaded(facts):
    """Four layers in each of four blocks and one refiner block."""
    assert facts["patched"] == facts["layers"] == 4 * (4 + 1) and not facts["not loaded"]
