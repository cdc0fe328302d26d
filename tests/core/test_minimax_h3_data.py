"""What MiniMax-H3 is trained on: clips with their sound through both VAEs, and prompts, against diffusers' own by hand."""

import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import record
from small_models import minimax_h3

from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.data.clips import encode_videos
from efficient_vdit_core.distill.data.prepare import check_data
from efficient_vdit_core.distill.families.fingerprints import video_stamp
from efficient_vdit_core.distill.families.minimax_h3_clip import ClipShape
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.texts import TextBank
from efficient_vdit_core.media.read_sound import read_sound
from efficient_vdit_core.media.read_video import read_video
from efficient_vdit_core.media.video import write_video

diffusers = pytest.importorskip("diffusers")
SHAPE = ClipShape(24, 32, 7, 6, 10)  # of 22 frames of 96 x 160 pixels


@pytest.fixture
def h3(tmp_path):
    return open_model(minimax_h3(tmp_path))


def with_sound(path, frames=22, fps=24, tone=True):
    """A clip of noise, with a tone on the left side where it has sound."""
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 96, 160, 3), dtype=np.uint8)
    write_video(path, pixels, fps=fps)
    if tone:
        import imageio_ffmpeg

        silent, source = path.with_name("silent.mp4"), "aevalsrc=0.5*sin(2*PI*440*t)|0:s=48000:d=0.5"
        path.rename(silent)
        arguments = ["-v", "error", "-i", silent, "-f", "lavfi", "-i", source, "-c:v", "copy", "-c:a", "aac", path]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *map(str, arguments)], check=True)
        silent.unlink()
    return path


def test_latents_of_another_sound_schedule_are_not_taken(h3, monkeypatch):
    """The sound is kept times the quotient of the two shifts."""
    assert video_stamp(h3) == video_stamp(h3)
    before = video_stamp(h3)
    monkeypatch.setattr(type(h3), "schedules", [6.0, 3.0])
    assert video_stamp(h3) != before


def test_sound_is_read_as_long_as_the_pictures_last(tmp_path):
    sound = read_sound(with_sound(tmp_path / "a.mp4"), 22 / 24, 32000, 24)
    assert sound.shape == (2, round(22 / 24 * 32000)) and sound.dtype == np.float32
    peak = np.abs(np.fft.rfft(sound[0, :16000])).argmax() * 32000 / 16000
    assert abs(peak - 440) < 5 and np.abs(sound[0, 2000:14000]).max() == pytest.approx(0.5, abs=0.05)
    assert np.abs(sound[1]).max() < 0.01 and np.abs(sound[:, 20000:]).max() < 0.01, "silence on the right and behind"
    assert read_sound(with_sound(tmp_path / "b.mp4", tone=False), 1.0, 32000, 24) is None
    with pytest.raises(ValueError, match="has 30 frames a second, expected 24"):
        read_sound(with_sound(tmp_path / "c.mp4", fps=30), 0.5, 32000, 24)
    assert read_sound(tmp_path / "c.mp4", 0.5, 32000, 0).shape == (2, 16000), "whose pictures are brought to a rate"
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for untold in (tmp_path / "cut.mp4", record(tmp_path / "r.webm", rate=60)):
        with pytest.raises(ValueError, match="a frame rate that is not told, or varies, expected 24"):
            read_sound(untold, 0.5, 32000, 24)


@pytest.mark.parametrize("late", ["sound", "pictures"])
def test_sound_keeps_its_place_beside_the_pictures(tmp_path, late):
    """In a file one of the two may begin after the other."""
    import imageio_ffmpeg

    source, path = with_sound(tmp_path / "a.mp4", frames=12), tmp_path / "late.mkv"
    streams = ["0:a", "1:v"] if late == "pictures" else ["0:v", "1:a"]
    arguments = [
        "-i",
        source,
        "-itsoffset",
        "0.25",
        "-i",
        source,
        "-map",
        streams[0],
        "-map",
        streams[1],
        "-c",
        "copy",
        path,
    ]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)
    sound, pictures = read_sound(path, 18 / 24, 32000, 24), read_video(path)
    begins = int((np.abs(sound[0]) > 0.1).argmax()) / 32000
    changes = int((np.abs(np.diff(pictures.astype(int), axis=0)).mean((1, 2, 3)) > 10).argmax())
    expected = (0.25, 0) if late == "sound" else (0, 6)
    assert begins == pytest.approx(expected[0], abs=0.03) and changes == expected[1]


def test_pictures_at_another_rate_than_the_sounds_are_refused(h3_with_vaes, tmp_path):
    h3, *_ = h3_with_vaes
    with_sound(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a")
    values = {
        "method": "consistency",
        "data": {"source": "videos", "folder": str(tmp_path), "frames": 22, "height": 96, "width": 160},
    }
    for fps, told in ((0, ""), (24, ""), (16, "data.fps is 16, but the model's pictures come at 24 a second")):
        values["data"]["fps"] = fps
        with nullcontext() if not told else pytest.raises(ValueError, match=told):
            check_data(DistillConfig.from_dict({**values, "training": {"batch": 1}}), h3)


@pytest.fixture
def h3_with_vaes(h3, tmp_path):
    torch.manual_seed(0)
    pictures = diffusers.AutoencoderKLMiniMaxH3(
        block_out_channels=(8, 8, 8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, decoder_num_layers=1,
        decoder_num_attention_heads=2, decoder_attention_head_dim=32, latents_mean=(0.1,) * 24, latents_std=(0.5,) * 24,
    )  # fmt: skip
    sound = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2, latent_dim=64, decoder_dim=128, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),),
        latents_mean=[0.2] * 32, latents_std=[2.0] * 32,
    )  # fmt: skip
    pictures.save_pretrained(tmp_path / "vae")
    sound.save_pretrained(tmp_path / "audio_vae")
    return h3, pictures.eval(), sound.eval()


def test_clips_go_through_both_of_h3s_vaes(h3_with_vaes, tmp_path):
    """Against diffusers' VAEs called by hand."""
    h3, pictures, hearing = h3_with_vaes
    frames = np.random.default_rng(1).integers(0, 255, (22, 96, 160, 3), dtype=np.uint8)
    tone = np.sin(np.arange(2 * 29333).reshape(2, -1) / 9).astype(np.float32)
    mean, deviation = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    encode = h3.video_encoder(torch.device("cpu"))
    with torch.no_grad():
        x = ((torch.from_numpy(frames) / 255 - mean) / deviation).permute(3, 0, 1, 2)[None]
        video = (pictures.encode(x).latent_dist.mode()[0] - 0.1) / 0.5
        for given, heard in ((tone, torch.from_numpy(tone)), (None, torch.zeros(2, 29600))):
            heard = F.pad(heard, (0, 29600 - heard.shape[1]))
            latents = (hearing.encode(heard[:, None]).latent_dist.mode() - 0.2) / 2.0
            ours = SHAPE.unpack(encode(frames, given) if given is not None else encode(frames))
            torch.testing.assert_close(ours[0], video, atol=1e-4, rtol=1e-4)
            rows = torch.cat([latents[0].T, latents[1].T])
            torch.testing.assert_close(ours[1], 4 * rows, atol=1e-4, rtol=1e-4)
            assert ours[2].abs().max() == 0
        wanted = pictures.decode(video[None] * 0.5 + 0.1).sample[0].permute(1, 2, 3, 0) * deviation + mean
    found = h3.video_decoder(torch.device("cpu"))(SHAPE.pack(video, torch.zeros(74, 32)))
    assert found.shape == frames.shape
    assert (torch.from_numpy(found).float() - wanted.clamp(0, 1) * 255).abs().max() <= 0.51


def test_a_folder_of_clips_is_encoded_with_its_sound(h3_with_vaes, tmp_path, caplog):
    h3, *_ = h3_with_vaes
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, about in (("loud", {}), ("mute", {"tone": False}), ("fast", {"fps": 30})):
        with_sound(folder / f"{name}.mp4", **about)
        (folder / f"{name}.txt").write_text(name)
    clips = encode_videos(folder, tmp_path, (22, 96, 160), lambda: h3.video_encoder(torch.device("cpu")), h3.sound_rate)
    assert clips.captions == [("loud",), ("mute",)] and "fast.mp4 is left out" in caplog.text
    loud, mute = (SHAPE.unpack(clips.latents[i])[1] for i in range(2))
    assert float((loud - mute).abs().max()) > 1e-3


def test_the_prompt_is_encoded_as_diffusers_blocks_do(h3, monkeypatch):
    """Without a template or special tokens, one after another, and padded; an empty one has no words."""
    import transformers

    seen = []

    class Reader:
        config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=64))

        def to(self, device):
            return self

        def eval(self):
            return self

        def model(self, input_ids, **settings):
            seen.append(input_ids.tolist())
            states = [(input_ids[..., None] + 100.0 * layer).expand(-1, -1, 8) for layer in range(65)]
            return SimpleNamespace(hidden_states=states)

    def tokenizer(text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [len(word) for word in text.split()]}

    processor = SimpleNamespace(create_mm_token_type_ids=lambda rows: [[0] * len(row) for row in rows])
    for kind, what in (
        ("Qwen3VLForConditionalGeneration", Reader()),
        ("AutoTokenizer", tokenizer),
        ("Qwen3VLProcessor", processor),
    ):
        found = SimpleNamespace(from_pretrained=lambda *_, what=what, **settings: what)
        monkeypatch.setattr(transformers, kind, found)
    context, mask = h3.text_encoder(torch.device("cpu"))(["a red cat", "", "dog"])
    assert seen == [[[1, 3, 3]], [[3]]] and mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert (
        context.shape == (3, 3, 8)
        and context[0, :, 0].tolist() == torch.tensor([5001.0, 5003, 5003]).bfloat16().tolist()
    )
    bank = TextBank.build(
        ["a red cat", ""], lambda: h3.text_encoder(torch.device("cpu")), h3.folder / "texts.safetensors"
    )
    again = TextBank.build(["", "a red cat"], lambda: None, h3.folder / "texts.safetensors")
    assert [len(again.states[t]) for t in ("", "a red cat")] == [0, 3] and bank.batch([""])[0].shape == (1, 0, 8)
