"""A tiny MiniMax-H3 in ComfyUI's own process, under the hooks of today's versions and of the nodes people put beside
ours. Its layouts and its search are in test_families.py."""

import pytest

ROUNDING = 2e-5
SPARSE = "Efficient-vDiT: 6 attention calls sparse at mean density 0.64; dense: none"


@pytest.fixture(scope="module")
def facts(in_process):
    import comfyui_server

    if not (comfyui_server.COMFYUI / "comfy" / "ldm" / "minimax").is_dir():
        pytest.skip("this ComfyUI has no MiniMax-H3")
    found = in_process("minimax_h3")
    assert found["effect"] > 100 * ROUNDING
    return found


@pytest.mark.parametrize("name", ["alone", "layered", "in groups", "own attention", "steps by hand", "two stages"])
def test_the_result_is_the_masked_oracle_s(facts, name):
    assert facts[name] < ROUNDING


def test_reference_frames_stand_on_the_chunk_heads(facts):
    assert facts["chunk heads"] < ROUNDING < facts["strided instead"]


def test_the_report_counts_each_call(facts):
    assert facts["alone lines"] == [SPARSE]


def test_groups_of_heads_are_parts_of_one_layer(facts):
    """Two heads one after the other, three layers, two steps; the third layer is full in the plan."""
    assert facts["in groups lines"] == [
        "Efficient-vDiT: 8 attention calls sparse at mean density 0.70; dense: 4 full in the plan"
    ]


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_model_attention_backend_computes_the_dense_pieces_on_either_side(facts, place):
    found = facts[f"backend {place}"]
    assert found["same"] < ROUNDING and found["again"] < ROUNDING
    # Of three layers two are sparse, in two steps: the shared rows, and all other frames in one piece.
    assert found["pieces"] == 2 * ((1 + 1) + (1 + 1))
    assert list(found["computed"].values()) == [6]
    assert next(iter(found["computed"])).startswith("optimized_attention_override of counted_attention over ")


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_dense_call_gets_its_containers_as_they_are(facts, place):
    assert facts[f"backend {place}"]["containers"] == 2  # the dense layer of two steps


def test_blocks_that_another_node_replaces_are_not_shared_out(facts):
    """ComfyUI tells such a node where the whole sequence's tokens stand; its Fun ControlNet adds its own there."""
    assert facts["sharding"]["alone"] == ""
    assert (
        "Another node replaces blocks of MiniMaxH3Model, as its Fun ControlNet does"
        in facts["sharding"]["replaced blocks"]
    )


def test_the_attention_that_a_file_asks_for_computes_its_layers(facts):
    assert facts["own attention asked"]
    assert facts["own attention computed"].pop("of_the_file") == 2
    assert list(facts["own attention computed"].values()) == [1]
    assert facts["own attention outside the window"] == 2


def test_arguments_that_do_not_exist_yet_are_handed_on(facts):
    assert facts["handed on"]


def test_the_schedule_is_left_as_the_sampler_gave_it(facts):
    """Checkpoints with a head for each interval (PDD) read it."""
    assert facts["schedule untouched"]


@pytest.mark.parametrize("shift", ["3.0", "6.0", "12.0"])
def test_steps_mean_the_same_under_every_shift(facts, shift):
    assert facts["steps"][f"shift {shift}"] == {
        "first": [1, 2, 3],
        "last": [0, 1, 2],
        "both": [1],
        "percent": [1, 2, 3],
        "full noise": [1, 2, 3],
        "none": [],
    }


def test_steps_are_counted_on_levels_by_hand_and_within_one_sampler(facts):
    assert facts["steps"]["by hand"] == [2, 3, 4, 5, 6] and facts["steps"]["second stage"] == [1, 2]
    assert facts["steps"]["second stage, of full noise"] == [0, 1, 2]
    again = [line for line in facts["dense again"] if "dense_first_steps keeps its first steps dense as well" in line]
    assert len(again) == 1 and "begins" in again[0] and "start_percent 0.01" in again[0]
    assert not any("as well" in line for line in facts["alone lines"])


@pytest.mark.parametrize("place", ["before", "behind"])
def test_what_a_step_cache_leaves_is_sparse(facts, place):
    (line,) = facts[f"EasyCache {place}"]
    calls = int(line.split()[1])
    assert 0 < calls < 8 * 3 and calls % 3 == 0 and line.endswith("dense: none")


@pytest.mark.parametrize("way", ["merged", "bypassed"])
def test_a_lora_acts_on_either_side(facts, way):
    found = facts[f"lora {way}"]
    assert max(found["before"], found["behind"]) < ROUNDING < 0.01 < found["acts"]


def test_a_sequence_that_is_not_as_it_should_be_stays_dense_with_its_reason(facts):
    assert facts["unknown"].pop("run") == 0
    assert facts["unknown"] == {
        "no table": "the table of its packed sequence is missing",
        "not last": "its packed sequence ends in audio, not in the video",
        "another kind": "its packed sequence has parts of an unknown kind (depth)",
        "another grid": "its packed video has 83 tokens, and 7 frames of 12 are 84",
    }
    assert facts["unknown lines"] == [
        "Efficient-vDiT: the attention stays dense: the table of its packed sequence is missing.",
        "Efficient-vDiT: 0 attention calls sparse; dense: 6 the table of its packed sequence is missing",
    ]


def test_a_checkpoint_trained_for_another_sparse_attention_is_warned_of_once(facts):
    warning, summary = facts["trained otherwise"]
    assert "trained for another sparse attention (VSA, FastH3)" in warning and summary == SPARSE


def test_the_recorder_sees_what_a_block_leaves_behind_and_what_changes(facts):
    assert facts["allocations"]["left behind"] == [20]
    assert not all(facts["allocations"]["unprepared"]["same"])


def test_blocks_leave_nothing_behind_and_allocate_the_same_at_every_step(facts):
    """What ComfyUI records of a block on an NVIDIA GPU, and replays at the next step."""
    found = facts["allocations"]["sparse"]
    assert found["lines"][-1] == "Efficient-vDiT: 12 attention calls sparse at mean density 0.61; dense: none"
    assert found["steps"] == 4 and all(found["same"]) and found["rogues"] == []


def test_a_sparse_block_holds_no_more_than_a_dense_one(facts):
    """At the real model's proportions of width, inner width and feed-forward."""
    assert facts["allocations"]["sparse"]["peak"] <= facts["allocations"]["dense"]["peak"]
