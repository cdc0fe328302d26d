"""Two models on the same clips: the difference of their shares, and how sure it is."""

import json

import numpy as np
import pytest

from efficient_vdit_core import cli
from efficient_vdit_core.tinyworld.difference import difference
from efficient_vdit_core.tinyworld.moving.figures import interval
from efficient_vdit_core.tinyworld.moving.scene import held_out_scenes

CLIPS = 216
CAPTIONS = [scene.caption() for scene in held_out_scenes(CLIPS)]


def figures(right, **more):
    return {"world": "moving", "captions": len(right), "first_seed": 0, "right": right, **more}


def drawn(share, seed):
    return "".join("01"[int(x)] for x in np.random.default_rng(seed).random(CLIPS) < share)


def test_it_is_the_difference_of_the_shares_and_turns_round_with_them():
    one, other = figures(drawn(0.6, 1)), figures(drawn(0.4, 2))
    there, back = difference(one, other, CAPTIONS), difference(other, one, CAPTIONS)
    assert there["all_right"] == pytest.approx((one["right"].count("1") - other["right"].count("1")) / CLIPS)
    assert there["one_alone"] - there["other_alone"] == round(there["all_right"] * CLIPS)
    assert (back["one_alone"], back["other_alone"]) == (there["other_alone"], there["one_alone"])
    low, high = there["all_right_interval"]
    assert low < there["all_right"] < high
    assert back["all_right_interval"] == pytest.approx((-high, -low), abs=0.005)


def test_pairs_tell_more_than_two_shares_of_their_own():
    """Where captions are hard for both models alike, that is in each share's interval and not in the difference's."""
    rng = np.random.default_rng(5)
    easy = {caption: rng.random() < 0.5 for caption in sorted(set(CAPTIONS))}
    right = [easy[caption] for caption in CAPTIONS]
    slips = rng.random(CLIPS) < 0.1
    one = "".join("01"[x] for x in right)
    other = "".join("01"[x and not slip] for x, slip in zip(right, slips, strict=True))
    low, high = difference(figures(one), figures(other), CAPTIONS)["all_right_interval"]
    of_one = interval(np.array([int(x) for x in one], dtype=float), CAPTIONS)
    assert of_one is not None and high - low < 0.4 * (of_one[1] - of_one[0])
    assert difference(figures(one), figures(one), CAPTIONS)["all_right_interval"] == (0, 0)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """The clips of a caption are alike and its difference its own: of 200 draws of 72 captions, 95 % hold the mean of all."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        shift = dict(zip(sorted(set(CAPTIONS)), rng.normal(0.2, 0.15, 72).clip(-0.3, 0.7), strict=True))
        one = "".join("01"[int(rng.random() < 0.3 + shift[c])] for c in CAPTIONS)
        other = "".join("01"[int(rng.random() < 0.3)] for _ in CAPTIONS)
        low, high = difference(figures(one), figures(other), CAPTIONS)["all_right_interval"]
        held += low <= 0.2 <= high
    assert 0.9 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (figures("0101", captions=3), "one has captions 4 and one 3"),
        (figures("0101", world="crossing"), "one has world 'moving' and one 'crossing'"),
        (figures("0101", first_seed=9), "one has first_seed 0 and one 9"),
        (figures("010", captions=4), "right is '010', expected a 0 or 1 for each of 4 clips"),
        (figures("01x1"), "right is '01x1'"),
        ({"world": "moving", "captions": 4, "first_seed": 0}, "right is None"),
    ],
)
def test_clips_that_are_no_pairs_are_refused(other, words):
    with pytest.raises(ValueError, match=words):
        difference(figures("0101"), other, CAPTIONS[:4])


def test_the_command_reads_what_eval_wrote(tmp_path, capsys):
    one, other, out = tmp_path / "one.json", tmp_path / "other.json", tmp_path / "difference.json"
    one.write_text(json.dumps(figures("0111", command="evdit tinyworld eval --captions 4")))
    other.write_text(json.dumps(figures("0100")))
    assert cli.main(["tinyworld", "difference", str(one), str(other), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["all_right"], found["one"], found["clips"]) == (0.5, "evdit tinyworld eval --captions 4", 4)
    assert json.loads(capsys.readouterr().out)["all_right"] == 0.5


@pytest.mark.parametrize("text", ["[]", '{"world": "flat"}', '{"world": "moving", "captions": -1}', "{"])
def test_a_file_of_something_else_is_refused(tmp_path, capsys, text):
    file = tmp_path / "one.json"
    file.write_text(text)
    assert cli.main(["tinyworld", "difference", str(file), str(file)]) == 2
    assert "Take one that evdit" in (said := capsys.readouterr().err) or "Take a file that evdit" in said
