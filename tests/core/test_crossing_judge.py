"""The judge of the crossing world: true clips pass, and a clip that was made wrong on purpose fails in that column
alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from efficient_vdit_core.cli import main
from efficient_vdit_core.tinyworld.crossing import bounds as crossing_bounds
from efficient_vdit_core.tinyworld.crossing.bounds import blurred
from efficient_vdit_core.tinyworld.crossing.judge import COLUMNS, crossing_figures, read_crossing
from efficient_vdit_core.tinyworld.crossing.scene import (
    BAR,
    FRAMES,
    GROUNDS,
    SIZE,
    compose,
    random_scene,
    render,
    textured,
)
from efficient_vdit_core.tinyworld.moving.scene import COLORS, SHAPES, coverage

TIME = np.arange(FRAMES)


def passed_behind(scene):
    """A mover that goes behind the bar after the two have crossed and is seen for a while after that, and the frame in
    which the bar hides all of it; None where there is none."""
    ways = [mover.centers() for mover in scene.movers]
    open_air = (np.abs(np.stack(ways)[..., 0] - 32) > 9).all(axis=0)
    crossed = np.flatnonzero(open_air & (np.abs(ways[0] - ways[1]).max(axis=1) < 14))[-1]
    for i, mover in enumerate(scene.movers):
        from_middle = np.abs(ways[i][:, 0] - (BAR.start + BAR.stop) / 2)
        hidden = np.flatnonzero((from_middle < 9 - mover.radius) & (crossed < TIME))
        if len(hidden) and (from_middle[hidden[0] :] > 9 + mover.radius).sum() > 12:
            return i, int(hidden[0])
    return None


# Two of the scenes in which a mover is so.
SCENES = [random_scene(np.random.default_rng(seed)) for seed in (15, 26)]


class Drawing:
    """A scene, frame by frame, to be made wrong."""

    def __init__(self, scene):
        self.scene = scene
        self.ways = [mover.centers() for mover in scene.movers]
        self.radii = [np.full(FRAMES, mover.radius) for mover in scene.movers]
        self.shapes = [[mover.shape] * FRAMES for mover in scene.movers]
        self.paints = [np.tile(np.array(COLORS[mover.color], float), (FRAMES, 1)) for mover in scene.movers]
        self.shown = [np.ones(FRAMES), np.ones(FRAMES)]
        self.ground = np.repeat(textured(scene.ground, scene.texture)[None], FRAMES, axis=0)
        self.front = scene.front

    def cover(self, i):
        places = np.column_stack([self.ways[i], self.radii[i]]).astype(np.float32)
        shapes = np.stack([coverage(shape, places) for shape in SHAPES])
        return shapes[[SHAPES.index(shape) for shape in self.shapes[i]], TIME] * self.shown[i][:, None, None]

    def clip(self):
        return compose(self.ground, [(self.cover(i), self.paints[i]) for i in (1 - self.front, self.front)])


def another(names, *but):
    return next(name for name in names if name not in but)


def third_color(scene):
    return another(COLORS, *(mover.color for mover in scene.movers))


def fails(clip, scene):
    verdict = read_crossing(clip).verdict(scene)
    assert tuple(verdict) == COLUMNS
    return [name for name in COLUMNS if not verdict[name]]


@pytest.mark.parametrize("seed", range(3))
def test_a_true_clip_passes_also_as_a_vae_would_give_it_and_is_followed_to_a_fraction_of_a_pixel(seed):
    scene = random_scene(np.random.default_rng(seed))
    clip = render(scene)
    found = read_crossing(clip)
    assert all(found.verdict(scene).values())
    for sighting in found.sightings:
        mover = next(mover for mover in scene.movers if mover.color == sighting.color[0])
        off = np.abs(sighting.places[:, :2] - mover.centers())
        assert np.nanmax(off[sighting.whole]) < 0.1 and np.nanmean(off) < 0.1
    assert fails(blurred(clip, np.random.default_rng(seed)), scene) == []


@pytest.mark.parametrize("scene", SCENES, ids=["first", "second"])
def test_another_caption_fails_where_it_differs(scene):
    found = read_crossing(render(scene))

    def wrong(column, **change):
        mover = replace(scene.movers[0], **change)
        verdict = found.verdict(replace(scene, movers=(mover, scene.movers[1])))
        return [name for name in COLUMNS if not verdict[name]] == [column]

    first = scene.movers[0]
    assert wrong("color", color=third_color(scene))
    assert wrong("shape", shape=another(SHAPES, first.shape))
    assert wrong("track", speed="fast" if first.speed == "slowly" else "slowly")
    turned = {"up": "down", "down": "up"}
    if first.direction.split()[0] in turned:
        assert wrong("track", direction=" ".join(turned.get(word, word) for word in first.direction.split()))
    else:
        assert wrong("track", direction="up and " + first.direction)
    verdict = found.verdict(replace(scene, front=1 - scene.front))
    assert [name for name in COLUMNS if not verdict[name]] == ["order"]
    verdict = found.verdict(replace(scene, ground=another(GROUNDS, scene.ground)))
    assert [name for name in COLUMNS if not verdict[name]] == ["ground"]


@pytest.mark.parametrize("scene", SCENES, ids=["first", "second"])
class TestFaults:
    def test_another_shape_or_colour_comes_out_of_the_bar(self, scene):
        i, hidden = passed_behind(scene)
        drawing = Drawing(scene)
        drawing.shapes[i][hidden:] = [another(SHAPES, scene.movers[i].shape)] * (FRAMES - hidden)
        assert fails(drawing.clip(), scene) == ["identity"]
        drawing = Drawing(scene)
        drawing.paints[i][hidden:] = COLORS[third_color(scene)]
        assert fails(drawing.clip(), scene) == ["identity"]

    def test_it_comes_out_late_or_at_another_height(self, scene):
        i, hidden = passed_behind(scene)
        drawing = Drawing(scene)
        drawing.ways[i] = drawing.ways[i][np.where(hidden < TIME, np.maximum(TIME - 8, hidden), TIME)]
        assert fails(drawing.clip(), scene) == ["track"]
        drawing = Drawing(scene)
        y = drawing.ways[i][:, 1]
        y[hidden:] += 8 if y[hidden:].max() < SIZE - 15 else -8
        assert fails(drawing.clip(), scene) == ["track"]

    def test_one_is_too_slow(self, scene):
        i, _ = passed_behind(scene)
        drawing = Drawing(scene)
        drawing.ways[i] = drawing.ways[i][np.round(0.8 * TIME).astype(int)]
        assert fails(drawing.clip(), scene) == ["track"]

    def test_the_other_is_in_front(self, scene):
        drawing = Drawing(scene)
        drawing.front = 1 - scene.front
        assert fails(drawing.clip(), scene) == ["order"]

    def test_one_never_comes_out_or_is_gone_for_a_while_or_merges_into_the_other(self, scene):
        i, hidden = passed_behind(scene)
        drawing = Drawing(scene)
        drawing.shown[i][hidden:] = 0
        assert fails(drawing.clip(), scene) == ["both"]
        drawing = Drawing(scene)
        seen = np.abs(drawing.ways[i][:, 0] - 32) > 18
        out = hidden + np.flatnonzero(seen[hidden:])[2]
        drawing.shown[i][out : out + 6] = 0
        assert fails(drawing.clip(), scene) == ["both"]
        drawing = Drawing(scene)
        near = np.abs(drawing.ways[0] - drawing.ways[1]).max(axis=1)
        drawing.shown[1 - scene.front][np.flatnonzero(near < 8)[0] :] = 0
        assert "both" in fails(drawing.clip(), scene)

    def test_the_ground_turns_into_another(self, scene):
        _, hidden = passed_behind(scene)
        hidden = min(hidden, 70)
        for other in (
            textured(another(GROUNDS, scene.ground), scene.texture),
            textured(scene.ground, scene.texture + 1),
        ):
            drawing = Drawing(scene)
            drawing.ground[hidden:] = other
            assert fails(drawing.clip(), scene) == ["ground"]

    def test_one_shows_through_the_bar(self, scene):
        drawing = Drawing(scene)
        clip = drawing.clip()
        covered = drawing.cover(0)
        covered[:, :, : BAR.start] = covered[:, :, BAR.stop :] = 0
        at = np.nonzero(covered > 0.5)
        clip[at] = COLORS[scene.movers[0].color]
        assert fails(clip, scene) == ["bar"]

    def test_stains(self, scene):
        drawing = Drawing(scene)
        clip, beside = drawing.clip(), drawing.clip()
        # A triangle is too narrow to stay one with a hole in it.
        i = next(i for i, mover in enumerate(scene.movers) if mover.shape != "triangle")
        x, y = drawing.ways[i].astype(int).T
        for t in TIME:
            if abs(x[t] - 32) > 16:
                clip[t, y[t] : y[t] + 4, x[t] - 2 : x[t] + 2] = COLORS[third_color(scene)]
            spots = np.array([(u, v) for u in (10, 54) for v in (8, 32, 56)])
            free = np.min([np.abs(spots - way[t]).max(axis=1) for way in drawing.ways], axis=0).argmax()
            u, v = spots[free]
            beside[t, v : v + 5, u : u + 5] = COLORS[scene.movers[i].color]
        assert fails(beside, scene) == ["clean"]
        assert fails(clip, scene) == ["clean"]

    def test_unsteady_sizes_and_colours(self, scene):
        drawing = Drawing(scene)
        drawing.radii[1] = drawing.radii[1] * (1 + 0.12 * np.sin(TIME))
        assert fails(drawing.clip(), scene) == ["steady"]
        drawing = Drawing(scene)
        drawing.paints[1] *= np.where(TIME % 2, 0.8, 1.0)[:, None]
        assert fails(drawing.clip(), scene) == ["steady"]
        drawing = Drawing(scene)
        drawing.ground += np.where(TIME % 2, 8.0, 0.0)[:, None, None, None]
        assert fails(drawing.clip(), scene) == ["steady"]

    def test_flashes(self, scene):
        _, hidden = passed_behind(scene)
        black = Drawing(scene).clip()
        black[hidden : hidden + 4] = 0
        assert fails(black, scene) == ["steady"]
        bright = Drawing(scene)
        bright.ground[40:42] += 40.0
        assert fails(bright.clip(), scene) == ["steady"]


def test_a_wavy_outline():
    scene = SCENES[0]
    mover = scene.movers[1 - scene.front]
    assert mover.shape == "circle"
    drawing, (y, x) = Drawing(scene), np.mgrid[0:SIZE, 0:SIZE] + 0.5
    dx, dy = (axis - way[:, None, None] for axis, way in zip((x, y), drawing.ways[1 - scene.front].T, strict=True))
    radius = mover.radius + 2.2 * np.sin(8 * np.arctan2(dy, dx))
    wavy = np.clip(0.5 - (np.hypot(dx, dy) - radius), 0, 1)
    layers = [(wavy, drawing.paints[1 - scene.front]), (drawing.cover(scene.front), drawing.paints[scene.front])]
    assert fails(compose(drawing.ground, layers), scene) == ["outline"]


def test_the_command_tells_the_bounds(tmp_path):
    file = tmp_path / "bounds.json"
    assert main(["tinyworld", "crossing-bounds", "--clips", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["true clips"]["all_right"] == found["true clips, blurred"]["all_right"] == 1
    assert found["chance"]["all_right"] == 0


def test_the_bounds_of_the_clips_before_ctrl_c_are_kept(tmp_path, monkeypatch):
    judged = []

    def blur(clip, rng):
        if judged:
            raise KeyboardInterrupt
        judged.append(clip)
        return clip

    monkeypatch.setattr(crossing_bounds, "blurred", blur)
    file = tmp_path / "bounds.json"
    assert main(["tinyworld", "crossing-bounds", "--clips", "2", "--json", str(file)]) == 130 and not file.exists()
    found = json.loads((tmp_path / "bounds.json.part").read_text(encoding="utf-8"))
    assert found["complete"] is False and found["true clips"]["clips"] == found["chance"]["clips"] == 1
    assert found["true clips"]["all_right"] == 1 and found["chance"]["all_right"] == 0


def test_clips_without_shapes_do_not_make_the_others_clean_and_steady():
    scene = SCENES[0]
    drawing = Drawing(scene)
    clip = drawing.clip()
    clip[::2, :8, :8] = 255 - clip[::2, :8, :8]
    drawing.shown = [np.zeros(FRAMES), np.zeros(FRAMES)]
    alone, among = figures([clip], [scene]), figures([clip, drawing.clip()], [scene] * 2)
    names = ("stain", "swelling", "flicker")
    assert [among[name] for name in names] == [alone[name] for name in names] and alone["stain"] > 0
    assert (alone["seen"], among["seen"], among["distinct_captions"]) == (1, 0.5, 1)
    nothing = figures([drawing.clip()], [scene])
    assert {nothing[name] for name in (*names, "all_right_interval")} == {None}


def figures(clips, scenes):
    return crossing_figures([read_crossing(clip) for clip in clips], scenes)


def test_figures():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(2)]
    swapped = [scenes[0], replace(scenes[1], front=1 - scenes[1].front)]
    found = figures([render(scene) for scene in scenes], swapped)
    assert found["all_right"] == found["columns"]["order"] == 0.5 and found["clips"] == 2
    assert all(share == 1 for name, share in found["columns"].items() if name != "order")
    low, high = found["all_right_interval"]
    assert 0 <= low < 0.5 < high <= 1


def test_nothing_one_alone_and_a_wrong_shape_of_array():
    scene = SCENES[0]
    drawing = Drawing(scene)
    drawing.shown = [np.zeros(FRAMES), np.zeros(FRAMES)]
    here = ["ground", "bar"]
    assert [name for name in COLUMNS if name not in fails(drawing.clip(), scene)] == here
    drawing.shown[0] = np.ones(FRAMES)
    assert [name for name in COLUMNS if name not in fails(drawing.clip(), scene)] == here
    noise = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    assert not any(
        read_crossing(noise).verdict(scene)[name] for name in ("shape", "track", "outline", "order", "clean")
    )
    with pytest.raises(ValueError, match="expected .frames >= 5"):
        read_crossing(np.zeros((29, 32, 32, 3), np.uint8))
