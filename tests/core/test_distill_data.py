"""What a distillation learns from: videos with captions, the teacher's own samples, text states, each made once and
kept."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import record
from small_models import opensora_plan

from efficient_vdit_core.distill.config import DataConfig, DistillConfig, TrainingConfig
from efficient_vdit_core.distill.data import prepare
from efficient_vdit_core.distill.data.clips import encode_videos, read_captions, teacher_clips, video_captions
from efficient_vdit_core.distill.data.noise import numbered_noise
from efficient_vdit_core.distill.data.stamp import data_stamp
from efficient_vdit_core.distill.families import texts
from efficient_vdit_core.distill.families.fingerprints import MAX_WHOLE, text_stamp
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.opensora_plan import OpenSoraPlanModel
from efficient_vdit_core.distill.families.texts import AT_ONCE, TextBank
from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig
from efficient_vdit_core.limits.documents import MAX_VALUES
from efficient_vdit_core.media import read_video
from efficient_vdit_core.media.video import write_video


def videos(folder, names):
    torch.manual_seed(0)
    for name in names:
        write_video(folder / name, torch.randint(0, 255, (5, 20, 32, 3), dtype=torch.uint8).numpy(), fps=8)


def test_a_corrupt_video_is_named_skipped_and_counted(tmp_path, caplog):
    folder = tmp_path / "videos"
    folder.mkdir()
    videos(folder, ["good.gif", "short.gif"])
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "good.gif", "text": "good one"}\n{"file_name": "short.gif", "text": "s"}\n{"file_name": "broken.mp4", "text": "b"}\n'
    )
    seen = []

    def encoder():
        return lambda frames: seen.append(frames.shape) or torch.ones(4, 2, 2, 2)

    clips = encode_videos(folder, tmp_path / "cache", (5, 16, 16), encoder)
    assert clips.captions == [("good one",), ("s",)] and seen == [(5, 16, 16, 3)] * 2
    assert "broken.mp4 is left out" in caplog.text and "1 of 3 videos" in caplog.text
    x, texts = clips.batch(3, torch.Generator().manual_seed(0))
    assert x.shape == (3, 4, 2, 2, 2) and set(texts) <= {"good one", "s"}
    encode_videos(folder, tmp_path / "cache", (5, 16, 16), encoder)
    assert len(seen) == 2, "what is cached is not encoded again"
    encode_videos(folder, tmp_path / "cache", (5, 16, 16), encoder, stamp="another VAE")
    assert len(seen) == 4
    with pytest.raises(ValueError, match="None of the 3"):
        encode_videos(folder, tmp_path / "cache", (9, 16, 16), encoder)


def test_videos_are_brought_to_the_models_rate_and_none_is_taken_without_one(tmp_path, caplog):
    pytest.importorskip("imageio_ffmpeg")
    folder = tmp_path / "videos"
    folder.mkdir()
    still = np.arange(16, dtype=np.uint8).repeat(20 * 32 * 3).reshape(16, 20, 32, 3) * 16
    write_video(folder / "fast.gif", still, fps=20)
    record(folder / "screen.webm", sound=False)
    for name in ("fast", "screen"):
        (folder / f"{name}.txt").write_text(name)
    seen = {}

    def encoder(fps):
        return lambda: lambda frames: seen.setdefault(fps, []).append(frames[:, 0, 0, 0]) or torch.ones(4, 2, 2, 2)

    found = {fps: encode_videos(folder, tmp_path / "cache", (5, 16, 16), encoder(fps), fps=fps) for fps in (0, 10.0)}
    assert found[0].captions == [("fast",)] and "screen.webm is left out: its frame rate is not told" in caplog.text
    assert found[10.0].captions == [("fast",), ("screen",)]
    assert seen[0][0].tolist() == [0, 16, 32, 48, 64] and seen[10.0][0].tolist() == [0, 32, 64, 96, 128]


def test_a_long_video_is_learnt_from_its_first_frames_and_a_short_one_is_told_of(tmp_path, caplog, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, count in (("long", 40), ("short", 3)):
        write_video(folder / f"{name}.mp4", np.zeros((count, 32, 32, 3), np.uint8), fps=60)
        (folder / f"{name}.txt").write_text(name)
    monkeypatch.setattr(read_video, "MAX_FRAMES", 30)
    seen = []
    encoder = lambda: lambda frames: seen.append(frames.shape) or torch.ones(4, 2, 2, 2)  # noqa: E731
    clips = encode_videos(folder, tmp_path / "cache", (5, 16, 16), encoder)
    assert clips.captions == [("long",)] and seen == [(5, 16, 16, 3)]
    assert "short.mp4 is left out: it has 3 frames, expected at least 5" in caplog.text
    assert "1 of 2 videos were left out, each for the reason above." in caplog.text


def test_a_video_that_is_gone_is_left_out(tmp_path, caplog):
    """A link to a disk that is not there is seen when its turn comes, behind hours of encoding."""
    folder = tmp_path / "videos"
    folder.mkdir()
    videos(folder, ["a.gif"])
    (folder / "b.gif").symlink_to(tmp_path / "unmounted" / "b.gif")
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    clips = encode_videos(folder, tmp_path / "cache", (5, 16, 16), lambda: lambda frames: torch.ones(4, 2, 2, 2))
    assert clips.captions == [("a",)] and "b.gif is left out: No such file or directory" in caplog.text


def test_nothing_that_is_listed_is_left_out_quietly(tmp_path, caplog):
    videos(tmp_path, ["a.webp", "b.gif"])
    for name in ("c.m4v", "d.mpg", "e.rm"):
        (tmp_path / name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "preview.webp")
    (tmp_path / "c.webp").write_bytes((tmp_path / "a.webp").read_bytes())  # one that moves
    progress = tmp_path / "run" / "samples" / "step-000002"  # of a training that keeps its state here
    progress.mkdir(parents=True)
    videos(progress, ["00.gif"])
    (tmp_path / "run" / "config.toml").touch()
    listed = ("a.webp", "b.gif", "c.m4v", "d.mpg", "e.rm", "gone.mp4")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in listed]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert [v.name for v in video_captions(tmp_path)] == ["a.webp", "b.gif", "c.m4v", "d.mpg"]
    assert "2 of 6 files that metadata.jsonl lists are not used, such as e.rm: " in caplog.text


def captioned(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.with_suffix(".txt").write_text(file.stem)


def test_what_has_a_caption_and_is_no_video_by_its_name_is_told_of(tmp_path, caplog):
    captioned(*(tmp_path / name for name in ("a.mp4", "b.ogv", "c.TS", "d.rm", "e.jpg", "f.jpg")))
    (tmp_path / "a.jpg").touch()  # the picture of a video
    (tmp_path / "f.jpg").unlink()
    assert [v.name for v in video_captions(tmp_path)] == ["a.mp4", "b.ogv", "c.TS"]
    assert (
        "2 files with a caption beside them are not used, such as d.rm: by their names they are no videos."
        in caplog.text
    )


def test_videos_behind_links_are_found_once_and_those_in_hidden_folders_are_not(tmp_path):
    folder, other = tmp_path / "videos", tmp_path / "disk2"
    captioned(*(folder / name for name in ("b.mp4", "in/c.mp4", ".trash/old.mp4", "in/.Trash-1000/files/old.mp4")))
    captioned(other / "d.mp4", other / "deep" / "e.mp4", other / ".trash" / "old.mp4")
    plain = data_stamp(DataConfig(source="videos", folder=str(folder)))
    for name, target in (("a", folder / "in"), ("more", other), (".hidden", other), ("deep", other / "deep")):
        (folder / name).symlink_to(target, target_is_directory=True)
    for circle in (folder / "in", other / "deep"):
        (circle / "round").symlink_to(folder, target_is_directory=True)
    found = [v.relative_to(folder).as_posix() for v in video_captions(folder)]
    assert found == ["b.mp4", "deep/e.mp4", "in/c.mp4", "more/d.mp4"], "by their own folder's name, and sorted"
    assert plain.startswith("2 videos") and data_stamp(DataConfig(source="videos", folder=str(folder))) != plain


def test_a_hidden_folder_may_be_named_itself_and_plain_ones_keep_their_stamp(tmp_path):
    folder = tmp_path / ".videos"
    captioned(folder / "b.mp4", folder / "a" / "z.mp4", folder / "a.b" / "c.mp4", folder / "a-b.mp4")
    assert list(video_captions(folder)) == sorted(folder.rglob("*.mp4"))
    listed = [["a-b.mp4", 0, "a-b"], ["a.b/c.mp4", 0, "c"], ["a/z.mp4", 0, "z"], ["b.mp4", 0, "b"]]
    told = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    assert data_stamp(DataConfig(source="videos", folder=str(folder))) == f"4 videos ({told})"


def test_missing_captions_are_listed(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "b.txt").write_text("has one")
    with pytest.raises(ValueError, match=r"1 of 2 videos have no caption \(a\.mp4\)"):
        video_captions(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        video_captions(tmp_path / "none")
    with pytest.raises(ValueError, match="no file of captions"):
        read_captions(tmp_path / "none.txt")


def test_the_teachers_samples_go_on_where_they_stopped_and_keep_to_their_settings(tmp_path):
    asked = []

    def teacher():
        def generate(texts, numbers):
            asked.extend(numbers)
            if len(asked) > 4:
                raise KeyboardInterrupt
            return torch.stack([torch.full((1, 1, 1, 1), float(n)) for n in numbers])

        return generate

    with pytest.raises(KeyboardInterrupt):
        teacher_clips(["a", "b"], 5, tmp_path, [0], teacher, at_once=2)
    asked.clear()
    clips = teacher_clips(["a", "b"], 5, tmp_path, [0], teacher, at_once=3)  # another batch asks for none of them again
    assert asked == [4] and [float(x) for x in clips.latents] == [0, 1, 2, 3, 4]
    assert clips.captions == [("a",), ("b",), ("a",), ("b",), ("a",)]
    asked.clear()
    teacher_clips(["a", "b"], 2, tmp_path, [1], teacher)
    assert asked == [0, 1], "samples of another seed or guidance are not taken"


def test_text_states_are_kept_and_padded(tmp_path):
    asked = []

    def encoder():
        def encode(texts):
            asked.append(texts)
            lengths = [len(t) + 1 for t in texts]
            context = torch.ones(len(texts), max(lengths), 3)
            return context, torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])

        return encode

    file = tmp_path / "texts.safetensors"
    TextBank.build(["ab", "", "ab"], encoder, file)
    bank = TextBank.build(["ab", "c"], encoder, file)
    assert asked == [["ab", ""], ["c"]]
    context, mask = bank.batch(["c", "ab"])
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]] and float(context[0, 2].abs().sum()) == 0


def test_what_was_encoded_before_ctrl_c_is_kept(tmp_path):
    """A T5 takes seconds for a caption on a processor, and hours for a training's."""
    asked = []

    def encoder(stop):
        def encode(texts):
            if len(asked) == stop:
                raise KeyboardInterrupt
            asked.append(texts)
            return torch.ones(len(texts), 1, 3), torch.ones(len(texts), 1, dtype=torch.long)

        return lambda: encode

    texts, file = [f"caption {i}" for i in range(AT_ONCE + 1)], tmp_path / "texts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        TextBank.build(texts, encoder(1), file)
    TextBank.build(texts, encoder(9), file)
    assert asked == [texts[:AT_ONCE], texts[AT_ONCE:]]


def test_a_process_that_is_killed_loses_a_minute_of_encoding(tmp_path, monkeypatch):
    """SIGTERM runs no `finally`."""
    monkeypatch.setattr(texts, "SAVE_EVERY", 0.0)
    names, file, kept = [f"caption {i}" for i in range(AT_ONCE + 1)], tmp_path / "texts.safetensors", []

    def encode(part):
        if file.is_file():
            kept.append(TextBank.build(names[:AT_ONCE], lambda: None, file))
        return torch.ones(len(part), 1, 3), torch.ones(len(part), 1, dtype=torch.long)

    TextBank.build(names, lambda: encode, file)
    assert len(kept) == 1, "the first ones stood in the file while the last was encoded"
    assert len(TextBank.build(names, lambda: None, file).states) == AT_ONCE + 1


def test_a_video_may_have_a_name_as_long_as_a_file_system_takes(tmp_path):
    """As downloads named after a title do, three bytes to each Chinese letter."""
    folder, name = tmp_path / "videos", "\u89c6\u9891" * 41
    folder.mkdir()
    videos(folder, [f"{name}.gif"])
    (folder / f"{name}.txt").write_text("long")
    clips = encode_videos(folder, tmp_path / "cache", (5, 16, 16), lambda: lambda frames: torch.ones(4, 2, 2, 2))
    assert clips.captions == [("long",)]


def test_the_marks_that_a_mac_leaves_beside_videos_are_no_videos(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat")
    for name in ("._a.mp4", "._a.txt"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff")
    assert video_captions(tmp_path) == {tmp_path / "a.mp4": "a cat"}


def test_the_text_encoder_leaves_when_the_texts_are_encoded(monkeypatch):
    import gc
    import weakref

    from efficient_vdit_core.distill.config import ModelConfig
    from efficient_vdit_core.distill.families.open_model import open_model
    from efficient_vdit_core.models.opensora_plan.text import TextEncoder

    made, load = [], TextEncoder.from_folder.__func__
    keep = lambda cls, *args, **kw: made.append(load(cls, *args, **kw)) or made[-1]  # noqa: E731
    monkeypatch.setattr(TextEncoder, "from_folder", classmethod(keep))
    model = open_model(ModelConfig())
    TextBank.build(["a red circle"], lambda: model.text_encoder(torch.device("cpu")))
    weights = weakref.ref(made.pop().model)
    gc.collect()
    assert weights() is None


def halve(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_half_a_file_in_the_cache_is_named_with_what_to_do(tmp_path):
    made = teacher_clips(["a"], 1, tmp_path, [0], lambda: lambda texts, numbers: torch.zeros(1, 1, 1, 1, 1))
    (file,) = tmp_path.iterdir()
    halve(file)
    with pytest.raises(ValueError, match=r"sample-000000.* is damaged or half written\. Delete it"):
        made.latents[0]
    bank = tmp_path / "texts.safetensors"
    encoder = lambda: lambda texts: (torch.ones(len(texts), 2, 3), torch.ones(len(texts), 2))  # noqa: E731
    TextBank.build(["a"], encoder, bank)
    halve(bank)
    with pytest.raises(ValueError, match=r"texts.safetensors in the cache is damaged or half written\. Delete it"):
        TextBank.build(["a"], encoder, bank)


@pytest.mark.parametrize(
    "line", ["[1]", "{", '{"file_name": 3, "text": "x"}', "[" * 100_000, '"' + "x" * 10**6 + '"'], ids=range(5)
)
def test_a_line_of_metadata_that_is_none_is_named(tmp_path, line):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="metadata.jsonl line 2 .*Correct it") as error:
        video_captions(tmp_path)
    assert len(str(error.value)) < 400


def test_a_caption_may_hold_marks_that_python_counts_as_ends_of_lines(tmp_path):
    odd = ["a cat\u2028on a mat", "a dog\x85runs", "a \x1cbird"]
    (tmp_path / "c.txt").write_bytes("\r\n".join([*odd, ""]).encode())
    assert read_captions(tmp_path / "c.txt") == odd
    (tmp_path / "mac.txt").write_bytes(b"one\rtwo\r\nthree\nfour")
    assert read_captions(tmp_path / "mac.txt") == ["one", "two", "three", "four"]
    for number in range(3):
        (tmp_path / f"{number}.mp4").touch()
    entries = ({"file_name": f"{n}.mp4", "text": text} for n, text in enumerate(odd))
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(lines).encode())
    assert list(video_captions(tmp_path).values()) == odd


def test_more_captions_are_kept_than_a_document_may_hold_values(tmp_path, monkeypatch):
    names, file = list(map(str, range(MAX_VALUES + 1))), tmp_path / "texts.safetensors"
    file.touch()
    kept = dict.fromkeys(names, torch.ones(1, 1)), {"texts": json.dumps(names)}
    monkeypatch.setattr("efficient_vdit_core.distill.families.texts.read_state_dict", lambda _: kept)
    assert len(TextBank.build(names, lambda: None, file).states) == MAX_VALUES + 1


def test_a_seed_counts_for_noise_where_pytorchs_takes_32_bits_of_it():
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 2**32 + 7)]
    assert torch.equal(*drawn)
    noises = [numbered_noise((64,), "teacher", number, seed) for number in (0, 1, 2**32) for seed in (0, 1, 2)]
    noises += [numbered_noise((64,), "samples", number) for number in (0, 1, 2)]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(noises)
    assert torch.equal(noises[1], numbered_noise((64,), "teacher", 0, 1)) and noises[0].dtype == torch.float32
    wide = numbered_noise((4, 50_000), "teacher", 3, 1)
    assert abs(float(wide.mean())) < 0.01 and float(wide.std()) == pytest.approx(1, abs=0.01)


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """Three samples of a model, for a data seed, from one cache; and whose weights were read for them."""
    monkeypatch.setattr(
        OpenSoraPlanModel,
        "text_encoder",
        lambda *_: lambda texts: (torch.ones(len(texts), 2, 8), torch.ones(len(texts), 2)),
    )
    read, load = [], OpenSoraPlanModel.load
    monkeypatch.setattr(OpenSoraPlanModel, "load", lambda self, *args: read.append(self) or load(self, *args))
    captions = tmp_path / "captions.txt"
    captions.write_text("a\n")
    about = {"source": "teacher", "captions": str(captions), "clips": 3, "teacher_steps": 2, "guidance": 1.0}

    def make(model, seed=1, sampled_by=None):
        read.clear()
        data = DataConfig(**about, seed=seed, frames=13, height=64, width=64)
        config = DistillConfig("consistency", ConsistencyConfig(), model, data, TrainingConfig(batch=2), sampled_by)
        found = prepare.prepare_data(config, open_model(model), tmp_path / "cache", torch.device("cpu"))
        return torch.stack(list(found.clips.latents)), [str(one.transformer_file) for one in read]

    return make


def test_the_teachers_samples_are_the_noise_schedules(tmp_path, sampled, monkeypatch):
    model = opensora_plan(tmp_path, layers=1)
    sampled(model)
    monkeypatch.setattr(OpenSoraPlanModel, "schedules", [8.0])
    assert sampled(model)[1] == [model.transformer] and sampled(model)[1] == []


def test_the_teachers_samples_are_its_own_and_the_seeds(tmp_path, sampled):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        models.append(opensora_plan(tmp_path / str(seed), layers=1))
    first, read = sampled(models[0])
    assert read == [models[0].transformer]
    again, read = sampled(models[0])
    assert torch.equal(first, again) and read == []
    assert not torch.equal(first, sampled(models[0], seed=2)[0])
    other, read = sampled(models[1])
    assert not torch.equal(first, other) and read == [models[1].transformer]
    assert torch.equal(first, sampled(models[1], sampled_by=models[0])[0]), (
        "a later stage's teacher learns from the first's"
    )
    third, read = sampled(models[1], 3, models[0])
    assert read == [models[0].transformer] and torch.equal(third, sampled(models[0], 3)[0])


def test_a_cache_keeps_what_each_encoder_made_apart(tmp_path, monkeypatch):
    model = open_model(opensora_plan(tmp_path))
    file = tmp_path / "encoder" / "model.safetensors"
    file.parent.mkdir()
    monkeypatch.setattr(OpenSoraPlanModel, "parts", {"text encoder": file.parent, "VAE": tmp_path / "none"})
    stamps = []
    (file.parent / ".cache").mkdir()
    for byte in (0, 0, 1):  # of the same size and name; only weights differ, as those of a model that was trained on
        file.write_bytes(bytes([byte]) * (MAX_WHOLE + 1))
        (file.parent / ".cache" / "downloaded").write_text(str(len(stamps)))
        stamps.append(text_stamp(model))
    (file.parent / "config.json").write_text("{}")
    stamps.append(text_stamp(model))
    model.config = replace(model.config, caption_channels=9)
    stamps.append(text_stamp(model))
    assert stamps[0] == stamps[1] and len(set(stamps)) == 4


def test_texts_that_were_padded_to_fewer_rows_are_encoded_anew(tmp_path, monkeypatch):
    model, encoded = open_model(opensora_plan(tmp_path)), []

    def encoder(self, device):
        return lambda texts: encoded.extend(texts) or (torch.ones(len(texts), 3, 8), torch.ones(len(texts), 3).long())

    monkeypatch.setattr(OpenSoraPlanModel, "text_encoder", encoder)
    monkeypatch.setattr(OpenSoraPlanModel, "parts", {"text encoder": tmp_path / "none"})
    for rows, longest in ((0, 3), (0, 3), (512, 512), (512, 512)):
        monkeypatch.setattr(OpenSoraPlanModel, "text_padding", rows)
        bank = prepare._text_bank(["a cat"], model, tmp_path / "cache", torch.device("cpu"))
        assert bank.batch(["a cat"])[0].shape == (1, longest, 8)
    assert encoded == ["a cat"] * 2


def test_the_tiny_worlds_clips_are_of_one_size():
    """A model of the crossing world would learn from clips of the other one, and their captions."""
    values = {"method": "consistency", "objective": {}, "model": {"path": "tiny"}, "training": {"steps": 1}}
    for size, told in (
        ({"frames": 29}, ""),
        ({"frames": 93}, "clips of 8 latent frames, and the run is of 24. Set data.frames to 29"),
        ({"frames": 29, "height": 32, "width": 48}, "clips of 64 x 64 pixels, and the run is of 48 x 32. Leave out"),
    ):
        config = DistillConfig.from_dict({**values, "data": {"source": "tinyworld", "clips": 1, **size}})
        with nullcontext() if not told else pytest.raises(ValueError, match=told):
            prepare.check_data(config, open_model(config.model))
