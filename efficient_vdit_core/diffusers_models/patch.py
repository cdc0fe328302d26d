"""Applies a tile plan to a diffusers transformer through attention processors and a forward pre-hook, nothing else.

No processor's body is copied. The processor in place still does projections, norms and rotary embeddings; only the
``scaled_dot_product_attention`` that it ends in is answered by ``tile_attention``, through a ``TorchFunctionMode`` that
is on while this one processor runs. Dense pieces go to the attention backend that was chosen in diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..attention.hook.prepare import Preparation
from ..attention.hook.state import ForwardState
from ..attention.report.reason_names import OUTSIDE_THE_WINDOW, REPLACED
from ..attention.report.report import AttentionReport
from ..plan import TilePlan
from .families import DiffusersFamily, SequenceLayout, find_family
from .processor import TiledProcessor, not_compiled, tiled

# A step may lie on the window's edge; schedule and window round it in their own ways.
_ROUNDING = 1 + 1e-4


class DiffusersPatch:
    """What ``apply_to_diffusers`` put into a transformer. ``report`` counts its attention calls; ``remove`` takes it
    out.

    As a context manager it is removed at the end of the block. With gradient checkpointing, a backward pass must follow
    its own forward pass: what the layers recompute then is read from the latest one.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: DiffusersFamily,
        plan: TilePlan,
        window: tuple[float, float],
        min_tokens: int,
        backend: str,
    ) -> None:
        self.report, self.min_tokens = AttentionReport(), min_tokens
        self.preparation = Preparation(plan, self.report, backend=backend)
        self.sequence: SequenceLayout | None = None
        self.entries: tuple[ForwardState, ...] = ()
        self._family, self._window, self._config = family, window, transformer.config
        self._forward = inspect.signature(type(transformer).forward)
        self._replaced: list[tuple[Any, TiledProcessor]] = []
        self._depth = family.depth(transformer)
        for layer, attention in family.modules(transformer):
            processor = tiled(attention.get_processor(), self, layer)
            attention.set_processor(processor)
            self._replaced.append((attention, processor))
        hook: Any = not_compiled(self._read_forward)
        self._hook = transformer.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Puts the processors back that were there before. One that was replaced by someone else meanwhile stays."""
        self._hook.remove()
        for attention, processor in self._replaced:
            if attention.get_processor() is processor:
                attention.set_processor(processor.original)
        self._replaced.clear()
        # What others have kept of it, as fused projections do, is dense where it is put back.
        self.sequence, self.entries = None, ()
        self.preparation.forget()

    def __enter__(self) -> DiffusersPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _read_forward(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: where the video tokens of this forward stand, and whether it lies in the window."""
        self._tell_replaced()
        arguments = self._forward.bind(transformer, *args, **kwargs).arguments
        reason = "" if self._in_window(arguments) else OUTSIDE_THE_WINDOW
        self.sequence = self._family.layout(arguments, self._config)
        if self.sequence is None:
            self.report.warn(
                "sequence",
                f"{type(transformer).__name__}: where the video's tokens stand is not known from what this pipeline gives, and its "
                "attention stays dense.",
            )
        layouts = self.sequence.entries if self.sequence is not None else ()
        self.entries = tuple(ForwardState(layout, reason, depth=self._depth) for layout in layouts)

    def _tell_replaced(self) -> None:
        """Counts the calls of this forward that the plan lost with its processors, and says it once."""
        lost = sum(attention.get_processor() is not processor for attention, processor in self._replaced)
        if not lost:
            return
        for _ in range(lost):
            self.report.add_dense(REPLACED)
        self.report.warn(
            "processors",
            f"{lost} of {len(self._replaced)} attention processors were replaced after the plan was applied, as fuse_qkv_projections() "
            "and set_attn_processor() do, and the plan does not act there: call remove() of its handle and apply it again.",
        )

    def _in_window(self, arguments: Mapping[str, Any]) -> bool:
        """Reads the noise level from the device, so only where a window was asked for, and once a forward."""
        start, end = self._window
        if (start, end) == (0.0, 1.0):
            return True
        level = self._family.level(arguments)
        return (end == 1.0 or level > (1 - end) * _ROUNDING) and level <= (1 - start) * _ROUNDING


def apply_to_diffusers(
    transformer: Any,
    plan: TilePlan | str,
    *,
    start: float = 0.0,
    end: float = 1.0,
    min_tokens: int = 0,
    backend: str = "auto",
) -> DiffusersPatch:
    """Makes the self-attention of a diffusers video transformer follow ``plan``, in place, until the handle is removed.

    Apply it last: attention processors that are set afterwards (``fuse_qkv_projections``, ``set_attn_processor``) take its place,
    and the report says so. With ``torch.compile`` leave ``fullgraph`` out: a plan's calls are counted outside of the graph.

    Args:
        transformer: ``pipe.transformer`` of a class in ``families.FAMILIES``: MiniMax-H3, Wan with VACE and Animate,
            SkyReels V2, ChronoEdit, LTX-Video, LTX-2, HunyuanVideo, CogVideoX, Kandinsky 5, Cosmos or Allegro. Its
            weights stay as they are.
        plan: one pattern a layer, or a uniform one, or the text of either. HunyuanVideo's layers are its double blocks, then its single
            blocks.
        start, end: part of the noise schedule that becomes sparse, 0 (pure noise) to 1, as 1 - the video's noise level
            (its timestep, on the scale of the model).
        min_tokens: shorter sequences stay dense.
        backend: of ``tile_attention``. The dense pieces run on the backend set in diffusers.

    Returns:
        A handle with ``report`` and ``remove()``, also a context manager.

    Raises:
        ValueError: the class is not known, the plan was made for another model, the window is empty, the backend computes
            no mean frames and the plan has some, or the transformer has a plan already.
    """
    transformer = _unwrapped(transformer)
    family = find_family(transformer)
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"start is {start} and end {end}, expected 0 <= start < end <= 1; no step would be sparse. Correct them."
        )
    if _tiled_processors(transformer, family):
        raise ValueError(
            "The transformer has a tile plan already; call remove() of that handle, or remove_from_diffusers(transformer), before "
            "applying another one."
        )
    plan = TilePlan.from_text(plan) if isinstance(plan, str) else plan
    plan.check_fits(family=family.name, layers=family.depth(transformer), heads=family.heads(transformer.config))
    return DiffusersPatch(transformer, family, plan, (start, end), min_tokens, backend)


def remove_from_diffusers(transformer: Any) -> None:
    """Takes the plan out of a transformer, as ``remove()`` of its handle does, where the handle is no longer at hand; nothing
    where it has none. Raises ValueError where its class is not known."""
    transformer = _unwrapped(transformer)
    for processor in _tiled_processors(transformer, find_family(transformer)):
        processor.patch.remove()


def _unwrapped(transformer: Any) -> Any:
    """What torch.compile wrapped, or the transformer itself."""
    return getattr(transformer, "_orig_mod", transformer)


def _tiled_processors(transformer: Any, family: DiffusersFamily) -> list[TiledProcessor]:
    """Those of a plan that the transformer has."""
    processors = [module.get_processor() for _, module in family.modules(transformer)]
    return [processor for processor in processors if isinstance(processor, TiledProcessor)]
