"""The sparse node beside ComfyUI's own split of guidance over devices, with the CPU under two names. Prints JSON."""

import json
import sys

from host import call, load_pack, log_lines, torch  # isort: skip
import comfy.samplers  # isort: skip

try:
    from comfy.multigpu import GPUOptionsGroup  # isort: skip
except ImportError:
    print(json.dumps({"skipped": "this ComfyUI does not split guidance over devices"}))
    sys.exit()

pack, lines = load_pack(), log_lines()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
(sparse,) = call(pack["EVDiTSparseAttention"], model=model, plan=plans.TilePlan.uniform(1), start_percent=0.0, end_percent=1.0,
                 dense_blocks="", min_tokens=0)  # fmt: skip
latent = torch.randn(1, 4, 8, 8, 8)
text, other = (torch.randn(1, 6, model.model.diffusion_model.config.caption_channels) for _ in range(2))
devices = []


def on_two_devices(source):
    """As ComfyUI's MultiGPU node does it: a copy of the model for the second device."""
    both = source.clone()
    copy = both.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    copy.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [copy])
    both.match_multigpu_clones()
    GPUOptionsGroup().register(both)
    return both


def run(source):
    lines.clear()
    guider = comfy.samplers.CFGGuider(source)
    guider.set_conds([[text, {}]], [[other, {}]])
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(source.get_model_object("model_sampling"), "simple", 3)
    with torch.inference_mode():
        return guider.sample(
            latent, torch.zeros_like(latent), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def watched(source):
    source.model.diffusion_model.register_forward_pre_hook(lambda *_: devices.append(id(source.model)))
    return source


dense, want = run(model), run(sparse)
alone = list(lines)
both = on_two_devices(sparse)
for patcher in (both, *both.get_additional_models_with_key("multigpu")):
    watched(patcher)
got = run(both)
print(json.dumps({
    "models": len(set(devices)), "forwards": len(devices), "lines alone": alone, "lines": list(lines),
    "difference": float((got - want).abs().max()), "effect": float((dense - want).abs().max()), "scale": float(want.abs().max()),
}))  # fmt: skip
