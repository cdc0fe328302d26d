"""Shares one video out over several devices."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..efficient_vdit_core.parallel.sharding.attend import SCHEMES
from ..efficient_vdit_core.parallel.sharding.division import AUTO, DIVISIONS, SEQUENCE
from .checked import checked
from .comfy_bridge.parallel.model import parallelize, reachable
from .comfy_bridge.parallel.run import AFTER_RUN
from .comfy_bridge.parallel.sharded_weights import WEIGHTS
from .inputs import CATEGORY, advanced_inputs, search_words


class EVDiTSequenceParallel(io.ComfyNode):
    """MODEL in, a MODEL that the workers compute out."""

    @classmethod
    @advanced_inputs("scheme", "start_timeout", "step_timeout", "division")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTSequenceParallel",
            display_name="Sequence Parallel",
            category=CATEGORY,
            **search_words(
                "multi gpu", "multigpu", "several gpus", "distributed", "xfuser", "ulysses", "faster", "speed up"
            ),
            description=(
                "Computes one video on several GPUs at once: each holds a part of the frames. The sampler, previews and Cancel "
                "stay in ComfyUI. Place it last before the sampler; the workers run the nodes before it themselves. With one "
                "device the model passes through."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "MiniMax-H3, Wan 2.1 and 2.2, LTX and LTX-2, HunyuanVideo, CogVideoX, Kandinsky 5 and 6 or Open-Sora-Plan, "
                        "with LoRAs and Sparse Attention before it. It is not changed."
                    ),
                ),
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip=(
                        '"auto" = the pool that runs already, else all GPUs that ComfyUI sees; or their numbers, such as "0,1". '
                        "Activations are divided: evenly over GPUs of one name, else by what each measured."
                    ),
                ),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default="auto",
                    tooltip=(
                        "How sparse layers exchange data. auto = what sends fewer bytes, layer by layer; rb = only the reference "
                        "frames travel, best for long clips with few of them; ulysses = heads are swapped. No effect on the result."
                    ),
                ),
                io.Int.Input(
                    "start_timeout",
                    default=300,
                    min=5,
                    max=7200,
                    tooltip="Seconds to wait until the workers have started, and again until they have built the model, 5 to 7200.",
                ),
                io.Int.Input(
                    "step_timeout",
                    default=600,
                    min=1,
                    max=86400,
                    tooltip=(
                        "Seconds that one evaluation of the model may take, 1 to 86400; then the error names the rank that hangs and "
                        "the workers are ended. Must be longer than the slowest step, the first one included."
                    ),
                ),
                io.Combo.Input(
                    "after_run",
                    options=AFTER_RUN,
                    default="keep",
                    tooltip=(
                        "What the workers do after each run: keep = stay loaded, the next run starts at once; offload = free the GPUs, "
                        "for a VAE that needs the memory; stop = end, the next run starts them and loads the model again."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip=(
                        "What happens where the model cannot be shared out (one device, another model, workers that do not start): off = "
                        "it runs on one device, and the node says why; on = the run stops with that reason."
                    ),
                ),
                io.Combo.Input(
                    "weights",
                    options=WEIGHTS,
                    default=WEIGHTS[0],
                    optional=True,  # a prompt that was saved before it came runs as it did
                    tooltip=(
                        "How the GPUs hold the model: whole = all of it on each; sharded = a part of each block on each, gathered ahead "
                        "of the block's turn, for a model that does not fit on one GPU. No effect on the result; slower over PCIe."
                    ),
                ),
                io.Combo.Input(
                    "division",
                    options=list(DIVISIONS),
                    default=AUTO,
                    optional=True,
                    tooltip=(
                        "With CFG above 1, where both branches come in one batch: branches = half of the GPUs take each; sequence = all "
                        "share out both; auto = the faster by forecast, or sequence where another node acts inside the model. The result "
                        "differs by rounding alone, unless such a node needs both branches at once."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "parallel_model",
                    display_name="model",
                    tooltip="Computed by the workers. Works with every sampler, guider and CFG; connect it to these directly.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "Devices, free memory, what the weights take, measured rates, the speed-up these promise, or why there is one "
                        "device."
                    ),
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            not_idempotent=True,  # its id counts in the cache, which older ComfyUIs do not tell from hidden
        )

    @classmethod
    def fingerprint_inputs(cls, devices: str | None = "auto", **_: Any) -> tuple[Any, ...]:
        """Runs again where the workers may be reached that could not be before."""
        return reachable(devices)

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        devices: str,
        scheme: str,
        start_timeout: int,
        step_timeout: int,
        after_run: str,
        strict: bool,
        weights: str = WEIGHTS[0],
        division: str = SEQUENCE,  # what a prompt did that was saved before it came
    ) -> io.NodeOutput:
        result = parallelize(
            model,
            devices=devices,
            scheme=scheme,
            start_timeout=start_timeout,
            step_timeout=step_timeout,
            after_run=after_run,
            strict=strict,
            weights=weights,
            division=division,
            prompt=cls.hidden.prompt,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(*result)
