"""A headless ComfyUI in a worker: started with the options and folders of the one that asks, it runs a prompt's nodes.

Nothing of ComfyUI is imported at the top: the folder it lies in comes with the first request.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

CAPTURE = "EVDiTWorkerCapture"
# Options, or how their names begin, of what a worker has not (a server, a page, a cache of its own), or is told otherwise.
_NOT_HEARD = (
    "auto_launch", "base_directory", "cache_", "comfy_api_base", "cpu", "cuda_device", "database_url", "default_device",
    "disable_all_custom_nodes", "disable_api_nodes", "disable_auto_launch", "disable_manager", "disable_metadata", "dont_print_server",
    "enable_asset", "enable_compress_response_body", "enable_cors_header", "enable_manager", "extra_model_paths_config",
    "feature_flag", "front_end", "high_ram", "input_directory", "list_feature_flags", "listen", "log_stdout", "max_upload_size",
    "models_directory", "multi_user", "output_directory", "port", "preview_", "quick_test_for_ci", "temp_directory", "tls_",
    "user_directory", "verbose", "whitelist_custom_nodes", "windows_standalone_build",
)  # fmt: skip


class WorkerComfyUI:
    """ComfyUI in this process, which is a rank with ``settings``; ``about``: root, argv, folders and input of the one that
    asks, as of ``worker_graph``."""

    def __init__(self, settings: Any, about: dict[str, Any]) -> None:
        self.settings, self.about = settings, about
        self.kept: list[Any] = []
        self.parts: dict[str, dict[str, Any]] = {}  # by key, of what prompts the models that are kept were built
        self.files: dict[str, list[int]] = {}  # size and time of those that models were built of
        self.packs: dict[str, str] = {}  # where node classes were loaded from
        self.sources: dict[str, str] = {}  # what code that was, by folder or file
        self.executor = self._start(about)

    def follow(self, about: dict[str, Any]) -> bool:
        """Take the folders of the ComfyUI that asks now, which may be another one than before; whether they are others.

        Raises ValueError where its own place or its options are: this process cannot change these.
        """
        if about["root"] != self.about["root"]:
            raise ValueError(
                f"The workers run the ComfyUI in {self.about['root']}, expected {about['root']}. End them where they were started, and "
                "start them again."
            )
        _check_version(about)
        if differ := _differ(self.about["argv"], about["argv"]):
            raise ValueError(
                f"The workers were started for a ComfyUI with other options ({', '.join(differ)}), and go on with those. End them "
                "where they were started, and start them again."
            )
        same = all(about[name] == self.about[name] for name in ("folders", "input"))
        self.about = about
        if not same:
            _set_folders(about)
            self.executor.reset()
        return not same

    def forget_replaced(self, files: dict[str, list[int]]) -> None:
        """Have ComfyUI read a file anew that was replaced under its name, which its own cache does not look at."""
        if any(self.files.get(path, about) != about for path, about in files.items()):
            self.executor.reset()
        self.files |= files

    def load_packs(self, packs: dict[str, str], sources: dict[str, str]) -> None:
        """Load the node classes of other packs, each from its folder or file, whose code has the number in ``sources``.
        Raises ValueError where one does not load, and where other code or that of elsewhere was loaded before."""
        nodes = importlib.import_module("nodes")
        for path, source in sources.items():
            if self.sources.setdefault(path, source) != source:
                raise ValueError(
                    f"The pack in {path} has changed since the workers loaded it. End them where they were started, and start them "
                    "again."
                )
        for kind, path in packs.items():
            self.settings.check_import(path)
            if (before := self.packs.setdefault(kind, path)) != path:
                raise ValueError(
                    f"The workers have loaded the node {kind} from {before}, expected {path}. End them where they were started, and "
                    "start them again."
                )
            if kind not in nodes.NODE_CLASS_MAPPINGS and not asyncio.run(
                nodes.load_custom_node(path, module_parent="custom_nodes")
            ):
                log = self.settings.log or "the workers' output"
                raise ValueError(
                    f"The node {kind} cannot run in the workers: its pack did not load there; {log} says why."
                )

    def build(self, key: str, keep: Collection[str], prompt: dict[str, Any], source: list[Any]) -> Any:
        """Run the part of the prompt that makes the model of ``key``. Raises ValueError naming the node that stands in the
        way.

        ComfyUI's cache forgets what stands in no prompt, so those of the models in ``keep`` stand beside it: two experts
        are read from disk once, whichever of them another LoRA is put on.
        """
        nodes, execution = importlib.import_module("nodes"), importlib.import_module("execution")
        for node in prompt.values():
            if node["class_type"] not in nodes.NODE_CLASS_MAPPINGS:
                raise ValueError(
                    f"The node {node['class_type']} is missing in the workers. Install its pack where they run."
                )
        others = {known: part for known, part in self.parts.items() if known in keep and known != key}
        self.parts = {**others, key: prompt}
        # Where two give a number to unlike nodes, the one asked for now has it.
        beside = {number: node for part in self.parts.values() for number, node in part.items()}
        prompt = {**beside, CAPTURE: {"class_type": CAPTURE, "inputs": {"model": source}}}
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

    def _start(self, about: dict[str, Any]) -> Any:
        """Import ComfyUI; returns its executor."""
        self.settings.check_import(about["root"])
        sys.path.insert(0, about["root"])
        _check_version(about)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        sys.argv = ["main.py", *about["argv"]]
        # ComfyUI's nodes put comfy/ on the path, whose utils.py would then hide the package of that name.
        importlib.import_module("utils")
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = self.settings.device == "cpu"
        _set_folders(about)
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


class NoAssets:
    """What later versions of ComfyUI (0.36) keep their assets by, for a server that never listens: it keeps none."""

    enabled = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _check_version(about: dict[str, Any]) -> None:
    """Raises ValueError where the ComfyUI that asks is another version than the one that this process imports."""
    own = importlib.import_module("comfyui_version").__version__
    if own != about["version"]:
        raise ValueError(
            f"The workers run ComfyUI {own}, expected {about['version']}, which the one that asks is. End them where they were "
            "started, and start them again."
        )


def _set_folders(about: dict[str, Any]) -> None:
    """Where ComfyUI finds models and inputs from now on."""
    folder_paths = importlib.import_module("folder_paths")
    for name, (folders, endings) in about["folders"].items():
        folder_paths.folder_names_and_paths[name] = (list(folders), set(endings))
    folder_paths.filename_list_cache.clear()
    folder_paths.set_input_directory(about["input"])


def _differ(before: list[str], now: list[str]) -> list[str]:
    """The options that a worker hears and two command lines of the same ComfyUI set otherwise."""
    parser = importlib.import_module("comfy.cli_args").parser
    then, now_set = (vars(parser.parse_args(argv)) for argv in (before, now))
    heard = (name for name in then if not name.startswith(_NOT_HEARD))
    return [f"--{name.replace('_', '-')}" for name in heard if then[name] != now_set[name]]


def _takes(kind: type, argument: str) -> bool:
    return argument in inspect.signature(kind.__init__).parameters


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
