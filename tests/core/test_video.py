"""Videos are written whole or not at all, and carry their metadata."""

import re

import numpy as np
import pytest

from efficient_vdit_core.media import read_video as reading
from efficient_vdit_core.media import video
from efficient_vdit_core.media.video import check_writable, read_metadata, write_video

imageio = pytest.importorskip("imageio.v3")
pytest.importorskip("imageio_ffmpeg")

METADATA = {
    "prompt": 'ein "roter" Kreis; = #1 \\ \n 红色 \U0001f534 it\'s',
    "seed": 2**63,
    "plan": {"k": 2},
    "steps": 20,
    "long": "x" * 5000,
    "nul": "a\0b",
}


@pytest.fixture
def frames():
    """A red square that moves right over a blue ground: 9 frames of 32x48."""
    out = np.zeros((9, 32, 48, 3), np.uint8)
    out[..., 2] = 200
    for i in range(9):
        out[i, 8:24, 2 + 3 * i : 18 + 3 * i] = (220, 20, 20)
    return out


@pytest.fixture(params=["imageio_ffmpeg", "av"])
def codec(request, monkeypatch):
    """With what mp4 is written: ComfyUI's Python has PyAV alone."""
    pytest.importorskip(request.param)
    if request.param == "av":
        monkeypatch.setattr(video, "has_ffmpeg", lambda: False)


def test_a_folder_that_looks_like_a_protocol(tmp_path, frames, monkeypatch, codec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    assert read_metadata(write_video("run:1/a.mp4", frames))["frames"] == 9


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_the_longest_prompts_of_other_letters_come_back(tmp_path, frames, suffix):
    prompt = "\U0001f534" * 8192  # as escapes of ASCII they would not fit
    assert read_metadata(write_video(tmp_path / f"a{suffix}", frames, metadata={"prompt": prompt + "x" * 2000}))[
        "prompt"
    ].startswith(prompt)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".MP4"])
def test_frames_and_metadata_come_back(tmp_path, frames, suffix, codec):
    path = write_video(tmp_path / f"clip{suffix}", frames, fps=8, metadata=METADATA)
    assert read_metadata(path) == {"fps": 8, "frames": 9, **METADATA}
    back = np.stack([f[..., :3] for f in imageio.imiter(path, extension=suffix.lower())])
    assert back.shape == frames.shape
    tolerance = {".webp": 0.01, ".gif": 6.0}.get(suffix, 12.0)  # mp4 loses colour resolution at edges
    assert np.abs(back.astype(float) - frames).mean() < tolerance
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("reader", ["imageio_ffmpeg", "av"])
@pytest.mark.parametrize("height", [48, 720])
def test_colours_are_those_that_players_show(tmp_path, monkeypatch, codec, reader, height):
    """Players follow the file's word; without one they take what is high for HD's colours."""
    pytest.importorskip(reader)
    monkeypatch.setattr(reading, "has_ffmpeg", lambda: reader == "imageio_ffmpeg")
    colours = np.array(
        [(220, 40, 40), (0, 200, 0), (20, 40, 230), (240, 210, 10), (128, 128, 128), (250, 250, 250)], np.uint8
    )
    width = height // 9 * 16
    frame = colours[np.arange(width) * 6 // width][None].repeat(height, axis=0)
    path = write_video(tmp_path / "a.mp4", frame[None])
    assert re.search(r"\(tv, bt709[,)]", reading.told_streams(path)), (
        "matrix, primaries and curve, or a browser guesses"
    )
    back = reading.read_video(path)[0, height // 2, width // 12 :: width // 6][:6]
    assert np.abs(back.astype(int) - colours).max() <= 4


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_one_frame_is_a_video_too(tmp_path, frames, suffix, codec):
    path = write_video(tmp_path / f"clip{suffix}", frames[:1], metadata={"a": 1})
    assert read_metadata(path) == {"fps": 24.0, "frames": 1, "a": 1}


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_rate_is_kept(tmp_path, frames, suffix, codec):
    path = write_video(tmp_path / f"clip{suffix}", frames, fps=10)
    meta = imageio.immeta(path)
    assert meta["fps"] == 10 if suffix == ".mp4" else meta["duration"] == 100


@pytest.mark.parametrize("writer", ["_write_mp4", "_write_animation"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, frames, monkeypatch, writer, error):
    def stop(path, *args):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(video, writer, stop)
    path = tmp_path / ("clip.mp4" if writer == "_write_mp4" else "clip.gif")
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_video(path, frames)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interrupt_between_two_frames_stops_ffmpeg_and_leaves_nothing(tmp_path, frames, monkeypatch):
    import imageio_ffmpeg

    write_frames = imageio_ffmpeg.write_frames

    class StopsAfterThree:
        def __init__(self, *args, **options):
            self.writer, self.sent, self.closed = write_frames(*args, **options), 0, False
            writers.append(self)

        def send(self, frame):
            self.sent += frame is not None
            if self.sent > 3:
                raise KeyboardInterrupt
            return self.writer.send(frame)

        def close(self):
            self.writer.close()
            self.closed = True

    writers: list[StopsAfterThree] = []
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", StopsAfterThree)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip.mp4", frames)
    assert writers[0].closed and not list(tmp_path.iterdir())


def test_a_failure_of_ffmpeg_is_no_video(tmp_path, frames, monkeypatch):
    monkeypatch.setattr(video, "MAX_FPS", 1e13)
    (tmp_path / "clip.mp4").write_bytes(b"old")
    with pytest.raises(OSError, match="could not finish|rate"):
        write_video(tmp_path / "clip.mp4", frames, fps=1e12)
    assert (tmp_path / "clip.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("fps", [0.01, 1000])
def test_the_slowest_and_the_fastest_rate_can_be_written(tmp_path, frames, suffix, fps, codec):
    assert read_metadata(write_video(tmp_path / f"clip{suffix}", frames, fps=fps, metadata={"a": 1})) == {
        "fps": fps,
        "frames": 9,
        "a": 1,
    }


def test_file_permissions_are_those_of_a_new_file(tmp_path, frames):
    (tmp_path / "plain").touch()
    path = write_video(tmp_path / "clip.gif", frames)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "name, words",
    [
        ("clip.avi", "must be one of .mp4, .gif, .webp"),
        ("clip", "must be one of"),
        ("no/such/clip.mp4", "does not exist"),
    ],
)
def test_bad_paths_are_refused_before_any_work(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        check_writable(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path / "clip.mp4")


def test_bad_frames_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.gif", frames.astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.gif", frames[:0])
    with pytest.raises(ValueError, match="even sizes"):
        write_video(tmp_path / "a.mp4", frames[:, :31])
    for fps in (0, -1, float("nan"), float("inf"), 1e-9, 1e12):
        with pytest.raises(ValueError, match="fps must lie in"):
            write_video(tmp_path / "a.gif", frames, fps=fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.mp4", b""),
        ("a.mp4", b"\0" * 64),
        ("a.gif", b"GIF89a"),
        ("a.webp", b"no"),
        ("b.mp4", None),
    ],
)
def test_files_without_metadata_say_so(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="holds no metadata"):
        read_metadata(tmp_path / name)


def test_a_missing_writer_is_named(tmp_path, monkeypatch):
    for module in ("imageio_ffmpeg", "av"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        ValueError, match=r"Write a \.gif or \.webp instead, or install it: \S*python\S* -m pip install av"
    ):
        check_writable(tmp_path / "a.mp4")


@pytest.mark.parametrize("comment", ["[" * 100_000, "x" * 2**21, "[1]", "{", '{"a": 1e999}', ""])
def test_comments_that_are_no_metadata_of_ours_are_refused(tmp_path, frames, comment):
    from PIL import Image

    Image.fromarray(frames[0]).save(tmp_path / "a.gif", comment=comment.encode())
    with pytest.raises(ValueError, match="a.gif' holds no metadata") as error:
        read_metadata(tmp_path / "a.gif")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_exif_that_is_damaged_is_no_metadata(tmp_path, frames, exif):
    from PIL import Image

    Image.fromarray(frames[0]).save(tmp_path / "a.webp", exif=exif)
    with pytest.raises(ValueError, match="holds no metadata"):
        read_metadata(tmp_path / "a.webp")


def test_an_mp4_of_a_million_empty_atoms_is_no_walk_without_end(tmp_path):
    (tmp_path / "a.mp4").write_bytes((8).to_bytes(4, "big") + b"free" + (b"\0\0\0\x08free" * 200_000))
    with pytest.raises(ValueError, match="holds no metadata"):
        read_metadata(tmp_path / "a.mp4")


@pytest.mark.parametrize(("suffix", "width"), [(".webp", 16384), (".gif", 65536), (".mp4", 16386)])
def test_frames_larger_than_the_format_holds_are_refused(tmp_path, suffix, width):
    with pytest.raises(ValueError, match=f"holds frames of up to .* pixels on a side, got {width}x16"):
        write_video(tmp_path / f"a{suffix}", np.zeros((1, 16, width, 3), np.uint8))
    assert not list(tmp_path.iterdir())
