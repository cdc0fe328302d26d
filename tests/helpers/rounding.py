"""How far two right results may lie apart, from the number format alone: never from what one processor happened to give."""

import torch


def drift(dtype: torch.dtype, sums: int) -> float:
    """Relative distance of two runs that take the same ``sums`` one after the other, each rounding its own way.

    A sum is off by half a step at most, independently in both runs, and such errors add up like a random walk's.
    """
    return torch.finfo(dtype).eps / 2 * (2 * sums) ** 0.5


def worst(dtype: torch.dtype, sums: int) -> float:
    """The same where the sums are too few for chance: every one is off by a whole step, all in one direction."""
    return torch.finfo(dtype).eps * sums
