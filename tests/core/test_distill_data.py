"""What a distillation learns from: videos with captions, the teacher's own samples, text states, each made once and
kept."""

import pytest
import torch

from efficient_vdit_core.distill.data.clips import encode_videos, read_captions, teacher_clips, video_captions
from efficient_vdit_core.distill.families.texts import TextBank


def videos(folder, names):
    from efficient_vdit_core.video import write_video

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
    with pytest.raises(ValueError, match="None of the 3"):
        encode_videos(folder, tmp_path / "cache", (9, 16, 16), encoder)


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
