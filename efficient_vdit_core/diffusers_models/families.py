"""The diffusers transformers whose self-attention is understood: a row for each, one layout rule for each.

A layout rule reads the arguments of one call of ``transformer.forward`` and says where the video tokens stand in the
sequence of each batch entry. In every family here they stand in the order t, h, w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import TokenLayout
from ..tiles import TokenGrid


@dataclass(frozen=True)
class SequenceLayout:
    """``tokens`` in each layer's sequence, and of each batch entry the part that is not padding.

    ``entries`` holds one layout where all entries of the batch are alike. With ``masked`` the model passes a mask that
    hides the padding, and nothing else, from attention.
    """

    tokens: int
    entries: tuple[TokenLayout, ...]
    masked: bool = False

    @property
    def grid(self) -> TokenGrid:
        return self.entries[0].grid


# (the forward's arguments by name, the transformer's config) -> the layout, or None where the arguments do not tell it
LayoutRule = Callable[[Mapping[str, Any], Any], "SequenceLayout | None"]
# the forward's arguments by name -> the video's noise level, 0 (none) to 1 (noise alone)
LevelRule = Callable[[Mapping[str, Any]], float]


def _of_a_thousand(arguments: Mapping[str, Any]) -> float:
    """Timesteps on the scale of their training. With one for each token, conditioning frames have 0; the noisy ones
    count."""
    return float(torch.as_tensor(arguments["timestep"]).max()) / 1000


def _of_one(arguments: Mapping[str, Any]) -> float:
    """Timesteps are noise levels themselves, but for those of EDM schedulers, whose logarithms alone do not tell which."""
    level = float(torch.as_tensor(arguments["timestep"]).max())
    if not 0.0 <= level <= 1.0:
        raise ValueError(
            f"The timestep is {level:g}, expected a noise level from 0 to 1: this pipeline's scheduler, as that of Cosmos 1.0, gives the "
            "model another number. Apply the plan with start 0 and end 1."
        )
    return level


def _minimax_h3_level(arguments: Mapping[str, Any]) -> float:
    """The distinct timesteps of the sequence run from 0 (noise) to 1; its last row is the video's."""
    return 1.0 - float(arguments["timestep"][arguments["timestep_indices"][-1]])


@dataclass(frozen=True)
class DiffusersFamily:
    """How one class of transformers keeps its layers and orders its tokens.

    Attributes:
        name: as in plan files.
        attention: (list of blocks, name of their self-attention), in the order of the layers.
        layout: where the video tokens stand.
        heads: the number of attention heads, from the config.
        level: the noise level of a forward.
        second: blocks beside the layers that follow the pattern of one each: (layer, self-attention).
    """

    name: str
    attention: tuple[tuple[str, str], ...]
    layout: LayoutRule
    heads: Callable[[Any], int] = lambda config: config.num_attention_heads
    level: LevelRule = _of_a_thousand
    second: Callable[[Any], list[tuple[int, Any]]] = lambda transformer: []

    def depth(self, transformer: nn.Module) -> int:
        """The number of layers."""
        return len([block for blocks, _ in self.attention for block in getattr(transformer, blocks)])

    def modules(self, transformer: nn.Module) -> list[tuple[int, Any]]:
        """Each self-attention over the video and the layer whose pattern it follows."""
        layers = [getattr(block, name) for blocks, name in self.attention for block in getattr(transformer, blocks)]
        return [*enumerate(layers), *self.second(transformer)]


def find_family(transformer: nn.Module) -> DiffusersFamily:
    """The row of this transformer. Exact classes only, as a subclass may order its tokens in another way; else
    ValueError."""
    name = type(transformer).__name__
    if name in LEFT_DENSE:
        raise ValueError(f"The transformer is a {name}, which stays dense: {LEFT_DENSE[name]}. Use it without a plan.")
    if name not in FAMILIES:
        raise ValueError(
            f"The transformer is a {name}, and where its video tokens stand is not known. Known are {', '.join(FAMILIES)}; "
            "pass pipe.transformer of such a pipeline."
        )
    return FAMILIES[name]


def _alike(grid: TokenGrid, prefix: int = 0) -> SequenceLayout:
    return SequenceLayout(prefix + grid.tokens, (TokenLayout(grid, prefix=prefix),))


def _grid(latents: Tensor, patch: tuple[int, int, int], axes: tuple[int, int, int] = (2, 3, 4)) -> TokenGrid:
    """The grid of whole patches: these models drop the rows and columns that do not fill one."""
    return TokenGrid(*(latents.shape[axis] // size for axis, size in zip(axes, patch, strict=True)))


def _cogvideox(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    """[text | video]; latents (B, T, C, H, W)."""
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    return _alike(
        _grid(arguments["hidden_states"], patch, axes=(1, 3, 4)), prefix=arguments["encoder_hidden_states"].shape[1]
    )


def _hunyuan_video(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    """[video | text | padding], with another length of text in each batch entry; latents (B, C, T, H, W)."""
    grid = _grid(arguments["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))
    # Read from the device once a forward, not once a layer. In integers, as the model counts: some pipelines give the mask in
    # bf16, whose sums are not exact above 256.
    lengths = arguments["encoder_attention_mask"].sum(dim=1, dtype=torch.int).tolist()
    entries = tuple(TokenLayout(grid, suffix=length) for length in lengths)
    alike = len(set(entries)) == 1
    return SequenceLayout(
        grid.tokens + arguments["encoder_hidden_states"].shape[1], entries[:1] if alike else entries, masked=True
    )


def _ltx(arguments: Mapping[str, Any], config: Any) -> SequenceLayout | None:
    """Latents come as tokens (B, N, C). Where the video stands is told by its frames, height and width, or by the tokens'
    coordinates: (B, 3, N), or (B, 3, N, 2) of LTX-2, the time first.

    Conditioning frames beside it are told by coordinates alone. They stand before the video (LTX-Video) or behind it (LTX-2).
    """
    sizes, coordinates = [arguments.get(n) for n in ("num_frames", "height", "width")], arguments.get("video_coords")
    # LTX-Video's pipeline for long clips says 1, 1, 1 beside the coordinates.
    told = None if None in sizes or sizes == [1, 1, 1] else TokenGrid(*map(int, sizes))  # pyright: ignore[reportArgumentType]
    if coordinates is None or (told and coordinates.shape[2] < told.tokens):  # then attention will be of another length
        return told and _alike(told)
    times = coordinates[:, 0] if coordinates.ndim == 3 else coordinates[:, 0, :, 0]
    # Read from the device once a forward, not once a layer.
    if not torch.equal(times, times[:1].expand_as(times)):
        return None
    return _most_frames(times[0]) if told is None else _first_frames(told, times[0])


def _first_frames(grid: TokenGrid, times: Tensor) -> SequenceLayout | None:
    """The video of ``grid`` in front of other tokens; None where the times (N,) of its own do not say so."""
    own = times[: grid.tokens]
    of_frame = own.view(grid.t, -1)
    in_order = torch.equal(of_frame, of_frame[:, :1].expand_as(of_frame)) and bool((of_frame[:, 0].diff() > 0).all())
    return SequenceLayout(len(times), (TokenLayout(grid, suffix=len(times) - len(own)),)) if in_order else None


def _most_frames(of_tokens: Tensor) -> SequenceLayout | None:
    """The video as the longest run of frames of equal size at rising times, of all that follow each other in tokens of
    these times (N,); None where it is not the most of the sequence."""
    times, sizes = (x.tolist() for x in torch.unique_consecutive(of_tokens, return_counts=True))
    starts = [i for i in range(len(times)) if i == 0 or times[i] <= times[i - 1] or sizes[i] != sizes[i - 1]]
    first, end = max(zip(starts, [*starts[1:], len(times)], strict=True), key=lambda run: run[1] - run[0])
    grid, before, tokens = TokenGrid(end - first, 1, sizes[first]), sum(sizes[:first]), len(of_tokens)
    if 2 * grid.tokens <= tokens:
        return None
    return SequenceLayout(tokens, (TokenLayout(grid, before, tokens - before - grid.tokens),))


def _wan(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    return _alike(_grid(arguments["hidden_states"], tuple(config.patch_size)))


def _minimax_h3(arguments: Mapping[str, Any], config: Any) -> SequenceLayout | None:
    """[text, references, keyframes, sound | video] in one sequence, whose rows say what they are (0 = video) and when.

    The video is what stands behind the last row of another kind; its frames are its distinct times.
    """
    # Read from the device once a forward, not once a layer.
    tags, times = arguments["token_tags"].tolist(), arguments["position_ids"][:, 0].tolist()
    prefix = max((i + 1 for i, tag in enumerate(tags) if tag != 0), default=0)
    moments = list(dict.fromkeys(times[prefix:]))
    size = (len(tags) - prefix) // max(len(moments), 1)
    in_order = [moment for moment in moments for _ in range(size)] == times[prefix:]
    return _alike(TokenGrid(len(moments), 1, size), prefix) if size and in_order else None


def _kandinsky5(arguments: Mapping[str, Any], config: Any) -> SequenceLayout | None:
    """Latents (B, T, H, W, C). Its own sparse attention reorders the tokens: then the layout is not known."""
    if arguments.get("sparse_params") is not None:
        return None
    return _alike(_grid(arguments["hidden_states"], tuple(config.patch_size), axes=(1, 2, 3)))


def _vace_blocks(transformer: Any) -> list[tuple[int, Any]]:
    """The second stream of VACE: each of its blocks stands beside one layer."""
    return [(layer, b.attn1) for layer, b in zip(transformer.config.vace_layers, transformer.vace_blocks, strict=True)]


def _allegro(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    return _alike(_grid(arguments["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size)))


_ATTN1 = (("transformer_blocks", "attn1"),)
_WAN = (("blocks", "attn1"),)
FAMILIES: dict[str, DiffusersFamily] = {
    "CogVideoXTransformer3DModel": DiffusersFamily("cogvideox", _ATTN1, _cogvideox),
    "WanTransformer3DModel": DiffusersFamily("wan", _WAN, _wan),
    "WanVACETransformer3DModel": DiffusersFamily("wan", _WAN, _wan, second=_vace_blocks),
    "WanAnimateTransformer3DModel": DiffusersFamily("wan", _WAN, _wan),
    "SkyReelsV2Transformer3DModel": DiffusersFamily("wan", _WAN, _wan),
    "ChronoEditTransformer3DModel": DiffusersFamily("wan", _WAN, _wan),
    "HunyuanVideoTransformer3DModel": DiffusersFamily(
        "hunyuan_video", (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")), _hunyuan_video
    ),
    "LTXVideoTransformer3DModel": DiffusersFamily("ltx_video", _ATTN1, _ltx),
    "LTX2VideoTransformer3DModel": DiffusersFamily("ltx_av", _ATTN1, _ltx),
    "MiniMaxH3Transformer3DModel": DiffusersFamily(
        "minimax_h3", (("transformer_blocks", "attn"),), _minimax_h3, level=_minimax_h3_level
    ),
    "Kandinsky5Transformer3DModel": DiffusersFamily(
        "kandinsky5",
        (("visual_transformer_blocks", "self_attention"),),
        _kandinsky5,
        heads=lambda config: config.model_dim // sum(config.axes_dims),
    ),
    "CosmosTransformer3DModel": DiffusersFamily("cosmos", _ATTN1, _wan, level=_of_one),
    "AllegroTransformer3DModel": DiffusersFamily("allegro", _ATTN1, _allegro),
}

# Classes that are known and left as they are.
LEFT_DENSE = {
    "HunyuanVideo15Transformer3DModel": "it sorts its text by what is padding, in another order for each batch entry",
    "MochiTransformer3DModel": "it attends for each batch entry alone, over as many tokens as its text has",
    "WanAnimate2Transformer3DModel": "each frame attends to its own keys and a reference's, never to the whole video",
    "HunyuanVideoFramepackTransformer3DModel": "it carries earlier frames in several sizes before the video",
    "SanaVideoTransformer3DModel": "its attention is linear, with no tiles to leave out",
    "LatteTransformer3DModel": "it attends within frames and along time in turn, with nothing to gain",
}
