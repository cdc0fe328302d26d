"""Sparse Attention with a cached residual, in runs of a tiny Wan. Prints JSON."""

import json
import sys
from inspect import signature

from host import call, load_pack, log_lines, nodes, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.samplers  # isort: skip
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode  # isort: skip
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(hooks,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.hook"))
(window,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.window"))
(cache,) = (m for name, m in sys.modules.items() if name.endswith("attention.hook.residual"))
log = log_lines()
model = build(CASES["wan"])
x, text, longer = noise(1, 16, 9, 4, 6), noise(1, 7, 32), noise(1, 11, 32)


def sparse(source=model, k=0, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(k), **settings)[0]


def run(chosen, steps=20, cfg=1.0, other=longer, start=x):
    """Texts of two lengths are two forwards a step under guidance; of one length they are one."""
    log.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds([[text, {}]], [[other, {}]])
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        empty = torch.zeros_like(start)
        return guider.sample(start, empty, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


def kept(chosen) -> int:
    return len(hooks.hook_of(chosen).preparation.residual.kept)


def kept_by_forward(chosen, **about) -> list[int]:
    """How many prompts and context windows are kept at the begin of each forward of a run."""
    found, of_run = [], hooks.hook_of(chosen).preparation.residual.kept
    look = chosen.model.diffusion_model.register_forward_pre_hook(
        lambda *_: found.append(len({name for name, _ in of_run}))
    )
    try:
        run(chosen, **about)
    finally:
        look.remove()
    return found


def two_nodes(high, low, steps, scheduler="simple"):
    """Two nodes of ComfyUI's, each with half of the schedule, as Wan 2.2's experts have."""
    node, half = nodes.NODE_CLASS_MAPPINGS["KSamplerAdvanced"](), steps // 2
    about = {"noise_seed": 1, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": scheduler}
    about |= {"positive": [[text, {}]], "negative": [[text, {}]]}
    with torch.inference_mode():
        (middle,) = node.sample(
            high, "enable", latent_image={"samples": torch.zeros_like(x)}, start_at_step=0, end_at_step=half,
            return_with_leftover_noise="enable", **about,
        )  # fmt: skip
        (end,) = node.sample(
            low, "disable", latent_image=middle, start_at_step=half, end_at_step=10_000, return_with_leftover_noise="disable",
            **about,
        )  # fmt: skip
    return end["samples"]


def whole(scheduler, steps, shift=8.0):
    """What the two halves of a schedule are taken for."""
    sampling = ModelSamplingSD3().patch(model, shift)[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    halves = sigmas[: steps // 2 + 1], sigmas[steps // 2 :], sigmas
    return [window.whole_steps(sampling, {"sample_sigmas": part}) for part in halves]


def forced(scheduler, steps, shift=8.0):
    """What the first half is taken for where its last step goes to a clean clip, as WanMoeKSampler's high expert has it."""
    sampling = ModelSamplingSD3().patch(model, shift)[0].get_model_object("model_sampling")
    part = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)[: steps // 2 + 1].clone()
    part[-1] = 0.0
    return window.whole_steps(sampling, {"sample_sigmas": part})


def miscounted(shift):
    """The ordinary schedules that are not taken for as many steps as they have, by scheduler and steps; ddim_uniform begins
    below the noise, so it is a part of one."""
    sampling = ModelSamplingSD3().patch(model, shift)[0].get_model_object("model_sampling")
    found = {}
    for name in set(comfy.samplers.SCHEDULER_NAMES) - {"ddim_uniform"}:
        for steps in (1, 2, 3, 4, 6, 8, 12, 15, 20, 40):
            sigmas = comfy.samplers.calculate_sigmas(sampling, name, steps)
            counted = window.whole_steps(sampling, {"sample_sigmas": sigmas})
            if counted != len(sigmas) - 1:
                found[f"{name} {steps}"] = [counted, len(sigmas) - 1]
    return found


def work(chosen) -> str:
    return call(pack["EVDiTReport"], model=chosen)[0].splitlines()[1]


def distances(sampled=run, sources=model, renewed=(4,), **about):
    """From the dense clip: of the sparse one, and with a residual ``renewed`` every so many steps."""
    exact = sampled(sources, **about)
    found = [sampled(with_residual(sources, every), **about) for every in (0, *renewed)]
    return [float((clip - exact).norm() / exact.norm()) for clip in found]


def with_residual(sources, every):
    return (
        [with_residual(one, every) for one in sources]
        if isinstance(sources, list)
        else sparse(sources, residual_every=every)
    )


facts = {
    "plain": distances(renewed=(8, 4, 2)),
    "two forwards a step": distances(cfg=3.0),
    "one forward a step": distances(cfg=3.0, other=noise(1, 7, 32)),
    "rest of the schedule": distances(steps=30),
}
residual = sparse(residual_every=4)
first, line = run(residual, cfg=3.0), list(log)
facts["line"] = next(text for text in line if "residual" in text)
facts["work"] = work(residual)
facts["kept after a run"] = kept(residual)
facts["again"] = bool(torch.equal(run(residual, cfg=3.0), first))


def cancel(*_):
    cancel.left -= 1
    if cancel.left == 0:
        raise mm.InterruptProcessingException


cancel.left = 9
stop = model.model.diffusion_model.register_forward_pre_hook(cancel)
try:
    run(residual, cfg=3.0)
except mm.InterruptProcessingException:
    facts["kept after a cancel"] = kept(residual)
stop.remove()
facts["after a cancel"] = bool(torch.equal(run(residual, cfg=3.0), first))
facts["few steps"] = bool(torch.equal(run(residual, steps=8), run(sparse(), steps=8)))
run(residual, steps=8)
facts["few steps said"] = [text for text in log if "residual" in text]
cached = EasyCacheNode.execute(model, reuse_threshold=0.5, start_percent=0.0, end_percent=1.0, verbose=False).args[0]
facts["EasyCache"] = distances(sources=cached)

experts = [model, build(CASES["wan"])]
log.clear()
facts["two experts"] = distances(lambda both: two_nodes(*both, 20), experts)
facts["two experts went without"] = [line for line in log if "no residual" in line]
log.clear()
two_nodes(*with_residual(experts, 2), 8)
facts["two experts of few steps"] = [line for line in log if "no residual" in line]
facts["forced"] = {f"{name} {n}": forced(name, n) for name in ("simple", "normal", "beta") for n in (20, 8)}
facts["miscounted"] = [miscounted(shift) for shift in (1.0, 3.0, 8.0, 12.0)]
facts["whole"] = {f"{name} {n}": whole(name, n) for name in ("simple", "normal", "beta") for n in (20, 8)}


def windows(schedule, source=model):
    asked = [source, 17, 4, schedule, 1, False, "pyramid", False]  # older ones have no freenoise
    return WanContextWindowsManualNode.execute(
        *asked[: len(signature(WanContextWindowsManualNode.execute).parameters)]
    ).args[0]


still = windows("standard_static")
facts["context windows"] = distances(sources=still, cfg=3.0)
facts["kept of context windows"] = kept_by_forward(sparse(still, residual_every=4), cfg=3.0)
moving = windows("standard_uniform")
facts["moving windows as without"] = bool(torch.equal(run(sparse(moving, residual_every=4)), run(sparse(moving))))
facts["kept of moving windows"] = kept_by_forward(sparse(moving, residual_every=4))
facts["moving windows said"] = [line for line in log if "no residual" in line]

late = {"residual_every": 4, "start_percent": 0.3}
facts["kept before the window"] = kept_by_forward(sparse(**late))[:3]
facts["kept where no window comes"] = max(kept_by_forward(sparse(residual_every=4, start_percent=0.99)))


def in_halves(model_function, inputs):
    """As nodes do that save memory: the batch in two parts, each with all that ComfyUI says of the whole."""
    parts = [
        model_function(inputs["input"][rows], inputs["timestep"][rows], **{
            name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in inputs["c"].items()
        })
        for rows in (slice(0, 2), slice(2, 4))
    ]  # fmt: skip
    return torch.cat(parts)


halved = model.clone()
halved.set_model_unet_function_wrapper(in_halves)
two_clips = {"cfg": 3.0, "other": noise(1, 7, 32), "start": noise(2, 16, 9, 4, 6)}
whole_batch = run(sparse(), **two_clips)
facts["a batch in halves"] = float((run(sparse(halved, residual_every=4), **two_clips) - whole_batch).abs().max())
facts["a batch in halves said"] = [line for line in log if "no residual" in line]
facts["kept of two clips"] = max(kept_by_forward(sparse(residual_every=4), **two_clips))

original, cache.free_bytes = cache.free_bytes, lambda *_: 1000
forwards = []
count = model.model.diffusion_model.register_forward_pre_hook(lambda *_: forwards.append(1))
try:
    run(sparse(**late))
except ValueError as error:
    facts["refused"] = str(error)
count.remove()
cache.free_bytes, facts["forwards before it was refused"] = original, len(forwards)
print(json.dumps(facts))
