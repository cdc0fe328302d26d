"""ComfyUI's side of sequence parallelism: a MODEL whose every forward pass is computed by the pool of workers.

Sampler, preview, progress and Cancel stay here; this process is never a rank.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...efficient_vdit_core.parallel.pool.session import Launch, Session, parse_devices
from . import patch
from .announce import show_on_node
from .packing import pack
from .parallel_report import report_of, shares_of
from .recipe import import_folders, recipe
from .sharded_weights import SHARDED_WEIGHTS, check_weights
from .sharding import find_shardable

log = logging.getLogger("efficient_vdit")

WRAPPER_KEY = "efficient_vdit_parallel"
NODE = "EVDiTSequenceParallel"
AFTER_RUN = ["keep", "offload", "stop"]
# What acts below the sampler: in the workers, where the same nodes have run. The other kinds of wrappers act here.
_IN_WORKERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
# Options of a forward that the workers' own hooks may read.
_FORWARD_OPTIONS = ("sigmas", "sample_sigmas", "cond_or_uncond")
# Others that ComfyUI sets: callables, which are looked at by themselves, and what acts in this process alone.
_OPTIONS_HERE = frozenset(
    (
        "patches",
        "patches_replace",
        "wrappers",
        "callbacks",
        "uuids",
        "context_window",
        "multigpu_thread_device",
        patch.OVERRIDE,
    )
)
_PLAIN = (bool, int, float, str, tuple, list, dict)
SESSION = Session()


@dataclass
class Run:
    """What one sampling run took, for the log."""

    steps: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    schemes: dict[str, int] = field(default_factory=dict)

    def summary(self, ranks: int) -> str:
        steady = self.steps[1:] or self.steps
        if not steady:
            return "no forward pass"
        mean, sent = 1000 * sum(steady) / len(steady), max(self.sent) / 2**20
        layers = ", ".join(f"{count} layers by {scheme}" for scheme, count in sorted(self.schemes.items()))
        return f"{len(self.steps)} forward passes on {ranks} ranks, {mean:.0f} ms and up to {sent:.1f} MiB sent by a rank in each; {layers}"


def parallelize(
    model: Any,
    *,
    devices: str,
    scheme: str,
    start_timeout: float,
    step_timeout: float,
    after_run: str,
    strict: bool,
    weights: str,
    prompt: dict[str, Any] | None,
    node_id: str | None,
) -> tuple[Any, str]:
    """A clone of MODEL that the workers compute, and a report; the MODEL itself where it cannot be so and ``strict`` is
    off. Raises ValueError for devices that cannot be read or that this machine has not."""
    names = parse_devices(devices)
    try:
        _, rule = find_shardable(model)
        _refuse_split_state(model)
        if weights == SHARDED_WEIGHTS:
            check_weights(model, rule)
        if len(names) < 2:
            raise ValueError(
                f"One device was found ({', '.join(names)}), expected two or more: there is nothing to share out."
            )
        key, opening = recipe(prompt, node_id, NODE)
        if weights == SHARDED_WEIGHTS:
            key, opening = f"{key} {weights}", {**opening, "hold": weights}
        launch = Launch(names, key, opening, start_timeout, step_timeout, imports=import_folders())
        SESSION.ready(launch, mm.throw_exception_if_processing_interrupted)
    except (ValueError, RuntimeError, OSError) as error:
        SESSION.failures += not isinstance(error, ValueError)
        if strict:
            raise
        log.warning("Efficient-vDiT: the model runs on one device: %s", error)
        report = f"The model runs on one device as it was: {error}"
        show_on_node(node_id, report)
        return model, report
    report = report_of(model, SESSION.tests, scheme, weights)
    show_on_node(node_id, report.splitlines()[0])
    return _redirected(model, launch, scheme, after_run), report


def reachable(devices: str) -> tuple[Any, ...]:
    """Changes where the same node may fare otherwise: another pool is found, or workers have failed since."""
    try:
        return *parse_devices(devices), SESSION.failures
    except ValueError as error:
        return (str(error),)


def _redirected(model: Any, launch: Launch, scheme: str, after_run: str) -> Any:
    """The clone: its weights rest unpatched, for the workers hold patched ones of their own."""
    patched = model.clone()
    # Where ComfyUI streams weights they come to the GPU when they are used, and such a patcher knows no CPU.
    if not getattr(patched, "is_dynamic", lambda: False)():
        patched.load_device = torch.device("cpu")
    patched.patches = _patches_here(model)
    patched.patches_uuid = uuid.uuid4()
    for kind in _IN_WORKERS:  # else they would act twice
        for key in list(patched.wrappers.get(kind, {})):
            patched.remove_wrappers_with_key(kind, key)
    # No attention call comes by here, which the sparse node's report would take for a fault.
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, patch.WRAPPER_KEY)
    run, options = Run(), dict(patched.model_options["transformer_options"])
    known = Known(_hooks(options), options, set(patched.object_patches), _counts(patched.patches))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _send_step(launch, scheme, run, known))
    patched.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, _after(run, len(launch.devices), after_run, known)
    )
    patched.set_additional_models(WRAPPER_KEY, [_memory_watch()])
    return patched


@dataclass(frozen=True)
class Known:
    """What the workers' model has too: functions of other nodes, options of every forward, and changed modules."""

    hooks: list[str]
    options: dict[str, Any]
    modules: set[str]
    patches: dict[str, int]


def _patches_here(model: Any) -> dict[str, Any]:
    """The LoRAs of what does not run in the workers: ComfyUI makes the text of some models ready before the steps."""
    _, rule = find_shardable(model)
    blocks = tuple(f"diffusion_model.{row.path}." for row in rule.rows)
    return {key: list(found) for key, found in model.patches.items() if not key.startswith(blocks)}


def _counts(patches: dict[str, Any]) -> dict[str, int]:
    return {key: len(found) for key, found in patches.items()}


def _send_step(launch: Launch, scheme: str, run: Run, known: Known) -> Any:
    """An APPLY_MODEL wrapper that ends the chain: the workers compute, this process waits and listens for Cancel."""

    def wrapper(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Tensor:
        if control is not None:
            raise ValueError(
                "A ControlNet acts on this run, which the workers cannot apply. Remove it, or bypass EVDiTSequenceParallel."
            )
        if marks := _marks(transformer_options or {}, known.options):
            raise ValueError(
                f"A node marks evaluations by {', '.join(marks)}: a guidance by layers or between sound and video, or one that stands "
                "behind EVDiTSequenceParallel. The workers cannot see that. Remove it, or place it before."
            )
        if _hooks(transformer_options or {}) != known.hooks:
            raise ValueError(
                "A node hooks the model's blocks in some of its evaluations (such as skip-layer or perturbed-attention guidance), or "
                "stands behind EVDiTSequenceParallel: the workers cannot see that. Remove it, or bypass EVDiTSequenceParallel."
            )
        options = {name: value for name, value in (transformer_options or {}).items() if name in _FORWARD_OPTIONS}
        tensors: dict[str, Tensor] = {}
        given = {"x": x, "t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, "options": options, **conds}
        SESSION.ready(launch, mm.throw_exception_if_processing_interrupted)  # a pool that starts anew measures anew
        message = {"inputs": pack(given, tensors), "scheme": scheme, "weights": shares_of(SESSION.tests)}
        start = time.perf_counter()
        ranks, result = SESSION.step(launch, message, tensors, mm.throw_exception_if_processing_interrupted)
        run.steps.append(time.perf_counter() - start)
        run.sent.append(max(int(said["bytes"]) for said in ranks))
        run.schemes = ranks[0]["schemes"]
        return result["out"].to(x.device)

    return wrapper


def _hooks(options: dict[str, Any]) -> list[str]:
    """The places in a forward's ``transformer_options`` where functions of other nodes hook in, and their names."""

    def walk(found: Any, place: str) -> list[str]:
        if isinstance(found, dict):
            return [name for key, value in found.items() for name in walk(value, f"{place} {key}")]
        if isinstance(found, list):
            return [name for value in found for name in walk(value, place)]
        return [f"{place}: {getattr(found, '__qualname__', type(found).__qualname__)}"]

    kinds = ("patches", "patches_replace", patch.OVERRIDE)
    return sorted(name for kind in kinds if kind in options for name in walk(options[kind], kind))


def _marks(options: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The options of a forward that the MODEL has not, or that say something else there."""
    looked_at = options.keys() - _OPTIONS_HERE - set(_FORWARD_OPTIONS)
    return sorted(str(key) for key in looked_at if key not in known or _differ(options[key], known[key]))


def _differ(one: Any, other: Any) -> bool:
    """Whether two options are known to differ; ComfyUI copies them from forward to forward, objects too."""
    return one is not other and isinstance(one, _PLAIN) and repr(one) != repr(other)


def _after(run: Run, ranks: int, after_run: str, known: Known) -> Any:
    """An OUTER_SAMPLE wrapper: refuses what would be lost on the way, and does what ``after_run`` says."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_hooks(executor.class_obj)
        _refuse_patches(executor.class_obj.model_patcher, known)
        run.steps, run.sent = [], []
        try:
            return executor(*args, **kwargs)
        finally:
            log.info("Efficient-vDiT: %s", run.summary(ranks))
            if after_run == "stop":
                SESSION.stop()
            elif after_run == "offload":
                _offload()

    return wrapper


def _refuse_hooks(guider: Any) -> None:
    for conds in (getattr(guider, "conds", None) or {}).values():
        if any(isinstance(cond, dict) and cond.get("hooks") is not None for cond in conds):
            raise ValueError(
                "The conditioning carries hooks (a LoRA or schedule of its own), which the workers cannot apply. Remove them."
            )


def _refuse_split_state(model: Any) -> None:
    """Raises where wrappers of one key act both here and in the workers, as EasyCache's do: they share a state of the
    run."""
    kinds = [
        (key, kind in _IN_WORKERS)
        for kind, found in model.wrappers.items()
        for key in found
        if key not in (None, patch.WRAPPER_KEY)
    ]
    split = sorted({str(key) for key, inside in kinds if inside and (key, False) in kinds})
    if split:
        raise ValueError(
            f"{', '.join(split)} shares what it remembers between the sampler and the model, which run in different processes here. "
            "Remove that node, or bypass EVDiTSequenceParallel."
        )


def _refuse_patches(patcher: Any, known: Known) -> None:
    """Raises where a node behind ours has changed the model: the workers have run only those before it."""
    wrappers = {key for kind in _IN_WORKERS for key in patcher.wrappers.get(kind, {})}
    modules = [name for name in set(patcher.object_patches) - known.modules if name.startswith("diffusion_model")]
    if _counts(patcher.patches) != known.patches or modules or wrappers != {WRAPPER_KEY}:
        raise ValueError(
            "A LoRA or another patch stands between EVDiTSequenceParallel and the sampler, where the workers cannot see it. Place "
            "EVDiTSequenceParallel last, and the patch before it."
        )


class _Nothing(nn.Module):
    """A module of one number: what ComfyUI's memory management holds in the place of the workers' memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1), requires_grad=False)


def _memory_watch() -> Any:
    """A patcher that is loaded and unloaded with the clone: when ComfyUI frees its memory, the workers free theirs."""
    watch = comfy.model_patcher.ModelPatcher(
        _Nothing(), load_device=mm.get_torch_device(), offload_device=torch.device("cpu")
    )
    watch.add_callback_with_key(CallbacksMP.ON_DETACH, WRAPPER_KEY, _on_detach)
    return watch


def _on_detach(patcher: Any, unpatch_all: bool) -> None:
    # Without unpatching, one clone only makes way for the next.
    if unpatch_all:
        _offload()


def _offload() -> None:
    try:
        if SESSION.offload():
            log.info("Efficient-vDiT: the workers have moved their models to main memory.")
    except (RuntimeError, ValueError) as error:
        log.warning("Efficient-vDiT: the workers could not free their memory: %s", error)
