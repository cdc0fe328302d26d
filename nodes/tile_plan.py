"""Which latent frames every layer attends to."""

from __future__ import annotations

from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan
from .inputs import CATEGORY, Plan


class EVDiTTilePlan(io.ComfyNode):
    """A plan with the same number of reference frames in every layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTTilePlan",
            display_name="Tile Plan (Efficient-vDiT)",
            category=CATEGORY,
            description=(
                "Makes a sparse-attention plan k:T-k for all layers: each latent frame attends to itself and to k "
                "reference frames, and the reference frames attend to everything. Fits any model and length."
            ),
            inputs=[
                io.Int.Input(
                    "reference_frames",
                    default=2,
                    min=0,
                    max=64,
                    step=1,
                    tooltip=(
                        "k, in latent frames (one latent frame is 4 video frames), 0 to 64. Evenly spread over the clip. "
                        "Fewer is faster and loosens motion over time; k at or above the clip's latent frames is full "
                        "attention; 0 lets every frame see only itself. Usual: a quarter of the latent frames."
                    ),
                ),
            ],
            outputs=[
                Plan.Output(
                    "plan",
                    display_name="plan",
                    tooltip=(
                        "The plan, one pattern k:T-k for all layers (k and T in latent frames). "
                        "Connect it to Sparse Attention; by itself it changes nothing."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, reference_frames: int) -> io.NodeOutput:
        return io.NodeOutput(TilePlan.uniform(reference_frames, layers=None))
