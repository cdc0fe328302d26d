"""Which latent frames every layer attends to."""

from __future__ import annotations

from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan
from .checked import checked
from .inputs import CATEGORY, Plan, plan_is_told_again, plan_ui, search_words


class EVDiTTilePlan(io.ComfyNode):
    """A plan with the same number of reference frames in every layer, or one written as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTTilePlan",
            display_name="Tile Plan",
            category=CATEGORY,
            **search_words("sparse", "faster", "speed up", "sparsity", "reference frames", "arrow mask"),
            **plan_is_told_again(),
            description=(
                "Makes a sparse-attention plan k:T-k for all layers, the paper's: each latent frame attends to itself and to k "
                "reference frames, and the reference frames attend to everything. Fits any model and length. Click a layer "
                "of the chart to give it another pattern. Its text also holds neighbours, mean frames and heads that differ."
            ),
            inputs=[
                io.Int.Input(
                    "reference_frames",
                    default=6,
                    min=0,
                    max=64,
                    step=1,
                    tooltip=(
                        "k, in latent frames (4 video frames each in most models, 8 in LTX-Video), 0 to 64. Evenly spread over the clip. "
                        "Fewer is faster and loosens motion over time; k at or above the clip's latent frames is full "
                        "attention; 0 lets every frame see only itself. Usual: a quarter of the latent frames, as 6 is of Wan's 21 "
                        "(52 % of the attention); 2 (22 %) suits models that were distilled for it."
                    ),
                ),
                io.String.Input(
                    "text",
                    default="",
                    optional=True,
                    tooltip=(
                        'A plan as text, used in place of reference_frames; the chart writes it. "all:2 0-1:full" = 2 reference frames '
                        'in all layers but the first two, for any depth; "0:full 1-4:2:6 5-31:1:7" = every layer of 32, at 8 latent '
                        'frames; "all:1~1+1" also sees neighbours and a mean frame. Sparser layers are faster and change the video more. '
                        "Empty = reference_frames everywhere."
                    ),
                ),
            ],
            outputs=[
                Plan.Output(
                    "plan",
                    display_name="plan",
                    tooltip=(
                        "The plan, a pattern k:T-k~w+m for each layer or group of its heads (in latent frames). "
                        "Connect it to Sparse Attention; by itself it changes nothing."
                    ),
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, reference_frames: int, text: str = "") -> io.NodeOutput:
        plan = TilePlan.from_text(text) if text.strip() else TilePlan.uniform(reference_frames)
        return io.NodeOutput(plan, ui=plan_ui(plan))
