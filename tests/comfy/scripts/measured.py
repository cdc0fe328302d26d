"""Sparse Attention with ``measure`` on: the run it leaves alone, and what it reports. Prints JSON."""

import json
import sys

from host import call, load_pack, log_lines, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.samplers  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

pack = load_pack()
(patch,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.patch"))
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
log = log_lines()
model = build(CASES["wan"])
forwards: list[tuple] = []


def seen(_, inputs):
    """Each forward is counted, and draws a number as a model with noise of its own would."""
    forwards.append(tuple(inputs[0].shape))
    torch.rand(1)


def unnamed(_, __, given):
    """A block is not told its number, as in versions of ComfyUI that name no layers."""
    given.get("transformer_options", {}).pop("block_index", None)


model.model.diffusion_model.register_forward_pre_hook(seen)
counted = build(CASES["wan"])
counted.model.diffusion_model.register_forward_pre_hook(seen)
for block in counted.model.diffusion_model.blocks:
    block.register_forward_pre_hook(unnamed, with_kwargs=True)
x, text, longer = noise(1, 16, 9, 4, 6), noise(1, 7, 32), noise(1, 11, 32)


def sparse(source=model, k=1, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(k), **settings)[0]


def run(chosen, steps=4, cfg=1.0, seed=0):
    """The latents, and a number that the run's own stream of them gives after it."""
    forwards.clear()
    log.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds([[text, {}]], [[longer, {}]])  # texts of two lengths are two forwards a step
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = guider.sample(
            x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=seed
        )
    return out, float(torch.rand(1))


def report(chosen) -> str:
    return call(pack["EVDiTReport"], model=chosen)[0]


def compared(steps=4, cfg=1.0, source=model, behind=lambda chosen: chosen, **changes):
    """The same run with the switch off and on."""
    plain, measuring = (behind(sparse(source, measure=measure, **changes)) for measure in (False, True))
    want, usual = run(plain, steps, cfg), len(forwards)
    said, text = list(log), report(plain)
    got = run(measuring, steps, cfg)
    *usual_lines, line = log
    return {
        "same": torch.equal(got[0], want[0]) and got[1] == want[1],
        "more forwards": len(forwards) - usual,
        "counts same": usual_lines == said,
        "calls": text.splitlines()[0] == report(measuring).splitlines()[0],
        "line": line,
        "last of the report": report(measuring).splitlines()[-1],
    }


facts = {
    "plain": compared(),
    "layers that are counted": compared(source=counted),
    "guidance": compared(cfg=2.0),
    "rotating": compared(placement="rotating"),
    "a window": compared(dense_first_steps=1),
    "one sparse step": compared(dense_first_steps=2, dense_last_steps=1),
    "one step": compared(steps=1),
    "no sparse step": compared(dense_first_steps=4),
    "declined": compared(min_tokens=10_000),
    "a residual": compared(steps=16, residual_every=4, k=0),
}
choices = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
facts["EasyCache"] = compared(steps=8, source=EasyCacheNode.execute(model, **choices).args[0])
facts["EasyCache behind"] = compared(steps=8, behind=lambda chosen: EasyCacheNode.execute(chosen, **choices).args[0])
facts["LazyCache"] = compared(steps=8, source=LazyCacheNode.execute(model, **choices).args[0])
wrapped = model.clone()
wrapped.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
facts["wrapped"] = compared(source=wrapped)

# Cancel within the dense forward of the measured step, and the next run.
measuring, found = sparse(measure=True), run(sparse())


def cancel(*_):
    if len(forwards) == 2:
        mm.interrupt_current_processing()


stop = model.model.diffusion_model.register_forward_pre_hook(cancel)
try:
    run(measuring)
except mm.InterruptProcessingException:
    facts["cancelled"] = {"forwards": len(forwards), "line": log[-1]}
stop.remove()
again = run(measuring)
facts["after it"] = {"same": torch.equal(again[0], found[0]) and again[1] == found[1], "line": log[-1]}


# No memory for the dense forward.
def no_memory(*_):
    if len(forwards) == 2:
        raise torch.cuda.OutOfMemoryError("none left")


# What the page is told: of a run that is cancelled before its first sparse call, nothing.
told = []
telling = patch.patch_attention(model, plans.TilePlan.uniform(1), after_run=lambda found, _: told.append(found.sparse))
run(telling)
stop = model.model.diffusion_model.register_forward_pre_hook(lambda *_: mm.throw_exception_if_processing_interrupted())
mm.interrupt_current_processing()
try:
    run(telling)
except mm.InterruptProcessingException:
    facts["told"] = told
stop.remove()

stop = model.model.diffusion_model.register_forward_pre_hook(no_memory)
got = run(measuring)
facts["no memory"] = {"same": torch.equal(got[0], found[0]), "line": log[-1]}
stop.remove()
print(json.dumps(facts))
