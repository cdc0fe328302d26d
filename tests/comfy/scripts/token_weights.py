"""The matrices that each video token meets, counted on ComfyUI's own classes at their real size, without memory. Prints
JSON."""

import importlib
import json
import sys

from host import load_pack, torch  # isort: skip
import comfy.ops  # isort: skip
from tiny_models import KANDINSKY_6  # isort: skip

load_pack()
(families,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.families"))
bounds = importlib.import_module(
    families.__name__.removesuffix("nodes.comfy_bridge.families") + "efficient_vdit_core.bench.bounds"
)
wan = {"model_type": "t2v", "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 16}
ltx = {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 48, "cross_attention_dim": 4096, "caption_channels": 3840,
       "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048}  # fmt: skip
REAL = {
    "minimax_h3": ("comfy.ldm.minimax.model", "MiniMaxH3Model", {}),
    "wan_14b": ("comfy.ldm.wan.model", "WanModel", wan),
    "ltx2": ("comfy.ldm.lightricks.av_model", "LTXAVModel", ltx),
}
found = {}
for name, (module, kind, settings) in REAL.items():
    try:
        build = getattr(importlib.import_module(module), kind)
    except ImportError:
        continue  # in versions without such a model
    network = build(**settings, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    family, model = families.find_family(network), bounds.MODELS[name]
    found[name] = {
        "here": [
            family.token_weights(network),
            family.depth(network),
            family.head_count(network),
            family.head_dim(network),
        ],
        "table": [model.weights, model.depth, model.heads, model.head_dim],
    }
# Those without a row in that table, by the sum of a block's matrices: C wide, F in the middle, sound of A.
C, F, A = (KANDINSKY_6[name] for name in ("model_dim", "ff_dim", "model_dim_a"))
SUMS = {
    "Kandinsky5": ("comfy.ldm.kandinsky5.model", {}, 32 * (6 * 1792**2 + 2 * 1792 * 7168)),
    "Kandinsky6NativeAVDiT": ("tiny_kandinsky6", KANDINSKY_6, 3 * (8 * C**2 + 2 * C * F + 2 * C * A)),
}
for kind, (module, settings, want) in SUMS.items():
    try:
        build = getattr(importlib.import_module(module), kind)
    except ImportError:
        continue
    network = build(**settings, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    found[kind] = {"here": [families.find_family(network).token_weights(network)], "table": [want]}
# Those that are left as they are, by the class that this ComfyUI has.
LEFT = {"comfy.ldm.wan.model_animate2": "WanAnimate2Model", "comfy.ldm.seedvr.model": "NaDiT"}
left = {}
for module, kind in LEFT.items():
    try:
        network = getattr(importlib.import_module(module), kind).__new__(getattr(importlib.import_module(module), kind))
    except ImportError:
        continue
    torch.nn.Module.__init__(network)
    left[kind] = [families.find_family(network) is None, families.why_no_family(network)]
print(json.dumps({"weights": found, "left": left}))
