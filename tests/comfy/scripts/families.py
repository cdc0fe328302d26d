"""Every native video family, sampled for two steps with the sparse node, against dense and a masked oracle. Prints
JSON.

Names of cases in $EVDIT_CASES, with commas between, run only these.
"""

import contextlib
import copy
import json
import os
import sys
import traceback

from host import call, follow_layers, load_pack, log_lines, torch  # isort: skip
from tiny_models import CASES, Case, build, inputs, missing, run  # isort: skip

OVERRIDE = "optimized_attention_override"
pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(families,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.families"))
(states,) = (m for name, m in sys.modules.items() if name.endswith("attention.hook.state"))
(hooks,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.hook"))
(probe,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.probe"))
(search,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.search"))
(node,) = (m for name, m in sys.modules.items() if name.endswith("nodes.search"))
lines = log_lines()


counted: list[int | None] = []  # the layers of the calls over the video
follow_layers(states, counted)


def patched(model, k: int):
    return under(model, plans.TilePlan.uniform(k))


def under(model, plan, **more):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **more}
    return call(pack["EVDiTSparseAttention"], model=model, plan=plan, **settings)[0]


def live_tiles(case: Case):
    """(N, N): which token sees which with frame 0 as the reference frame; masked text is seen by none."""
    prefix, frames, size, suffix = case.layout
    owner = torch.tensor([0] * prefix + [f for f in range(frames) for _ in range(size)] + [0] * suffix)
    live = (owner[:, None] == owner) | (owner[:, None] == 0) | (owner == 0)
    live[:, list(case.padding)] = False
    return live


def expected_places(case: Case) -> list[list[int]]:
    """The tokens of each frame by the case's layout."""
    prefix, frames, size, _ = case.layout
    return [list(range(prefix + t * size, prefix + (t + 1) * size)) for t in range(frames)]


def masked_oracle(case: Case, calls: list):
    """An override that builds the whole mask and takes a float64 softmax."""
    live = live_tiles(case)

    def override(func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
        tokens = q.shape[2] if skip_reshape else q.shape[1]
        form = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        if q.shape != k.shape or tokens != len(live):
            return func(q, k, v, heads, mask=mask, **form, **kwargs)
        calls.append(tokens)
        q, k, v = (
            x.double() if skip_reshape else x.unflatten(-1, (heads, -1)).transpose(1, 2).double() for x in (q, k, v)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores.masked_fill(~live, float("-inf")).softmax(-1) @ v).float()
        return out if skip_output_reshape else out.transpose(1, 2).flatten(-2)

    return override


class SeenEnough(Exception):
    """Nothing after this call matters."""


def where_frames_stand(model, case: Case) -> list[list[int]]:
    """For each latent frame the tokens whose queries change with it, in the first attention call over the whole
    sequence."""
    prefix, frames, size, suffix = case.layout
    seen: list[torch.Tensor] = []

    def override(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        if q.shape == k.shape and q.shape[2 if skip_reshape else 1] == prefix + frames * size + suffix:
            seen.append(q.transpose(1, 2).flatten(2) if skip_reshape else q)
            raise SeenEnough
        return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **kwargs)

    def first_queries(changed: int | None) -> torch.Tensor:
        seen.clear()
        watched = model.clone()
        watched.model_options["transformer_options"][OVERRIDE] = override
        with contextlib.suppress(SeenEnough):
            run(watched, case, changed)
        return seen[0]

    before, last = first_queries(None), case.latent[1] - 1
    moved = [min((case.before + t + 1) * case.patch_t - 1, last) for t in range(frames)]
    return [(first_queries(t) != before).any(-1).any(0).nonzero().flatten().tolist() for t in moved]


def latent_of(case: Case) -> tuple[dict, list]:
    """The case as nodes hand it on: a LATENT, and the conditioning."""
    x, cond, noise_mask = inputs(case)
    return ({"samples": x} if noise_mask is None else {"samples": x, "noise_mask": noise_mask}), cond


def searched(model, case: Case, error: str) -> list:
    """The errors of k = 1 that a search measures at one noise level, a layer each."""
    latent, cond = latent_of(case)
    settings = search.SearchSettings(search.parse_candidates("1"), error=error)
    plan = probe.search_plan(model, cond, None, latent, settings, probe.ProbeSampling(seed=0, probes=1))
    return plan.provenance["errors"]["1"]


def searched_by_a_new_node(model, case: Case) -> dict:
    """What a search by the candidates and head groups of a new node found, and what a run says that follows its plan."""
    latent, cond = latent_of(case)
    patterns = search.parse_candidates(node.CANDIDATES)
    settings = search.SearchSettings(patterns, speedup=1.05, head_groups=node.HEAD_GROUPS)
    plan = probe.search_plan(model, cond, None, latent, settings, probe.ProbeSampling(seed=0, probes=1))
    sparse = under(model, plan, decline_slow=False)
    lines.clear()
    run(sparse, case)
    return {
        "errors": plan.provenance["plan_errors"],
        "means": any(pattern.means for layer in plan.patterns for pattern in layer.kinds),
        "heads": plan.heads,
        "lines": list(lines),
    }


def mapped(model, case: Case) -> list[int]:
    """The layers whose tile map was measured, of the first and the last."""
    latent, cond = latent_of(case)
    ends = sorted({0, probe.model_depth(model, None) - 1})
    return sorted(probe.measure_tiles(model, cond, latent, layers=ends, percent=0.0, seed=0, rows=2))


def left_dense(model, case: Case) -> dict:
    """What a run and a search say where nothing may become sparse."""
    dense = run(model, case)
    lines.clear()
    changed = float((run(patched(model, 1), case) - dense).abs().max())
    try:
        searched(model, case, "attention")
    except ValueError as error:
        return {"changed": changed, "lines": list(lines), "refused": str(error)}
    return {"changed": changed, "lines": list(lines), "refused": ""}


def facts(case: Case) -> dict:
    if missing(case):
        return {"skipped": f"this ComfyUI has no {missing(case)}"}
    model = build(case)
    if case.left_dense:
        return left_dense(model, case)
    diffusion_model = model.model.diffusion_model
    why = families.find_family(diffusion_model).why_no_hook()
    forwards: list[int] = []
    diffusion_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    weights = {name: value.clone() for name, value in diffusion_model.state_dict().items()}
    options = copy.deepcopy(model.model_options)
    dense = run(model, case)
    scale = float(dense.abs().max())
    same = float((run(patched(model, case.layout[1]), case) - dense).abs().max())
    lines.clear()
    before, one = len(forwards), patched(model, 1)
    counted.clear()
    sparse = run(one, case)
    ran, layers = len(forwards) - before, list(counted)
    if why:
        return {"skipped": why, "lines": list(lines), "changed": float((sparse - dense).abs().max())}
    calls: list[int] = []
    judge = model.clone()
    judge.model_options["transformer_options"][OVERRIDE] = masked_oracle(case, calls)
    want = run(judge, case)
    return {
        "frames stand": where_frames_stand(model, case) == expected_places(case),
        "finite": bool(torch.isfinite(want).all()),
        "layers": layers == list(case.layers) * ran,
        "unforeseen": [str(shape) for shape in hooks.hook_of(one).preparation.choices.unforeseen],
        "depth": families.find_family(diffusion_model).depth(diffusion_model),
        "calls": len(calls) == len(case.layers) * ran,
        "lines": list(lines),
        "sparse calls": len(case.layers) * ran,
        "searched": {error: searched(model, case, error) for error in ("attention", "block")},
        "by a new node": searched_by_a_new_node(model, case),
        "mapped": mapped(model, case),
        "all frames": same / scale,
        "error": float((sparse - want).abs().max()) / scale,
        "effect": float((dense - want).abs().max()) / scale,
        "bypassed": float((run(model, case) - dense).abs().max()),
        "weights same": all(torch.equal(value, weights[name]) for name, value in diffusion_model.state_dict().items()),
        "options same": repr(model.model_options) == repr(options),
    }


found = {}
chosen = os.environ.get("EVDIT_CASES")
for name in chosen.split(",") if chosen else CASES:
    case = CASES[name]
    try:
        found[name] = facts(case)
    except Exception:
        found[name] = {"failed": traceback.format_exc()[-1500:]}
print(json.dumps(found))
