"""Few-step sampling: the noise levels and the sampler of a multi-step consistency model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..efficient_vdit_core.limits.quote import quoted
from ..efficient_vdit_core.sampling.presets import cut
from .checked import checked, not_listed
from .comfy_bridge.distilled import LOADED_MODEL
from .comfy_bridge.sampling import (
    FROM_CHECKPOINT,
    PRESET_NAMES,
    SEGMENTS,
    checkpoint_changed,
    checkpoint_names,
    consistency_sampler,
    preset_sigmas,
)
from .inputs import CATEGORY, advanced_inputs, search_words

MAX_STEP = 1000


def _preset_inputs() -> list[Any]:
    """The inputs beside segments and steps; all may be left as they are."""
    return [
        io.Combo.Input(
            "preset",
            options=PRESET_NAMES,
            default=SEGMENTS,
            optional=True,
            tooltip=(
                "Where the levels come from: segments and steps above; 'from checkpoint', what a file of this pack's trainer says; "
                "'manual', the list below; or what a published few-step flow model was distilled for, which ignores segments and steps."
            ),
        ),
        io.Combo.Input(
            "checkpoint",
            options=checkpoint_names(),
            default=LOADED_MODEL,
            optional=True,
            tooltip="For 'from checkpoint': the distilled model or LoRA whose metadata is read. Unused otherwise.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            optional=True,
            tooltip=(
                "For 'segments' on flow models, and for 'from checkpoint' where the file names none: shift of time, 0 to 100. 0 keeps "
                "the model's own; higher spends more of the levels near pure noise. Must be what the model was distilled for. For LTX the "
                "shift of its own nodes is an exponent: their 2.37 is e^2.37 = 10.7 here."
            ),
        ),
        io.String.Input(
            "manual_sigmas",
            default="",
            optional=True,
            tooltip="For 'manual': descending noise levels with commas, such as 1, 0.9375, 0.8333, 0.625, 0. Unused otherwise.",
        ),
        io.Int.Input(
            "start_step",
            default=0,
            min=0,
            max=MAX_STEP,
            step=1,
            optional=True,
            tooltip="First step of this part, counted from 0. For models with two experts: the second starts where the first ends.",
        ),
        io.Int.Input(
            "end_step",
            default=MAX_STEP,
            min=1,
            max=MAX_STEP,
            step=1,
            optional=True,
            tooltip="Step before which this part ends, 1 to 1000; 1000 goes to the end. With 2 of 4, the first expert takes 2 steps.",
        ),
    ]


class EVDiTConsistencySigmas(io.ComfyNode):
    """The noise levels at which a multi-step consistency model is evaluated."""

    @classmethod
    @advanced_inputs("shift", "manual_sigmas", "start_step", "end_step")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTConsistencySigmas",
            display_name="Consistency Sigmas",
            category=CATEGORY,
            **search_words("distill", "few steps", "turbo", "lightning", "lcm", "scheduler"),
            description=(
                "Exact noise levels for a model distilled by multi-step consistency: equal segments of diffusion time, each "
                "walked in equal sub-steps. Also a plain, evenly spaced schedule for models that are not distilled."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will be sampled; its noise schedule turns times into noise levels."
                ),
                io.Int.Input(
                    "segments",
                    default=4,
                    min=1,
                    max=1000,
                    step=1,
                    tooltip=(
                        "Number of equal segments of diffusion time, 1 to 1000; must be what the model was distilled for. For a "
                        "model that is not distilled, set it equal to steps."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=1000,
                    step=1,
                    tooltip=(
                        "Model evaluations in all, segments to 1000; time grows in proportion. Equal to segments = one jump per "
                        "segment, the fastest; more splits each segment and gains quality. 20 to 50 for models not distilled."
                    ),
                ),
                *_preset_inputs(),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas",
                    display_name="sigmas",
                    tooltip=(
                        "Noise levels in the model's own units, one more than the steps that are taken; the last is 0, unless end_step "
                        "or manual_sigmas end above it. For SamplerCustom(Advanced)."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = SEGMENTS, checkpoint: str | None = LOADED_MODEL) -> bool | str:
        """In place of ComfyUI's own check of both lists: only 'from checkpoint' reads a file. What a link gives is None here."""
        if preset is not None and preset not in PRESET_NAMES:
            return not_listed("preset", preset, PRESET_NAMES)
        if preset != FROM_CHECKPOINT or checkpoint is None or checkpoint in checkpoint_names():
            return True
        return f"{quoted(checkpoint)} is not in the list. Choose another, or press R where it is new."

    @classmethod
    def fingerprint_inputs(cls, preset: str | None = None, checkpoint: str | None = None, **others: Any) -> float:
        """Runs again after the file has changed. What a link gives is None here, and ComfyUI compares it by itself."""
        return checkpoint_changed(checkpoint) if preset == FROM_CHECKPOINT and checkpoint else 0.0

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        segments: int,
        steps: int,
        preset: str = SEGMENTS,
        checkpoint: str = LOADED_MODEL,
        shift: float = 0.0,
        manual_sigmas: str = "",
        start_step: int = 0,
        end_step: int = MAX_STEP,
    ) -> io.NodeOutput:
        levels = preset_sigmas(model, preset, segments, steps, shift=shift, sigmas=manual_sigmas, checkpoint=checkpoint)
        return io.NodeOutput(cut(levels, start_step, end_step))


class EVDiTConsistencySampler(io.ComfyNode):
    """Jumps from segment edge to segment edge, with a chosen share of fresh noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTConsistencySampler",
            display_name="Consistency Sampler",
            category=CATEGORY,
            **search_words("distill", "few steps", "turbo", "lightning", "lcm"),
            description=(
                "Sampler for multi-step consistency models. gamma 0 is the deterministic jump (the same as euler), gamma 1 "
                "re-noises fully after each step (the same rule as lcm)."
            ),
            inputs=[
                io.Float.Input(
                    "gamma",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of fresh noise in each step, 0 to 1. 0 = deterministic jumps, what multi-step consistency "
                        "models are trained for; 1 = full re-noise as LCM; 0.2 to 0.4 can add detail. No effect on speed."
                    ),
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=(
                        "Seed of the fresh noise, 0 to 2^64 - 1; separate from the seed of the starting noise. "
                        "No effect at gamma 0. The same seed gives the same noise on every device."
                    ),
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler",
                    display_name="sampler",
                    tooltip="For SamplerCustom and SamplerCustomAdvanced; combine it with Consistency Sigmas.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, gamma: float, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(consistency_sampler(gamma, noise_seed))
