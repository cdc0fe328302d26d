"""Paired metrics of two clips: the same seed, prompt and size, made with one thing changed, such as the attention.

Frames are (F, H, W, 3), RGB; 1.0 is white. Everything runs frame by frame, so memory is that of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage.json_text import finite
from .perceptual import Perceptual, find_lpips

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III-C.
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2
MIN_SIDE = 2 * _SSIM_RADIUS + 1


@dataclass(frozen=True)
class ClipComparison:
    """Two clips a and b, of ``frames`` frames of ``width`` x ``height`` pixels.

    psnr: dB, from the mean squared error of the whole clip; inf where the clips are identical. psnr_frames: the same of
        each frame. ssim, ssim_frames: -1 to 1, 1 is identical.
    temporal_psnr: dB, of the differences between successive frames: how alike the motion is, whatever a constant error.
        None for a single frame, as are the motions.
    motion_a, motion_b: mean absolute difference of successive frames, as a share of full range, 0 to 1.
    motion_ratio: b over a; below 1 where b moves less. None where a stands still.
    lpips: 0 is identical, mean over frames; None where it is not available, and ``lpips_note`` says why.
    """

    frames: int
    height: int
    width: int
    psnr: float
    ssim: float
    temporal_psnr: float | None
    motion_a: float | None
    motion_b: float | None
    motion_ratio: float | None
    lpips: float | None
    lpips_note: str
    psnr_frames: tuple[float, ...]
    ssim_frames: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null there, and ``identical`` tells an infinite PSNR from a missing one."""
        values = finite(asdict(self))
        return {**values, "identical": math.isinf(self.psnr)}


def compare_clips(
    a: Iterable[Tensor], b: Iterable[Tensor], *, lpips: bool = True, progress: Callable[[int, int], None] | None = None
) -> ClipComparison:
    """Compares b with a.

    Args:
        a, b: (F, H, W, 3) each, or their frames one by one, as of a file that need not fit into memory: uint8, or float
            with 0..1 from black to white; values beyond are clipped as a screen does.
        lpips: measure it too where the package ``lpips`` and its weights are on this machine.
        progress: called with (frames done, all frames, 0 where that is not known yet) after each; what it raises ends
            the comparison.

    Raises:
        ValueError: the clips are no videos, differ in size or length, hold NaN, or are smaller than 11 pixels.
    """
    total = 0
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _check(a, b)
        total = len(a)
    perceptual: Perceptual | None = None if lpips else Perceptual(None, "not asked for")
    errors, similar, temporal, motions, distances = [], [], [], [], []
    before: tuple[Tensor, Tensor] | None = None
    height = width = 0
    for index, pair in enumerate(_pairs(a, b)):
        perceptual = perceptual or find_lpips(pair[0].device)
        height, width = pair[0].shape[:2]
        now = _finite_unit(pair[0], index, "first"), _finite_unit(pair[1], index, "second")
        errors.append(_mean_square(now[0] - now[1]))
        similar.append(ssim(*now))
        if before is not None:
            steps = now[0] - before[0], now[1] - before[1]
            temporal.append(_mean_square(steps[0] - steps[1]))
            motions.append([float(step.abs().mean(dtype=torch.float64)) for step in steps])
        if perceptual.distance is not None:
            distances.append(perceptual.distance(*now))
        before = now
        if progress is not None:
            progress(index + 1, total)
    assert perceptual is not None, "a clip has a frame"
    motion_a, motion_b = map(_mean, zip(*motions, strict=True)) if motions else (None, None)
    return ClipComparison(
        frames=len(errors),
        height=height,
        width=width,
        psnr=_psnr(_mean(errors)),
        ssim=_mean(similar),
        temporal_psnr=_psnr(_mean(temporal)) if temporal else None,
        motion_a=motion_a,
        motion_b=motion_b,
        motion_ratio=motion_b / motion_a if motion_a and motion_b is not None else None,
        lpips=_mean(distances) if distances else None,
        lpips_note=perceptual.note,
        psnr_frames=tuple(map(_psnr, errors)),
        ssim_frames=tuple(similar),
    )


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two frames (H, W, 3) in 0..1: 11 x 11 Gaussian window, each channel by itself, their
    mean.

    Only windows that lie within the frame count. The same as scikit-image with gaussian_weights, sigma 1.5 and
    use_sample_covariance=False.
    """
    offsets = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, device=a.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    weights = (weights / weights.sum()).to(a.dtype)
    x, y = (frame.movedim(-1, 0)[:, None] for frame in (a, b))  # channels as a batch of grey images

    def smooth(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (var_x + var_y + _SSIM_C2)
    return float((luminance * structure).mean(dtype=torch.float64))


def _check(a: Tensor, b: Tensor) -> None:
    for name, clip in (("first", a), ("second", b)):
        if clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
            raise ValueError(
                f"The {name} clip has shape {tuple(clip.shape)}, expected (frames, height, width, 3): an RGB video."
            )
        if min(clip.shape[1:3]) < MIN_SIDE:
            raise ValueError(
                f"The {name} clip is {clip.shape[2]}x{clip.shape[1]} pixels, expected at least {MIN_SIDE} on each side: "
                "SSIM looks through a window of that size. Compare larger clips."
            )
    if a.shape[1:3] != b.shape[1:3]:
        raise ValueError(
            f"The first clip is {a.shape[2]}x{a.shape[1]} pixels and the second {b.shape[2]}x{b.shape[1]}: each pixel is "
            "compared with its partner. Make both with the same settings and seed."
        )
    if len(a) != len(b):
        _refuse_lengths(len(a), len(b))


def _refuse_lengths(a: int, b: int) -> NoReturn:
    raise ValueError(
        f"The first clip has {a} frames and the second {b}: each frame is compared with its partner. "
        "Make both with the same settings and seed, or cut the longer one."
    )


def _pairs(a: Iterable[Tensor], b: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Frame by frame, where the first clip is; what does not fit is refused at the first pair, another length where one of them
    ends."""
    count, first, second = 0, iter(a), iter(b)
    while True:
        one, two = next(first, None), next(second, None)
        if one is None and two is None:
            return
        if one is None or two is None:
            longer = count + 1 + sum(1 for _ in (second if one is None else first))
            _refuse_lengths(*((count, longer) if one is None else (longer, count)))
        if not count:
            _check(one[None], two[None])
        count += 1
        # ComfyUI may keep what it decoded on the GPU, and a file is read into main memory.
        yield one, two.to(one.device)


def unit(frame: Tensor) -> Tensor:
    """One frame, float32 in 0..1."""
    return frame.float() / 255 if frame.dtype == torch.uint8 else frame.float().clamp(0, 1)


def _finite_unit(frame: Tensor, index: int, name: str) -> Tensor:
    if not bool(frame.isfinite().all()):
        raise ValueError(
            f"Frame {index} of the {name} clip holds NaN or infinite values, expected 0 to 1. Its generation failed."
        )
    return unit(frame)


def _mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


def _mean(values: Any) -> float:
    return math.fsum(values) / len(values)


def _psnr(mean_square: float) -> float:
    return 0.0 - 10 * math.log10(mean_square) if mean_square else math.inf  # of black against white 0, not -0
