"""What runs in a worker: models that a headless ComfyUI has built, and their steps.

Nothing of ComfyUI is imported at the top: the folder it lies in and its options come with the first request.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from .packing import unpack
from .worker_comfyui import WorkerComfyUI


class ComfyHost:
    """Builds and keeps models by key; ``settings`` and ``comm`` are the rank's."""

    def __init__(self, settings: Any, comm: Any) -> None:
        self.settings, self.comm = settings, comm
        self.models: dict[str, Any] = {}
        self.comfyui: WorkerComfyUI | None = None
        self.running: Any = None  # the model of the run that goes on
        self.run = ""

    def open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Build the model of ``message["key"]``, unless it is there, and tell its plan, the precision it computes in and the
        models that are held now.

        Raises ValueError naming the node that stands in the way.
        """
        if self.comfyui is None:
            self.comfyui = WorkerComfyUI(self.settings, message["comfyui"])
        elif self.comfyui.follow(message["comfyui"]):
            self._end_run()
            self.models.clear()
        from ..forward import compute_dtype
        from .mapped_files import files_stay_mapped
        from .sharded_weights import SHARDED_WEIGHTS, WHOLE_WEIGHTS
        from .sharding import plan_text, shard_model

        self.comfyui.load_packs(message["packs"], message["sources"])
        if message["key"] not in self.models:
            self.comfyui.forget_replaced(message["files"])
            hold = message.get("hold", WHOLE_WEIGHTS)
            with files_stay_mapped() if hold == SHARDED_WEIGHTS else nullcontext():
                built = self.comfyui.build(message["key"], message["keep"], message["prompt"], message["source"])
            self.models[message["key"]] = shard_model(built, self.comm, weights=hold)
        for key in set(self.models) - set(message["keep"]):
            if self.models.pop(key) is self.running:
                self._end_run()
        model = self.models[message["key"]]
        return {"plan": plan_text(model), "dtype": str(compute_dtype(model.model)), "held": list(self.models)}

    def offload(self) -> None:
        """Free the device; the weights stay in main memory."""
        mm = importlib.import_module("comfy.model_management")
        try:
            self._end_run()
        finally:  # whatever another node's clean-up does
            _let_go_of_weights()
            mm.unload_all_models()
            mm.soft_empty_cache()

    def step(self, message: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One forward pass; every rank returns the same denoised latents, rank 0's are used. ``message["run"]`` names the
        sampling run that it belongs to, ``message["schedule"]`` the noise schedule that ComfyUI's process has now."""
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy.patcher_extension

        from ....efficient_vdit_core.attention.report.report import AttentionReport
        from .branches import DIVISION_KEY, WEIGHTS_KEY, division_of
        from .schedule import set_schedule
        from .sharded_weights import ShardedWeightsPatcher, let_go
        from .sharding import COUNTS_KEY, REPORT_KEY, SCHEME_KEY
        from .step_memory import part_of, step_memory

        model, run = self.models[message["key"]], message.get("run", "")
        weights, division = tuple(message.get("weights", ())), division_of(message)
        given = unpack(message["inputs"], tensors, mm.get_torch_device())
        if model is not self.running or run != self.run:
            self._end_run()
        if not isinstance(model, ShardedWeightsPatcher):
            let_go(model.model)  # before whole weights come in the place of parts
        part = part_of(self.comm.rank, self.comm.size, len(given["x"]), weights, division)
        mm.load_models_gpu(
            [model, *model.get_nested_additional_models()], memory_required=step_memory(model, given, *part)
        )
        set_schedule(model.model.model_sampling, unpack(message.get("schedule", {}), tensors, mm.get_torch_device()))
        if self.running is None:
            model.pre_run()
            self.running, self.run = model, run
        options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
        for kind, found in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
            comfy.patcher_extension.merge_nested_dicts(options.setdefault(kind, {}), found, copy_dict1=False)
        options.update(given.pop("options"))
        options[SCHEME_KEY], options[COUNTS_KEY] = message["scheme"], Counter()
        options[WEIGHTS_KEY], options[DIVISION_KEY] = weights, division
        options[REPORT_KEY] = report = AttentionReport()
        before = sum(self.comm.sent.values())
        try:
            out = model.model.apply_model(given.pop("x"), given.pop("t"), transformer_options=options, **given)
        except BaseException:
            _let_go_of_weights()
            raise
        told = {"schemes": options[COUNTS_KEY], "attention": report.counts()}
        return {"bytes": sum(self.comm.sent.values()) - before, **told}, {"out": out}

    def _end_run(self) -> None:
        """What ComfyUI does behind each run: other nodes forget what they keep for it."""
        ended, self.running, self.run = self.running, None, ""
        if ended is not None:
            ended.cleanup()


def _let_go_of_weights() -> None:
    """What ComfyUI's executor does behind every node where it streams weights; the steps here are no node's."""
    for module, name in (("model_management", "reset_cast_buffers"), ("model_prefetch", "cleanup_prefetch_queues")):
        if importlib.util.find_spec(f"comfy.{module}"):
            getattr(importlib.import_module(f"comfy.{module}"), name, lambda: None)()
