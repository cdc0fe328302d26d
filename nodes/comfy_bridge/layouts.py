"""Where the video tokens of each model family stand in the sequence that its layers attend over.

Shapes: latents (B, C, T, H, W), given by their size. Video tokens stand in the order t, h, w in every family here.
Frames and tokens that condition the video (reference images, guides, text) become prefix or suffix: they attend to
everything and everything attends to them, whatever the plan says. As ordinary frames they would reach no other frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...efficient_vdit_core.attention import TokenLayout
from ...efficient_vdit_core.tiles import TokenGrid

Conds = Mapping[str, Any]


class UnknownLayout(ValueError):
    """The inputs of a forward do not say where the video tokens stand; the text says why."""


@dataclass(frozen=True)
class Tokens:
    """One forward: the layout, and the lengths of the ``others`` (text, audio) that have attention of their own.

    ``padding`` is where masked text stands.
    """

    layout: TokenLayout
    others: tuple[int, ...] = ()
    padding: range = range(0)


# (size of the latents, diffusion model, text (B, L, C), the other conditionings by name) -> Tokens
LayoutRule = Callable[[Sequence[int], Any, Tensor | None, Conds], Tokens]


def patch_grid(size: Sequence[int], patch: Sequence[int]) -> TokenGrid:
    """The token grid of latents (..., T, H, W); incomplete patches are padded by the models, so they count."""
    t, h, w = (math.ceil(side / p) for side, p in zip(size[-3:], patch, strict=True))
    return TokenGrid(t, h, w)


def _length(tokens: Tensor | None) -> int:
    """L of (B, L, C), 0 for None."""
    return 0 if tokens is None else tokens.shape[-2]


def _tokens(latents: Tensor | None, patch: Sequence[int]) -> int:
    """How many tokens latents (B, C, T, H, W) become, 0 for None."""
    return 0 if latents is None else patch_grid(latents.shape, patch).tokens


def open_sora_plan(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """The video alone. The model says itself which calls cross to the text, so that its length need not tell."""
    return Tokens(TokenLayout(patch_grid(size, model.patch_size)))


def wan(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[reference image of ref_conv | video | frames of time_dim_concat (Phantom) | context_latents (Bernini)].

    CLIP tokens, of two images for WanDancer, and text are crossed with.
    """
    reference, prefix = conds.get("reference_latent"), 0
    if reference is not None and getattr(model, "ref_conv", None) is not None:
        prefix = math.prod(side // p for side, p in zip(reference.shape[-2:], model.patch_size[1:], strict=True))
    appended = (conds.get("time_dim_concat"), *(conds.get("context_latents") or ()))
    suffix = sum(_tokens(latents, model.patch_size) for latents in appended)
    image = _length(conds.get("clip_fea")) + _length(conds.get("clip_fea_ref"))
    return Tokens(
        TokenLayout(patch_grid(size, model.patch_size), prefix, suffix), (_length(text), image, _length(text) + image)
    )


def wan_animate(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[reference image | video]: the pose, which is added to the video alone, is as much shorter."""
    found, pose = wan(size, model, text, conds), conds.get("pose_latents")
    grid = found.layout.grid
    if pose is None or pose.shape[2] != grid.t - 1 or grid.t < 2:
        return found
    return replace(found, layout=TokenLayout(TokenGrid(grid.t - 1, grid.h, grid.w), grid.tokens_per_frame))


def wan_reference(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[video | reference frames] (HuMo), and behind them the packed motion frames of S2V."""
    found, suffix = wan(size, model, text, conds), 0
    reference, motion = conds.get("reference_latent"), conds.get("reference_motion")
    if reference is not None:
        suffix += math.prod(side // p for side, p in zip(reference.shape[-3:], model.patch_size, strict=True))
    if motion is not None:
        packer = model.frame_packer
        parts = zip(packer.zip_frame_buckets, (packer.proj, packer.proj_2x, packer.proj_4x), strict=True)
        for frames, projection in parts:
            sides = zip((frames, *motion.shape[-2:]), projection.kernel_size, strict=True)
            suffix += math.prod(side // p for side, p in sides)
    layout = found.layout
    return Tokens(TokenLayout(layout.grid, 0, layout.suffix + suffix), found.others)


def wan_pose(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[reference frames | video | frames of the pose] (SCAIL), the pose in a size of its own."""
    found, patch = wan(size, model, text, conds), model.patch_size
    reference, pose = _tokens(conds.get("reference_latent"), patch), _tokens(conds.get("pose_latents"), patch)
    return Tokens(TokenLayout(found.layout.grid, reference, found.layout.suffix + pose), found.others)


def hunyuan_video(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[text, ByT5 and vision tokens | reference image | video], in ComfyUI before 0.14 with the text last.

    The token refiner attends over the text alone.
    """
    if len(model.patch_size) != 3:
        raise UnknownLayout("the model makes images")
    grid, image = patch_grid(size, model.patch_size), _tokens(conds.get("ref_latent"), model.patch_size)
    words = beside = _length(text)
    for name, module in (("txt_byt5", "byt5_in"), ("clip_fea", "vision_in")):
        beside += _length(conds.get(name)) if getattr(model, module, None) is not None else 0
    text_last = getattr(model.double_blocks[0], "flipped_img_txt", False)
    layout = TokenLayout(grid, image, beside) if text_last else TokenLayout(grid, beside + image)
    padding = range(0)
    if beside == words:  # with other tokens among the text ComfyUI masks none
        end = layout.tokens if text_last else words
        padding = range(end - _padding(conds.get("attention_mask"), words), end)
    return Tokens(layout, (words,), padding)


def _padding(mask: Tensor | None, length: int) -> int:
    """How many tokens at the end of the text a mask (B, length) of 1 and 0 leaves out; 0 where it says anything
    else."""
    if mask is None or mask.is_floating_point() or mask.shape[-1] != length:
        return 0
    real = int(mask.flatten()[:length].sum())
    expected = torch.arange(length, device=mask.device) < real
    return length - real if bool((mask.bool() == expected).all()) else 0


def ltx_video(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[video | guide frames]; versions that split the forward into steps drop the guide tokens that the mask marks."""
    grid, keyframes = patch_grid(size, (1, 1, 1)), conds.get("keyframe_idxs")
    if keyframes is None or not keyframes.shape[2]:
        return Tokens(TokenLayout(grid), (_length(text),))
    per_frame = grid.tokens_per_frame
    video_frames = grid.t - math.ceil(keyframes.shape[2] / per_frame)
    if video_frames < 1:
        raise UnknownLayout(f"its {keyframes.shape[2]} guide tokens leave no frame of the video")
    suffix = grid.tokens - video_frames * per_frame
    mask = conds.get("denoise_mask")
    if mask is not None and hasattr(model, "_process_input"):
        dropped = (mask[0] < 0).any(0).flatten()
        before, behind = (int(part.sum()) for part in dropped.tensor_split([video_frames * per_frame]))
        if before:
            raise UnknownLayout(f"{before} tokens of the video itself are dropped")
        suffix -= behind
    return Tokens(TokenLayout(TokenGrid(video_frames, grid.h, grid.w), 0, suffix), (_length(text),))


def ltx_audio_video(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """As ltx_video; the audio, latents (B, C, L, F), has its own stream of L tokens, a reference voice before them."""
    video, voice = ltx_video(size, model, text, conds), conds.get("ref_audio")
    before = 0 if voice is None else _length(voice["tokens"])
    audio = tuple(before + shape[2] for shape in conds.get("latent_shapes", ())[1:])
    return Tokens(video.layout, video.others + audio)


def cogvideox(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[text | video]; version 1.5 joins two latent frames in a token."""
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    return Tokens(TokenLayout(patch_grid(size, patch), _length(text)))


def mochi(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[video | real text tokens]."""
    suffix = min(int(conds.get("num_tokens", 256)), _length(text))
    return Tokens(TokenLayout(patch_grid(size, (1, model.patch_size, model.patch_size)), 0, suffix))


def cosmos(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """The video alone; the text is crossed with."""
    patch = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    return Tokens(TokenLayout(patch_grid(size, patch)), (_length(text),))


def kandinsky5(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """The video alone; the text blocks before it attend over the text."""
    return Tokens(TokenLayout(patch_grid(size, model.patch_size)), (_length(text),))


def kandinsky6(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[video | reference frame], the sound, latents (B, L, C), in a stream of its own.

    Kandinsky's own nodes append the reference to the latents as a last frame and say so.
    """
    grid, suffix = patch_grid(size, model.patch_size), _tokens(conds.get("k6_reference"), model.patch_size)
    if conds.get("k6_reference_tail"):
        if grid.t < 2:
            raise UnknownLayout("its reference leaves no frame of the video")
        grid, suffix = TokenGrid(grid.t - 1, grid.h, grid.w), grid.tokens_per_frame
    words = (_length(text), _length(conds.get("k6_audio_context")))
    audio = tuple(shape[1] for shape in conds.get("latent_shapes", ())[1:])
    return Tokens(TokenLayout(grid, 0, suffix), words + audio)


# What MiniMax-H3 packs before the target video; newer kinds may stand elsewhere or mean something else.
_H3_BEFORE = {"text", "cond", "cond_audio", "ref_img", "ref_audio", "audio"}


def minimax_h3(size: Sequence[int], model: Any, text: Tensor | None, conds: Conds) -> Tokens:
    """[text with vision tokens | keyframes and guides or references, with their sound | audio | video].

    The model packs them by a table of segments (start, stop, kind), which ComfyUI makes once a run and hands to each
    forward. The text's refiner attends over the text alone.
    """
    grid = patch_grid(size, model.patch_size)
    payload: Mapping[str, Any] = conds.get("minimax_payload") or {}
    segments: list[tuple[int, int, str]] = list(getattr(payload.get("layout"), "segments", ()))
    if not segments:
        raise UnknownLayout("the table of its packed sequence is missing")
    start, stop, last = segments[-1]
    if last != "video":
        raise UnknownLayout(f"its packed sequence ends in {last}, not in the video")
    unknown = sorted({kind for _, _, kind in segments[:-1]} - _H3_BEFORE)
    if unknown:
        raise UnknownLayout(f"its packed sequence has parts of an unknown kind ({', '.join(unknown)})")
    if stop - start != grid.tokens:
        raise UnknownLayout(
            f"its packed video has {stop - start} tokens, and {grid.t} frames of {grid.tokens_per_frame} are {grid.tokens}"
        )
    return Tokens(TokenLayout(grid, start), (_length(text),))
