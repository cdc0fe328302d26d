"""A clip of MiniMax-H3, its pictures and its sound, as one tensor on the pictures' noise path.

Both are flows, z = (1 - s) x + s e with s / (1 - s) = shift u / (1 - u), of one diffusion time u and of a shift each: S of
the pictures, A of the sound. Their ratios of noise to signal differ by the same factor k = S / A at every u. So

    s_S / s_A ((1 - s_A) x + s_A e) = (1 - s_S) k x + s_S e

is the sound times k on the pictures' path, exactly, and every objective holds for both with no word of its own: at each
step the network is asked at two levels. ComfyUI's sampler carries the sound in the same way.

Latents (C, T, h, w) are the pictures' channels, and behind them as many as k times the sound fills. What it leaves over
of the last one is nothing: its clean value is 0, and its prediction is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SIDES = 2  # of stereo sound
PIXELS, FIRST, CHUNK, CHUNK_LATENTS = 16, 5, 17, 5  # a latent's side; 17n + 5 frames are 5n + 2 latent ones
PATCH = 2  # latents along each side of a token
RATE, SOUND_RATE = 24, 40  # frames and sound latents a second


def latent_frames(frames: int) -> int:
    """Of 17n + 5 frames."""
    return (frames - FIRST) // CHUNK * CHUNK_LATENTS + 2


def sound_latents(latent_frames: int) -> int:
    """For each side, of a clip with so many latent frames."""
    frames = (latent_frames - 2) // CHUNK_LATENTS * CHUNK + FIRST
    return round(frames / RATE * SOUND_RATE)


@dataclass(frozen=True)
class ClipShape:
    """Channels of the pictures' and the sound's latents, latent frames, height and width."""

    channels: int
    sound_channels: int
    t: int
    h: int
    w: int

    @property
    def sound_rows(self) -> int:
        return SIDES * sound_latents(self.t)

    @property
    def state(self) -> tuple[int, int, int, int]:
        sound = -(-self.sound_rows * self.sound_channels // (self.t * self.h * self.w))
        return self.channels + sound, self.t, self.h, self.w

    def pack(self, video: Tensor, sound: Tensor, rest: Tensor | None = None) -> Tensor:
        """(C, T, h, w) of ``video`` (channels, T, h, w), ``sound`` (sound_rows, sound_channels) times k, and what fills the
        last channel; zeros where None."""
        sound = sound.flatten()
        room = (self.state[0] - self.channels) * self.t * self.h * self.w - len(sound)
        behind = F.pad(sound, (0, room)) if rest is None else torch.cat([sound, rest])
        return torch.cat([video, behind.view(-1, self.t, self.h, self.w)])

    def unpack(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `pack` was given."""
        behind = z[self.channels :].flatten()
        sound = self.sound_rows * self.sound_channels
        return z[: self.channels], behind[:sound].view(self.sound_rows, -1), behind[sound:]


def to_rows(video: Tensor) -> Tensor:
    """Tokens (T h w, C p p) of latents (C, T, H, W)."""
    return rearrange(video, "c t (h p) (w q) -> (t h w) (c p q)", p=PATCH, q=PATCH)


def from_rows(rows: Tensor, shape: ClipShape) -> Tensor:
    h, w = shape.h // PATCH, shape.w // PATCH
    return rearrange(rows, "(t h w) (c p q) -> c t (h p) (w q)", h=h, w=w, p=PATCH, q=PATCH)


@dataclass(frozen=True)
class TwoLevels:
    """The pictures' and the sound's noise at one time, from the pictures' level ``s`` (scalar tensor): ``ratio`` is the
    sound's level over the pictures'."""

    s: Tensor
    ratio: Tensor
    k: float

    @classmethod
    def at(cls, s: Tensor, shift: float, sound_shift: float) -> TwoLevels:
        u = s / (shift - (shift - 1) * s)
        ratio = sound_shift * (1 + (shift - 1) * u) / (shift * (1 + (sound_shift - 1) * u))
        return cls(s, ratio, shift / sound_shift)

    @property
    def times(self) -> Tensor:
        """The network's (2,), which counts from noise, 0, to data, 1."""
        return 1 - torch.stack([self.s, self.ratio * self.s])

    def flow(self, velocity: Tensor) -> Tensor:
        """What our samplers call flow, e - x, of the network's velocity towards the data."""
        return -velocity

    def sound_flow(self, velocity: Tensor, carried: Tensor) -> Tensor:
        """e - k x, of the network's velocity and of the sound as it is carried: (carried - k x) / s written out, in which
        the noise has cancelled."""
        return self.ratio * ((1 - self.k) * carried - self.k * velocity)
