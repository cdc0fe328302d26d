"""Puts sparse attention into a MODEL through ComfyUI's own hooks: a keyed wrapper and the attention override."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention.override import FORWARD_KEY, AttentionReport, ForwardState, make_attention_override
from ...efficient_vdit_core.plan import TilePlan
from .families import FAMILIES, Family, find_family, uncompiled

log = logging.getLogger("efficient_vdit")

WRAPPER_KEY = "efficient_vdit"
OVERRIDE = "optimized_attention_override"
Window = tuple[float, float]
# A step may lie on the window's edge; schedule and window round it in their own ways.
_ROUNDING = 1 + 1e-4


def patch_attention(model: Any, plan: TilePlan, *, window: Window = (0.0, 1.0), min_tokens: int = 0) -> Any:
    """A clone of MODEL whose self-attention follows the plan.

    Args:
        window: start and end as fractions 0..1 of the noise schedule; outside it the attention is dense.
        min_tokens: calls with fewer tokens stay dense.

    Raises:
        ValueError: the window is empty, or the plan is for another model.
    """
    if window[0] >= window[1]:
        raise ValueError(
            f"start_percent is {window[0]} and end_percent {window[1]}, expected start below end: no step would be sparse. "
            "Lower start_percent, raise end_percent, or bypass the node."
        )
    patched = model.clone()
    diffusion_model = uncompiled(patched.get_model_object("diffusion_model"))
    family = find_family(diffusion_model)
    if family is None:
        log.warning(
            "%s stays dense: where its video tokens stand is not known. Known are %s.",
            type(diffusion_model).__name__,
            ", ".join(FAMILIES),
        )
        return patched
    depth = family.depth(diffusion_model)
    plan.check_fits(family=family.name, layers=depth, heads=family.head_count(diffusion_model))
    _check_dense_layers(plan, depth)
    report = AttentionReport()
    options = patched.model_options["transformer_options"]
    # A second plan takes the place of the first: two of them cannot both decide about one call.
    previous = options.get(OVERRIDE)
    previous = getattr(previous, "replaces", previous)
    # Kept out of torch.compile: it counts calls, and each count would compile the model anew.
    override: Any = torch.compiler.disable(make_attention_override(plan, report, min_tokens=min_tokens, previous=previous))
    override.replaces = previous
    options[OVERRIDE] = override
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, _publish_layout(family, depth, window, plan, min_tokens)),
        (WrappersMP.OUTER_SAMPLE, _log_report(report)),
    ):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
        patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    return patched


def _check_dense_layers(plan: TilePlan, depth: int) -> None:
    for edge in {edge for pair in plan.dense_layers for edge in pair}:
        if not -depth <= edge < depth:
            raise ValueError(
                f"dense_blocks names layer {edge}, but the model has {depth} layers: 0 to {depth - 1}, or -{depth} to -1 "
                "counted from the end. Correct dense_blocks."
            )


def _publish_layout(family: Family, depth: int, window: Window, plan: TilePlan, min_tokens: int) -> Callable[..., Any]:
    """An APPLY_MODEL wrapper: tells the override where the video tokens of this forward stand, and whether it acts."""

    def wrapper(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        options["total_blocks"] = depth  # not every ComfyUI version says it, and "-1" needs it
        options[FORWARD_KEY] = state = _forward_state(family, executor.class_obj, window, x, t, c_crossattn, conds)
        if state is not None:
            state.plan, state.min_tokens = plan, min_tokens
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    return wrapper


def _forward_state(
    family: Family, base_model: Any, window: Window, x: Tensor, t: Tensor, text: Tensor | None, conds: dict[str, Any]
) -> ForwardState | None:
    if x.ndim != 5:
        return None
    layout = family.layout(x, uncompiled(base_model.diffusion_model), conds)
    if text is not None and text.shape[1] >= layout.tokens and _text_length(text, conds) == layout.tokens:
        # Cross-attention is told from self-attention by its length; here the lengths are the same.
        return ForwardState(layout, active=False, reason="text as long as the video")
    return ForwardState(layout, active=_in_window(base_model.model_sampling, window, t))


def _text_length(text: Tensor, conds: dict[str, Any]) -> int:
    mask = conds.get("attention_mask")
    return text.shape[1] if mask is None else int(mask.any(0).nonzero().max()) + 1


def _in_window(model_sampling: Any, window: Window, t: Tensor) -> bool:
    """Whether this step's noise level lies in the window. Reads the level from the device, so once a forward only."""
    if window == (0.0, 1.0):
        return True
    high, low = (model_sampling.percent_to_sigma(p) for p in window)
    level = float(t.flatten()[0])
    return low * _ROUNDING < level <= high * _ROUNDING


def _log_report(report: AttentionReport) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper: one line in the log after each run."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        report.reset()
        try:
            return executor(*args, **kwargs)
        finally:
            log.info("Efficient-vDiT: %s", report.summary())

    return wrapper
