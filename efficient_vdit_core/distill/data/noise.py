"""Noise by number: the same wherever it is drawn, and no other's.

PyTorch's generator on the CPU takes the low 32 bits of a seed, so that 1, 2**32 + 1 and so on are one. numpy mixes all of a key.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

# What is drawn for one purpose is met in no other: a sample from a training clip's own noise would only show what was learnt.
STREAMS = {"teacher": 1, "samples": 2}


def numbered_noise(shape: tuple[int, ...], stream: Literal["teacher", "samples"], number: int, seed: int = 0) -> Tensor:
    """Unit noise, float32 on the CPU, of one ``number`` under a seed."""
    generator = np.random.default_rng([STREAMS[stream], seed, number])
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
