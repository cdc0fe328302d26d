"""What `accelerate launch` started: one process, data parallel ones, or ones that share the weights by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ...limits.packages import install
from ..config import DistillConfig
from ..data.prepare import cache_folder, encode_captions, sample_teacher
from ..families.open_model import open_model

MIXED = {"float32": "no", "bf16": "bf16"}  # precision -> accelerate's name
PATIENCE = timedelta(hours=12)  # while one process makes what the others wait for; the default is minutes


def make_accelerator(config: DistillConfig) -> Any:
    """accelerate's Accelerator for a run. Raises ValueError where the configuration or the launch cannot be met."""
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise ValueError(
            f"Distillation needs the package 'accelerate', which is missing. {install('accelerate', 'tensorboard')}"
        ) from error
    precision = config.training.precision
    sharding = launched_sharding()
    _refuse_other_engines(sharding)
    accelerator = Accelerator(
        mixed_precision=MIXED[precision], cpu=config.model.device == "cpu",
        fsdp_plugin=fsdp_plugin(precision) if sharding else None, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
    if sharding and not accelerator.is_fsdp2:
        raise ValueError(
            f"`accelerate launch --use_fsdp` shards weights over GPUs only, but this run is on {accelerator.device.type}. "
            "Start it without --use_fsdp."
        )
    return accelerator


def fsdp_plugin(precision: str) -> Any:
    """The launch's FSDP2 settings, completed: one unit for each transformer block, and bf16 as data parallel runs have
    it."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = None
    if precision == "bf16":
        # accelerate's own policy also rounds what goes in (times of 0..999 to steps of 4) and sums the gradients in
        # bf16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY") or "transformer_based_wrap",  # pyright: ignore[reportArgumentType]
        # That way of loading takes every entry of the state dict for a weight, and knows transformers' models only.
        cpu_ram_efficient_loading=False,
    )


def by_first_process(accelerator: Any, make: Callable[[], None]) -> None:
    """What the first process makes alone, while the others wait for it."""
    if accelerator.is_main_process:
        make()
    accelerator.wait_for_everyone()


def share_samples(config: DistillConfig, cache: Path, accelerator: Any) -> None:
    """Where several processes train on the teacher's samples, each draws its share of those that are missing."""
    processes = accelerator.num_processes
    if processes == 1 or config.data.source != "teacher":
        return
    cache, model = cache_folder(config, cache), open_model(config.sampled_by or config.model)
    with accelerator.main_process_first():  # the others read them
        encode_captions(config, model, cache, accelerator.device)
    sample_teacher(config, model, cache, accelerator.device, (accelerator.process_index, processes))
    accelerator.wait_for_everyone()


def free_memory(accelerator: Any) -> None:
    """Give back what no name holds any more, on the GPU too: the next stage of a recipe loads a model of its own."""
    from accelerate.utils import release_memory

    accelerator.free_memory()  # it lets go of what it prepared, but only after it has looked for what is free
    release_memory()  # Python's collector first: accelerate ties networks in bf16, and hosted ones, into cycles


def launched_processes() -> int:
    """How many processes accelerate's launcher started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_sharding() -> bool:
    """Whether they are to share out the weights by FSDP2; known before there is an accelerator."""
    return _launched_with("ACCELERATE_USE_FSDP")


def _launched_with(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("1", "true", "yes")


def _refuse_other_engines(sharding: bool) -> None:
    for flag, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _launched_with(flag):
            raise ValueError(
                f"accelerate was started with {engine}, expected plain data parallelism or FSDP2. Start `accelerate launch --multi_gpu`, "
                "or `accelerate launch --use_fsdp --fsdp_version 2` where the weights do not fit."
            )
    if not sharding:
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate was started with FSDP 1, expected FSDP2. Add --fsdp_version 2.")
    if _launched_with("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "accelerate was started with --fsdp_activation_checkpointing, which renames the weights. Leave it out and set "
            "model.gradient_checkpointing, which does the same."
        )
