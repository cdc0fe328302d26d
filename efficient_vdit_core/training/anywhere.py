"""What several processes that train together must decide alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Anywhere:
    """``anywhere(flag)``: whether the flag is set in any process. All of them must turn the same way, or the rest waits for
    ever. ``accelerator``: accelerate's Accelerator, or None for a process alone."""

    accelerator: Any = None

    def __call__(self, flag: bool) -> bool:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device, dtype=torch.int32))
        return bool(flags.any())
