"""A search and a map where a step has several forwards: joined prompts, and context windows. Prints JSON."""

import inspect
import json
import sys

from host import call, load_pack, torch  # isort: skip
from comfy_extras.nodes_context_windows import ContextWindowsManualNode  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

pack, model = load_pack(), build(CASES["wan"])
(probe,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.probe"))
short, long = ([noise(1, tokens, 32), {}] for tokens in (7, 11))
latent = {"samples": torch.zeros(1, 16, 13, 4, 6)}


def share(*prompts):
    """The map of the middle layer, by its heads."""
    mass = probe.measure_tiles(model, list(prompts), latent, layers=[1], percent=0.0, seed=0, rows=64)[1]
    return torch.cat([mass.of_heads, mass.extra_of_heads[..., None]], -1)


def of_map(chosen, *prompts):
    """The node's report."""
    choices = {"layers": "0,-1", "percent": 0.0, "seed": 0, "rows": 8}
    return call(pack["EVDiTAttentionTileMap"], model=chosen, positive=list(prompts), latent=latent, **choices)[1]


def of_search(chosen, **choices):
    """The report, and the errors of each candidate by layer."""
    settings = {"seed": 0, "probes": 2, "threshold": 0.5, "target_speedup": 0.0, "candidates": "1,2,4", **choices}
    plan, report = call(pack["EVDiTSearchTilePlan"], model=chosen, positive=[short], latent=latent, **settings)
    return report, plan.provenance["errors"]


def in_windows(**changes):
    """5 of the 13 frames at a time."""
    settings = {"context_length": 5, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
                "closed_loop": False, "fuse_method": "pyramid", "freenoise": False, "dim": 2, **changes}  # fmt: skip
    known = inspect.signature(ContextWindowsManualNode.execute).parameters
    return ContextWindowsManualNode.execute(
        model, **{name: value for name, value in settings.items() if name in known}
    ).args[0]


with torch.inference_mode():
    one, other = share(short), share(long)
    of_both = [share(short, long), share(long, short)]
    plain = in_windows(causal_window_fix=False)
    facts = {
        "of both": max(float((joined - (one + other) / 2).abs().max()) for joined in of_both),
        "of one": min(float((joined - alone).abs().max()) for joined in of_both for alone in (one, other)),
        "joined": [of_map(model, short, long), of_map(model, long, short)],
        "windows map": of_map(plain, short),
        "windows search": of_search(plain)[0],
    }
    if "causal_window_fix" in inspect.signature(ContextWindowsManualNode.execute).parameters:
        anchored = in_windows(causal_window_fix=True)
        facts["anchored map"] = of_map(anchored, short)
        facts.update({f"anchored search, {e}": of_search(anchored, error=e) for e in ("attention", "block", "output")})
print(json.dumps(facts))
