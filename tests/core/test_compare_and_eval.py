"""evdit compare and evdit eval, as their users meet them."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from efficient_vdit_core.cli import main
from efficient_vdit_core.media.read_video import read_video
from efficient_vdit_core.media.video import read_metadata, write_video
from efficient_vdit_core.quality.vbench import DIMENSIONS, clip_names

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def clip(tmp_path):
    """clip(name, level, ...): a lossless clip of one grey level, 5 frames of 32x48 that a line crosses."""

    def make(name: str, level: int = 100, length: int = 5, size: tuple[int, int] = (32, 48), **metadata) -> Path:
        frames = np.full((length, *size, 3), level, np.uint8)
        for i in range(length):
            frames[i, :, i] = level // 2
        return write_video(tmp_path / name, frames, fps=8, metadata=metadata)

    return make


def test_a_build_without_the_video_reader_says_what_to_do(monkeypatch, capsys):
    """The registry's archive, which starts no process."""
    monkeypatch.setitem(sys.modules, "efficient_vdit_core.media.read_video", None)
    assert main(["compare", "a.webp", "b.webp"]) != 0
    assert "Compare Videos" in capsys.readouterr().err


def test_such_a_build_lays_out_no_clips_either(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "efficient_vdit_core.media.read_video", None)
    monkeypatch.delitem(sys.modules, "efficient_vdit_core.quality.vbench", raising=False)
    assert main(["eval", "vbench-layout", "a.mp4", "--out", str(tmp_path / "vbench")]) == 2
    assert "The registry's build of the pack reads no videos. Use a clone." in capsys.readouterr().err


def test_a_star_means_files_where_the_shell_passes_it_on(tmp_path, clip, capsys):
    """As Windows' shells do."""
    for name in ("b.gif", "a.gif", "[c].gif"):
        clip(name, prompt="a cat")
    out = tmp_path / "vbench"
    assert main(["eval", "vbench-layout", str(tmp_path / "?.gif"), str(tmp_path / "[c].gif"), "--out", str(out)]) == 0
    sources = [Path(clip["source"]).name for clip in json.loads((out / "clips.json").read_text()).values()]
    assert sources == ["a.gif", "b.gif", "[c].gif"]
    assert main(["eval", "vbench-layout", str(tmp_path / "*.mp4"), "--out", str(tmp_path / "none")]) == 2


def test_compare_prints_and_writes_json_and_a_picture(tmp_path, clip, capsys):
    a, b = clip("dense.webp", 100), clip("sparse.webp", 120)
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    assert main(["compare", str(a), str(b), "--json", str(numbers), "--picture", str(picture), "--no-lpips"]) == 0
    values = json.loads(numbers.read_text())
    error = (47 * 20**2 + 10**2) / 48 / 255**2
    assert values["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert (values["frames"], values["height"], values["width"], values["identical"]) == (5, 32, 48, False)
    assert len(values["psnr_frames"]) == len(values["ssim_frames"]) == 5 and values["lpips"] is None
    assert f"{values['psnr']:.2f} dB" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.width >= 900
    assert not list(tmp_path.glob("*.tmp"))


def test_a_clip_is_identical_with_itself(clip, tmp_path, capsys):
    a = str(clip("a.webp"))
    assert main(["compare", a, a, "--json", str(tmp_path / "x.json")]) == 0
    assert "identical" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["identical"] is True


def test_compare_warns_of_another_seed(clip, caplog):
    assert main(["compare", str(clip("a.webp", seed=1)), str(clip("b.webp", seed=2))]) == 0
    assert "seed 1 and 2" in caplog.text
    caplog.clear()
    assert main(["compare", str(clip("a.webp", seed=1)), str(clip("b.webp", seed=1))]) == 0
    assert not caplog.text


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, clip, capsys):
    a, long, large = str(clip("a.webp")), str(clip("long.webp", length=6)), str(clip("large.webp", size=(48, 48)))
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    cases = [
        ([a, long], "5 frames and the second 6"),
        ([a, large], "48x32 pixels and the second 48x48"),
        ([a, str(tmp_path / "broken.mp4")], "cannot be read as a video"),
        ([a, str(tmp_path / "none.mp4")], "no file"),
        ([a, a, "--json", str(tmp_path / "x.txt")], "ends in .json"),
        ([a, a, "--picture", str(tmp_path / "no" / "x.png")], "does not exist"),
    ]
    for arguments, words in cases:
        assert main(["compare", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def as_vbench_reads(videos: Path, prompt_file: Path | None) -> dict[str, str]:
    """Path to prompt by the rules of VBench's mode custom_input, written apart from the engine.

    Every .mp4 and .gif right in the folder; its name less a final -<number>, or the prompt file's text under the name.
    """
    found = {p.name: re.sub(r"-\d+$", "", p.stem) for p in videos.iterdir() if p.suffix.lower() in (".mp4", ".gif")}
    if prompt_file:
        listed = json.loads(prompt_file.read_text(encoding="ascii"))
        assert isinstance(listed, dict) and len(listed) >= len(found)
        assert {(videos / name).resolve() for name in found} <= {(videos / name).resolve() for name in listed}
        found = {name: listed[name] for name in found}
    return found


def test_vbench_reads_what_is_laid_out(tmp_path, clip, capsys):
    clips = [clip("1.mp4", prompt="a cat"), clip("2.gif", prompt="a cat")]
    clips += [clip("3.webp", prompt="half/whole: 红色?", seed=4, fps=8), clip("4.mp4")]
    out, prompts = tmp_path / "vbench", tmp_path / "p.json"
    prompts.write_text(json.dumps({"4.mp4": "A Cat"}))
    assert main(["eval", "vbench-layout", *map(str, clips), "--out", str(out), "--prompts", str(prompts)]) == 0
    assert "4 clips" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "clips.json", "prompts.json", "videos"]
    read = as_vbench_reads(out / "videos", out / "prompts.json")
    assert sorted(read.values()) == ["A Cat", "a cat", "a cat", "half/whole: 红色?"]
    assert set(as_vbench_reads(out / "videos", None).values()) == {"A Cat", "a cat", "half_whole_ 红色_"}
    assert (out / "videos" / "a cat-0.mp4").read_bytes() == clips[0].read_bytes()
    assert (out / "videos" / "a cat-1.gif").read_bytes() == clips[1].read_bytes()
    assert (out / "videos" / "A Cat-2.mp4").read_bytes() == clips[3].read_bytes(), (
        "A and a are one name to many file systems"
    )
    turned = out / "videos" / "half_whole_ 红色_-0.mp4"
    assert read_metadata(turned)["seed"] == 4 and read_video(turned).shape == (5, 32, 48, 3)
    instructions = (out / "README.md").read_text()
    assert (
        all(d in instructions for d in DIMENSIONS)
        and "--mode=custom_input" in instructions
        and "4 clips" in instructions
    )
    assert json.loads((out / "clips.json").read_text())["a cat-1.gif"]["source"] == str(clips[1])


@pytest.mark.parametrize(
    "prompt", ["", "...", "a" * 500, "红" * 300, 'a/b\\c:*?"<>|\n\t', "ends in -7", "x" * 179 + " y"]
)
def test_names_fit_every_file_system_and_end_in_a_number(prompt):
    for name in clip_names([prompt, prompt]):
        assert 0 < len(f"{name}.mp4".encode()) < 200
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', name) and re.search(r"[^ .]-\d$", name)
    assert len(set(clip_names([prompt, prompt, "ends in", "ends in"]))) == 4


def test_a_layout_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, clip, capsys):
    good, nameless, single = (
        str(clip("a.mp4", prompt="x")),
        str(clip("b.mp4")),
        str(clip("c.mp4", length=1, prompt="x")),
    )
    cut, avi, alien = clip("d.mp4", prompt="x"), tmp_path / "e.avi", tmp_path / "f.webp"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    Image.new("RGB", (16, 16)).save(alien, save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for name, text in (
        ("list.json", "[]"),
        ("no.json", "{"),
        ("other.json", '{"z.mp4": "x"}'),
        ("f.json", '{"f.webp": "x"}'),
    ):
        (tmp_path / name).write_text(text)
    out = str(tmp_path / "out")
    cases = [
        ([nameless], out, None, "does not tell its prompt"), ([single], out, None, "single frame"), ([str(cut)], out, None, "damaged"),
        ([str(avi)], out, None, "'.avi'"), ([str(tmp_path / "none.mp4")], out, None, "no file"), ([good, good], out, None, "2 times"),
        ([good], str(tmp_path / "full"), None, "empty folder"), ([good], str(tmp_path / "no" / "out"), None, "does not exist"),
        ([good], out, "list.json", "object"), ([good], out, "no.json", "not valid JSON"), ([good], out, "other.json", "'z.mp4'"),
        ([good], out, "gone.json", "no file"), ([str(alien)], out, "f.json", "frames per second"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for clips, folder, prompts, words in cases:
        extra = ["--prompts", str(tmp_path / prompts)] if prompts else []
        assert main(["eval", "vbench-layout", *clips, "--out", folder, *extra]) == 2, words
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_clips_of_one_name_are_not_given_one_prompt(tmp_path, clip, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    clips = [str(clip("one/a.mp4", prompt="a cat")), str(clip("two/a.mp4", prompt="a dog", level=90))]
    (tmp_path / "p.json").write_text('{"a.mp4": "a sofa"}')
    out = tmp_path / "out"
    assert main(["eval", "vbench-layout", *clips, "--out", str(out), "--prompts", str(tmp_path / "p.json")]) == 2
    assert "2 clips are called 'a.mp4'" in capsys.readouterr().err and not out.exists()
    assert main(["eval", "vbench-layout", *clips, "--out", str(out)]) == 0
    made = json.loads((out / "clips.json").read_text())
    assert {clip["source"]: clip["prompt"] for clip in made.values()} == dict(
        zip(clips, ("a cat", "a dog"), strict=True)
    )


def test_clips_are_laid_out_in_the_empty_folder_that_one_stands_in(tmp_path, clip, monkeypatch):
    (tmp_path / "here").mkdir()
    source = str(clip("a.mp4", prompt="x"))
    monkeypatch.chdir(tmp_path / "here")
    assert main(["eval", "vbench-layout", source, "--out", "."]) == 0
    made = sorted(file.name for file in Path.cwd().iterdir())
    assert main(["eval", "vbench-layout", source, "--out", str(tmp_path / "new")]) == 0
    assert made == sorted(file.name for file in (tmp_path / "new").iterdir()) and len(made) > 2


def test_a_layout_that_cannot_be_moved_whole_leaves_the_empty_folder(tmp_path, clip, monkeypatch):
    (tmp_path / "out").mkdir()
    source, moved, rename = str(clip("a.mp4", prompt="x")), [], Path.rename

    def stops(self, target):
        if target.parent.name == "out":
            if len(moved) == 2:
                raise OSError("no room")
            moved.append(target)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stops)
        assert main(["eval", "vbench-layout", source, "--out", str(tmp_path / "out")]) != 0
        assert len(moved) == 2
        moved.clear()
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_layout_leaves_nothing(tmp_path, clip, monkeypatch):
    from efficient_vdit_core.quality import vbench

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vbench, "write_video", stop)
    clips = [str(clip("a.mp4", prompt="x")), str(clip("b.webp", prompt="y", fps=8))]
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", "vbench-layout", *clips, "--out", str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.rglob("*")) == before
