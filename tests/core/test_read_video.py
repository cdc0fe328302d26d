"""Clips come back whole, or are refused by name."""

import logging
import time
from itertools import islice, product
from threading import Thread

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from recorded import record

from efficient_vdit_core.media import pyav_video
from efficient_vdit_core.media import read_video as reading
from efficient_vdit_core.media import video as writing
from efficient_vdit_core.media.ffmpeg import start_ffmpeg, told_rates, told_streams
from efficient_vdit_core.media.read_sound import read_sound
from efficient_vdit_core.media.read_video import check_steady, iterate_video, read_video
from efficient_vdit_core.media.video import write_video

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


@pytest.fixture(autouse=True, params=["imageio_ffmpeg", "av"])
def codec(request, monkeypatch):
    """With what mp4 is written and read: ComfyUI's Python has PyAV alone."""
    pytest.importorskip(request.param)
    if request.param == "av":
        for module in (reading, writing):
            monkeypatch.setattr(module, "has_ffmpeg", lambda: False)


@pytest.fixture(scope="module")
def frames():
    """13 frames of 34x50 that differ: a light square moves over noise that no encoder makes small."""
    out = np.random.default_rng(0).integers(0, 120, (13, 34, 50, 3), np.uint8)
    for i in range(13):
        out[i, 8:20, 2 + 3 * i : 12 + 3 * i] = (220, 200, 180)
    return out


def changed(source, target, *arguments, first=()):
    """``target``, made by ffmpeg of ``source``."""
    with start_ffmpeg(["-v", "error", *first, "-i", str(source), *arguments, str(target)], None, None) as process:
        assert process.wait() == 0
    return target


@pytest.mark.parametrize("fps", [24, 23.976, 0.5])
def test_mp4_keeps_every_frame_at_every_rate(tmp_path, frames, fps):
    back = read_video(write_video(tmp_path / "a.mp4", frames, fps=fps))
    assert back.shape == frames.shape and back.dtype == np.uint8
    errors = np.abs(back[:, None].astype(float) - frames[None]).mean((2, 3, 4))
    assert (errors.argmin(1) == np.arange(13)).all(), "in order, none doubled or dropped"


def test_webp_is_exact_and_odd_sizes_are_read(tmp_path, frames):
    odd = frames[:, :33, :49]
    assert np.array_equal(read_video(write_video(tmp_path / "a.webp", odd)), odd)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_that_the_file_joins_come_back_apart(tmp_path, frames, suffix):
    still = frames[[0, 1, 1, 1, 2]]
    back = read_video(write_video(tmp_path / f"a{suffix}", still))
    assert len(back) == 5
    assert (
        np.array_equal(back[1], back[3])
        and not np.array_equal(back[0], back[1])
        and not np.array_equal(back[3], back[4])
    )


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_a_file_cut_short_is_refused_and_not_read_as_a_shorter_clip(tmp_path, frames, suffix, share):
    path = write_video(tmp_path / f"a{suffix}", frames)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=f"a{suffix}' .* damaged"):
        read_video(path)


@pytest.fixture(scope="module")
def webm(tmp_path_factory, frames):
    """Of 39 frames at 13 a second, a cluster each half second; Matroska does not count them."""
    source = tmp_path_factory.mktemp("webm") / "a.webm"
    pixels = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "50x34", "-r", "13"]
    (raw := source.with_name("a.raw")).write_bytes(np.concatenate([frames] * 3).tobytes())
    return changed(raw, source, "-c:v", "libvpx", "-b:v", "500k", "-cluster_time_limit", "500", first=pixels)


def test_a_matroska_cut_short_is_refused_too(tmp_path, webm):
    whole, path = webm.read_bytes(), tmp_path / "cut.webm"
    clusters = [at for at in range(len(whole)) if whole.startswith(b"\x1f\x43\xb6\x75", at)]
    assert len(read_video(webm)) == 39 and len(clusters) > 3
    for end in (clusters[2], clusters[3] + 200, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="ended prematurely.* damaged"):
            read_video(path)


def test_a_hole_in_a_matroska_is_not_filled_by_repeats(tmp_path, webm):
    """Each time that it is read, by threads at once and while another clip's frames come in turn."""
    data, path = bytearray(webm.read_bytes()), tmp_path / "hole.webm"
    data[len(data) // 2 : len(data) * 6 // 10] = bytes(len(data) * 6 // 10 - len(data) // 2)
    path.write_bytes(data)
    told, other = [], iterate_video(webm)

    def refused(beside=()):
        beside = iter(beside)
        try:
            for _ in iterate_video(path):
                next(beside, None)
        except ValueError as error:
            told.append(str(error))
        assert len(read_video(webm)) == 39

    for beside in ((), (), islice(other, 20)):
        refused(beside)
    for thread in (threads := [Thread(target=refused) for _ in range(4)]):
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 7 and all("damaged" in text for text in told)
    assert 19 <= len(list(other)) < 39


def test_pyavs_log_is_left_as_it_was(tmp_path, webm, caplog):
    av = pytest.importorskip("av")
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    (tmp_path / "cut.webm").write_bytes(webm.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="damaged"):
        read_video(tmp_path / "cut.webm")
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before and not caplog.records


@pytest.mark.parametrize(
    "comment",
    [
        "Video: a cat, 99999x99999 pixels",
        "Video: a scene, 25 tbr",
        "Audio: waves crash",
        "a\n  Stream #0:0: Video: h264, yuv420p, 99999x9999 [SAR 9:1 DAR 9:1], 25 fps, 50 tbr\n  Stream #0:1: Audio: aac\n"
        "  Stream #0:2: Video: hevc, yuv420p10le(tv, bt2020nc/bt2020/smpte2084)\nframe=99999",
    ],
)
def test_a_prompt_that_speaks_of_streams_is_none(tmp_path, frames, comment, caplog):
    path = changed(
        write_video(tmp_path / "a.mp4", frames, fps=13),
        tmp_path / "b.mp4",
        "-c",
        "copy",
        "-metadata",
        f"comment={comment}",
    )
    assert read_video(path).shape == frames.shape and not caplog.records
    check_steady(path)
    assert read_sound(path, 1.0, 16000, 13) is None


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.mkv"])
@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 40])
def test_a_file_that_is_no_video_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="another kind"):
        read_video(tmp_path / name)


def test_a_file_without_pictures_is_refused(tmp_path):
    """A second of silence, as a WAV file under another name."""
    header = b"RIFF" + (36 + 8000).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little") + b"\1\0\1\0"
    header += (8000).to_bytes(4, "little") * 2 + b"\1\0\x08\0" + b"data" + (8000).to_bytes(4, "little")
    (tmp_path / "a.mp4").write_bytes(header + b"\x80" * 8000)
    with pytest.raises(ValueError, match=r"cannot be read as a video \(it has no pictures\)"):
        read_video(tmp_path / "a.mp4")


def test_a_missing_file_and_a_missing_reader_are_named(tmp_path, monkeypatch, frames):
    with pytest.raises(ValueError, match="no file"):
        read_video(tmp_path / "a.mp4")
    path = write_video(tmp_path / "a.mp4", frames)
    for module in ("imageio_ffmpeg", "av"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match="-m pip install (av|imageio-ffmpeg)$"):
        read_video(path)


def test_names_that_ffmpeg_would_take_for_something_else(tmp_path, frames, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_video(tmp_path / "a.mp4", frames)
    path.rename(tmp_path / "-i 50%d:x.mp4")
    assert len(read_video("-i 50%d:x.mp4")) == 13


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_what_a_phone_filmed_stands_upright(tmp_path, frames, angle):
    path, turned = write_video(tmp_path / "a.mp4", frames[:1]), tmp_path / "b.mp4"
    arguments = ["-v", "error", "-display_rotation", str(angle), "-i", str(path), "-c", "copy", str(turned)]
    with start_ffmpeg(arguments, None, None) as process:
        assert process.wait() == 0
    assert np.abs(read_video(turned)[0] - np.rot90(read_video(path)[0], angle // 90).astype(float)).mean() < 4


def test_what_is_mirrored_stands_as_players_show_it(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", frames[:1])
    plain, shown = read_video(path)[0].astype(float), []
    for angle, mirrors in product((0, 90, 180, 270), ((), ("-display_hflip",), ("-display_vflip",))):
        turned = changed(
            path, tmp_path / "b.mp4", "-y", "-c", "copy", first=["-display_rotation", str(angle), *mirrors]
        )
        (picture,) = read_video(turned)
        stood = [np.rot90(way, angle // 90) for way in (plain, plain[:, ::-1], plain[::-1])]
        ways = (
            stood[:1] if not mirrors else stood[1:]
        )  # of the two mirrors, ffmpeg's option mirrors before the turn or after
        assert min(np.abs(picture - way).mean() for way in ways if way.shape == picture.shape) < 4
        shown.append(picture)
    assert np.abs(shown[1] - plain[:, ::-1]).mean() < 4 and np.abs(shown[2] - plain[::-1]).mean() < 4


def test_a_photos_own_orientation_is_followed(tmp_path, frames):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    Image.fromarray(frames[0]).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(frames[0]).save(tmp_path / "b.jpg")
    assert np.array_equal(read_video(tmp_path / "a.jpg")[0], np.rot90(read_video(tmp_path / "b.jpg")[0], -1))


def test_a_slanted_picture_is_turned_or_refused(tmp_path, frames, codec):
    path = write_video(tmp_path / "a.mp4", frames[:1])
    turned = changed(path, tmp_path / "b.mp4", "-c", "copy", first=["-display_rotation", "30"])
    if reading.has_ffmpeg():
        assert read_video(turned).shape == read_video(path).shape
    else:
        with pytest.raises(ValueError, match="turned by an angle that is no right one"):
            read_video(turned)


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (34, 100)), ("3/4", (45, 50)), ("1280/1281", (34, 50))])
def test_pixels_become_square(tmp_path, frames, monkeypatch, aspect, size):
    told = ["-c", "copy", "-bsf:v", f"h264_metadata=sample_aspect_ratio={aspect}"]
    plain = write_video(tmp_path / "a.mp4", frames[:3])
    path = changed(plain, tmp_path / "b.mp4", *told)
    back = read_video(path)
    assert back.shape == (3, *size, 3)
    wide = np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1])) for frame in read_video(plain)])
    assert np.abs(back - wide.astype(float)).mean() < 6
    assert next(iterate_video(path, 48)).shape == back.shape[1:]
    upright = changed(path, tmp_path / "c.mp4", "-c", "copy", first=["-display_rotation", "90"])
    assert read_video(upright).shape == (3, *size[::-1], 3)
    monkeypatch.setattr(reading, "MAX_PIXELS", size[0] * size[1] - 1)
    monkeypatch.setattr(reading, "_ppm_pictures", lambda stream: pytest.fail("a picture was decoded"))
    with pytest.raises(ValueError, match=f"its frames are {size[1]}x{size[0]}"):
        read_video(path)


def test_the_containers_word_on_pixels_stands_above_the_codecs(tmp_path, frames):
    path = changed(write_video(tmp_path / "a.mp4", frames[:3]), tmp_path / "b.mp4", "-vf", "setsar=2")
    assert read_video(changed(path, tmp_path / "c.mkv", "-c", "copy", "-aspect", "50:17")).shape == (3, 34, 100, 3)
    assert read_video(changed(path, tmp_path / "d.mkv", "-c", "copy", "-aspect", "75:17")).shape == (3, 34, 150, 3)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67", "bt709"])
def test_hdr_is_named_once(tmp_path, frames, caplog, transfer):
    hdr = ["-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", transfer]
    tagged = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    path = changed(write_video(tmp_path / "a.mp4", frames), tmp_path / "b.mp4", "-vf", tagged, *hdr)
    for _ in range(2):
        assert len(read_video(path)) == len(frames)
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(found) == (transfer != "bt709") and all("b.mp4' is HDR footage" in t and transfer in t for t in found)


def test_what_tells_no_colours_is_read_as_ever(tmp_path, frames):
    """As BT.601, whatever its size: what this program wrote before it told them."""
    flat = np.full((1, 720, 64, 3), (220, 40, 40), np.uint8)
    (tmp_path / "a.raw").write_bytes(flat.tobytes())
    pixels = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x720", "-r", "24"]
    untagged = changed(tmp_path / "a.raw", tmp_path / "a.mp4", "-pix_fmt", "yuv420p", first=pixels)
    assert "bt709" not in told_streams(untagged)
    assert np.abs(read_video(untagged).astype(int) - flat).max() <= 4


@pytest.mark.parametrize(("suffix", "own"), [(".mp4", 24), (".gif", 20), (".webp", 20)])
def test_frames_are_brought_to_a_rate_by_their_times(tmp_path, frames, suffix, own):
    path = write_video(tmp_path / f"a{suffix}", frames[:12], fps=own)
    every = read_video(path)
    half, twice, same = (np.stack(list(iterate_video(path, fps))) for fps in (own / 2, 2 * own, own))
    assert np.array_equal(half, every[::2]) and np.array_equal(same, every)
    assert np.array_equal(twice[:22], every.repeat(2, axis=0)[:22])  # how long the last one lasts, mp4 tells roughly


def test_a_recording_without_a_rate_is_known_and_read_by_its_times(tmp_path, frames):
    path = record(tmp_path / "a.webm", rate=30)
    with pytest.raises(ValueError, match=r"rate is not told, or varies\. Set data\.fps"):
        check_steady(path)
    assert 15 <= sum(1 for _ in iterate_video(path, 16)) <= 17
    for name in ("b.mp4", "b.gif"):
        check_steady(write_video(tmp_path / name, frames))


def test_a_rate_that_counts_fields_is_constant(tmp_path, frames):
    """MPEG's 24 frames a second are 48 of the container's, and each comes once."""
    source, path = write_video(tmp_path / "a.mp4", np.concatenate([frames] * 4), fps=24), tmp_path / "b.mpg"
    with start_ffmpeg(["-v", "error", "-i", str(source), str(path)], None, None) as process:
        assert process.wait() == 0
    check_steady(path)
    assert len(read_video(path)) == 4 * len(frames)
    assert told_rates("Video: h264, yuv420p, 64x48, 25 fps, 50 tbr, 12800 tbn") == (25, 25)
    assert told_rates("Video: vp8, yuv420p, 64x48, 1k tbr, 1k tbn") == (0, 1000)


def nearest(found, frames):
    """Of which of the frames each found one is the picture."""
    return [int(np.abs(frames.astype(int) - frame).mean((1, 2, 3)).argmin()) for frame in found]


def test_an_avi_comes_in_the_order_that_it_is_shown_in(tmp_path, frames):
    """It knows no times, and pictures that others build on are stored before them."""
    source = write_video(tmp_path / "a.mp4", frames, fps=16)
    path = changed(source, tmp_path / "b.avi", "-c:v", "libx264", "-bf", "3", "-x264-params", "b-adapt=0")
    assert nearest(read_video(path), frames) == [*range(13)]
    assert nearest(iterate_video(path, 8), frames) == [*range(0, 13, 2)]


def test_empty_places_of_an_avi_show_the_picture_before_them(tmp_path, frames):
    source = write_video(tmp_path / "a.mp4", frames, fps=16)
    every_fourth_out = ["-vf", "select='not(eq(mod(n,4),2))'", "-fps_mode", "passthrough", "-c:v", "mpeg4", "-q:v", "1"]
    path = changed(source, tmp_path / "b.avi", *every_fourth_out)
    assert nearest(iterate_video(path, 16), frames) == [0, 1, 1, 3, 4, 5, 5, 7, 8, 9, 9, 11, 12]
    assert len(read_video(path)) == 13


def test_pyav_refuses_an_avi_that_lacks_its_end(tmp_path, frames):
    """Between two pictures, each of which is whole: ffmpeg itself takes it for a shorter one."""
    whole = changed(write_video(tmp_path / "a.mp4", frames), tmp_path / "b.avi", "-c:v", "mjpeg")
    data, cut = whole.read_bytes(), tmp_path / "c.avi"
    cut.write_bytes(data[: data.rindex(b"00dc", 0, data.index(b"idx1"))])
    assert len(list(pyav_video.read_frames(whole, lambda *_: None))) == 13
    with pytest.raises(ValueError, match="its pictures end at the place 12 of 13"):
        list(pyav_video.read_frames(cut, lambda *_: None))


def test_a_picture_that_begins_late_is_shown_from_the_begin_on(tmp_path, frames):
    """As where the sound begins before it."""
    source = write_video(tmp_path / "a.mp4", frames, fps=16)
    silence = ["-f", "lavfi", "-t", "1", "-i", "anullsrc", "-itsoffset", "0.5"]
    late = changed(source, tmp_path / "b.mp4", "-map", "1:v", "-map", "0:a", "-c:v", "copy", first=silence)
    assert nearest(read_video(late), frames) == [*[0] * 8, *range(13)]
    assert nearest(iterate_video(late, 8), frames)[:6] == [0, 0, 0, 0, 0, 2]


def test_a_stream_without_times_is_read_by_its_own_frames_alone(tmp_path, frames):
    source = write_video(tmp_path / "a.mp4", frames, fps=16)
    changed(source, tmp_path / "b.h264", "-c", "copy")
    path = (tmp_path / "b.h264").rename(tmp_path / "b.mkv")
    assert nearest(read_video(path), frames) == [*range(13)]
    if not reading.has_ffmpeg():
        with pytest.raises(ValueError, match="does not tell when its frames are shown"):
            next(iterate_video(path, 8))


def test_a_clip_that_was_cut_without_coding_it_anew_is_whole(tmp_path, frames):
    path, cut = write_video(tmp_path / "a.mp4", np.concatenate([frames] * 3), fps=13), tmp_path / "b.mp4"
    arguments = ["-v", "error", "-ss", "1.5", "-i", str(path), "-c", "copy", str(cut)]
    with start_ffmpeg(arguments, None, None) as process:
        assert process.wait() == 0
    assert 18 <= len(read_video(cut)) <= 20
    cut.write_bytes(cut.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        read_video(cut)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [24, 8, 30])
def test_equal_frames_are_not_lost(tmp_path, frames, suffix, fps):
    still = np.repeat(frames[:1], 29, axis=0)
    assert len(read_video(write_video(tmp_path / f"a{suffix}", still, fps=fps))) == 29


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_frame_of_no_time_makes_its_neighbours_no_longer(tmp_path, frames, suffix):
    first, *rest = map(Image.fromarray, frames[:4])
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=rest, duration=[100, 0, 100, 200])
    assert len(read_video(tmp_path / f"a{suffix}")) == 5


def test_a_frame_of_hours_is_not_repeated_into_gigabytes(tmp_path, frames):
    images = [Image.fromarray(frame) for frame in frames[:2]]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[1, 2**24 - 1])
    with pytest.raises(
        ValueError, match="a.webp' cannot be read: it has 16,777,216 frames at its constant rate, at most 10,000"
    ):
        read_video(tmp_path / "a.webp")


@pytest.mark.parametrize("side", [6000, 15000])
def test_a_screen_of_gigabytes_is_refused_before_it_is_painted(tmp_path, side):
    size = side.to_bytes(2, "little")
    picture = b"\x2c" + bytes(8) + b"\0\2\2\x4c\1\0\x3b"
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + size + size + b"\x80\0\0" + bytes(6) + picture)
    with pytest.raises(ValueError, match="cannot be read: its frames .*Cut it, or make it smaller"):
        read_video(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("bound", "value", "said"),
    [("MAX_CLIP", 5000, "13 frames of 50x34"), ("MAX_FRAMES", 12, "13 frames"), ("MAX_PIXELS", 1000, "50x34")],
)
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_sizes_are_read_before_pixels(tmp_path, frames, monkeypatch, suffix, bound, value, said):
    path = write_video(tmp_path / f"a{suffix}", frames)
    monkeypatch.setattr(reading, bound, value)
    monkeypatch.setattr(reading, "_ppm_pictures", lambda stream: pytest.fail("a picture was decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("a picture was decoded"))
    with pytest.raises(ValueError, match=f"{said}.*Cut it, or make it smaller"):
        read_video(path)


def test_ffmpeg_itself_decodes_nothing_larger(tmp_path, frames, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames)
    monkeypatch.setattr(reading, "MAX_PIXELS", 1000)
    monkeypatch.setattr(reading, "_probed", lambda source: (0, 0, 0))
    with pytest.raises(ValueError, match="cannot be read"):
        read_video(path)


def test_frames_come_one_by_one(tmp_path, frames):
    first = next(iterate_video(write_video(tmp_path / "a.mp4", frames)))
    assert first.shape == frames.shape[1:]  # ffmpeg is ended with the iterator


def test_all_frames_at_once_must_fit(tmp_path, frames, monkeypatch):
    path = write_video(tmp_path / "a.webp", np.concatenate([frames, frames]))
    monkeypatch.setattr("efficient_vdit_core.limits.memory.free_bytes", lambda device="cpu": 1000)
    with pytest.raises(ValueError, match="a.webp' with its frames so far takes about .* 1000 bytes are free"):
        read_video(path)


@pytest.mark.parametrize(("bound", "value"), [("MAX_CLIP", 34 * 50 * 6), ("MAX_FRAMES", 6)])
@pytest.mark.parametrize("fps", [0, 16])
def test_the_first_frames_of_a_clip_of_any_length_are_read(tmp_path, frames, monkeypatch, bound, value, fps):
    path = write_video(tmp_path / "a.mp4", frames, fps=8)
    whole = np.stack(list(iterate_video(path, fps)))
    monkeypatch.setattr(reading, bound, value)
    with pytest.raises(ValueError, match="13 frames"):
        read_video(path)
    assert np.array_equal(np.stack(list(iterate_video(path, fps, 5))), whole[:5])
    with pytest.raises(ValueError, match="cannot be read: it has .*frames"):
        list(iterate_video(path, fps, 7))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_frame_of_hours_is_repeated_as_often_as_it_is_wanted(tmp_path, frames, suffix):
    images = [Image.fromarray(frame) for frame in frames[:2]]
    images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:], duration=[10, 600_000])
    assert sum(1 for _ in iterate_video(tmp_path / f"a{suffix}", 24, 7)) == 7
    with pytest.raises(ValueError, match="at most 10,000"):
        list(iterate_video(tmp_path / f"a{suffix}", 24))


def test_a_clip_with_fewer_frames_than_are_wanted_gives_what_it_has(tmp_path, frames):
    assert sum(1 for _ in iterate_video(write_video(tmp_path / "a.mp4", frames), 0, 40)) == 13


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_no_program_is_started_by_what_a_picture_holds(tmp_path, monkeypatch, suffix):
    """PostScript under another name went to Ghostscript, where that is installed."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *about, **more: started.append(about))
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    path = tmp_path / f"a{suffix}"
    path.write_text(head + "{} loop\n%%EOF\n")
    with pytest.raises(ValueError, match=f"a{suffix}' cannot be read as a video"):
        read_video(path)
    with pytest.raises(ValueError):
        writing.read_metadata(path)
    assert started == []


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile a.mp4\nfile a.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_list_of_other_files_is_no_clip(tmp_path, frames, playlist):
    """One that names others three deep, each three hundred times, is millions of clips in three small files."""
    write_video(tmp_path / "a.mp4", frames)
    path = tmp_path / "b.mp4"
    path.write_text(playlist)
    with pytest.raises(ValueError, match="b.mp4' cannot be read as a video"):
        read_video(path)
    with pytest.raises((ValueError, OSError)):
        check_steady(path)


@pytest.mark.parametrize("ending", ["m4v", "mov", "mpeg", "ts", "mts", "m2ts", "wmv", "flv", "ogv", "3gp"])
def test_every_kind_that_the_help_names_is_read(tmp_path, frames, ending):
    """Beside those of the other tests."""
    codec = {"wmv": ["-c:v", "msmpeg4"], "ogv": ["-c:v", "libtheora"], "mpeg": ["-c:v", "mpeg2video"]}.get(ending, [])
    shape = ["-vf", "scale=176:144", "-r", "25"]  # that of 3gp's own codec
    path = changed(write_video(tmp_path / "a.mp4", frames, fps=25), tmp_path / f"b.{ending}", *shape, *codec)
    assert 12 <= len(read_video(path)) <= 14


def test_frames_without_end_are_not_counted(tmp_path, frames, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames)
    if not reading.has_ffmpeg():
        pytest.skip("PyAV is told their number by the container")
    monkeypatch.setattr(reading, "MAX_FRAMES", 3)
    monkeypatch.setattr(reading, "_MOST_COUNTED", 5, raising=False)
    with pytest.raises(ValueError, match="it has 5 frames at its constant rate, at most 3 are read"):
        read_video(path)


@pytest.mark.parametrize("hangs", ["at once", "behind its words"])
def test_a_process_that_does_nothing_is_ended(tmp_path, frames, monkeypatch, hangs):
    """As on a share that is gone."""
    path, program = write_video(tmp_path / "a.mp4", frames), tmp_path / "program"
    if not reading.has_ffmpeg():
        pytest.skip("PyAV reads in this process")
    words = "Stream #0:0: Video: h264, yuv420p, 50x34, 24 fps, 24 tbr"
    counts = 'case "$*" in *copy*) echo "$WORDS" >&2; exit 0;; esac' if hangs == "behind its words" else ""
    program.write_text(f'#!/bin/sh\nWORDS="{words}"\n{counts}\nexec sleep 10\n')
    program.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    monkeypatch.setattr("efficient_vdit_core.media.ffmpeg.PATIENCE", 1)
    with pytest.raises(ValueError, match="ffmpeg did nothing for 1 seconds"):
        read_video(path)


def test_a_reader_that_takes_its_time_is_waited_for(tmp_path, frames, monkeypatch):
    monkeypatch.setattr("efficient_vdit_core.media.ffmpeg.PATIENCE", 1)
    found = iterate_video(write_video(tmp_path / "a.mp4", frames))
    next(found)
    time.sleep(2.5)
    assert len(list(found)) == len(frames) - 1


@pytest.mark.parametrize(
    "suffix", [".mxf", ".nut", ".ivf", ".mjpeg", ".dv", ".rm", ".vob", ".m2ts", ".ogv", ".3gp", ".y4m"]
)
def test_seldom_formats_are_read_too(tmp_path, frames, suffix):
    """What FFmpeg is asked to read is listed: all that holds one video by itself."""
    kinds = {
        ".mxf": ["mpeg2video"],
        ".ivf": ["libvpx"],
        ".rm": ["rv20"],
        ".y4m": ["wrapped_avframe", "-pix_fmt", "yuv420p"],
    }
    sizes = {".dv": ["-s", "720x576", "-pix_fmt", "yuv420p"], ".3gp": ["-s", "176x144"], ".rm": ["-s", "128x96"]}
    codec = ["-c:v", *kinds[suffix]] if suffix in kinds else []
    plain = write_video(tmp_path / "a.mp4", frames[:6], fps=25)
    path = changed(plain, tmp_path / f"b{suffix}", "-y", *codec, *sizes.get(suffix, []))
    assert len(read_video(path)) == 6
