"""What every weight of a model must be, whatever its name and shape: a finite number of a floating type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...limits.quote import named

_PIECE = 2**26  # elements looked at together, where a sum does not settle it


def check_weights(state_dict: Mapping[str, Tensor], file: str) -> None:
    """Raises ValueError where a tensor is not floating, or holds NaN or infinity: such a model makes black clips, or
    wrong ones, and says nothing. Reads every weight once, at the speed of memory."""
    for name, value in state_dict.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{named(file)} is damaged: the tensor {named(name)} is {str(value.dtype).removeprefix('torch.')}, expected a "
                "floating type such as bfloat16. Download the file again."
            )
        if not is_finite(value):
            raise ValueError(
                f"{named(file)} is damaged: the tensor {named(name)} holds NaN or infinite weights. Download the file again, "
                "or train it again with a lower learning rate."
            )


@torch.no_grad()
def is_finite(value: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity. One pass without a copy, but for 8-bit types."""
    value = value.detach()
    if value.dtype.itemsize == 1:
        value = value.to(torch.bfloat16)  # PyTorch sums no 8-bit floats; bfloat16 holds all of them
    if bool(value.sum(dtype=torch.float32).isfinite()):  # NaN and infinity survive a sum
        return True
    # Or the sum itself is beyond float32.
    pieces = value.flatten().split(_PIECE)
    return all(bool(piece.isfinite().all()) for piece in pieces)
