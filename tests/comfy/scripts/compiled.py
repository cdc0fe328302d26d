"""torch.compile around a tiny Wan, before and behind the sparse node. Prints JSON.

The backend "eager" traces and guards as any other, and needs no C compiler.
"""

import json
import logging

from host import call, load_pack, torch  # isort: skip
import comfy.samplers  # isort: skip
from comfy_api.torch_helpers import set_torch_compile_wrapper  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

pack = load_pack()
lines: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("efficient_vdit").addHandler(handler)
logging.getLogger("efficient_vdit").setLevel(logging.INFO)

model = build(CASES["wan"])
x, text = noise(1, 16, 9, 4, 6), noise(1, 7, 32)
(plan,) = call(pack["EVDiTTilePlan"], reference_frames=1)


def sparse(source):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plan, **settings)[0]


def run(chosen):
    lines.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds([[text, {}]], [[text * 0.5, {}]])
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", 2)
    with torch.inference_mode():
        return guider.sample(x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


dense, alone = run(model), run(sparse(model))
inner, outer = model.clone(), sparse(model)
set_torch_compile_wrapper(inner, backend="eager")
set_torch_compile_wrapper(outer, backend="eager")
facts = {"effect": distance(alone, dense)}
for name, compiled in (("before", sparse(inner)), ("behind", outer)):
    facts[name] = {"same": distance(run(compiled), alone), "lines": list(lines)}
facts["dense"] = distance(run(inner), dense)
facts["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps(facts))
