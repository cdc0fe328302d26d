"""Host memory that the ranks of one machine share: weights stay in the mapped pages of their file. Runs in the workers.

ComfyUI maps a safetensors file and then copies it into the model, so that each rank would hold a copy of its own, save of
quantised weights, which it takes as they lie in the file. It can take all so where it streams weights; here it is told to.
This is the one place where a function of ComfyUI's is replaced: in a worker, which is a process of this pack's own, and only while
it loads. No hook leads there, and without it P ranks would hold a model P times.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.utils
from comfy.model_base import BaseModel
from torch import Tensor, nn


@contextmanager
def files_stay_mapped() -> Iterator[None]:
    """While it lasts, a diffusion model that ComfyUI loads keeps its file's pages, where they hold the precision that it
    computes from; weights that ComfyUI converts are copies still, and all are in versions that know of no other way."""
    load = BaseModel.load_model_weights
    if "assign" not in inspect.signature(load).parameters:
        yield
        return

    def mapped(self: Any, sd: dict[str, Tensor], unet_prefix: str = "", assign: bool = False) -> Any:
        wanted = {name: x.dtype for name, x in _plain(self.diffusion_model)}
        made = load(self, sd, unet_prefix, assign=True)
        for name, x in _plain(self.diffusion_model):
            if x.dtype != wanted.get(name, x.dtype):
                place = comfy.utils.set_attr_param if isinstance(x, nn.Parameter) else comfy.utils.set_attr
                place(self.diffusion_model, name, x.to(wanted[name]))
        return made

    BaseModel.load_model_weights = mapped
    try:
        yield
    finally:
        BaseModel.load_model_weights = load


def _plain(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*module.named_parameters(), *module.named_buffers()]
    return [(name, x) for name, x in found if type(x) in (Tensor, nn.Parameter)]
