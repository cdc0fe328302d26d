"""Tells what sparse attention did in the last run."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..efficient_vdit_core.attention.report.summary import NO_CALLS, summarize_run
from .checked import checked
from .comfy_bridge.hook import report_of
from .inputs import CATEGORY, search_words

log = logging.getLogger("efficient_vdit")

NOT_SPARSE = (
    "The model has no sparse attention: Sparse Attention is bypassed, is not before this node, or left this model dense (the log "
    "says why)."
)
CONNECT_AFTER = "Connect the sampler's LATENT to after: without it this node runs before the sampler."


class EVDiTReport(io.ComfyNode):
    """The counts of the last run, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTReport",
            display_name="Sparse Attention Report",
            category=CATEGORY,
            **search_words("speed", "benchmark", "timing", "sparse", "faster"),
            description=(
                "Shows how many attention calls of the last run became sparse, why others did not, and FLOPs and time against dense. "
                "Connect the sampler's result to `after`, so that it runs behind the sampler."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The MODEL as it comes out of Sparse Attention; the sampler must use the same one, or that of Sequence "
                        "Parallel behind it."
                    ),
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="The sampler's LATENT, or anything made from it: orders this node behind that run. Passed on unchanged.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "Counts of attention calls, the share of dense attention's FLOPs computed (in percent), seconds against "
                        "dense, and reasons, as text."
                    ),
                ),
                io.AnyType.Output("passed", display_name="after", tooltip="What came in at after, unchanged."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> float:
        """Runs in every run without `after`, where its inputs do not tell that the model was sampled; NaN equals nothing."""
        return 0.0 if "after" in given else float("nan")

    @classmethod
    @checked
    def execute(cls, model: Any, after: Any = None) -> io.NodeOutput:
        report = report_of(model)
        # Said, not raised: ComfyUI runs this node before the clip is decoded and saved, and an error ends the run.
        text, became_sparse = (NOT_SPARSE, False) if report is None else summarize_run(report)
        if text == NO_CALLS and after is None:
            text = f"{NO_CALLS} {CONNECT_AFTER}"
        if not became_sparse:
            log.warning("Efficient-vDiT: %s", text.splitlines()[0].removeprefix("WARNING: "))
        return io.NodeOutput(text, after, ui=ui.PreviewText(text))
