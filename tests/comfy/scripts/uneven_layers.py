"""Forwards in which a layer attends twice (VACE) or not at all (skip layer guidance). Prints JSON."""

import json
import sys
from dataclasses import replace

from host import call, follow_layers, load_pack, torch  # isort: skip
import comfy.samplers  # isort: skip
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT  # isort: skip
from tiny_models import CASES, build, inputs, missing, noise  # isort: skip

pack = load_pack()


def module(name):
    return next(m for full, m in sys.modules.items() if full.endswith(name))


plans, states = module("efficient_vdit_core.plan"), module("attention.hook.state")
mass, probe = module("search.tile_mass"), module("comfy_bridge.probe")


def run(model, case, steps=16):
    x, asked, _ = inputs(case)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(asked, [[asked[0][0] * 0.5, asked[0][1]]])
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    start = x - x if x.is_nested else torch.zeros_like(x)
    with torch.inference_mode():
        return guider.sample(x, start, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


def sparse(model, plan, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=model, plan=plan, **settings)[0]


def skipping(model, layers):
    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, layers, "").args[0]


def distances(model, case, plan, around=lambda m: m):
    """From the dense clip: of the sparse one, and with a residual renewed every fourth step."""
    exact = run(around(model), case)
    found = [run(around(sparse(model, plan, residual_every=every)), case) for every in (0, 4)]
    return [float((clip - exact).norm() / exact.norm()) for clip in found]


def layers_seen(name, around):
    """The layer that each call of a step is taken for, of the MODEL that ``around`` makes."""
    case, seen = CASES[name], []
    unfollow = follow_layers(states, seen)
    try:
        run(around(sparse(build(case), plans.TilePlan.uniform(1))), case, steps=1)
    finally:
        unfollow()
    return seen


def asking_twice(model):
    """Layer 1's block is computed twice and its mean taken, as guidance by perturbed attention may."""
    asking = model.clone()

    def replacement(block, extra):
        first, second = (extra["original_block"](dict(block)) for _ in range(2))
        return {name: (first[name] + second[name]) / 2 for name in first}

    asking.set_model_patch_replace(replacement, "dit", "double_block", 1)
    return asking


def tile_map(model, case):
    """How many calls the tile map measures, and the layers that it tells of."""
    found, original = [], mass.tile_mass
    mass.tile_mass = lambda *args, **kwargs: found.append(original(*args, **kwargs)) or found[-1]
    x, asked, _ = inputs(case)
    try:
        kept = probe.measure_tiles(model, asked, {"samples": x}, layers=(0, 1, 2, 3), percent=0.5, seed=0, rows=64)
    finally:
        mass.tile_mass = original
    return len(found), list(kept)


def beside_a_key_of_its_own(model, case):
    """How far a clip is moved by a replacement whose key is no numbered block, which no model asks for."""
    follows = sparse(model, one)
    marked = follows.clone()
    marked.model_options["transformer_options"]["patches_replace"] = {"dit": {("a node's own",): None, "another": None}}
    return float((run(marked, case, steps=1) - run(follows, case, steps=1)).norm())


one = plans.TilePlan.uniform(1)
vace = CASES["wan vace"]
frames, size = vace.latent[1], vace.latent[2:]
vace = replace(
    vace,
    conds={
        "vace_frames": [noise(1, 32, frames, *size)], "vace_mask": [torch.ones(1, 64, frames, *size)], "vace_strength": [1.0],
    },
)  # fmt: skip
tiny_vace, wan = build(vace), build(CASES["wan"])
uneven = plans.TilePlan(
    patterns=tuple(module("efficient_vdit_core.tiles").TilePattern(k) for k in (1, 0, 2, 0, 1, None))
)
ltx = replace(CASES["ltx"], settings={**CASES["ltx"].settings, "num_layers": 6})
facts = {
    "vace": distances(tiny_vace, vace, one),
    "a key of its own": beside_a_key_of_its_own(wan, CASES["wan"]),
    "vace tile map": tile_map(tiny_vace, vace),
    "wan, a layer skipped": distances(wan, CASES["wan"], one, lambda m: skipping(m, "1")),
    "ltx, a layer skipped": distances(build(ltx), ltx, uneven, lambda m: skipping(m, "1")),
    **{
        about: {
            name: layers_seen(name, around)
            for name in ("wan", "ltx", "mochi", "h3 with guidance")
            if name in CASES and not missing(CASES[name])
        }
        for about, around in (("layer 0 skipped", lambda m: skipping(m, "0")), ("layer 1 twice", asking_twice))
    },
}
print(json.dumps(facts))
