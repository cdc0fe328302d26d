"""Nodes in place of loaders whose models ComfyUI builds in one size only: text encoders, and two of the video VAEs.

They give what the real ones give, in shape: words become random rows, pictures the latents of their size.
"""

import zlib

import torch


def _random(seed: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


class _TextEncoder:
    """A row for each word and, as Qwen3-VL does it, one for each 32 x 32 pixels of a picture in the prompt."""

    def __init__(self, width: int):
        self.width = width

    def tokenize(self, text, images=(), **_):
        return text, sum(image.shape[1] // 32 * (image.shape[2] // 32) for image in images)

    def encode_from_tokens_scheduled(self, tokens):
        text, seen = tokens
        words = len(text.split())
        tags = torch.tensor([0] * seen + [1] * words)
        pooled = _random(text, 1, 768)
        more = {"minimax_token_tags": tags} if seen else {}
        return [[_random(text, 1, seen + words, self.width), {"pooled_output": pooled, **more}]]


class TextEncoder:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"width": ("INT", {"max": 8192})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "tests"

    def load(self, width):
        return (_TextEncoder(width),)


class _VideoVAE:
    """``side``: pixels of a latent's side; ``chunked``: five latent frames hold 17 frames, as in MiniMax-H3."""

    def __init__(self, channels: int, side: int, chunked: bool):
        self.channels, self.side, self.chunked = channels, side, chunked

    def encode(self, pixels):
        height, width = (size // self.side for size in pixels.shape[1:3])
        return _random("latents", 1, self.channels, 1, height, width)

    def decode(self, latents):
        _, channels, frames, height, width = latents.shape
        assert channels == self.channels, f"{channels} channels, expected {self.channels}"
        length = frames // 5 * 17 + 5 if self.chunked else 4 * frames - 3
        return torch.rand(1, length, height * self.side, width * self.side, 3)

    def decode_tiled(self, latents, **_):
        return self.decode(latents)

    def temporal_compression_decode(self):
        return 4

    def spacial_compression_decode(self):
        return self.side


class VideoVAE:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"channels": ("INT", {}), "side": ("INT", {}), "chunked": ("BOOLEAN", {})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "load", "tests"

    def load(self, **sizes):
        return (_VideoVAE(**sizes),)


class _SoundVAE:
    audio_sample_rate = 32000

    def decode(self, latents):
        """(1, 32, 2, L) at 40 latents a second -> (1, samples, 2)."""
        _, channels, sides, length = latents.shape
        assert (channels, sides) == (32, 2), latents.shape
        return torch.rand(1, length * self.audio_sample_rate // 40, 2)


class SoundVAE:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "load", "tests"

    def load(self):
        return (_SoundVAE(),)


NODE_CLASS_MAPPINGS = {"StandInTextEncoder": TextEncoder, "StandInVideoVAE": VideoVAE, "StandInSoundVAE": SoundVAE}
