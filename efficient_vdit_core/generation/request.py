"""What a user may ask of the pipeline, checked before any long work."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from ..limits.memory import check_memory
from ..limits.numbers import MAX_TORCH_SEED, number, whole
from ..limits.quote import quoted
from ..limits.texts import checked_prompt

SAMPLERS = ("consistency", "ddim", "euler_ancestral")
DEFAULT_STEPS = {"consistency": 20, "ddim": 100, "euler_ancestral": 100}
# Of the built-in model, and as the reference model's makers recommend, who ask for less of their 29x480p.
TINY_GUIDANCE, GUIDANCE, GUIDANCE_29X480P = 3.0, 7.5, 2.5
MAX_STEPS = 1000
# diffusers gives a single step the timestep of the clean end, 0.
FEWEST_STEPS = {"consistency": 1, "ddim": 2, "euler_ancestral": 2}
FULL_NOISE = 900  # timestep from which on 2 % of the data are left at most
FITTING_DDIM_STEPS = "10, 20, 25, 50, 100, 250, 500"
MAX_GUIDANCE = 1000.0
MAX_FRAMES = 4 * (1024 - 1) + 1  # a plan has at most 1024 latent frames
MAX_SIDE = 4096  # pixels
SPACE, TIME = 8, 4  # pixels and frames that one latent stands for
WHOLE = ("frames", "height", "width", "steps", "segments", "seed")
SIZE_MULTIPLE = 16  # SPACE times the transformer's patch of 2


@dataclass(frozen=True)
class VideoRequest:
    """One video. `check` fills in what is None and refuses what cannot be made.

    frames: 4 k + 1, as the VAE turns k + 1 latent frames into 4 k + 1. height, width: pixels, multiples of 16.
    steps: evaluations of the model (two forwards each with guidance); ddim and euler_ancestral take 2 at least.
    guidance: classifier-free, 1 is off, and then `check` empties ``negative``, which the model is never asked with.
    segments, gamma: of the consistency sampler; segments None means one for each step.
    """

    prompt: str
    negative: str = ""
    frames: int = 29
    height: int = 64
    width: int = 64
    steps: int | None = None
    guidance: float = 1.0
    sampler: str = "consistency"
    segments: int | None = None
    gamma: float = 0.0
    seed: int = 0

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent video."""
        return (self.frames - 1) // TIME + 1, self.height // SPACE, self.width // SPACE

    def describe(self) -> str:
        """Its size, as a message begins."""
        return f"A video of {self.frames} frames of {self.width}x{self.height}"

    def remarks(self) -> list[str]:
        """What is allowed but probably not meant."""
        found = []
        if not self.prompt.strip():
            found.append("The prompt is empty, so nothing tells the model what to show; give it a text.")
        if self.guidance == 1.0 and self.negative:
            found.append("The negative prompt does nothing: guidance is 1, so that the model is never asked with it.")
        if self.sampler != "consistency" and (self.segments is not None or self.gamma != 0.0):
            found.append(f"segments and gamma belong to the consistency sampler; {self.sampler} ignores them.")
        if self.sampler == "ddim" and (begin := _ddim_begin(self.steps)) < FULL_NOISE:
            found.append(
                f"ddim in {self.steps} steps begins at {begin} of {MAX_STEPS - 1}, below pure noise, so expect less; with "
                f"{FITTING_DDIM_STEPS} it begins at {FULL_NOISE} or above."
            )
        return found

    def check(self) -> VideoRequest:
        """The complete request; ValueError says what does not fit and what would."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {quoted(self.sampler)}.")
        whole_numbers = {name: _whole(getattr(self, name), name) for name in WHOLE}
        prompts = {"prompt": checked_prompt(self.prompt), "negative": checked_prompt(self.negative)}
        complete = replace(self, **prompts, **whole_numbers)
        if complete.steps is None:
            complete = replace(complete, steps=DEFAULT_STEPS[self.sampler])
        _check_size(complete)
        # As float32 from the VAE, then as bytes; what the model itself takes comes on top.
        check_memory(
            5 * 3 * self.frames * self.height * self.width, self.describe(), "Use fewer frames or a smaller size."
        )
        return _check_sampling(complete)


def _ddim_begin(steps: int | None) -> int:
    """The first timestep of DDIM's own spacing, which ends at 0 and so begins below the last one."""
    steps = steps or DEFAULT_STEPS["ddim"]
    return (steps - 1) * (MAX_STEPS // steps)


def _whole(value: Any, name: str) -> int | None:
    """An int, of NumPy's too; None stays."""
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {quoted(value)}, expected a whole number.") from None


def _check_size(request: VideoRequest) -> None:
    if request.frames > MAX_FRAMES:
        whole(request.frames, "frames", 1, MAX_FRAMES, "No plan goes further; make several clips.")
    below = max(0, request.frames - 1) // TIME * TIME + 1
    if request.frames < 1 or request.frames != below:
        choice = f"{below} or {below + TIME}" if request.frames > 1 else "1"
        raise ValueError(
            f"frames must be 4k+1 (1, 5, ..., 29, ..., 93), got {quoted(request.frames)}: the VAE turns one latent frame into "
            f"four, after the first; use {choice}."
        )
    for name in ("height", "width"):
        size = getattr(request, name)
        if size > MAX_SIDE:
            whole(size, name, SIZE_MULTIPLE, MAX_SIDE, "Make the video smaller and scale it up afterwards.")
        below = size // SIZE_MULTIPLE * SIZE_MULTIPLE
        if size < SIZE_MULTIPLE or size != below:
            choice = f"{below} or {below + SIZE_MULTIPLE}" if size > SIZE_MULTIPLE else str(SIZE_MULTIPLE)
            raise ValueError(
                f"{name} must be a multiple of {SIZE_MULTIPLE}, got {quoted(size)}: one token covers "
                f"{SIZE_MULTIPLE}x{SIZE_MULTIPLE} pixels; use {choice}."
            )


def _check_sampling(request: VideoRequest) -> VideoRequest:
    steps = request.steps or 0
    fewest = FEWEST_STEPS[request.sampler]
    if 1 <= steps < fewest:
        raise ValueError(
            f"steps must lie in {fewest}..{MAX_STEPS} for {request.sampler}, got {steps}: a single step would begin at the clean end "
            f"and leave the noise as it is; use {fewest} or more, or the sampler consistency."
        )
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"steps must lie in 1..{MAX_STEPS}, got {quoted(steps)}: the model knows {MAX_STEPS} noise levels."
        )
    number(request.guidance, "guidance", 0, MAX_GUIDANCE, why="1 switches it off.")
    if request.guidance == 1.0:
        request = replace(request, negative="")
    if not 0 <= request.seed <= MAX_TORCH_SEED:
        raise ValueError(
            f"seed must lie in 0..{MAX_TORCH_SEED:,}, got {quoted(request.seed)}: PyTorch repeats smaller ones above that."
        )
    if request.sampler != "consistency":
        return replace(request, segments=None, gamma=0.0)
    from ..sampling import segment_edges

    segments = steps if request.segments is None else request.segments
    segment_edges(segments, steps)  # refuses counts out of range
    if not 0.0 <= request.gamma <= 1.0:
        raise ValueError(
            f"gamma must lie in 0..1, got {quoted(request.gamma)}: 0 jumps deterministically, 1 re-noises fully."
        )
    return replace(request, segments=segments)
