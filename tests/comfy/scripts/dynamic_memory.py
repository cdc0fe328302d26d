"""The loaders where ComfyUI keeps weights in its dynamic memory, as on a GPU. Prints JSON."""

import importlib.util
import json

from host import call, load_pack, skip, torch  # isort: skip

if not importlib.util.find_spec("comfy.memory_management"):
    skip("this ComfyUI has no dynamic memory")
import comfy.memory_management as memory  # isort: skip

pack = load_pack()


def load(weight_dtype="default"):
    return call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype=weight_dtype)[0]


def as_loaded(model):
    """What ComfyUI makes of the linear layers' weights when it loads them."""
    layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear)]
    return sorted({str(layer.weight_comfy_model_dtype) for layer in layers})


(clip,) = call(pack["EVDiTTextEncoderLoader"], text_encoder_name="tiny (built in)")
(vae,) = call(pack["EVDiTVAELoader"], vae_name="tiny (built in)")
model, facts = load(), {"reloaded": {}}
for name, patcher in (("model", model), ("clip", clip.patcher), ("vae", vae.patcher)):
    make, given, *_ = patcher.cached_patcher_init
    again = make(*given, disable_dynamic=True)
    again = getattr(again, "patcher", again)
    before, after = (p.model.state_dict() for p in (patcher, again))
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    facts["reloaded"][name] = same and again.model is not patcher.model
if hasattr(memory, "aimdo_enabled"):
    memory.aimdo_enabled = True
    try:
        facts |= {"fp8": as_loaded(load("fp8_e4m3fn")), "bf16": as_loaded(load("bf16"))}
    finally:
        memory.aimdo_enabled = False
print(json.dumps(facts))
