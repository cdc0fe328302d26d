"""Finds a plan for the user's own model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..efficient_vdit_core.search import SearchSettings, parse_candidates
from ..efficient_vdit_core.search.by_head import MAX_GROUPS
from ..efficient_vdit_core.search.describe import describe_plan
from .checked import checked
from .comfy_bridge.probe import ProbeSampling, check_searchable, search_plan
from .inputs import CATEGORY, SEED_STAYS, Plan, advanced_inputs, plan_is_told_again, plan_ui, search_words

# What a new node begins with. Heads apart, with neighbours and means, erred least of what was measured on the built-in model at
# equal cost (docs/measurements.md, "Plans by head").
CANDIDATES, HEAD_GROUPS = "0,1,2,0~1,1~1,0+1,1+1,0~1+1,1~1+1", 3


class EVDiTSearchTilePlan(io.ComfyNode):
    """The search for each layer's and head's pattern on a MODEL: the paper's Algorithm 1, over heads and wider patterns."""

    @classmethod
    @advanced_inputs("candidates", "costs", "error")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTSearchTilePlan",
            display_name="Search Tile Plan",
            category=CATEGORY,
            **search_words("sparse", "faster", "speed up", "calibrate", "layer search"),
            **plan_is_told_again(),
            description=(
                "Runs the dense model at a few noise levels and measures, in every layer and attention head, how far each candidate "
                "pattern changes the attention's output: k reference frames, with neighbours and mean frames. Takes the sparsest "
                "patterns under a threshold, or the plan with the least error at a target speed-up. The paper's search, reference "
                "frames alone and one pattern k:T-k a layer, is head_groups 1 with candidates 1,2,4: it errs much more at the same "
                "cost. Connect the plan to Sparse Attention, save it with Save Tile Plan, and use Load Tile Plan from then on: every "
                "change of prompt, LoRA or size searches again."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The video model to search. It is not changed; sparse attention on it is ignored."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip=(
                        "A prompt such as you will use. To measure several, join them with Conditioning (Combine): errors are averaged, "
                        "the time grows with each."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "Gives the size: width, height and frames, best as you will use them. Its content is used with sigmas, or "
                        "where it carries a noise mask (LTX image to video)."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=SEED_STAYS,
                    tooltip="Seed of the starting noise, 0 to 2^64 - 1. The same seed gives the same plan (except with measured costs).",
                ),
                io.Int.Input(
                    "probes",
                    default=3,
                    min=1,
                    max=100,
                    tooltip=(
                        "Noise levels at which the model is run and measured, 1 to 100: Euler steps from pure noise. The time of "
                        "that many dense steps, plus the candidates' attention. Errors are averaged over them."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=0.2,
                    min=0.0,
                    max=10.0,
                    step=0.005,
                    round=0.0001,
                    tooltip=(
                        "Largest relative error (0 to 10) of a layer's attention output, the paper's r: 0.2 = 20 %. Each layer gets "
                        "the sparsest candidate below it. Higher is faster and changes the video more; 0 keeps all full."
                    ),
                ),
                io.Float.Input(
                    "target_speedup",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip=(
                        "How many times less self-attention the plan should cost, 1 to 1000; the plan with the least summed error "
                        "is chosen and the threshold ignored. 0 = use the threshold."
                    ),
                ),
                io.String.Input(
                    "candidates",
                    default=CANDIDATES,
                    tooltip=(
                        'Patterns to try in each layer, at most 16. "2": so many reference frames, in latent frames. "2~1" also sees '
                        'neighbours up to 1 frame away, which keeps motion better; "1~1+1" also sees the mean of the frames that are left '
                        "out, which errs least at equal cost. Full attention is always a choice. Each adds its attention's time to every "
                        'layer. The paper\'s: "1,2,4", without ~ and +, in half of that time.'
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, if you sample with one: both are measured, at twice the time. Empty = without guidance.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance strength of the probing steps, 0 to 100, as you sample with. No effect without negative.",
                ),
                io.Combo.Input(
                    "costs",
                    options=["flops", "measured"],
                    default="flops",
                    optional=True,
                    tooltip=(
                        "What a pattern costs: its share of the dense FLOPs, or its time as measured here, which differs a little "
                        "from run to run and drops patterns that are slower than dense."
                    ),
                ),
                io.Combo.Input(
                    "error",
                    options=["attention", "block", "output"],
                    default="attention",
                    optional=True,
                    tooltip=(
                        "Where the relative error is measured: in the attention's output; in what the whole block returns, several times "
                        "slower; or in the model's own output, which found the best plans of the built-in model but takes a forward "
                        "for each layer and candidate. Block and output errors are smaller: lower the threshold, or set target_speedup."
                    ),
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip=(
                        "Noise levels at which to measure, in place of probes; a step each but for the last. For Wan 2.2's low-noise "
                        "model: the low part of Split Sigmas, and as latent a video or the high-noise result, noised to the first level."
                    ),
                ),
                io.Int.Input(
                    "head_groups",
                    default=HEAD_GROUPS,
                    min=1,
                    max=MAX_GROUPS,
                    optional=True,
                    tooltip=(
                        "At most as many different patterns in a layer, over its attention heads. 3 keeps more quality at the same "
                        "FLOPs, for a few more calls a layer; 1 gives all heads of a layer one pattern, as in the paper, and is "
                        "what block errors need. Best with candidates that have neighbours and mean frames."
                    ),
                ),
            ],
            outputs=[
                Plan.Output(
                    "plan",
                    display_name="plan",
                    tooltip=(
                        "A pattern for each layer, or each group of its heads, for this model: k:T-k, with neighbours ~w and mean frames "
                        "+m where they were candidates, all in latent frames. Connect it to Sparse Attention."
                    ),
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "The plan as text to share, its predicted FLOPs and speed-up, and every layer's errors, the plan's and the "
                        "candidates', as fractions of 1."
                    ),
                ),
            ],
        )

    # A prompt without head_groups was saved before that input was there, when all heads of a layer were alike.
    @classmethod
    @checked
    def execute(
        cls, model: Any, positive: Any, latent: dict[str, Any], seed: int, probes: int, threshold: float, target_speedup: float,
        candidates: str, negative: Any = None, cfg: float = 5.0, costs: str = "flops", error: str = "attention",
        sigmas: Any = None, head_groups: int = 1,
    ) -> io.NodeOutput:  # fmt: skip
        check_searchable(model, error)  # said before what the widgets hold
        patterns = parse_candidates(candidates)
        settings = SearchSettings(patterns, threshold, target_speedup, error, costs, head_groups)
        sampling = ProbeSampling(seed, probes, cfg, sigmas)
        plan = search_plan(model, positive, negative, latent, settings, sampling)
        return io.NodeOutput(plan, describe_plan(plan), ui=plan_ui(plan))
