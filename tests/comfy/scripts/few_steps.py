"""Presets, metadata and warnings of the few-step nodes. Prints JSON."""

import json
import pathlib
import sys

from host import call, load_pack, log_lines, torch  # isort: skip
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
about = modules["models.distilled"].DistillMetadata("consistency", 4, 8, {"kind": "vp"}, "v_prediction", 3.0)
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
    "unknown preset": {"preset": "LightX2V 4 step"},
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
for lowest in (0.0101, 0.0171):
    about = modules["models.distilled"].DistillMetadata(
        "consistency", 8, 8, {"kind": "vp", "sigma_min": lowest}, "v_prediction"
    )
    distilled.set_attachments(carrier.DISTILLED, about)
    guider = comfy.samplers.CFGGuider(distilled)
    guider.inner_model = distilled.model
    facts["warnings"][f"from {lowest}"] = bridge.remarks(guider, torch.tensor(levels(model, segments=8, steps=8)), 0.0)
for name, steps in (("its jumps", 4), ("between its jumps", 8)):
    about = modules["models.distilled"].DistillMetadata(
        "consistency", 4, 4, {"kind": "vp"}, "v_prediction", jumps_only=True
    )
    distilled.set_attachments(carrier.DISTILLED, about)
    guider = comfy.samplers.CFGGuider(distilled)
    guider.inner_model = distilled.model
    facts["warnings"][name] = bridge.remarks(guider, torch.tensor(levels(model, segments=4, steps=steps)), 0.0)


def ours(gamma):
    return call(pack["EVDiTConsistencySampler"], gamma=gamma, noise_seed=0)[0]


def on(family, source, sampler, sigmas, noise=None, latent=None, **options):
    """A clip of a tiny model without guidance, from ``noise`` on zeros by default."""
    x, asked, _ = inputs(CASES[family])
    x = x if noise is None else noise
    guider = comfy.samplers.CFGGuider(source)
    guider.set_conds(asked, asked)
    guider.set_cfg(1.0)
    with torch.inference_mode():
        start = torch.zeros_like(x) if latent is None else latent
        return guider.sample(x, start, sampler, torch.tensor(sigmas), disable_pbar=True, seed=0, **options)


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def seen_of_a_mask(source, latent, mask):
    """How far the latents that the network is given spread, kept half and made half, at each step."""
    spreads, half = [], latent.shape[-1] // 2

    def look(apply, given):
        x = given["input"]
        spreads.append([float(x[..., :half].std()), float(x[..., half:].std())])
        return apply(x, given["timestep"], **given["c"])

    watched = source.clone()
    watched.set_model_unet_function_wrapper(look)
    out = on("cogvideox", watched, ours(0.0), levels(source), latent=latent, denoise_mask=mask)
    return {"spreads": spreads, "kept": float((out - latent)[..., :half].abs().max())}


if not missing(CASES["cogvideox"]):
    from comfy_extras.nodes_void import VOID_DDIM

    # Its network takes latents at unit variance, and its schedule scales none.
    cogvideox = build(CASES["cogvideox"])
    clip = on("cogvideox", cogvideox, VOID_DDIM(), levels(cogvideox))
    facts["cogvideox against its own sampler"] = off(on("cogvideox", cogvideox, ours(0.0), levels(cogvideox)), clip)
    facts["cogvideox re-noised"] = bool(on("cogvideox", cogvideox, ours(0.5), levels(cogvideox)).isfinite().all())
    half = torch.ones(1, 1, *clip.shape[2:])
    half[..., : clip.shape[-1] // 2] = 0
    facts["cogvideox masked"] = seen_of_a_mask(cogvideox, torch.randn(clip.shape), half)

wan = build(CASES["wan"])
parts = [
    levels(wan, preset="rCM 4 steps", start_step=start, end_step=end) for start, end in ((0, 1000), (0, 1), (1, 1000))
]
whole, first = (on("wan", wan, ours(1.0), part) for part in parts[:2])
facts["two experts against one"] = off(
    on("wan", wan, ours(1.0), parts[2], noise=torch.zeros_like(first), latent=first), whole
)
lines = log_lines()
on("wan", wan, ours(0.0), parts[0])
facts["said of the preset"], known = list(lines), bridge.model_metadata
bridge.model_metadata = lambda _: modules["models.distilled"].DistillMetadata.from_entries({"evdit": "half a"})
facts["sampled all the same"] = off(on("wan", wan, ours(1.0), parts[0]), whole)
bridge.model_metadata, facts["said of the file"] = known, lines[-1]

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
