"""Clips come back whole, or are refused by name."""

import numpy as np
import pytest
from PIL import Image
from recorded import record

from efficient_vdit_core.media import read_video as reading
from efficient_vdit_core.media import video as writing
from efficient_vdit_core.media.read_video import check_steady, iterate_video, read_video, told_rates
from efficient_vdit_core.media.video import write_video

pytest.importorskip("imageio_ffmpeg")


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
    with pytest.raises(ValueError, match="cannot be read as a video"):
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
    with reading.ffmpeg(arguments, None, None) as process:
        assert process.wait() == 0
    assert np.abs(read_video(turned)[0] - np.rot90(read_video(path)[0], angle // 90).astype(float)).mean() < 4


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
    with reading.ffmpeg(["-v", "error", "-i", str(source), str(path)], None, None) as process:
        assert process.wait() == 0
    check_steady(path)
    assert len(read_video(path)) == 4 * len(frames)
    assert told_rates("Video: h264, yuv420p, 64x48, 25 fps, 50 tbr, 12800 tbn") == (25, 25)
    assert told_rates("Video: vp8, yuv420p, 64x48, 1k tbr, 1k tbn") == (0, 1000)


def test_a_clip_that_was_cut_without_coding_it_anew_is_whole(tmp_path, frames):
    path, cut = write_video(tmp_path / "a.mp4", np.concatenate([frames] * 3), fps=13), tmp_path / "b.mp4"
    arguments = ["-v", "error", "-ss", "1.5", "-i", str(path), "-c", "copy", str(cut)]
    with reading.ffmpeg(arguments, None, None) as process:
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
