"""ComfyUI's side of sequence parallelism: a MODEL whose every forward pass is computed by the pool of workers.

Sampler, preview, progress and Cancel stay here; this process is never a rank.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ....efficient_vdit_core.parallel.pool.session import Launch, Session, parse_devices
from ..announce import show_on_node
from ..hook import PARALLEL_KEY, WRAPPER_KEY, from_workers, hook_of, take_off
from ..run_log import log_report
from .division import Divider
from .memory import MemoryWatch
from .refusals import IN_WORKERS, Known, others_see_options, refuse_second_time, refuse_split_state
from .report import forecast_report
from .run import Shared
from .sharded_weights import SHARDED_WEIGHTS, WeightForecast, check_weights
from .sharding import find_shardable
from .worker_graph import import_folders, recipe

log = logging.getLogger("efficient_vdit")

NODE = "EVDiTSequenceParallel"
SESSION = Session()


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
    division: str,
    prompt: dict[str, Any] | None,
    node_id: str | None,
) -> tuple[Any, str]:
    """A clone of MODEL that the workers compute, and a report; the MODEL itself where it cannot be so and ``strict`` is
    off. Raises ValueError for devices that cannot be read or that this machine has not."""
    names, asked = parse_devices(devices), False
    try:
        refuse_second_time(model)
        _, rule = find_shardable(model)
        refuse_split_state(model)
        if weights == SHARDED_WEIGHTS:
            check_weights(model, rule)
        if len(names) < 2:
            raise ValueError(
                f"One device was found ({', '.join(names)}), expected two or more: there is nothing to share out."
            )
        asked = True  # what stands in the way from here on may be mended outside of the prompt
        key, opening = recipe(prompt, node_id, NODE)
        if weights == SHARDED_WEIGHTS:
            key, opening = f"{key} {weights}", {**opening, "hold": weights}
        launch = Launch(names, key, opening, start_timeout, step_timeout, imports=import_folders())
        SESSION.forget_if_gone()
        SESSION.ready(launch, mm.throw_exception_if_processing_interrupted)
    except (ValueError, RuntimeError, OSError) as error:
        SESSION.failures += asked
        if strict:
            raise
        how = "stays with its workers" if from_workers(model) else "runs on one device"
        log.warning("Efficient-vDiT: the model %s: %s", how, error)
        report = f"The model {how} as it was: {error}"
        show_on_node(node_id, report)
        return model, report
    about = WeightForecast.where_possible(model, rule, len(SESSION.tests))
    divider = Divider(model, division, scheme, about.gathered if weights == SHARDED_WEIGHTS else 0)
    report = forecast_report(model, SESSION.tests, divider, about, weights)
    show_on_node(node_id, report.splitlines()[0])
    size = about.sharded if weights == SHARDED_WEIGHTS else about.whole
    return _redirected(model, launch, divider, after_run, size), report


def reachable(devices: str | None) -> tuple[Any, ...]:
    """Changes where the same node may fare otherwise: another pool is found, or workers have failed since. None where a
    link gives the devices, which only the run knows."""
    try:
        return *(() if devices is None else parse_devices(devices)), SESSION.failures
    except ValueError as error:
        return (str(error),)


def _redirected(model: Any, launch: Launch, divider: Divider, after_run: str, size: int) -> Any:
    """The clone: its weights rest unpatched, for the workers hold patched ones of their own, ``size`` bytes each."""
    patched = model.clone()
    if getattr(patched, "is_dynamic", lambda: False)():
        # Streamed weights come to the GPU when they are used, and such a patcher knows no CPU. ComfyUI makes room for them.
        size = 0
    else:
        patched.load_device = torch.device("cpu")
    patched.patches = _patches_here(model)
    patched.patches_uuid = uuid.uuid4()
    for kind in IN_WORKERS:  # else they would act twice
        for key in list(patched.wrappers.get(kind, {})):
            patched.remove_wrappers_with_key(kind, key)
    # No attention call comes by here, which the sparse node's report would take for a fault.
    take_off(patched)
    watch = MemoryWatch.of(SESSION, launch.key, size if _beside_us(launch.devices) else 0)
    known = Known.of(patched, PARALLEL_KEY, others_see_options(model))
    sparse, made_for = hook_of(model), weakref.ref(model.model)
    shared = Shared(made_for, SESSION, launch, divider.scheme, known, divider, watch.model, sparse)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, PARALLEL_KEY, shared.evaluation())
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, PARALLEL_KEY, shared.around_run(after_run))
    if sparse is not None:  # inside of ours: its report tells what the workers have counted
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, log_report(sparse))
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, PARALLEL_KEY, shared.before_run)
    patched.set_additional_models(PARALLEL_KEY, [watch])
    return patched


def _beside_us(devices: tuple[str, ...]) -> bool:
    """Whether one of a pool's ``devices`` is ComfyUI's own; where they have no names, rank 0 is on this machine."""
    return str(mm.get_torch_device()) in devices or devices[0].startswith("rank")


def _patches_here(model: Any) -> dict[str, Any]:
    """The LoRAs of what does not run in the workers: ComfyUI makes the text of some models ready before the steps."""
    _, rule = find_shardable(model)
    blocks = tuple(f"diffusion_model.{row.path}." for row in rule.rows)
    return {key: list(found) for key, found in model.patches.items() if not key.startswith(blocks)}
