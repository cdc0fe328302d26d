"""How each model's blocks take their hidden state, positions and modulation: what a rank is given its rows of.

A new model is a row in ``RULES``. Blocks that ComfyUI hooks are hooked; the forwards of other modules are replaced in
the MODEL as ComfyUI's own nodes do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from ....efficient_vdit_core.attention.backends.spans import Span, take
from ....efficient_vdit_core.parallel.sharding.arguments import WHOLE, BlockArguments, numbers_of


@dataclass(frozen=True)
class Row:
    """A row of blocks, one after another, with nothing but sums of rows between them.

    Attributes:
        path: the list of them in the model.
        hook: ComfyUI's name of their hooks; "" where it has none: then the forward is replaced, whose arguments
            ``about`` names.
        aside: they are no layers of the model: each attends as the layer before it does, and gives this rank's rows to
            it. Of layers the last one gives the hidden states of all tokens.
    """

    path: str
    about: BlockArguments = field(default_factory=BlockArguments)
    hook: str = "double_block"
    aside: bool = False


@dataclass(frozen=True)
class WholeModule:
    """A module that counts frames: it is given the hidden state of all tokens first, and gives this rank's rows.

    ``path``: with * for each entry of a list. ``acts``: whether a call does anything, from the module and its
    arguments.
    """

    path: str
    acts: Callable[..., bool] = lambda *_, **__: True


@dataclass(frozen=True)
class ShardRule:
    """A class of models.

    Attributes:
        rows: its rows of blocks.
        whole: the modules that take all tokens.
        all_keys: the attentions whose keys are the video's and whose queries every rank has.
        patches: ComfyUI's patches that its blocks ask, which expect whole tensors.
        hooks_place_tokens: what another node hooks in at a block is told where all tokens stand (MiniMax-H3's ``layout``,
            from ComfyUI 0.34 on), and may place its own there.
        pixels: the video's frames and pixels in a token (T, H, W), of a model.
    """

    rows: tuple[Row, ...]
    whole: tuple[WholeModule, ...] = ()
    all_keys: tuple[str, ...] = ()
    patches: frozenset[str] = frozenset()
    hooks_place_tokens: bool = False
    pixels: Callable[[Any], tuple[int, int, int]] = lambda _: (4, 16, 16)


def rows_of_compressed(timestep: Any, spans: Sequence[Span]) -> Any:
    """LTX-2's modulation for the tokens of ``spans``: tensors (B, 1 or N, F), or one entry for each frame in a class of
    ComfyUI's, which spreads it when it is needed."""
    entries = timestep if isinstance(timestep, Tensor) else timestep.data
    size = 1 if isinstance(timestep, Tensor) else timestep.patches_per_frame
    if size == 1 and entries.shape[1] == 1:
        return timestep
    if isinstance(timestep, Tensor):
        return take(timestep, spans, 1)
    if size == 1:
        return type(timestep)(take(entries, spans, 1), 1, per_frame=True)
    return _rows_class(type(timestep))(entries, 1, per_frame=True).of(numbers_of(spans, entries.device) // size)


@cache
def _rows_class(kind: type) -> type:
    """A subclass of ComfyUI's compressed modulation that gives the entries of some tokens."""

    class Rows(kind):
        __slots__ = ("index",)

        def of(self, index: Tensor) -> Any:
            self.index = index
            return self

        def expand(self) -> Tensor:
            return self.data[:, self.index]

        def expand_for_computation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(x[:, self.index] for x in super().expand_for_computation(*args, **kwargs))

    return Rows


def _injects(module: Any, x: Tensor, layer: int, *_: Any, **__: Any) -> bool:
    return layer in module.injected_block_id


def _wan_pixels(model: Any) -> tuple[int, int, int]:
    """Wan 2.2's 5B, of 48 channels, has a VAE of 16 x 16."""
    return (4, 32, 32) if model.in_dim == 48 else (4, 16, 16)


def _cogvideox_pixels(model: Any) -> tuple[int, int, int]:
    return 4 * (model.patch_size_t or 1), 16, 16


_WAN_PATCHES = frozenset(("attn1_patch", "attn2_patch", "double_block"))
_WAN = Row("blocks")
_VACE = Row(
    "vace_blocks",
    BlockArguments(("c",), {"x": WHOLE, "freqs": WHOLE}, ("e",)),
    hook="",
    aside=True,
)
_H3 = BlockArguments(tables={"rope_freqs": WHOLE}, spread=(), runs={"mod_segments": WHOLE})
_DOUBLE = BlockArguments(("txt", "img"), spread=(), runs={"modulation_dims_img": "img", "modulation_dims_txt": "txt"})
_SINGLE = BlockArguments(spread=(), runs={"modulation_dims": WHOLE})
_LTX = BlockArguments(tables={"pe": WHOLE, "vec": WHOLE}, spread=())
_LTX_AUDIO = BlockArguments(
    tables={"v_pe": WHOLE, "v_cross_pe": WHOLE},
    spread=(),
    rows=dict.fromkeys(("v_timestep", "v_cross_scale_shift_timestep", "v_cross_gate_timestep"), rows_of_compressed),
)
_COGVIDEOX = BlockArguments(
    ("encoder_hidden_states", "hidden_states"), {"image_rotary_emb": "hidden_states"}, spread=()
)
_KANDINSKY = BlockArguments(("visual_embed",), {"freqs": WHOLE}, spread=())
_KANDINSKY_6 = BlockArguments(("visual",), {"rope_v": WHOLE}, spread=())


def _wan(*whole: WholeModule, rows: tuple[Row, ...] = (_WAN,)) -> ShardRule:
    return ShardRule(rows, whole, patches=_WAN_PATCHES, pixels=_wan_pixels)


RULES: Mapping[str, ShardRule] = {
    "OpenSoraT2V": ShardRule((Row("transformer_blocks"),)),
    "MiniMaxH3Model": ShardRule((Row("blocks", _H3),), hooks_place_tokens=True, pixels=lambda _: (4, 32, 32)),
    "WanModel": _wan(),
    "CameraWanModel": _wan(),
    "SCAILWanModel": _wan(),
    "SCAIL2WanModel": _wan(),
    "VaceWanModel": _wan(rows=(_WAN, _VACE)),
    "AnimateWanModel": _wan(WholeModule("face_adapter.fuser_blocks.*")),
    "HumoWanModel": _wan(WholeModule("blocks.*.audio_cross_attn_wrapper")),
    "WanModel_S2V": _wan(WholeModule("audio_injector", _injects)),
    "WanDancerModel": _wan(WholeModule("music_injector", _injects)),
    "HunyuanVideo": ShardRule(
        (Row("double_blocks", _DOUBLE), Row("single_blocks", _SINGLE, "single_block")),
        patches=frozenset(("attn1_patch", "attn1_output_patch")),
    ),
    "LTXVModel": ShardRule((Row("transformer_blocks", _LTX),), pixels=lambda _: (8, 32, 32)),
    "LTXAVModel": ShardRule(
        (Row("transformer_blocks", _LTX_AUDIO),),
        all_keys=("transformer_blocks.*.video_to_audio_attn",),
        pixels=lambda _: (8, 32, 32),
    ),
    "CogVideoXTransformer3DModel": ShardRule((Row("blocks", _COGVIDEOX, hook=""),), pixels=_cogvideox_pixels),
    # Its hook names its hidden state as its block does not (ComfyUI 0.33), so that it cannot be used.
    "Kandinsky5": ShardRule((Row("visual_transformer_blocks", _KANDINSKY, hook=""),)),
    "Kandinsky6NativeAVDiT": ShardRule(
        (Row("visual_blocks", _KANDINSKY_6),), all_keys=("visual_blocks.*.av_cross_attention",)
    ),
}

# Models that have a plan and no rule.
NOT_SHARDED = {
    "AsymmDiTJoint": "its text is padded beyond the tokens that attend",
    "GeneralDIT": "its blocks take the video as a grid of frames, not as a row of tokens",
    "MiniTrainDIT": "its blocks take the video as a grid of frames, not as a row of tokens",
}
