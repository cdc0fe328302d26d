"""The sparse node among ComfyUI's other ways to change a MODEL or a run, in its own process."""

import pytest

ROUNDING = 2e-5


@pytest.fixture(scope="module")
def facts(in_process):
    found = in_process("chains")
    assert found["effect"] > 100 * ROUNDING
    return found


@pytest.mark.parametrize("name", ["alone", "split", "windows", "windows behind", "the second node counts", "threads"])
def test_the_result_is_the_one_expected(facts, name):
    assert facts[name] < ROUNDING


@pytest.mark.parametrize("place", ["first", "last", "strided", "rotating"])
def test_reference_frames_stand_where_asked(facts, place):
    assert facts[f"placement {place}"] < ROUNDING < facts["rotating differs"]


def test_guidance_in_two_forwards_counts_layers_anew_in_each(facts):
    assert facts["split forwards"] == 4
    assert facts["split lines"] == ["Efficient-vDiT: 12 attention calls sparse at mean density 0.31; dense: 12 cross-attention"]


def test_context_windows_are_clips_of_their_own(facts):
    assert facts["window frames"] == [5]
    assert len(facts["window lines"]) == 1 and "sparse at mean density 0.52; dense: " in facts["window lines"][0]


@pytest.mark.parametrize("order", ["before", "behind"])
def test_torch_compile_on_either_side(in_process, order, _cache={}):  # noqa: B006
    if not _cache:
        _cache.update(in_process("compiled"))
    assert _cache["dense"] < ROUNDING and _cache["graphs"] > 0 and _cache["effect"] > 100 * ROUNDING
    assert _cache[order]["same"] < ROUNDING
    assert _cache[order]["lines"] == ["Efficient-vDiT: 6 attention calls sparse at mean density 0.31; dense: 6 cross-attention"]


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_what_a_cache_skips_is_skipped_and_the_rest_is_sparse(facts, cache, order):
    forwards, lines = facts[f"{cache} {order}"]["forwards"], facts[f"{cache} {order}"]["lines"]
    assert 0 < forwards < 8
    assert lines == [
        f"Efficient-vDiT: {3 * forwards} attention calls sparse at mean density 0.31; dense: {3 * forwards} cross-attention"
    ]


def test_a_lora_acts_on_either_side(facts):
    assert facts["lora"]["either side"] < ROUNDING < facts["lora"]["acts"]


def test_an_override_installed_earlier_computes_the_dense_pieces(facts):
    assert facts["override under"]["same"] < ROUNDING
    # steps x layers x (reference rows, the other frames of two batch entries, cross-attention)
    assert facts["override under"]["calls"] == 2 * 3 * (1 + 2 + 1)


def test_an_override_installed_later_takes_the_place_and_the_log_says_so(facts):
    assert facts["override over"]["dense"] < ROUNDING
    (line,) = facts["override over"]["lines"]
    assert "no attention call came by: another node replaces the attention" in line


def test_threads_of_one_model_keep_their_plans_apart(facts):
    assert facts["threads differ"] > 100 * ROUNDING


def test_a_plan_for_a_longer_clip_keeps_its_stride_and_says_so_once(facts):
    assert facts["scaled"]["same"] < ROUNDING
    warning, summary = facts["scaled"]["lines"]
    assert "made for 36 latent frames and the run has 9" in warning and "1 instead of 4" in warning
    assert "6 attention calls sparse" in summary


def test_a_bypass_after_all_that_leaves_nothing(facts):
    assert facts["bypassed"] == 0


@pytest.mark.parametrize("name", ["never declined", "frames"])
def test_long_sequences_are_sparse_where_nothing_may_decline(facts, name):
    assert facts[name]["sparse"] < ROUNDING < facts[name]["dense"]
    assert facts[name]["lines"][-1] == "Efficient-vDiT: 6 attention calls sparse at mean density 0.31; dense: 6 cross-attention"


def test_long_sequences_are_measured_and_what_is_declined_is_counted(facts):
    summary = facts["measured"]["lines"][-1]
    if "6 measured faster" in summary:
        assert "0 attention calls sparse" in summary and facts["measured"]["dense"] < ROUNDING
    else:
        assert "6 attention calls sparse" in summary and facts["measured"]["sparse"] < ROUNDING
