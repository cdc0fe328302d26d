"""torch.compile around a tiny Wan, before and behind the sparse node, by ComfyUI's own node and for each block. Prints
JSON.

The backend "eager" traces and guards as any other, and needs no C compiler; $EVDIT_COMPILER names another.
"""

import json
import os
import sys

from host import call, load_pack, log_lines, torch  # isort: skip
import comfy.samplers  # isort: skip
from comfy_api.torch_helpers import set_torch_compile_wrapper  # isort: skip
from comfy_extras.nodes_torch_compile import TorchCompileModel  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

BACKEND = os.environ.get("EVDIT_COMPILER", "eager")
pack = load_pack()
(probe,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.probe"))
(search,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.search"))
lines = log_lines()

model = build(CASES["wan"])
x, text = noise(1, 16, 9, 4, 6), noise(1, 7, 32)


def sparse(source, k=1, **more):
    (plan,) = call(pack["EVDiTTilePlan"], reference_frames=k)
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **more}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plan, **settings)[0]


def by_node(source):
    """ComfyUI's own node, which looks at nothing in transformer_options again once the model is compiled."""
    return TorchCompileModel.execute(source, BACKEND).args[0]


def by_block(source):
    """Each block alone, as KJNodes' nodes do."""
    compiled = source.clone()
    set_torch_compile_wrapper(compiled, backend=BACKEND, keys=[f"diffusion_model.blocks.{i}" for i in range(3)])
    return compiled


def run(chosen, steps=2):
    lines.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds([[text, {}]], [[text * 0.5, {}]])
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        return guider.sample(
            x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


want = {"dense": run(model), 1: run(sparse(model)), 3: run(sparse(model, 3))}
facts = {"effect": min(distance(want[1], want["dense"]), distance(want[1], want[3]))}
for name, compile_ in (("node", by_node), ("blocks", by_block)):
    torch._dynamo.reset()
    before = graphs()
    compiled = compile_(model)
    patched = sparse(compiled)
    found = {"first": distance(run(patched), want[1]), "first lines": list(lines)}
    found["behind"] = distance(run(compile_(sparse(model))), want[1])
    found["behind lines"] = list(lines)
    # One compiled model with other plans, and with none: whatever was compiled for the last one must not stay.
    found["another plan"] = distance(run(sparse(compiled, 3)), want[3])
    found["another plan lines"] = list(lines)
    found["dense"] = distance(run(compiled), want["dense"])
    found["again"] = distance(run(patched), want[1])
    found["again lines"] = list(lines)
    found["graphs"] = graphs() - before
    run(patched)  # as many steps: ComfyUI hands the schedule on, so another length is another shape
    found["graphs of a second run"] = graphs() - before - found["graphs"]
    # The dense forward beside the run is no other graph: none is compiled while it is timed.
    counts = []
    for measure in (False, True):
        before = graphs()
        found["measured"] = distance(run(sparse(compiled, measure=measure)), want[1])
        counts.append(graphs() - before)
    found["graphs of a measurement"] = counts[1] - counts[0]
    found["measured lines"] = list(lines)
    facts[name] = found


def searched(chosen, error: str) -> list:
    latent = {"samples": torch.zeros_like(x)}
    settings = search.SearchSettings(search.parse_candidates("1"), error=error)
    plan = probe.search_plan(chosen, [[text, {}]], None, latent, settings, probe.ProbeSampling(seed=0, probes=2))
    return plan.provenance["errors"]["1"]


facts["searched"] = {
    error: [searched(chosen, error) for chosen in (model, by_node(model))] for error in ("attention", "block")
}
print(json.dumps(facts))
