"""Presets, metadata and warnings of the few-step nodes. Prints JSON."""

import json
import pathlib
import sys

from host import call, load_pack, torch  # isort: skip
import comfy.model_sampling as ms  # isort: skip
import comfy.samplers  # isort: skip
from tiny_models import CASES, build, inputs, missing  # isort: skip

pack = load_pack()
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
modules = {
    name.rsplit("efficient_vdit_core.", 1)[-1]: m for name, m in sys.modules.items() if "efficient_vdit_core." in name
}
bridge, carrier = (
    next(m for name, m in sys.modules.items() if name.endswith(f"comfy_bridge.{file}"))
    for file in ("sampling", "distilled")
)


def levels(source, **inputs):
    return call(pack["EVDiTConsistencySigmas"], **{"model": source, "segments": 4, "steps": 4, **inputs})[0].tolist()


class FlowSampling(ms.ModelSamplingDiscreteFlow, ms.CONST):
    pass


flow = model.clone()
flow.add_object_patch("model_sampling", FlowSampling())
distilled = model.clone()
about = modules["distill.metadata"].DistillMetadata("consistency", 4, 8, {"kind": "vp"}, "v_prediction", 3.0)
distilled.set_attachments(carrier.DISTILLED, about)

facts = {
    "LightX2V 4 steps": levels(flow, preset="LightX2V 4 steps"),
    "shift 5": levels(flow, shift=5.0),
    "second expert": levels(flow, preset="LightX2V 4 steps", start_step=2),
    "manual": levels(model, preset="manual", manual_sigmas="2, 1, 0"),
    "from the loaded model": levels(distilled, preset="from checkpoint"),
    "4 segments, 8 steps": levels(model, steps=8),
    "refused": {},
    "warnings": {},
}
wrong = {
    "flow preset on a v model": {"preset": "FastWan 3 steps"},
    "shift on a v model": {"shift": 3.0},
    "no metadata": {"preset": "from checkpoint"},
    "empty part": {"start_step": 4},
}
for name, changes in wrong.items():
    try:
        levels(model, **changes)
        facts["refused"][name] = False
    except ValueError as error:
        facts["refused"][name] = len(str(error)) > 20

cases = {
    "as made": (distilled, 8, 1.0, 0.0), "plain model": (model, 2, 7.0, 1.0), "cfg 3": (distilled, 8, 3.0, 0.0),
    "2 steps": (distilled, 2, 1.0, 0.0), "gamma 1": (distilled, 8, 1.0, 1.0), "half of it": (distilled, 8, 1.0, 0.0),
}  # fmt: skip
for name, (source, steps, cfg, gamma) in cases.items():
    guider = comfy.samplers.CFGGuider(source)
    guider.set_cfg(cfg)
    guider.inner_model = source.model
    sigmas = torch.tensor(levels(model, segments=steps, steps=steps))
    facts["warnings"][name] = bridge.remarks(guider, sigmas[:3] if name == "half of it" else sigmas, gamma)


def on_cogvideox(sampler):
    """A clip of CogVideoX, whose network takes latents at unit variance and whose schedule scales none."""
    x, asked, _ = inputs(CASES["cogvideox"])
    guider = comfy.samplers.CFGGuider(cogvideox)
    guider.set_conds(asked, asked)
    guider.set_cfg(1.0)
    with torch.inference_mode():
        return guider.sample(
            x, torch.zeros_like(x), sampler, torch.tensor(levels(cogvideox)), disable_pbar=True, seed=0
        )


if not missing(CASES["cogvideox"]):
    from comfy_extras.nodes_void import VOID_DDIM

    cogvideox, ours = build(CASES["cogvideox"]), call(pack["EVDiTConsistencySampler"], gamma=0.0, noise_seed=0)[0]
    stock = on_cogvideox(VOID_DDIM())
    facts["cogvideox against its own sampler"] = float((on_cogvideox(ours) - stock).abs().max() / stock.abs().max())

node = pack["EVDiTConsistencySigmas"]
marks = [node.fingerprint_inputs(preset="from checkpoint", checkpoint=source) for source in (bridge.LOADED_MODEL, None)]
facts["marks"] = [
    *marks,
    node.fingerprint_inputs(model=None, segments=4),
    node.fingerprint_inputs(preset="segments", checkpoint="x"),
]
original, bridge.checkpoint_path = bridge.checkpoint_path, lambda _: pathlib.Path(__file__)
facts["mark of a file"] = node.fingerprint_inputs(preset="from checkpoint", checkpoint="x", model=None)
bridge.checkpoint_path, facts["when it was changed"] = original, pathlib.Path(__file__).stat().st_mtime
print(json.dumps(facts))
