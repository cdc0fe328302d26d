"""Makes the self-attention of a video model sparse."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..efficient_vdit_core.attention import BACKENDS
from ..efficient_vdit_core.plan import TilePlan
from ..efficient_vdit_core.tiles import PLACEMENTS
from .checked import checked
from .comfy_bridge.announce import announce_to_page
from .comfy_bridge.patch import patch_attention
from .comfy_bridge.window import Window
from .inputs import CATEGORY, SPEED_WORDS, Plan, advanced_inputs, search_words


class EVDiTSparseAttention(io.ComfyNode):
    """MODEL and plan in, patched MODEL out; the incoming MODEL stays as it is."""

    @classmethod
    @advanced_inputs(
        "end_percent",
        "min_tokens",
        "placement",
        "decline_slow",
        "backend",
        "dense_last_steps",
        "measure",
        "residual_every",
    )
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTSparseAttention",
            display_name="Sparse Attention",
            category=CATEGORY,
            **search_words(
                *SPEED_WORDS,
                "optimize",
                "wan faster",
                "minimax faster",
                "h3 faster",
                "hunyuan faster",
                "ltx faster",
                "teacache",
                "radial attention",
            ),
            description=(
                "Applies a tile plan to the self-attention of a video model: MiniMax-H3, Wan 2.1 and 2.2 with their variants, "
                "LTX-Video and LTX-2, HunyuanVideo and 1.5, Open-Sora-Plan v1.2, CogVideoX, Mochi, Cosmos, Cosmos Predict2, "
                "Kandinsky 5 and 6. The whole step gains less than its attention does: the report says how much at most. Uses the "
                "attention backend that ComfyUI runs with, or a fused kernel where that measures faster. After each run this "
                "node tells in a line how many calls became sparse, or why none did; the log also why others did not."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The video model to speed up. It is not changed; the output is a patched copy."
                ),
                Plan.Input(
                    "plan",
                    tooltip=(
                        "From Tile Plan, Load Tile Plan or Search Tile Plan: which latent frames each layer attends to. Decides speed "
                        "and quality."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the denoising the sparse attention begins, as a fraction 0 to 1 of the noise schedule. "
                        "0 = from the first step. 0.1 to 0.2 keeps the first steps, which set layout and motion, dense: "
                        "better quality, less speed."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where the sparse attention ends, as a fraction 0 to 1 of the noise schedule. 1 = to the last step. "
                        "Lower leaves the last steps dense: slower, a little more detail."
                    ),
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    tooltip=(
                        'Layers that keep full attention, counted from 0, negative from the end: "0-2,-1" is the first three and '
                        "the last. Empty = none. Each dense layer costs its full time and protects quality."
                    ),
                ),
                io.Int.Input(
                    "min_tokens",
                    default=0,
                    min=0,
                    max=10_000_000,
                    step=128,
                    tooltip=(
                        "Calls over fewer video tokens than this stay dense, 0 to 10,000,000. In most models a token is a 2x2 patch of "
                        "a latent frame, 16x16 pixels. 0 = always sparse; a few thousand spares small runs the overhead where dense is "
                        "as fast."
                    ),
                ),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENTS),
                    default=PLACEMENTS[0],
                    optional=True,
                    tooltip=(
                        "Where the k reference frames stand (latent frames). strided = evenly over the clip, as in the paper; "
                        "first or last = the clip's first or last k; rotating = strided, moved on by one frame each step, so "
                        "that every frame gets its turn; chunk heads = on MiniMax-H3's latent frames of one pixel frame, every fifth. "
                        "Same speed; it changes which motion holds together."
                    ),
                ),
                io.Boolean.Input(
                    "decline_slow",
                    default=True,
                    optional=True,
                    tooltip=(
                        "On: a call stays dense where sparse would not be faster: fewer than 4 latent frames, more than 90 % "
                        "of the dense work left (with what residual_every adds), or dense measured faster. The log counts them. "
                        "Off: always sparse, for comparing quality."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", *BACKENDS],
                    default="auto",
                    optional=True,
                    tooltip=(
                        "What computes the sparse attention; the result is the same to rounding. auto = the fastest of a short "
                        "trial, measured once for each kind of shape and kept. frames = ComfyUI's own attention backend, on any "
                        "device. triton = one fused kernel, on NVIDIA GPUs from Ampere on and AMD's CDNA. flex = PyTorch's FlexAttention, "
                        "compiled. parts = the same backend's attention over parts of the keys, merged, where it tells what a merge needs "
                        "(PyTorch's, flash-attn, SageAttention), else frames. One that cannot run here is refused."
                    ),
                ),
                io.Int.Input(
                    "dense_first_steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip=(
                        "How many of the sampler's first steps stay dense, by number: the same under every shift and scheduler. "
                        "1 of 4 or 8 steps keeps what sets layout and motion. Counted within one sampler node; start_percent "
                        "holds as well."
                    ),
                ),
                io.Int.Input(
                    "dense_last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip=(
                        "How many of the sampler's last steps stay dense, by number. 1 gives back detail where a few-step LoRA was "
                        "not trained for sparse attention. Counted within one sampler node; end_percent holds as well."
                    ),
                ),
                io.Boolean.Input(
                    "measure",
                    default=False,
                    optional=True,
                    tooltip=(
                        "On: one step of each run is computed twice, dense and sparse, and the report, the log and this node tell the "
                        "seconds of both; with residual_every also of a step that renews. The result stays the same to the bit; the run "
                        "takes one dense step longer. Off: the report gives a bound by FLOPs."
                    ),
                ),
                io.Int.Input(
                    "residual_every",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip=(
                        "Every so many steps (0, or 2 to 100) each sparse layer also computes dense attention, and adds the difference "
                        "in the steps between: much closer to the dense clip. For models without a few-step LoRA, in 15 steps and "
                        "more. Keeps a tensor in memory for each layer and prompt. 4 is usual; 0 = off."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched_model",
                    display_name="model",
                    tooltip="A copy of the model with sparse attention. Works with every sampler, LoRA and guider node.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # its id counts in the cache, which older ComfyUIs do not tell from hidden
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str | None:
        """The node's id, at which ComfyUI's cache does not look: a MODEL kept under another one tells its runs to that."""
        return cls.hidden.unique_id if cls.hidden else None

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        plan: TilePlan,
        start_percent: float,
        end_percent: float,
        dense_blocks: str,
        min_tokens: int,
        placement: str = PLACEMENTS[0],
        decline_slow: bool = True,
        backend: str = "auto",
        dense_first_steps: int = 0,
        dense_last_steps: int = 0,
        measure: bool = False,
        residual_every: int = 0,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            patch_attention(
                model,
                plan.with_dense(dense_blocks),
                window=Window(start_percent, end_percent, dense_first_steps, dense_last_steps),
                min_tokens=min_tokens,
                placement=placement,
                decline_slow=decline_slow,
                backend=backend,
                measure=measure,
                residual_every=residual_every,
                # Outside a prompt, as in a script, there is no id and nobody to tell.
                after_run=announce_to_page(cls.hidden.unique_id, plan.to_text()) if cls.hidden else None,
            )
        )
