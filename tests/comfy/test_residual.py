"""The cached residual in ComfyUI's own sampling: nearer to the dense clip, told apart by prompt, and gone after a run."""

import pytest


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("residual")


@pytest.mark.parametrize("name", ["plain", "two forwards a step", "one forward a step", "rest of the schedule"])
def test_the_clip_comes_nearer_to_the_dense_one(facts, name):
    sparse, *with_residual = facts[name]
    assert all(found < 0.6 * sparse for found in with_residual)
    assert with_residual[2] == min(with_residual)


def test_the_log_says_what_it_takes_and_the_report_what_it_costs(facts):
    assert "the cached residual takes" in facts["line"] and "on cpu" in facts["line"]
    # 21 % of the tiles are left, and every fourth step computes all of them as well
    assert "work:" in facts["work"] and 30 <= int(facts["work"].split("%")[0].split()[-1]) <= 50


def test_nothing_is_kept_after_a_run_or_a_cancel(facts):
    assert facts["kept after a run"] == facts["kept after a cancel"] == 0
    assert facts["again"] and facts["after a cancel"]


def test_few_steps_go_without_and_say_so(facts):
    assert facts["few steps"]
    assert len(facts["few steps said"]) == 1 and "8 steps, expected at least 15" in facts["few steps said"][0]


def test_a_step_cache_beside_it(facts):
    sparse, with_residual = facts["EasyCache"]
    assert with_residual < 0.7 * sparse
