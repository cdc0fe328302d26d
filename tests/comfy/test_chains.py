"""The sparse node among ComfyUI's other ways to change a MODEL or a run, in its own process."""

import pytest

ROUNDING = 2e-5


@pytest.fixture(scope="module")
def facts(in_process):
    found = in_process("chains")
    assert found["effect"] > 100 * ROUNDING
    return found


@pytest.mark.parametrize(
    "name",
    [
        "alone",
        "split",
        "windows",
        "windows behind",
        "the second node counts",
        "the second node counts behind another",
        "threads",
    ],
)
def test_the_result_is_the_one_expected(facts, name):
    assert facts[name] < ROUNDING


@pytest.mark.parametrize("place", ["first", "last", "strided", "rotating"])
def test_reference_frames_stand_where_asked(facts, place):
    assert facts[f"placement {place}"] < ROUNDING < facts["rotating differs"]


def test_the_steps_of_levels_that_rise_are_counted_in_their_order(facts):
    dense = "9 cross-attention, 3 outside the step window"
    assert facts["rising"] == [f"Efficient-vDiT: 6 attention calls sparse at mean density 0.31; dense: {dense}"] * 2


def test_guidance_in_two_forwards_counts_layers_anew_in_each(facts):
    assert facts["split forwards"] == 4
    assert facts["split lines"] == [
        "Efficient-vDiT: 12 attention calls sparse at mean density 0.31; dense: 12 cross-attention"
    ]


def test_context_windows_are_clips_of_their_own(facts):
    assert facts["window frames"] == [5]
    assert len(facts["window lines"]) == 1 and "sparse at mean density 0.52; dense: " in facts["window lines"][0]


def test_context_windows_of_a_clip_whose_sound_is_not_made_are_sparse_too(facts):
    if "windows without sound" not in facts:
        pytest.skip("this ComfyUI has no LTX-2")
    assert facts["windows without sound"] == [
        "Efficient-vDiT: 6 attention calls sparse at mean density 0.52; dense: 6 cross-attention"
    ]


def test_a_window_that_brings_the_first_frame_has_one_frame_more(facts):
    if "anchored frames" not in facts:
        pytest.skip("this ComfyUI puts no first frame before its context windows")
    assert facts["anchored frames"] == [5, 6] and facts["windows anchored"] < ROUNDING


@pytest.mark.parametrize("error", ["attention", "block"])
def test_a_search_of_a_compiled_model_finds_the_same(compiled, error):
    plain, found = compiled["searched"][error]
    assert found == plain and min(plain) > 0


@pytest.fixture(scope="module")
def compiled(in_process):
    found = in_process("compiled")
    assert found["effect"] > 100 * ROUNDING
    return found


@pytest.mark.parametrize("way", ["node", "blocks"])
@pytest.mark.parametrize(
    ("order", "density"), [("first", 0.31), ("behind", 0.31), ("another plan", 0.63), ("again", 0.31)]
)
def test_torch_compile_on_either_side(compiled, way, order, density):
    found = compiled[way]
    assert found[order] < ROUNDING
    assert found[f"{order} lines"] == [
        f"Efficient-vDiT: 6 attention calls sparse at mean density {density}; dense: 6 cross-attention"
    ]


@pytest.mark.parametrize("way", ["node", "blocks"])
def test_a_compiled_model_is_dense_again_and_compiled_once(compiled, way):
    found = compiled[way]
    assert found["dense"] < ROUNDING and found["graphs"] > 0 and found["graphs of a second run"] == 0


@pytest.mark.parametrize("way", ["node", "blocks"])
def test_measuring_a_compiled_model_compiles_nothing_more(compiled, way):
    found = compiled[way]
    assert found["measured"] < ROUNDING and found["graphs of a measurement"] == 0
    assert "Measured in this run: a dense step" in found["measured lines"][-1]


@pytest.fixture(scope="module")
def talk(in_process):
    found = in_process("infinite_talk")
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


@pytest.mark.parametrize("speakers", ["1", "2"])
def test_infinite_talk_speaks_on_either_side(talk, speakers):
    found = talk[speakers]
    assert found["behind"] < ROUNDING and found["before"] < ROUNDING < 0.01 < min(found["dense"], found["speech"])
    assert (
        found["lines"]
        == ["Efficient-vDiT: 6 attention calls sparse at mean density 0.52; dense: 12 cross-attention"] * 2
    )


def test_what_infinite_talk_adds_is_not_shared_out(talk):
    plain, one, two, blocks = talk["sharding"]
    assert plain == "" and "(attn2_patch), as InfiniteTalk does" in one and "(attn1_patch, attn2_patch)" in two
    assert "(double_block)" in blocks


def test_nothing_of_other_nodes_is_kept_after_a_run(facts):
    assert facts["overrides of a run"]["made"] == 2 and facts["overrides of a run"]["left"] == 0
    assert facts["overrides of a run"]["same"] < ROUNDING


def test_an_override_that_carries_our_marks_is_another_node_s(facts):
    found = facts["override with our marks"]
    assert found["same"] < ROUNDING and found["next plan"] < ROUNDING and found["calls"] > 0


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_what_a_cache_skips_is_skipped_and_the_rest_is_sparse(facts, cache, order):
    (line,) = facts[f"{cache} {order}"]
    calls = int(line.split()[1])
    assert (
        line == f"Efficient-vDiT: {calls} attention calls sparse at mean density 0.31; dense: {calls} cross-attention"
    )
    assert 0 < calls < 8 * 3 and calls % 3 == 0  # some of 8 steps, all 3 layers in each


def test_a_lora_acts_on_either_side(facts):
    assert facts["lora"]["either side"] < ROUNDING < facts["lora"]["acts"]


def test_an_override_installed_earlier_computes_the_dense_pieces(facts):
    assert facts["override under"]["same"] < ROUNDING
    # steps x layers x (reference rows, the other frames of two batch entries, cross-attention)
    assert facts["override under"]["calls"] == 2 * 3 * (1 + 2 + 1)


def test_an_override_installed_later_computes_them_too(facts):
    assert facts["override over"]["same"] < ROUNDING
    assert facts["override over"]["calls"] == facts["override under"]["calls"]


@pytest.mark.parametrize("name", ["override over", "override around"])
def test_each_call_is_counted_once_whatever_stands_behind(facts, name):
    assert facts[name]["same"] < ROUNDING
    assert facts[name]["lines"] == [
        "Efficient-vDiT: 6 attention calls sparse at mean density 0.31; dense: 6 cross-attention"
    ]


def test_threads_of_one_model_keep_their_plans_apart(facts):
    assert facts["threads differ"] > 100 * ROUNDING


def test_two_experts_take_a_plan_each(facts):
    assert facts["experts"]["same"] < ROUNDING < facts["experts"]["swapped"]
    start = "Efficient-vDiT: 6 attention calls sparse at mean density"
    assert facts["experts"]["lines"] == [
        f"{start} 0.31; dense: 6 cross-attention",
        f"{start} 0.63; dense: 6 cross-attention",
    ]


def test_the_last_line_blames_nobody_for_a_run_that_was_stopped(facts):
    assert facts["stopped"] == ["Efficient-vDiT: 0 attention calls sparse; dense: none"]


def test_a_run_without_any_sparse_call_is_warned_of_whatever_was_said_before(facts):
    scaled, nothing = facts["scaled but short"]
    assert "made for 36 latent frames" in scaled
    assert nothing.startswith("Efficient-vDiT: 0 attention calls sparse; dense: ") and "6 below min_tokens" in nothing


def test_a_plan_for_a_longer_clip_keeps_its_stride_and_says_so_once(facts):
    assert facts["scaled"]["same"] < ROUNDING
    warning, summary = facts["scaled"]["lines"]
    assert "made for 36 latent frames and the run has 9" in warning and "1 instead of 4" in warning
    assert "6 attention calls sparse" in summary


def test_a_plan_for_a_much_shorter_clip_is_warned_of(facts):
    assert len(facts["made for 8"]) == 1
    warning, _ = facts["made for 3"]
    assert (
        "made for 3 latent frames and the run has 9" in warning
        and "31% of the attention is computed in place of 78%" in warning
    )


def test_a_bypass_after_all_that_leaves_nothing(facts):
    assert facts["bypassed"] == 0


@pytest.mark.parametrize("name", ["never declined", "frames", "parts", "parts of pytorch"])
def test_long_sequences_are_sparse_where_nothing_may_decline(facts, name):
    if name not in facts:
        pytest.skip("this ComfyUI chooses one attention for all models")
    assert facts[name]["sparse"] < ROUNDING < facts[name]["dense"]
    # ComfyUI's attention on a CPU does not tell what a merge needs.
    instead = [line for line in facts[name]["lines"] if "does not tell its log-sum-exp" in line]
    assert len(instead) == (name == "parts")
    assert (
        facts[name]["lines"][-1]
        == "Efficient-vDiT: 6 attention calls sparse at mean density 0.31; dense: 6 cross-attention"
    )


def test_long_sequences_are_measured_and_what_is_declined_is_counted(facts):
    summary = facts["measured"]["lines"][-1]
    if "6 measured faster" in summary:
        assert "0 attention calls sparse" in summary and facts["measured"]["dense"] < ROUNDING
    else:
        assert "6 attention calls sparse" in summary and facts["measured"]["sparse"] < ROUNDING


def test_a_second_model_of_a_run_follows_its_own_plan_or_none(facts):
    if "two models" not in facts:
        pytest.skip("this ComfyUI has no guider for two models")
    found = facts["two models"]
    assert all(of_one["same"] < ROUNDING for of_one in found.values())
    assert found["first"]["lines"] == [
        "Efficient-vDiT: the run samples with a second model, which has no Sparse Attention and stays dense.",
        "Efficient-vDiT: 3 attention calls sparse at mean density 0.31; dense: 3 cross-attention",
    ]
    (said,) = found["second"]["lines"]
    assert "second model was not asked for" in said and "Dual Model CFG Guider" in said
    assert [line.split(":")[0] for line in found["both"]["lines"]] == [
        "Efficient-vDiT",
        "Efficient-vDiT, of the run's second model",
    ]
    assert all("3 attention calls sparse" in line for line in found["both"]["lines"])


def test_the_second_model_is_told_and_names_what_computed_it_alone(facts):
    if "two models" not in facts:
        pytest.skip("this ComfyUI has no guider for two models")
    both = facts["both told"]
    assert both["told"] == [["first", 3], ["second", 3]]
    assert both["computed"][0] == both["computed"][1]  # not "override over ..."
    assert "easycache may keep something" in both["measure"]


def test_a_second_model_of_a_run_that_is_stopped_is_no_fault(facts):
    if "two models" not in facts:
        pytest.skip("this ComfyUI has no guider for two models")
    assert not any("not asked" in line for line in facts["both stopped"]["lines"])
    assert facts["both stopped"]["sparse"] == 0  # those of the run before are gone


def test_what_fails_after_a_run_keeps_nothing_of_it(facts):
    assert facts["broken announcement"] == {"running": False, "kept": 0}


def test_a_run_within_a_run_gives_the_outer_one_back(facts):
    """As its clips at once are counted by it, and its warnings hang on whether it was asked."""
    kept = {"the same": True, "running": True, "clips": 1, "asked": True, "after it": False, "clip": 0.0}
    assert facts["a run within a run"] == kept


def test_an_override_without_a_hash_is_chained_too(facts):
    assert facts["odd override"] < ROUNDING


def test_a_trial_s_calls_are_none_of_the_model_s(facts):
    assert facts["a trial's calls"] and not any("token grid" in line for line in facts["a trial's calls"])


def test_steps_that_lie_close_together_are_told_apart(facts):
    assert facts["steps"] == list(range(100))


def test_a_run_without_steps_accuses_nobody(facts):
    assert facts["no steps"] == ["Efficient-vDiT: no step was sampled."]
