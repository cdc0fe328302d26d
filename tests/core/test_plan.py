import json

import pytest

from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.text import parse_layers
from efficient_vdit_core.tiles import TilePattern


def layered() -> TilePlan:
    return TilePlan(
        patterns=tuple(TilePattern(k) for k in (None, 2, 1)),
        family="OpenSoraT2V",
        frames=8,
        heads=24,
        provenance={"r": 0.1},
    )


@pytest.mark.parametrize(
    "plan", [layered(), TilePlan.uniform(1), TilePlan.uniform(2, 4).with_dense("0,2-3"), TilePlan.uniform(None)]
)
def test_json_round_trip(plan, tmp_path):
    assert TilePlan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "p.json")
    assert TilePlan.load(tmp_path / "p.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_dense_layers_count_from_both_ends():
    plan = TilePlan.uniform(1).with_dense("0-1,-1")
    assert [plan.pattern(i, 5).k for i in range(5)] == [None, None, 1, 1, None]
    assert TilePlan.uniform(1).with_dense(" ") == TilePlan.uniform(1)


def test_density_is_the_mean_over_layers():
    assert layered().density(8) == pytest.approx((1 + TilePattern(2).density(8) + TilePattern(1).density(8)) / 3)


def test_a_plan_of_another_family_is_refused_with_the_preset_of_the_model_s_own():
    plan = TilePlan.uniform(1, family="minimax_h3")
    with pytest.raises(
        ValueError, match=r"the model is 'wan'.* preset wan \('wan \(preset\)' in Load Tile Plan\), or a uni"
    ):
        plan.check_fits(family="wan")
    with pytest.raises(ValueError, match="Choose a plan for this model, or a uniform one"):
        plan.check_fits(family="WanModel")


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"family": "WanModel"}, "family"), ({"layers": 32}, "3 layers"), ({"heads": 12}, "24 attention heads")],
)
def test_a_plan_for_another_model_is_refused(asked, message):
    layered().check_fits(family="OpenSoraT2V", layers=3, heads=24)
    TilePlan.uniform(1).check_fits(**asked)
    with pytest.raises(ValueError, match=message):
        layered().check_fits(**asked)


@pytest.mark.parametrize(("dense", "layer"), [("40", "40"), ("0-6", "6"), ("-7", "-7")])
def test_a_plan_that_keeps_a_layer_full_which_the_model_lacks_is_refused(dense, layer):
    TilePlan.uniform(2).with_dense("0-5,-6").check_fits(layers=6)
    with pytest.raises(ValueError, match=f"names layer {layer}, but the model has 6 layers"):
        TilePlan.uniform(2).with_dense(dense).check_fits(layers=6)


def test_a_layer_beyond_the_plan_is_refused():
    with pytest.raises(ValueError, match="Layer 3"):
        layered().pattern(3)


def edited(**changes) -> str:
    return json.dumps({**json.loads(layered().to_json()), **changes})


def by_schema_3(*patterns) -> str:
    return json.dumps({"schema_version": 3, "heads": 2, "patterns": patterns, "provenance": {"anything": "goes"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 40 + "]" * 40, "nested deeper"),
        (edited(frames=8).replace("8", "1e999"), "too large for a number"),
        (edited(dense_layers=[[0, 0]] * 10**4), "dense_layers"),
        (" " * 2**21, "larger than"),
        ("[1]", "expected an object"),
        ("{}", "schema_version"),
        (edited(schema_version="1"), "schema_version"),
        (edited(schema_version=4), "Update the node pack"),
        (edited(reference_frames=[]), "0 layers"),
        (edited(reference_frames=[1] * 10_000), "10000 layers"),
        (edited(reference_frames=[1, -2]), r"reference_frames\[1\]"),
        (edited(reference_frames=[1, "full"]), r"reference_frames\[1\]"),
        (edited(reference_frames=[True]), r"reference_frames\[0\]"),
        (edited(reference_frames=1.5), "reference_frames"),
        (edited(family=3), "family"),
        (edited(frames="8"), "frames"),
        (edited(heads=-1), "heads"),
        (edited(provenance=[]), "provenance"),
        (edited(dense_layers=[[1]]), "dense_layers"),
        (edited(dense_layers="0-2"), "dense_layers"),
        (edited(dense_layers=[[5, 2]]), "dense_layers"),
        (edited(dense_layers=[[0, -1]]), "dense_layers"),
        (edited(dense_layers=[[0, 1024]]), "dense_layers"),
        (
            edited(dense_layer=[[0, 2]]),
            "The plan has a field 'dense_layer', expected schema_version, .*reference_frames",
        ),
        (edited(patterns=[]), "The plan has a field 'patterns'"),
        (by_schema_3({"k": 2, "windw": 3}), r"patterns\[0\] has a field 'windw', expected k, window, means"),
        (by_schema_3({"k": 2, "heads": "0"}), r"patterns\[0\] has a field 'heads'"),
        (by_schema_3([{"k": 2, "head": "0-1"}]), r"patterns\[0\]\[0\] has a field 'head', expected heads, k"),
    ],
)
def test_nonsense_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        TilePlan.from_json(text)


def test_load_names_the_file(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ValueError, match=name):
            TilePlan.load(tmp_path / name)


def test_layer_lists():
    assert parse_layers("0-2, 5,-1") == ((0, 2), (5, 5), (-1, -1))
    for text in ("a", "3-1", "1--2", "--1", "-3--1", "1-"):
        with pytest.raises(ValueError, match="dense_blocks"):
            parse_layers(text)


@pytest.mark.parametrize(
    ("text", "ks"),
    [
        ("0:full 1-2:2:6 3:1:7", [None, 2, 2, 1]),
        ("1:3 0:FULL", [None, 3]),
        ("0-1:0", [0, 0]),
    ],
)
def test_text_gives_a_pattern_to_every_layer(text, ks):
    plan = TilePlan.from_text(text)
    assert [p.k for p in plan.patterns] == ks and plan.frames == (8 if "6" in text else None)
    assert TilePlan.from_text(plan.to_text()) == plan


def test_text_of_plans_for_any_depth():
    plan = TilePlan.from_text("all:2:6 0-1:full -1:full")
    assert [plan.pattern(i, 5).k for i in range(5)] == [None, None, 2, 2, None] and plan.frames == 8
    assert plan.to_text() == "all:2:6 0-1:full -1:full" and TilePlan.from_text(plan.to_text()) == plan
    assert TilePlan.uniform(None).to_text() == "all:full"


def test_a_file_s_range_from_the_end_reads_the_same_as_text():
    plan = TilePlan.from_json(edited(reference_frames=2, dense_layers=[[0, 1], [-3, -2]]))
    assert plan.to_text() == "all:2:6 0-1:full -3:full -2:full"
    again = TilePlan.from_text(plan.to_text())
    assert (
        [again.pattern(i, 8).k for i in range(8)]
        == [plan.pattern(i, 8).k for i in range(8)]
        == [None, None, 2, 2, 2, None, None, 2]
    )


def test_text_says_dense_layers_of_a_layered_plan():
    assert layered().with_dense("1").to_text() == "0-1:full 2:1:7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 parts"),
        (" ".join(f"{i}:1" for i in range(10_000)), "10000 parts"),
        ("0-9999:1", "ascending"),
        ("3-1:1", "ascending"),
        ("0:half", "'0:half'"),
        ("0=1", "'0=1'"),
        ("0:1 " + "x" * 10_000, "xxx[.]{3}"),
        ("0:2:6 1:2:7", "8 and of 9 latent frames"),
        ("0:1 2:1", "leaves out layer 1"),
        ("2:6", "leaves out layer 0: '2:6' is a pattern for layer 2 alone. .* write 'all:2:6'"),
        ("0-2:1 1:2", "layer 1 of '1:2' is named twice"),
        ("0:1 -1:full", "counts from the end"),
        ("all:1 0:2", "must stand first"),
        ("-1:full all:1", "must stand first"),
        ("all:1 all:2", "must stand first"),
        ("--1:1", "'--1:1'"),
        ("all:1025", "more than 1024 frames at 'all:1025'"),  # a plan file could not hold it
        ("0:2:1023", "more than 1024 frames at '0:2:1023'"),
    ],
)
def test_nonsense_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        TilePlan.from_text(text)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("about", "words"),
    [('"schema_version": 1, "dense_layers": [[-3, 2]]', "dense_layers"), ('"schema_version": 0', "schema_version")],
)
def test_a_file_of_layers_from_both_ends_or_of_no_version_is_refused(about, words):
    with pytest.raises(ValueError, match=words):
        TilePlan.from_json(f'{{{about}, "reference_frames": 1}}')


def test_a_file_without_a_family_is_for_any():
    assert TilePlan.from_json('{"schema_version": 1, "reference_frames": 1, "family": null}').family == "any"


def test_layers_that_a_file_keeps_full_twice_are_written_once():
    """A file of 13 kB became a text of 10 MB, which the page asks for."""

    def text(*ranges: list[int]) -> str:
        values = {"schema_version": 1, "reference_frames": 2, "dense_layers": ranges}
        return TilePlan.from_json(json.dumps(values)).to_text()

    assert text([-3, -1], [-2, -1]) == "all:2 -3:full -2:full -1:full"
    assert text([0, 3], [2, 5], [1, 2], [7, 7]) == "all:2 0-3:full 4-5:full 7:full"
    assert len(text(*[[-1023, -1]] * 100).split()) == 1 + 1023
