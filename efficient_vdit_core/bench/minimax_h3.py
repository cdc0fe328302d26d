"""MiniMax-H3's step: the bound by FLOPs for the clips people make, and a measurement at small depth.

The sizes are the model's own (``comfy.ldm.minimax.model``): 50 blocks of 56 heads x 128 on a width of 5376, SwiGLU of
14336; a token is 32x32 pixels; clips of 17 n + 5 frames at 24 a second are 5 n + 2 latent frames; sound has 40 latents
a second, two tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..attention import TokenLayout
from ..attention.report.cost import StepCost
from ..tiles import TilePattern, TokenGrid

HEADS, HEAD_DIM, DEPTH, WIDTH, FEED_FORWARD = 56, 128, 50, 5376, 14336
INNER = HEADS * HEAD_DIM
# q, k, v and output projections, and the three matrices of SwiGLU.
WEIGHTS_PER_BLOCK = 4 * WIDTH * INNER + 3 * WIDTH * FEED_FORWARD
TEXT = 300  # tokens of a long prompt
FRAMES_PER_SECOND, SOUND_PER_SECOND = 24, 40


@dataclass(frozen=True)
class Clip:
    """A video to make: ``pixels`` = (width, height), ``length`` in frames; ``references`` = tokens of references before
    it."""

    pixels: tuple[int, int]
    length: int
    references: int = 0

    @property
    def frames(self) -> int:
        """Latent frames."""
        return (self.length - 5) // 17 * 5 + 2

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return (self.pixels[0] // 32) * (self.pixels[1] // 32)

    @property
    def prefix(self) -> int:
        """Tokens before the video: text, references and sound."""
        return TEXT + self.references + 2 * round(self.length / FRAMES_PER_SECOND * SOUND_PER_SECOND)

    @property
    def layout(self) -> TokenLayout:
        grid = TokenGrid(self.frames, self.pixels[1] // 32, self.pixels[0] // 32)
        return TokenLayout(grid, self.prefix)

    def cost(self, depth: int = DEPTH) -> StepCost:
        return StepCost(self.layout, HEADS, HEAD_DIM, depth, depth * WEIGHTS_PER_BLOCK)


_LENGTHS = {"5s": 124, "10s": 243, "15s": 362}
_PIXELS = {"864x480": (864, 480), "1344x768": (1344, 768), "1920x1088": (1920, 1088)}
CLIPS = {f"{size}-{name}": Clip(p, n) for size, p in _PIXELS.items() for name, n in _LENGTHS.items()}
# With what people put before the video: a first frame, or a reference video of 5 s with its sound.
CLIPS["1344x768-5s-first-frame"] = Clip((1344, 768), 124, references=2 * 1008)
CLIPS["1344x768-5s-reference-video"] = Clip((1344, 768), 124, references=37 * 1008 + 414)
# Small enough to be measured on a CPU: the same block on a clip of a fifth of a second.
CLIPS["64x64-tiny"] = Clip((64, 64), 22)


def bounds(clip: Clip) -> list[dict[str, Any]]:
    """One row a pattern: what it leaves of the attention, and the most that a step gains, by FLOPs alone.

    Attention at the matrices' FLOP/s, and at twice that (INT8 attention beside bf16 matrices).
    """
    cost, frames = clip.cost(), clip.frames
    rows = []
    for count in sorted({1, 2, -(-frames // 10), -(-frames // 5)}):
        pattern = TilePattern(count)
        density = pattern.flop_density(clip.layout.grid, clip.prefix)
        rows.append(
            {
                "pattern": pattern.name(frames),
                "tokens": clip.layout.tokens,
                "attention_pflop": cost.attention / 1e15,
                "matrices_pflop": cost.matrices / 1e15,
                "attention_share": cost.attention_share(),
                "attention_left": density,
                "bound": cost.bound(density),
                "bound_with_int8_attention": cost.bound(density, attention_rate=2.0),
            }
        )
    return rows


def measure(
    clip: str, depth: int, device: torch.device, *, references: tuple[int, ...], dtype: str, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Times ``depth`` of diffusers' own blocks with random weights on a clip of ``CLIPS``, dense and under uniform plans
    (`time_plans`)."""
    from .blocks import drawn, time_plans

    torch.manual_seed(seed)
    with drawn(device, getattr(torch, dtype)):
        model = _model(depth).to(device, getattr(torch, dtype)).eval()
    inputs = _inputs(CLIPS[clip], device, getattr(torch, dtype))
    rows = time_plans(model, inputs, CLIPS[clip].cost(depth), device, references=references, repeats=repeats)
    return [{**row, "dtype": dtype} for row in rows]


def _model(depth: int) -> Any:
    """diffusers' transformer at full width; what runs once a forward, or over the text alone, is kept small."""
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_layers=depth, num_refiner_layers=1, text_dim=64, time_embed_hidden_dim=64, time_embed_dim=16
    )


def _inputs(clip: Clip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Random rows of text, sound and video in the order of the packed sequence."""
    layout, sound = clip.layout, clip.prefix - TEXT - clip.references
    kinds = torch.cat(
        [torch.full((n,), tag) for n, tag in ((TEXT, 1), (clip.references + sound, 2), (layout.grid.tokens, 0))]
    ).to(device)
    positions = torch.zeros(layout.tokens, 3, device=device)
    axes = [torch.arange(n, device=device) for n in (layout.grid.t, layout.grid.h, layout.grid.w)]
    positions[layout.prefix :] = torch.cartesian_prod(*axes).to(positions.dtype)
    video, text, audio = ((kinds == tag).nonzero()[:, 0] for tag in (0, 1, 2))
    return {
        "hidden_states": torch.randn(1, len(video), 96, device=device, dtype=dtype),
        "audio_hidden_states": torch.randn(1, len(audio), 32, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, len(text), 64, device=device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "timestep_indices": torch.zeros_like(kinds),
        "token_tags": kinds,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
