"""The crossing world: what its captions say is in its clips, by the drawn pixels themselves."""

from dataclasses import replace

import numpy as np
import pytest

from efficient_vdit_core.cli import main
from efficient_vdit_core.distill.data.clips import video_captions
from efficient_vdit_core.media.video import read_metadata
from efficient_vdit_core.tinyworld.crossing.scene import (
    BAR,
    BAR_COLOR,
    DIRECTIONS,
    FIRST_BOUNCE,
    FRAMES,
    GROUNDS,
    SIZE,
    held_out_scenes,
    is_held_out,
    random_scene,
    render,
    textured,
)
from efficient_vdit_core.tinyworld.moving.scene import COLORS, coverage
from efficient_vdit_core.tinyworld.worlds import WORLDS


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


MANY = scenes(30)


def test_each_is_seen_then_hidden_then_seen_again_and_the_two_cross_in_the_open():
    for scene in MANY[:15]:
        drawn = []
        for mover in scene.movers:
            centers = mover.centers()
            assert (centers >= mover.radius - 1e-9).all() and (centers <= SIZE - mover.radius + 1e-9).all()
            np.testing.assert_allclose(np.diff(centers[:FIRST_BOUNCE, 1]), mover.velocity[1], atol=1e-9)
            drawn.append(coverage(mover.shape, np.column_stack([centers, np.full(FRAMES, mover.radius)])))
        apart = np.minimum(*drawn).sum(axis=(1, 2)) == 0
        for cover in drawn:
            behind = cover[..., BAR].sum(axis=(1, 2)) / cover.sum(axis=(1, 2))
            hidden = np.flatnonzero(behind > 0.99)
            assert (behind[:4] == 0).all() and apart[:4].all() and len(hidden)
            after = np.arange(FRAMES) > hidden[0]
            assert (after & apart & (behind == 0)).sum() >= 4
        both = np.minimum(*drawn)
        both[..., BAR] = 0
        assert both.sum() > 60


def test_who_is_in_front_covers_the_other_and_the_bar_covers_all():
    for scene in MANY[:6]:
        clip = render(scene)
        assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8
        assert (clip[:, :, BAR] == BAR_COLOR).all()
        places = [np.column_stack([m.centers(), np.full(FRAMES, m.radius)]) for m in scene.movers]
        both = np.minimum(*(coverage(m.shape, p) for m, p in zip(scene.movers, places, strict=True))) == 1
        both[..., BAR] = False
        assert both.any() and (clip[both] == COLORS[scene.movers[scene.front].color]).all()


def test_the_ground_is_the_named_colour_with_a_smooth_texture_of_its_seed():
    for name, color in GROUNDS.items():
        ground = textured(name, 3)
        np.testing.assert_allclose(ground.mean(axis=(0, 1)), color, atol=0.1)
        np.testing.assert_allclose(ground.std(axis=(0, 1)), 6, atol=0.1)
        assert np.abs(np.diff(ground, axis=1)).mean() < 6, "neighbours are alike; of white noise they differ by 6.8"
        assert np.array_equal(ground, textured(name, 3)) and not np.allclose(ground, textured(name, 4))


def test_scenes_and_clips_are_the_same_each_time_and_a_part_is_that_part():
    first, again = scenes(3, seed=5), scenes(3, seed=5)
    assert first == again and np.array_equal(render(first[2]), render(again[2]))
    np.testing.assert_array_equal(render(first[0])[50:70], render(first[0], first=50, frames=20))


@pytest.mark.parametrize("template", range(3))
def test_captions_name_all_that_is_to_be_seen(template):
    for scene in MANY:
        text = scene.caption(template)
        front, back = scene.movers[scene.front], scene.movers[1 - scene.front]
        assert scene.ground in text and "black bar" in text
        assert text.index(f"{front} ", text.rindex(str(front))) < text.rindex(str(back)), "the front one is named first"
        for mover in scene.movers:
            assert f"{mover.color} {mover.shape}" in text and f"{mover.direction} {mover.speed}" in text


def test_ways_are_many():
    ways = {(m.direction, m.speed) for s in MANY for m in s.movers}
    assert len(ways) >= 14
    assert len({tuple(m.way for m in s.movers) for s in MANY}) > 20


def test_held_out_captions_are_different_and_the_same_each_time():
    held = held_out_scenes(4)
    assert held[:2] == held_out_scenes(2)
    assert len({scene.caption() for scene in held}) == 4 and all(map(is_held_out, held))
    swapped = [replace(s, movers=s.movers[::-1], front=1 - s.front) for s in MANY]
    assert list(map(is_held_out, swapped)) == list(map(is_held_out, MANY)), "the same clip, named the other way round"


def test_an_eighth_of_the_captions_is_held_out():
    rng, share = np.random.default_rng(0), []
    for _ in range(400):
        color, direction, ground = (str(rng.choice(list(names))) for names in (COLORS, DIRECTIONS, GROUNDS))
        first = replace(MANY[0].movers[0], color=color, direction=direction)
        share.append(is_held_out(replace(MANY[0], movers=(first, MANY[0].movers[1]), ground=ground)))
    assert 0.08 < np.mean(share) < 0.18


def test_the_command_writes_clips_with_their_captions_as_training_reads_them(tmp_path, capsys):
    assert main(["tinyworld", "crossing-render", "--clips", "2", "--seed", "3", "--out", str(tmp_path)]) == 0
    rng = np.random.default_rng(3)
    captions = [random_scene(rng).caption(0), random_scene(rng).caption(1)]
    assert list(video_captions(tmp_path).values()) == captions
    assert read_metadata(tmp_path / "00001.mp4")["prompt"] == captions[1] and captions[1] in capsys.readouterr().out


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_trained_on_is_never_held_out(name):
    world, rng = WORLDS[name], np.random.default_rng(0)
    for draw in (world.random_scene, world.random_words):
        assert not any(world.is_held_out(world.trained_on(draw, rng)) for _ in range(100))
