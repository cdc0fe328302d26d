"""What several processes that train together must decide alike, and what each of them puts into their one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anywhere:
    """``anywhere(flag)``: whether the flag is set in any process. All of them must turn the same way, or the rest waits for
    ever. ``accelerator``: accelerate's Accelerator, or None for a process alone."""

    accelerator: Any = None

    def __call__(self, flag: bool) -> bool:
        return bool(self.of_each(torch.tensor([flag], dtype=torch.int32)).any())

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    def of_each(self, value: Tensor) -> Tensor:
        """``value`` (n) of every process, one after the other, on the CPU. Called by all of them, with as many numbers."""
        if self.processes == 1:
            return value
        return self.accelerator.gather(value.to(self.accelerator.device)).cpu()

    def own(self, values: Tensor) -> Tensor:
        """This process's part of what `of_each` gave."""
        rank = self.accelerator.process_index if self.accelerator else 0
        # A copy: from a view that begins within its storage, PyTorch would read another generator's state.
        return values.view(self.processes, -1)[rank].clone()
