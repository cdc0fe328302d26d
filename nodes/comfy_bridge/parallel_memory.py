"""What holds the place of the workers' memory in ComfyUI's own management of it."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...efficient_vdit_core.parallel.pool.session import Session

log = logging.getLogger("efficient_vdit")

WATCH_KEY = "efficient_vdit_parallel"


class _Nothing(nn.Module):
    """A module of one number: what ComfyUI's memory management holds in the place of the workers' memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1), requires_grad=False)


def memory_watch(session: Session) -> Any:
    """A patcher that is loaded and unloaded with the clone: when ComfyUI frees its memory, the workers free theirs."""
    watch = comfy.model_patcher.ModelPatcher(
        _Nothing(), load_device=mm.get_torch_device(), offload_device=torch.device("cpu")
    )

    def on_detach(patcher: Any, unpatch_all: bool) -> None:
        # Without unpatching, one clone only makes way for the next.
        if unpatch_all:
            offload(session)

    watch.add_callback_with_key(CallbacksMP.ON_DETACH, WATCH_KEY, on_detach)
    return watch


def offload(session: Session) -> None:
    """Have the workers free their devices; a log line tells, also where they could not."""
    try:
        if session.offload():
            log.info("Efficient-vDiT: the workers have moved their models to main memory.")
    except (RuntimeError, ValueError) as error:
        log.warning("Efficient-vDiT: the workers could not free their memory: %s", error)
