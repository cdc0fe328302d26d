"""The diffusers transformers whose self-attention is understood: a row for each, one layout rule for each.

A layout rule reads the arguments of one call of ``transformer.forward`` and says where the video tokens stand in the
sequence of each batch entry. In every family here they stand in the order t, h, w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class DiffusersFamily:
    """name: as in plan files. attention: (list of blocks, name of their self-attention), in the order of the layers."""

    name: str
    attention: tuple[tuple[str, str], ...]
    layout: LayoutRule

    def modules(self, transformer: nn.Module) -> list[Any]:
        """The self-attention module of each layer."""
        return [getattr(block, name) for blocks, name in self.attention for block in getattr(transformer, blocks)]


def find_family(transformer: nn.Module) -> DiffusersFamily:
    """The row of this transformer. Exact classes only, as a subclass may order its tokens in another way; else
    ValueError."""
    name = type(transformer).__name__
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
    # Read from the device once a forward, not once a layer.
    lengths = arguments["encoder_attention_mask"].sum(dim=1).tolist()
    entries = tuple(TokenLayout(grid, suffix=int(length)) for length in lengths)
    alike = len(set(entries)) == 1
    return SequenceLayout(
        grid.tokens + arguments["encoder_hidden_states"].shape[1], entries[:1] if alike else entries, masked=True
    )


def _ltx(arguments: Mapping[str, Any], config: Any) -> SequenceLayout | None:
    """Latents come as tokens (B, N, C) with their frames, height and width beside them; conditioning frames leave these
    out."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return None if None in sizes else _alike(TokenGrid(*map(int, sizes)))  # pyright: ignore[reportArgumentType]


def _wan(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    return _alike(_grid(arguments["hidden_states"], tuple(config.patch_size)))


def _allegro(arguments: Mapping[str, Any], config: Any) -> SequenceLayout:
    return _alike(_grid(arguments["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size)))


_ATTN1 = (("transformer_blocks", "attn1"),)
FAMILIES: dict[str, DiffusersFamily] = {
    "CogVideoXTransformer3DModel": DiffusersFamily("cogvideox", _ATTN1, _cogvideox),
    "WanTransformer3DModel": DiffusersFamily("wan", (("blocks", "attn1"),), _wan),
    "HunyuanVideoTransformer3DModel": DiffusersFamily(
        "hunyuan_video", (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")), _hunyuan_video
    ),
    "LTXVideoTransformer3DModel": DiffusersFamily("ltx_video", _ATTN1, _ltx),
    "AllegroTransformer3DModel": DiffusersFamily("allegro", _ATTN1, _allegro),
}
