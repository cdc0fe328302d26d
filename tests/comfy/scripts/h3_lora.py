"""ComfyUI's MiniMax-H3 with a LoRA that the trainer wrote, sampled at the levels that the trainer's own rollout had.
Prints JSON.

$EVDIT_H3_LORA is a folder with weights, LoRA, and noise, words and levels beside the rollout's results, with the LoRA and
without.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from host import log_lines, torch  # isort: skip
import comfy.samplers  # isort: skip
import comfy.sd  # isort: skip
from comfy.nested_tensor import NestedTensor  # isort: skip
from safetensors.torch import load_file  # isort: skip
from tiny_models import CASES, build  # isort: skip

folder = Path(os.environ["EVDIT_H3_LORA"])
io, lora = load_file(folder / "io.safetensors"), load_file(folder / "lora.safetensors")
case = CASES["h3"]
model = build(replace(case, settings={**case.settings, "num_layers": 4, "token_refiner_num_layers": 1}))
model.model.diffusion_model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
lines = log_lines()


def sample(chosen):
    guider = comfy.samplers.CFGGuider(chosen)
    cond = [[io["words"], {}]]
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    start = NestedTensor([io["video"], io["sound"]])
    with torch.inference_mode():
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(start, start - start, euler, io["levels"], disable_pbar=True, seed=0).unbind()


def distance(found, name):
    pairs = zip(found, (io[f"{name} video"], io[f"{name} sound"]), strict=True)
    return [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]


with_lora = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)[0]
facts = {
    "dense": distance(sample(model), "dense"),
    "lora": distance(sample(with_lora), "lora"),
    "effect": distance(sample(model), "lora"),
    "patched": len(with_lora.patches),
    "layers": sum(name.endswith(".alpha") for name in lora),
    "not loaded": [line for line in lines if "not loaded" in line],
}
print(json.dumps(facts))
