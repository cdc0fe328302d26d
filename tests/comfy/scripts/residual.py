"""Sparse Attention with a cached residual, in runs of a tiny Wan. Prints JSON."""

import json
import sys

from host import call, load_pack, log_lines, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.samplers  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(patch,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.patch"))
log = log_lines()
model = build(CASES["wan"])
x, text, longer = noise(1, 16, 9, 4, 6), noise(1, 7, 32), noise(1, 11, 32)


def sparse(source=model, k=0, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(k), **settings)[0]


def run(chosen, steps=20, cfg=1.0, other=longer):
    """Texts of two lengths are two forwards a step under guidance; of one length they are one."""
    log.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds([[text, {}]], [[other, {}]])
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        return guider.sample(x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


def kept(chosen) -> int:
    return len(patch.hook_of(chosen).preparation.residual.kept)


def work(chosen) -> str:
    return call(pack["EVDiTReport"], model=chosen)[0].splitlines()[1]


def distances(**about):
    """From the dense clip: of the sparse one, and with a residual renewed every 8, 4 and 2 steps."""
    exact = run(model, **about)
    found = [run(sparse(residual_every=every), **about) for every in (0, 8, 4, 2)]
    return [float((clip - exact).norm() / exact.norm()) for clip in found]


facts = {
    "plain": distances(),
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
exact = run(cached)
facts["EasyCache"] = [float((run(sparse(cached, residual_every=n)) - exact).norm() / exact.norm()) for n in (0, 4)]
print(json.dumps(facts))
