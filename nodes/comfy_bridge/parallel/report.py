"""What Sequence Parallel says before a run: devices, what the weights take on each, and the speed-up to expect."""

from __future__ import annotations

from typing import Any

from ....efficient_vdit_core.parallel.sharding.division import AUTO, BRANCHES, by_sequence, choose_division, seconds_of
from ..hook import hook_of
from .division import Divider
from .forecast import Layers, Measured, Tests, clip_layout
from .sharded_weights import WHOLE_WEIGHTS, WeightForecast

# The sizes (frames, height, width) that the report forecasts for.
CLIPS = {"81 frames of 832x480": (81, 480, 832), "93 frames of 1280x720": (93, 720, 1280)}
WORTH_IT = 1.2
# A prompt and a negative one.
GUIDANCE = 2


def forecast_report(model: Any, tests: Tests, divider: Divider, about: WeightForecast, held: str) -> str:
    """Devices, what they measured of one another (``tests``), what is shared out, and the speed-up to expect.

    ``held``: how the weights are, as of the node's input; ``about``: what they take."""
    how = "whole on each device" if held == WHOLE_WEIGHTS else "shared out"
    lines = [f"{len(tests)} ranks, scheme {divider.scheme}. The weights are {how}, the activations are divided."]
    measured = Measured.of(tests)
    weights = measured.weights
    for rank, test in enumerate(tests):
        free = "" if test["free_mib"] is None else f", {test['free_mib']} MiB free"
        peers = {True: ", direct access to all others", False: ", no direct access to some others", None: ""}[
            test["peer_access"]
        ]
        part = f", {weights[rank] / sum(weights):.0%} of the tokens" if weights else ""
        lines.append(f"rank {rank}: {test['device']}{free}, sends {test['gigabytes_per_second']:.2f} GB/s{peers}{part}")
    hook = hook_of(model)
    if hook is not None and hook.report.measure is not None:
        lines.append("Sparse Attention's measure has no effect here: the workers compute each step once.")
    return "\n".join([*lines, about.text(held), *_forecast(model, measured, divider), _guidance(measured, divider)])


def _forecast(model: Any, measured: Measured, divider: Divider) -> list[str]:
    """Lines that say what speed-up the measured rates promise for two common clips, and where it does not pay."""
    everyone = tuple(range(len(measured.rates)))

    def speedups(gathered: int) -> list[float]:
        layers = [Layers.of(model, clip_layout(model, clip), gathered) for clip in CLIPS.values()]
        return [of.alone(measured) / of.seconds(measured, divider.scheme)(1, everyone) for of in layers]

    gathered = divider.gathered
    found, whole = speedups(gathered), speedups(0)
    texts = ", ".join(f"{value:.2f}x for {text}" for value, text in zip(found, CLIPS, strict=True))
    but = " but the weights' gather" if gathered else ""
    flops = sum(measured.rates) / len(measured.rates)
    lines = [
        f"Expected speed-up, a model from {flops / 1e12:.2f} TFLOP/s and {measured.link / 1e9:.2f} GB/s with nothing overlapped"
        f"{but}: {texts}."
    ]
    if gathered and any(one < other for one, other in zip(found, whole, strict=True)):
        texts = " and ".join(f"{value:.2f}x" for value in whole)
        lines.append(
            f"The link is slower at gathering weights than the devices compute: whole weights would give {texts}."
        )
    if max(whole) < WORTH_IT:
        lines.append(
            "It hardly pays here: the link is too slow for these layers. A plan with fewer reference frames sends less."
        )
    return lines


def _guidance(measured: Measured, divider: Divider) -> str:
    """How the two branches of CFG will be divided, and the forecast of both ways for the common clips."""
    taken, by_branch, by_all = [], [], []
    for clip in CLIPS.values():
        layout = clip_layout(divider.model, clip)
        chosen, seconds = divider.of(measured, layout, GUIDANCE)
        grouped = choose_division(BRANCHES, measured.rates, GUIDANCE, seconds)
        alone = Layers.of(divider.model, layout).alone(measured, GUIDANCE)
        taken.append(f"by branch ({chosen.text()})" if chosen.by_branches else "by sequence")
        by_branch.append(f"{alone / seconds_of(grouped, seconds):.2f}x")
        by_all.append(f"{alone / seconds_of(by_sequence(len(measured.rates), GUIDANCE), seconds):.2f}x")
    why = divider.never or ("the faster" if divider.asked == AUTO else f"division is {divider.asked}")
    return (
        f"CFG above 1, where ComfyUI gives both branches in one batch: {' and '.join(by_branch)} by branch, {' and '.join(by_all)} by "
        f"sequence. Taken is {' and '.join(dict.fromkeys(taken))}: {why}. Branches that come one at a time go by sequence."
    )
