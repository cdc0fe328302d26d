"""What holds the place of the workers' memory in ComfyUI's own management of it."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ....efficient_vdit_core.parallel.pool.session import Session

log = logging.getLogger("efficient_vdit")

WATCH_KEY = "efficient_vdit_parallel"
# ComfyUI's own word for as much as there is.
_ALL = 1e32
_WEIGHTS: weakref.WeakValueDictionary[tuple[Session, str], WorkersWeights] = weakref.WeakValueDictionary()


class WorkersWeights(nn.Module):
    """A module of one number, in the place of the weights that the workers hold of a MODEL.

    ``pool``: whose workers were last known to have them on their devices, None where none have.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.session, self.pool = session, None

    def arrived(self) -> None:
        """A step was computed with them."""
        self.pool = self.session.pool

    def are_there(self) -> bool:
        """Not after a fault: workers that were started anew have yet to load them."""
        return self.pool is not None and self.pool is self.session.pool


class MemoryWatch(ModelPatcher):
    """Loaded and unloaded with the clone of a MODEL: ComfyUI makes room for what the workers take of its device, and when
    it frees its memory, they free theirs. It is unloaded as a whole."""

    @classmethod
    def of(cls, session: Session, key: str, size: int) -> MemoryWatch:
        """``size``: the bytes of weights that a worker holds on ComfyUI's device, 0 where none does. ``key`` names them in the
        pool: all watches of the same ones are clones to ComfyUI, which lets one make way for another without a word to the workers.
        """
        weights = _WEIGHTS.setdefault((session, key), WorkersWeights(session))
        watch = cls(weights, mm.get_torch_device(), torch.device("cpu"), size)
        watch.add_callback_with_key(CallbacksMP.ON_DETACH, WATCH_KEY, _on_detach)
        return watch

    def loaded_size(self) -> int:
        return self.model_size() if self.model.are_there() else 0

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        return super().partially_load(device_to, _ALL, force_patch_weights)

    def partially_unload(self, *_: Any, **__: Any) -> int:
        return 0


def _on_detach(watch: Any, unpatch_all: bool) -> None:
    # Without unpatching, one clone only makes way for the next.
    if unpatch_all:
        offload(watch.model.session)


def offload(session: Session) -> None:
    """Have the workers free their devices; a log line tells, also where they could not."""
    try:
        if session.offload():
            log.info("Efficient-vDiT: the workers have moved their models to main memory.")
    except (RuntimeError, ValueError) as error:
        log.warning("Efficient-vDiT: the workers could not free their memory: %s", error)
    for weights in list(_WEIGHTS.values()):
        if weights.session is session:
            weights.pool = None
