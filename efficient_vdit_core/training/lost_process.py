"""How PyTorch says that a process that trains along has ended."""

from __future__ import annotations

import torch.distributed as dist

# gloo tells it by plain RuntimeErrors. A process that ends closes its connections, at once or when one writes to it.
_SAID = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


def is_lost_process(error: BaseException) -> bool:
    """Whether an exchange among processes failed because one of them is gone."""
    kinds = tuple(getattr(dist, name) for name in ("DistBackendError", "DistNetworkError") if hasattr(dist, name))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID))
