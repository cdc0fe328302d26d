"""Clips come back whole, or are refused by name."""

import numpy as np
import pytest

from efficient_vdit_core import read_video as reading
from efficient_vdit_core import video as writing
from efficient_vdit_core.read_video import read_video
from efficient_vdit_core.video import write_video

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
