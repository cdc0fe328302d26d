"""ComfyUI's own Train LoRA behind Sparse Attention, on tiny models. Prints JSON."""

import importlib.util
import json
import sys

from host import call, load_pack, log_lines, skip, torch  # isort: skip
from tiny_models import CASES, build, inputs, missing  # isort: skip

if not importlib.util.find_spec("comfy_extras.nodes_train"):
    skip("this ComfyUI trains no LoRA")
from comfy_extras.nodes_train import TrainLoraNode  # isort: skip

pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
lines = log_lines()
SETTINGS = {
    "batch_size": 1, "steps": 2, "grad_accumulation_steps": 1, "learning_rate": 1e-2, "rank": 2, "optimizer": "SGD",
    "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
    "algorithm": "LoRA", "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
}  # fmt: skip
known = (
    {field.id for field in TrainLoraNode.define_schema().inputs} if hasattr(TrainLoraNode, "define_schema") else set()
)
SETTINGS = {name: value for name, value in SETTINGS.items() if name in known}
if "checkpoint_depth" not in known:
    skip("this ComfyUI's Train LoRA checkpoints in no chosen depth")


def trained(case, plan, depth, images=1, residual_every=0):
    """The LoRA, or what was refused; ``depth`` of gradient checkpointing, 0 = none."""
    model = build(case)
    model.cached_patcher_init = (lambda disable_dynamic=False: build(case), ())
    sparse = call(
        pack["EVDiTSparseAttention"], model=model, plan=plans.TilePlan.from_text(plan), start_percent=0.0, end_percent=1.0,
        dense_blocks="", min_tokens=0, decline_slow=False, residual_every=residual_every,
    )[0]  # fmt: skip
    x, prompt, _ = inputs(case)
    latents = {"samples": x[:1].repeat(images, *[1] * (x.ndim - 1))}
    settings = {**SETTINGS, "gradient_checkpointing": depth > 0, "checkpoint_depth": max(depth, 1)}
    lines.clear()
    torch.manual_seed(0)
    try:
        found = TrainLoraNode.execute(
            model=[sparse], latents=[latents], positive=[prompt], **{k: [v] for k, v in settings.items()}
        )
    except (ValueError, RuntimeError) as error:
        return str(error)
    return {name: value.detach().double() for name, value in found.args[0].items()}


def difference(found, expected):
    """Of two LoRAs; the refusal of one that there is none of."""
    if isinstance(found, str) or isinstance(expected, str):
        return f"{found}, {expected}"
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


facts = {}
for name in ("wan", "cosmos", "cogvideox"):
    if missing(CASES[name]):
        continue
    mixed, alike = "all:1 0:full", "all:1"
    plain = trained(CASES[name], mixed, 0)
    facts[name] = {
        "whole": difference(trained(CASES[name], mixed, 1), plain),
        "lines": list(lines),
        "effect": difference(trained(CASES[name], "all:full", 0), plain),
        "blocks alike": difference(trained(CASES[name], alike, 2), trained(CASES[name], alike, 0)),
        "blocks": trained(CASES[name], mixed, 2),
        # As many images as a schedule has steps that would keep one.
        "residual": difference(trained(CASES[name], mixed, 0, 16, 2), trained(CASES[name], mixed, 0, 16)),
    }
print(json.dumps(facts))
