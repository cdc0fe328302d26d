"""Which weight goes with which loss, for each thing that a network predicts: students of the 2-D mixture, all distilled
from one start under every pair.

The start has learnt what diffusion models learn, the mean square of the raw output's error. Whatever pair moves its
endpoints away from the exact ODE's does harm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..distill.objectives.consistency import WEIGHTS
from ..sampling.path import EPSILON, FLOW, V
from .mixture import MixtureShape, exact_network, figures, network_of, new_student, objective_of, train

PATHS = {EPSILON: "vp", V: "vp", FLOW: "flow"}
LOSSES = ("norm", "squared")
# The weight of the error in x that makes its square the raw output's.
OF_THE_OUTPUT = {EPSILON: "snr", V: "inverse_variance", FLOW: "inverse_variance"}
# As the recipe of Open-Sora-Plan has it, with fewer segments of twice the sub-steps.
SHAPE = MixtureShape(segments=8, teacher_steps=48, max_weight=20.0, steps=2500)


def compare_pairs(
    seed: int,
    shape: MixtureShape = SHAPE,
    predictions: Sequence[str] = tuple(PATHS),
    losses: Sequence[str] = LOSSES,
    weights: Sequence[str] = WEIGHTS,
) -> Iterator[dict[str, Any]]:
    """One row for each prediction, loss and weight: the distilled student, its start and the undistilled teacher."""
    for prediction in predictions:
        shape = replace(shape, prediction=prediction, path=PATHS[prediction])
        start, generator = new_student(shape, seed)
        usual = replace(objective_of(shape), segments=shape.teacher_steps, loss="squared", weight=OF_THE_OUTPUT[prediction],
                        max_weight=1e9)  # fmt: skip
        train(start, usual, shape.pretraining, shape, generator)
        told = {
            "seed": seed,
            "start": figures(start, shape),
            "undistilled": figures(exact_network(*network_of(shape)), shape),
        }
        drawn = generator.get_state()
        for loss in losses:
            for weight in weights:
                chosen = replace(shape, loss=loss, weight=weight)
                student = copy.deepcopy(start)
                train(student, objective_of(chosen), chosen.steps, chosen, generator.set_state(drawn))
                yield {**asdict(chosen), **told, "distilled": figures(student, chosen)}
