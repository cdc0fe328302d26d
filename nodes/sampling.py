"""Few-step sampling: the noise levels and the sampler of a multi-step consistency model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .comfy_bridge.sampling import consistency_sampler, model_consistency_sigmas
from .inputs import CATEGORY


class EVDiTConsistencySigmas(io.ComfyNode):
    """The noise levels at which a multi-step consistency model is evaluated."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTConsistencySigmas",
            display_name="Consistency Sigmas (Efficient-vDiT)",
            category=CATEGORY,
            description=(
                "Exact noise levels for a model distilled by multi-step consistency: equal segments of diffusion time, each "
                "walked in equal sub-steps. Also a plain, evenly spaced schedule for models that are not distilled."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; its noise schedule turns times into noise levels."),
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
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas",
                    display_name="sigmas",
                    tooltip="steps + 1 noise levels, descending to 0, in the model's own units. For SamplerCustom(Advanced).",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, segments: int, steps: int) -> io.NodeOutput:
        return io.NodeOutput(model_consistency_sigmas(model, segments, steps))


class EVDiTConsistencySampler(io.ComfyNode):
    """Jumps from segment edge to segment edge, with a chosen share of fresh noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTConsistencySampler",
            display_name="Consistency Sampler (Efficient-vDiT)",
            category=CATEGORY,
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
    def execute(cls, gamma: float, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(consistency_sampler(gamma, noise_seed))
