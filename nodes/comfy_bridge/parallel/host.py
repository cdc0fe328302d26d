"""What runs in a worker: a headless ComfyUI that builds the MODEL from its part of the prompt, and computes steps.

Nothing of ComfyUI is imported at the top: the folder it lies in and its options come with the first request.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from .packing import unpack

CAPTURE = "EVDiTWorkerCapture"


class ComfyHost:
    """Builds and keeps models by key; ``settings`` and ``comm`` are the rank's."""

    def __init__(self, settings: Any, comm: Any) -> None:
        self.settings, self.comm = settings, comm
        self.models: dict[str, Any] = {}
        self.executor: Any = None
        self.files: dict[str, list[int]] = {}  # size and time of those that models were built of
        self.kept: list[Any] = []
        self.running: Any = None  # the model of the run that goes on
        self.run = ""

    def open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Build the model of ``message["key"]``, unless it is there, and tell its plan and the precision it computes in.

        Raises ValueError naming the node that stands in the way.
        """
        if self.executor is None:
            self.executor = self._start_comfyui(message["comfyui"])
        from ..forward import compute_dtype
        from .mapped_files import files_stay_mapped
        from .sharded_weights import SHARDED_WEIGHTS, WHOLE_WEIGHTS
        from .sharding import plan_text, shard_model

        if message["key"] not in self.models:
            self._load_packs(message["packs"])
            self._forget_replaced(message["files"])
            hold = message.get("hold", WHOLE_WEIGHTS)
            with files_stay_mapped() if hold == SHARDED_WEIGHTS else nullcontext():
                built = self._build(message["prompt"], message["source"])
            self.models[message["key"]] = shard_model(built, self.comm, weights=hold)
        for key in set(self.models) - set(message["keep"]):
            if self.models.pop(key) is self.running:
                self._end_run()
        model = self.models[message["key"]]
        return {"plan": plan_text(model), "dtype": str(compute_dtype(model.model))}

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
        sampling run that it belongs to."""
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy.patcher_extension

        from ....efficient_vdit_core.attention.report.report import AttentionReport
        from .branches import DIVISION_KEY, WEIGHTS_KEY, division_of
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

    def _start_comfyui(self, about: dict[str, Any]) -> Any:
        """Import ComfyUI with the options and folders of the one that asked; returns its executor."""
        self.settings.check_import(about["root"])
        sys.path.insert(0, about["root"])
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        sys.argv = ["main.py", *about["argv"]]
        # ComfyUI's nodes put comfy/ on the path, whose utils.py would then hide the package of that name.
        importlib.import_module("utils")
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = self.settings.device == "cpu"
        folder_paths = importlib.import_module("folder_paths")
        for name, (folders, endings) in about["folders"].items():
            folder_paths.folder_names_and_paths[name] = (list(folders), set(endings))
        folder_paths.set_input_directory(about["input"])
        execution, nodes, server = (importlib.import_module(name) for name in ("execution", "nodes", "server"))
        # Packs register routes when they are imported; this server never listens.
        assets = {"asset_manager": NoAssets()} if _takes(server.PromptServer, "asset_manager") else {}
        instance = server.PromptServer(asyncio.new_event_loop(), **assets)
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        nodes.NODE_CLASS_MAPPINGS[CAPTURE] = _capture_node(self.kept)
        extra = {}
        if _takes(execution.PromptExecutor, "cache_args"):
            # Of the limits only the kinds of cache that are not used here make use; each version asks for more of them.
            extra = {"cache_type": execution.CacheType.CLASSIC, "cache_args": defaultdict(int)}
        return execution.PromptExecutor(instance, **extra)

    def _forget_replaced(self, files: dict[str, list[int]]) -> None:
        """Have ComfyUI read a file anew that was replaced under its name, which its own cache does not look at."""
        if any(self.files.get(path, about) != about for path, about in files.items()):
            self.executor.reset()
        self.files |= files

    def _load_packs(self, packs: dict[str, str]) -> None:
        nodes = importlib.import_module("nodes")
        for kind, path in packs.items():
            self.settings.check_import(path)
            if kind not in nodes.NODE_CLASS_MAPPINGS and not asyncio.run(
                nodes.load_custom_node(path, module_parent="custom_nodes")
            ):
                log = self.settings.log or "the workers' output"
                raise ValueError(
                    f"The node {kind} cannot run in the workers: its pack did not load there; {log} says why."
                )

    def _build(self, prompt: dict[str, Any], source: list[Any]) -> Any:
        """Run the part of the prompt that makes the model."""
        nodes, execution = importlib.import_module("nodes"), importlib.import_module("execution")
        for node in prompt.values():
            if node["class_type"] not in nodes.NODE_CLASS_MAPPINGS:
                raise ValueError(
                    f"The node {node['class_type']} is missing in the workers. Install its pack where they run."
                )
        prompt = {**prompt, CAPTURE: {"class_type": CAPTURE, "inputs": {"model": source}}}
        valid, error, outputs, by_node = asyncio.run(execution.validate_prompt(CAPTURE, prompt, None))
        if not valid:
            names = ", ".join(found["class_type"] for found in by_node.values())
            raise ValueError(
                f"The workers cannot run {names or 'the nodes before EVDiTSequenceParallel'}: {error['message']} {by_node}"
            )
        self.kept.clear()
        self.executor.execute(prompt, CAPTURE, {}, outputs)
        if not self.executor.success:
            failed = next(
                data
                for kind, data in self.executor.status_messages
                if kind in ("execution_error", "execution_interrupted")
            )
            raise ValueError(
                f"The node {failed['node_type']} failed in the workers: {failed.get('exception_message', 'interrupted')}"
            )
        return self.kept[-1]


class NoAssets:
    """What later versions of ComfyUI (0.36) keep their assets by, for a server that never listens: it keeps none."""

    enabled = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _takes(kind: type, argument: str) -> bool:
    return argument in inspect.signature(kind.__init__).parameters


def _let_go_of_weights() -> None:
    """What ComfyUI's executor does behind every node where it streams weights; the steps here are no node's."""
    for module, name in (("model_management", "reset_cast_buffers"), ("model_prefetch", "cleanup_prefetch_queues")):
        if importlib.util.find_spec(f"comfy.{module}"):
            getattr(importlib.import_module(f"comfy.{module}"), name, lambda: None)()


def _capture_node(kept: list[Any]) -> type:
    """A node that keeps the MODEL it is given in ``kept``; it exists in the workers alone."""

    class Capture:
        RETURN_TYPES = ()
        FUNCTION = "keep"
        CATEGORY = "Efficient-vDiT"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"model": ("MODEL",)}}

        @classmethod
        def IS_CHANGED(cls, **_: Any) -> float:
            return float("nan")  # never taken from the cache

        def keep(self, model: Any) -> dict[str, Any]:
            kept.append(model)
            return {}

    return Capture
