"""The reader of the tiny world: true clips pass, and a clip that was made wrong on purpose fails in that column alone."""

import json
import shutil
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from efficient_vdit_core import tinyworld
from efficient_vdit_core.cli import main
from efficient_vdit_core.commands.tinyworld import figures as command_figures
from efficient_vdit_core.pipeline import Pipeline, Video
from efficient_vdit_core.tinyworld.evaluate import evaluate
from efficient_vdit_core.tinyworld.moving.figures import figures_of, interval
from efficient_vdit_core.tinyworld.moving.reader import COLUMNS, read_clip
from efficient_vdit_core.tinyworld.moving.scene import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    FRAMES,
    SHAPES,
    SIZE,
    SPEEDS,
    coverage,
    held_out_scenes,
    random_scene,
    render,
)

SEEDS = range(12)


def scene_of(seed):
    """One that fits into the picture with room for what the faults do."""
    return replace(random_scene(np.random.default_rng(seed)), radius=11.0)


def other(names, name, scene):
    """The next name of a list."""
    order = list(names)
    return replace(scene, **{name: order[(order.index(getattr(scene, name)) + 1) % len(order)]})


def draw(scene, centers=None, radii=None, shapes=None, color=None):
    """Frames of ``scene`` with other centres, radii, shapes or colours in each of them."""
    centers = scene.centers() if centers is None else centers
    radii = np.full(FRAMES, scene.radius) if radii is None else radii
    places = np.column_stack([centers, radii])
    shapes = [scene.shape] * FRAMES if shapes is None else shapes
    drawn = np.concatenate([coverage(shape, places[i : i + 1]) for i, shape in enumerate(shapes)])
    ground = np.array(BACKGROUNDS[scene.background], dtype=float)
    paint = np.array(COLORS[scene.color], dtype=float) if color is None else color
    paint = np.broadcast_to(paint, (FRAMES, 3))[:, None, None]
    return np.clip(np.round(ground + drawn[..., None] * (paint - ground)), 0, 255).astype(np.uint8)


def passed(clip, scene):
    return read_clip(clip).verdict(scene)


def fails_only(clip, scene, column):
    verdict = passed(clip, scene)
    return [name for name in COLUMNS if not verdict[name]] == [column]


@pytest.mark.parametrize("seed", range(60))
def test_a_true_clip_passes_and_is_read_to_a_fraction_of_a_pixel(seed):
    scene = random_scene(np.random.default_rng(seed))
    found = read_clip(render(scene))
    assert all(found.verdict(scene).values())
    assert (found.direction, found.speed) == (scene.direction, scene.speed)
    assert np.abs(found.track - scene.centers()).max() < 0.1 and np.abs(found.radius - scene.radius).max() < 0.1
    assert found.overlap > 0.99 and found.stain == found.flicker == 0 and found.swelling < 1e-3
    assert found.off_track(scene) < 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "column, names", [("shape", SHAPES), ("color", COLORS), ("background", BACKGROUNDS)], ids=lambda v: str(v)[:10]
)
def test_another_shape_colour_or_background(seed, column, names):
    scene = scene_of(seed)
    assert fails_only(render(scene), other(names, column, scene), column)


@pytest.mark.parametrize("seed", SEEDS)
def test_another_way(seed):
    scene = scene_of(seed)
    clip = render(scene)
    assert fails_only(clip, other(DIRECTIONS, "direction", scene), "track")
    assert fails_only(clip, other(SPEEDS, "speed", scene), "track")
    still = np.repeat(clip[:1], FRAMES, axis=0)
    assert fails_only(still, scene, "track")
    step = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed] * np.arange(FRAMES)[:, None]
    middle = np.full(2, SIZE / 2) - step[-1] / 2
    assert all(passed(draw(scene, middle + step), scene).values())
    assert fails_only(draw(scene, middle + 0.6 * step), scene, "track")  # two fifths too slow
    jumping = middle + step + 3.0 * (np.arange(FRAMES)[:, None] % 2)
    assert fails_only(draw(scene, jumping), scene, "track")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wavy_outline(seed):
    scene = replace(scene_of(seed), shape="circle")
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    ground, paint = (np.array(palette, float) for palette in (BACKGROUNDS[scene.background], COLORS[scene.color]))
    frames = []
    for center_x, center_y in scene.centers():
        dx, dy = x - center_x, y - center_y
        radius = scene.radius + 2.8 * np.sin(7 * np.arctan2(dy, dx))
        drawn = np.clip(0.5 - (np.hypot(dx, dy) - radius), 0, 1)[..., None]
        frames.append(np.round(ground + drawn * (paint - ground)).astype(np.uint8))
    assert fails_only(np.stack(frames), scene, "outline")


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_turns_into_another(seed):
    scene = scene_of(seed)
    later = other(SHAPES, "shape", scene).shape
    assert fails_only(draw(scene, shapes=[scene.shape] * 20 + [later] * 9), scene, "identity")
    paint = np.array([COLORS[scene.color]] * 20 + [COLORS[other(COLORS, "color", scene).color]] * 9, dtype=float)
    assert not passed(draw(scene, color=paint), scene)["identity"]


@pytest.mark.parametrize("seed", SEEDS)
def test_stains(seed):
    scene = scene_of(seed)
    clip = render(scene)
    hue = np.array(COLORS[other(COLORS, "color", scene).color])
    within, beside = clip.copy(), clip.copy()
    for i, (x, y) in enumerate(scene.centers().astype(int)):
        within[i, y - 2 : y + 3, x - 2 : x + 3] = hue
        beside[i, (y + 32) % 58 : (y + 32) % 58 + 5, (x + 32) % 58 : (x + 32) % 58 + 5] = COLORS[scene.color]
    assert fails_only(within, scene, "clean") and fails_only(beside, scene, "clean")


@pytest.mark.parametrize("seed", SEEDS)
def test_unsteady_sizes_and_colours(seed):
    scene = scene_of(seed)
    swell = 1 + 0.1 * np.sin(np.arange(FRAMES))
    assert fails_only(draw(scene, radii=scene.radius * swell), scene, "steady")
    paint = np.array(COLORS[scene.color]) * np.where(np.arange(FRAMES) % 2, 0.85, 1.0)[:, None]
    assert fails_only(draw(scene, color=paint), scene, "steady")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_background_that_turns_into_another(seed):
    scene = scene_of(seed)
    for turns in (16, 24):
        clip = np.concatenate([render(scene)[:turns], render(other(BACKGROUNDS, "background", scene))[turns:]])
        assert fails_only(clip, scene, "background")


@pytest.mark.parametrize("seed", SEEDS)
def test_flashes_and_a_background_that_flickers(seed):
    scene = scene_of(seed)
    clip = render(scene)
    for flash in (slice(9, 10), slice(9, 11)):
        flashing = clip.copy()
        flashing[flash] = render(other(BACKGROUNDS, "background", scene))[flash]
        assert fails_only(flashing, scene, "steady")
    beside = np.abs(clip.astype(int) - np.array(BACKGROUNDS[scene.background])).max(-1, keepdims=True) == 0
    towards = np.where(np.array(BACKGROUNDS[scene.background]) > 127, -8, 8)
    flickering = clip + np.where(np.arange(FRAMES) % 2, 1, 0)[:, None, None, None] * beside * towards
    assert fails_only(flickering.astype(np.uint8), scene, "steady")
    paint = np.array(COLORS[scene.color], float)
    paints = paint + np.where(np.arange(FRAMES) % 2, 8.0, 0.0)[:, None] * np.where(paint > 127, -1, 1)
    assert fails_only(draw(scene, color=paints), scene, "steady")


def test_nothing_and_a_wrong_shape_of_array():
    scene = scene_of(0)
    empty = read_clip(np.full((5, SIZE, SIZE, 3), 12, np.uint8))
    assert empty.shape is None and empty.background == "black" and empty.off_track(scene) == float("inf")
    verdict = empty.verdict(replace(scene, background="black"))
    assert [name for name in COLUMNS if verdict[name]] == ["background"]
    with pytest.raises(ValueError, match="expected .frames >= 2"):
        read_clip(render(scene)[0])


def test_a_shape_that_is_gone_for_a_while():
    scene = scene_of(1)
    clip = render(scene)
    clip[8:12] = clip[0, 0, 0]
    found = read_clip(clip)
    assert found.shape == scene.shape and np.isnan(found.track[8:12]).all()
    assert not found.verdict(scene)["identity"] and found.verdict(scene)["track"]


@pytest.mark.parametrize("gone", [slice(0, 8), slice(1, None, 2), slice(0, 20), slice(0, None)])
def test_figures_are_numbers_whatever_is_gone(gone):
    scene = scene_of(2)
    clip = render(scene)
    clip[gone] = clip[0, 0, 0]
    found = figures_of([clip, render(scene)], [scene, scene])
    json.loads(json.dumps(found, allow_nan=False))
    assert found["all_right"] == 0.5 and found["off_track"] < 3


EMPTY = np.full((FRAMES, SIZE, SIZE, 3), 12, np.uint8)


def test_what_no_clip_tells_is_none_and_not_nought():
    scenes = held_out_scenes(2)
    found = figures_of([render(scene) for scene in scenes], scenes)
    assert found["diversity"] is None and found["motion"] > 0, "one clip of each caption"
    nothing = figures_of([EMPTY, EMPTY], scenes)
    assert {nothing[name] for name in ("stain", "swelling", "flicker", "off_track", "motion", "diversity")} == {None}
    assert nothing["seen"] == nothing["overlap"] == nothing["all_right"] == 0


def test_clips_without_a_shape_do_not_make_the_others_clean_and_steady():
    scene = scene_of(0)
    paint = np.array(COLORS[scene.color]) * np.where(np.arange(FRAMES) % 2, 0.85, 1.0)[:, None]
    clip = draw(scene, color=paint, radii=scene.radius * (1 + 0.1 * np.sin(np.arange(FRAMES))))
    alone, among = figures_of([clip], [scene]), figures_of([clip, EMPTY, EMPTY, EMPTY], [scene] * 4)
    assert [among[name] for name in ("stain", "swelling", "flicker")] == [
        alone[name] for name in ("stain", "swelling", "flicker")
    ]
    assert alone["flicker"] > 1 and (alone["seen"], among["seen"]) == (1, 0.25)


def test_captions_that_come_again_are_counted_once_and_one_has_no_interval():
    scenes = held_out_scenes(73)
    found = figures_of([EMPTY] * 73, scenes)
    assert (found["clips"], found["distinct_captions"]) == (73, 72)
    assert figures_of([EMPTY] * 2, [scenes[0], scenes[72]])["all_right_interval"] is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("kept_every", [0.0, 1e9])
def test_the_clips_that_were_judged_outlive_what_ends_the_command(monkeypatch, tmp_path, capsys, error, kept_every):
    scenes, made = held_out_scenes(3), []

    def generate(self, request, plan):
        assert not any(clip() is not None for clip in made[:-1]), "a clip that was judged is still held"
        if len(made) == 2:
            assert part.exists() == (kept_every == 0), "what comes before is kept now and then"
            raise error
        clip = render(scenes[len(made)])
        made.append(weakref.ref(clip))
        return Video(clip, {})

    monkeypatch.setattr(Pipeline, "generate", generate)
    monkeypatch.setattr(command_figures, "KEPT_EVERY", kept_every)
    file, part = tmp_path / "a.json", tmp_path / "a.json.part"
    file.write_text("those of a whole run")
    command = ["tinyworld", "eval", "--captions", "3", "--steps", "2"]
    assert main([*command, "--json", str(file)]) != 0
    assert file.read_text() == "those of a whole run" and f"figures so far in {part}" in capsys.readouterr().out
    found = json.loads(part.read_text())
    assert (found["complete"], found["clips"], found["captions"], found["all_right"]) == (False, 2, 3, 1)


def test_without_a_file_the_figures_so_far_are_said(monkeypatch, capsys):
    made = []

    def generate(self, request, plan):
        if made:
            raise KeyboardInterrupt
        made.append(request)
        return Video(EMPTY, {})

    monkeypatch.setattr(Pipeline, "generate", generate)
    assert main(["tinyworld", "eval", "--captions", "3", "--steps", "2"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False and found["clips"] == 1
    assert main(["tinyworld", "eval", "--captions", "3", "--steps", "2"]) == 130
    assert not capsys.readouterr().out, "nothing was judged"


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_a_short_clip_is_read_too(frames):
    scene = scene_of(3)
    assert read_clip(render(scene, frames=frames)).off_track(scene) < 0.1


def test_held_out_scenes_are_all_different_until_there_are_no_more():
    captions = [scene.caption() for scene in held_out_scenes(150)]
    assert len(set(captions[:72])) == 72 and captions[72:144] == captions[:72]


def test_figures_of_many_clips():
    scenes = held_out_scenes(4)
    right = [replace(s, start=(32.0, 32.0)) for s in scenes]
    wrong = [other(COLORS, "color", s) for s in right[:2]]
    found = figures_of([render(s) for s in [*right, *wrong]], [*scenes, *scenes[:2]])
    assert found["all_right"] == found["columns"]["color"] == pytest.approx(4 / 6) and found["clips"] == 6
    assert all(found["columns"][name] == 1 for name in COLUMNS if name != "color")
    assert found["diversity"] == pytest.approx(0.0, abs=0.1)
    low, high = found["all_right_interval"]
    assert 0.5 <= low < 4 / 6 < high <= 1


def test_the_interval_knows_that_clips_of_a_caption_are_alike():
    rng = np.random.default_rng(0)
    alone = rng.random(400) < 0.7
    low, high = interval(alone.astype(float), [str(i) for i in range(400)])
    half = 1.96 * np.sqrt(alone.mean() * (1 - alone.mean()) / 400)
    assert (low + high) / 2 == pytest.approx(alone.mean(), abs=0.005)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)  # of a 90 % interval it is 0.84
    alike = np.repeat(alone[:40], 10).astype(float)
    groups = np.repeat([str(i) for i in range(40)], 10)
    low, high = interval(alike, list(groups))
    assert high - low > 2.5 * 2 * half  # forty captions, not four hundred clips


@pytest.mark.parametrize(
    ("model", "said", "sampler", "steps", "guidance", "segments"),
    [
        ("tiny", {}, "ddim", 100, 3.0, None),
        ("tiny", {"sampler": "consistency", "steps": 4}, "consistency", 4, 3.0, 4),
        (
            "folder",
            {},
            "ddim",
            100,
            3.0,
            None,
        ),  # guided by no caption, as it was trained, whatever its folder is called
        ("tiny-8-steps", {}, "consistency", 8, 1.0, 8),
        ("tiny-8-steps", {"steps": 4}, "consistency", 4, 1.0, 4),
        ("tiny-4-steps", {}, "consistency", 4, 1.0, 4),
        ("tiny-8-steps", {"steps": 16}, "consistency", 16, 1.0, 8),
        ("tiny-8-steps", {"sampler": "ddim", "steps": 8, "guidance": 1.0}, "ddim", 8, 1.0, None),
    ],
)
def test_a_model_is_judged_at_the_steps_that_it_was_made_for(
    monkeypatch, tmp_path, caplog, model, said, sampler, steps, guidance, segments
):
    if model == "folder":
        model = shutil.copytree(
            Path(tinyworld.__file__).parents[1] / "assets" / "tiny",
            tmp_path / "trained",
            ignore=shutil.ignore_patterns("transformer_*"),
        )
    pipeline, scenes, asked = Pipeline.from_model(model), held_out_scenes(2), []

    def generate(request, plan):
        asked.append(request)
        return Video(render(scenes[len(asked) - 1]), {})

    monkeypatch.setattr(pipeline, "generate", generate)
    figures = evaluate(pipeline, captions=2, **said)
    for of in (figures, *map(asdict, asked)):
        assert [of[name] for name in ("sampler", "steps", "guidance", "segments")] == [
            sampler,
            steps,
            guidance,
            segments,
        ]
    assert [request.seed for request in asked] == [0, 1] and {request.negative for request in asked} == {""}
    assert figures["all_right"] == 1.0
    assert len(caplog.records) == (sampler == "ddim" and steps == 8)  # once, not for each caption
