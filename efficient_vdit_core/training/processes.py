"""What several processes that train together must decide alike, and what each of them puts into their one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Those of ``accelerator``, accelerate's Accelerator, or None for a process alone. All of them must decide alike, or the
    rest waits for ever."""

    accelerator: Any = None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.any_of_each(flag)[0]

    def any_of_each(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set in any process."""
        return self.gather(torch.tensor(flags, dtype=torch.int32)).view(-1, len(flags)).any(dim=0).tolist()

    @property
    def count(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    def gather(self, value: Tensor) -> Tensor:
        """``value`` (n) of every process, one after the other, on the CPU. Called by all of them, with as many numbers."""
        if self.count == 1:
            return value
        return self.accelerator.gather(value.to(self.accelerator.device)).cpu()

    def local(self, values: Tensor) -> Tensor:
        """This process's part of what `gather` gave."""
        rank = self.accelerator.process_index if self.accelerator else 0
        # A copy: from a view that begins within its storage, PyTorch would read another generator's state.
        return values.view(self.count, -1)[rank].clone()
