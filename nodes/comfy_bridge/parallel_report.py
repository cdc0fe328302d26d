"""What Sequence Parallel says before a run: devices, what the weights take on each, and the speed-up to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...efficient_vdit_core.parallel.sharding.forecast import Rates, weights_of
from . import patch
from .sharded_weights import SHARDED_WEIGHTS, WHOLE_WEIGHTS, WeightForecast
from .sharding import clip_speedup, find_shardable

# The sizes (frames, height, width) that the report forecasts for.
CLIPS = {"81 frames of 832x480": (81, 480, 832), "93 frames of 1280x720": (93, 720, 1280)}
WORTH_IT = 1.2


def report_of(model: Any, tests: Sequence[Mapping[str, Any]], scheme: str, held: str) -> str:
    """Devices, what they measured of one another (``tests``), what is shared out, and the speed-up to expect.

    ``held``: how the weights are, as of the node's input."""
    how = "whole on each device" if held == WHOLE_WEIGHTS else "shared out"
    lines = [f"{len(tests)} ranks, scheme {scheme}. The weights are {how}, the activations are divided."]
    weights = shares_of(tests)
    for rank, test in enumerate(tests):
        free = "" if test["free_mib"] is None else f", {test['free_mib']} MiB free"
        peers = {True: ", direct access to all others", False: ", no direct access to some others", None: ""}[
            test["peer_access"]
        ]
        part = f", {weights[rank] / sum(weights):.0%} of the tokens" if weights else ""
        lines.append(f"rank {rank}: {test['device']}{free}, sends {test['gigabytes_per_second']:.2f} GB/s{peers}{part}")
    hook = patch.hook_of(model)
    if hook is not None and hook.report.measure is not None:
        lines.append("Sparse Attention's measure has no effect here: the workers compute each step once.")
    _, rule = find_shardable(model)
    about = WeightForecast.where_possible(model, rule, len(tests))
    gathered = about.gathered if held == SHARDED_WEIGHTS else 0
    return "\n".join([*lines, about.text(held), *_forecast(model, tests, scheme, gathered)])


def shares_of(tests: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The shares of the ranks, by what their devices measured."""
    return weights_of([test["device"] for test in tests], [test["flops_per_second"] for test in tests])


def _forecast(model: Any, tests: Sequence[Mapping[str, Any]], scheme: str, gathered: int) -> list[str]:
    """Lines that say what speed-up the measured rates promise for two common clips, and where it does not pay.

    ``gathered``: the bytes of weights that a rank gathers in each evaluation."""
    each = [test["flops_per_second"] for test in tests]
    # Unlike devices finish together and are set against the fastest one; like ones wait for the slowest.
    flops, against = (sum(each) / len(each), max(each)) if shares_of(tests) else (min(each), min(each))
    link = min(test["gigabytes_per_second"] for test in tests)
    rates = Rates("measured", flops, link * 1e9)

    def speedups(gathered: int) -> dict[str, float]:
        ranks = len(tests)
        return {
            text: clip_speedup(model, clip, ranks, scheme, rates, gathered) * flops / against
            for text, clip in CLIPS.items()
        }

    found, whole = speedups(gathered), speedups(0)
    texts = ", ".join(f"{value:.2f}x for {clip}" for clip, value in found.items())
    but = " but the weights' gather" if gathered else ""
    lines = [
        f"Expected speed-up, a model from {flops / 1e12:.2f} TFLOP/s and {link:.2f} GB/s with nothing overlapped{but}: {texts}."
    ]
    if gathered and any(found[clip] < whole[clip] for clip in CLIPS):
        texts = " and ".join(f"{value:.2f}x" for value in whole.values())
        lines.append(
            f"The link is slower at gathering weights than the devices compute: whole weights would give {texts}."
        )
    if max(whole.values()) < WORTH_IT:
        lines.append(
            "It hardly pays here: the link is too slow for these layers. A plan with fewer reference frames sends less."
        )
    return lines
