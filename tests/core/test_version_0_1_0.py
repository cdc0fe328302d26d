"""Plans of version 0.1.0 mean to the bit what they meant there. It wrote the files of tests/version_0_1_0.

Their scores lie so far apart that each query sees the value of one key alone: whole numbers, whatever a processor rounds.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern, TokenGrid

FOLDER = Path(__file__).parents[1] / "version_0_1_0"
STORED = load_file(FOLDER / "attention.safetensors")
NAMES = [name.removeprefix("attention ") for name in STORED if name.startswith("attention ")]
LAYOUT = TokenLayout(TokenGrid(7, 1, 5), 3, 2)
CLOSEST = 512.0  # two scores differ by this before they are divided by the root of 8


def read(name: str) -> TilePattern:
    """``rotating:2+3``: placement, reference frames, shift."""
    placement, rest = name.split(":")
    count, _, shift = rest.partition("+")
    return TilePattern(int(count), placement, int(shift or 0))


@pytest.mark.parametrize("backend", ["auto", "frames", "parts"])
@pytest.mark.parametrize("name", NAMES)
def test_attention(name, backend):
    q, k, v = STORED["q"] * CLOSEST, STORED["k"].float(), STORED["v"].float()
    got = tile_attention(q, k, v, LAYOUT, read(name), backend=backend)
    assert torch.equal(got, STORED[f"attention {name}"].float())


def test_a_plan_file():
    plan = TilePlan.load(FOLDER / "plan.json")
    assert plan.to_text() == "0:2:6 1:1:7 2:full 3:2:6 4:4:4 5:1:7"
    assert (plan.family, plan.frames, plan.density(8)) == ("opensora_plan", 8, 0.59375)
