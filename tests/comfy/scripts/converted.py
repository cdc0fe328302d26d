"""ComfyUI's Wan and CogVideoX on weights that came from diffusers' by the pack's converter. Prints JSON.

$EVDIT_CONVERTED is a folder with <case>.safetensors and, for each, inputs and diffusers' result in <case>.io.safetensors.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from host import torch  # isort: skip
from safetensors.torch import load_file  # isort: skip
from tiny_models import CASES, build, missing  # isort: skip

found = {}
for file in sorted(Path(os.environ["EVDIT_CONVERTED"]).glob("*.io.safetensors")):
    name = file.name.removesuffix(".io.safetensors")
    if missing(CASES[name]):
        found[name] = {"skipped": f"this ComfyUI has no {missing(CASES[name])}"}
        continue
    case = CASES[name]
    if name == "cogvideox":  # ComfyUI's loader tells by the table in the file
        case = replace(case, settings={**case.settings, "use_learned_positional_embeddings": True})
    model, io = build(case).model.diffusion_model, load_file(file)
    weights = load_file(file.with_name(f"{name}.safetensors"))
    model.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        out = model(io["x"], io["t"], io["text"])
    found[name] = {"error": float((out - io["out"]).abs().max() / io["out"].abs().max()), "tensors": len(weights)}
print(json.dumps(found))
