"""The switch that measures: the run stays as it is to the bit, and the report tells seconds or why there are none."""

import re

import pytest

TIMES = r"Measured in this run: a dense step [\d.]+ s, a sparse step [\d.]+ s: [\d.]+x (faster|slower) "
NOT = "Not measured: "
EASY = NOT + "easycache may keep something of each forward for the next, and one more would disturb it"
# What runs -> how many forwards more than without the switch at least, and what the report says.
RUNS = {
    "plain": (1, TIMES + r"\(step 2, computed both ways\)"),
    "layers that are counted": (1, TIMES + r"\(step 2, computed both ways\)"),
    "guidance": (2, TIMES + r"\(step 2, 2 forwards of the model, computed both ways\)"),
    "rotating": (1, TIMES + r"\(step 2, computed both ways\)"),
    "a window": (1, TIMES + r"\(step 3, computed both ways\)"),
    "one sparse step": (2, TIMES + r"\(step 3, computed both ways\)"),  # behind a sparse forward that warms up
    "one step": (2, TIMES + r"\(step 1, computed both ways\)"),
    "no sparse step": (0, NOT + "no step became sparse"),
    "declined": (1, NOT + "no step became sparse"),
    "a residual": (
        1,
        TIMES.replace(": [", ", every 4th one, which renews the residual, [\\d.]+ s: [")
        + r"\(step 3, computed both ways\)",
    ),
    "EasyCache": (0, EASY),
    "EasyCache behind": (0, EASY),
    "LazyCache": (1, TIMES + r"\(step 2, computed both ways\)"),
    "wrapped": (0, EASY.replace("easycache", "a node around the model's forwards")),
}


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("measured")


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_the_same_and_the_report_tells(facts, name):
    found, (more, said) = facts[name], RUNS[name]
    assert found["same"] and found["counts same"] and found["calls"]
    # A forward of under a second is computed three times each way.
    assert more <= found["more forwards"] <= 5 * more
    assert re.fullmatch(said, found["last of the report"])
    assert found["line"] == "Efficient-vDiT: " + found["last of the report"]


def test_a_cancelled_measurement_leaves_nothing_behind(facts):
    assert facts["cancelled"]["forwards"] == 2 and NOT in facts["cancelled"]["line"]
    assert facts["after it"]["same"] and re.search(TIMES, facts["after it"]["line"])


def test_without_memory_for_a_dense_forward_the_run_goes_on(facts):
    assert facts["no memory"]["same"] and facts["no memory"]["line"].endswith(NOT + "a dense step found no memory")


def test_a_run_that_is_cancelled_before_its_first_sparse_call_leaves_the_page_its_last_numbers(facts):
    assert len(facts["told"]) == 1 and facts["told"][0] > 0
