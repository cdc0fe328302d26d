"""The cached residual in ComfyUI's own sampling: nearer to the dense clip, told apart by prompt, and gone after a run."""

import pytest


@pytest.fixture(scope="module")
def facts(in_process):
    return in_process("residual")


@pytest.mark.parametrize("name", [
    "plain", "two forwards a step", "one forward a step", "rest of the schedule", "two experts", "context windows",
])  # fmt: skip
def test_the_clip_comes_nearer_to_the_dense_one(facts, name):
    sparse, *with_residual = facts[name]
    assert all(found < 0.6 * sparse for found in with_residual)
    assert with_residual[-1] == min(with_residual)  # what is renewed most often


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


def test_two_sampler_nodes_count_as_one_schedule(facts):
    assert facts["two experts went without"] == []
    without = facts["two experts of few steps"]
    assert len(without) == 2 and all("8 steps, 4 of them in this sampler" in text for text in without)


@pytest.mark.parametrize("name", ["simple", "normal", "beta"])
@pytest.mark.parametrize("steps", [20, 8])
def test_a_part_of_the_schedule_tells_the_whole(facts, name, steps):
    *halves, whole = facts["whole"][f"{name} {steps}"]
    assert whole == steps and all((found >= 15) == (steps == 20) for found in halves)
    assert name != "simple" or halves == [steps, steps]


@pytest.mark.parametrize("name", ["simple", "normal", "beta"])
@pytest.mark.parametrize("steps", [20, 8])
def test_a_part_that_is_forced_to_a_clean_clip_tells_the_whole_too(facts, name, steps):
    found = facts["forced"][f"{name} {steps}"]
    assert (found >= 15) == (steps == 20) and (name != "simple" or found in (steps, 4))


def test_ordinary_schedules_count_as_many_steps_as_they_have(facts):
    assert facts["miscounted"] == [{}] * 4


def test_context_windows_that_stay_are_told_apart_and_others_go_without(facts):
    prompts_and_windows = 2 * 2
    assert facts["kept of context windows"][4:] == [prompts_and_windows] * (4 * 19)
    assert facts["moving windows as without"] and max(facts["kept of moving windows"]) == 0
    assert "standard_uniform" in facts["moving windows said"][0]


def test_room_is_made_at_the_first_forward_or_refused_there(facts):
    assert facts["kept before the window"] == [1, 1, 1]  # the room is made before the model runs
    assert facts["kept where no window comes"] == 0
    assert "cached residual takes about" in facts["refused"] and facts["forwards before it was refused"] == 0


def test_prompts_are_not_mixed_where_a_node_computes_the_batch_in_parts(facts):
    assert facts["kept of two clips"] == 2
    assert facts["a batch in halves"] < 1e-4, "sparse, without a residual"
    assert len(facts["a batch in halves said"]) == 1 and "not known" in facts["a batch in halves said"][0]
