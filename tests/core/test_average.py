"""The exported average against its closed form for weights that jump once and stay."""

import pytest
import torch

from efficient_vdit_core.training.average import WeightAverage


def averaged(steps, decay):
    average = WeightAverage({"weight": torch.zeros(3, dtype=torch.float64), "count": torch.tensor(0)}, decay)
    for step in range(1, steps + 1):
        average.update({"weight": torch.ones(3, dtype=torch.float64), "count": torch.tensor(step)}, step)
    return average.state


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize(
    ("steps", "counted"), [(1, [1]), (3, [1, 2, 3]), (7, [1, 2, 3, 4]), (801, [1, 2, 3, *range(4, 801, 4)])]
)
def test_what_is_left_of_the_start(steps, counted, decay):
    left = torch.tensor([min(decay**4, step / (step + 40)) for step in counted], dtype=torch.float64).prod()
    state = averaged(steps, decay)
    torch.testing.assert_close(state["weight"], (1 - left).expand(3), rtol=1e-12, atol=0)
    assert int(state["count"]) == counted[-1], "a whole number is copied, not averaged"


def test_the_shortest_run_exports_what_it_learned():
    assert float(averaged(1, 0.999)["weight"][0]) > 0.97
