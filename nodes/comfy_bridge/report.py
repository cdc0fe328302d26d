"""Finds the counts of a patched MODEL's last run."""

from __future__ import annotations

from typing import Any

from ...efficient_vdit_core.attention.report import AttentionReport
from .hook import hook_of


def report_of(model: Any) -> AttentionReport:
    """The counts that Sparse Attention keeps. Raises ValueError where the MODEL has not been through that node."""
    hook = hook_of(model)
    if hook is None:
        raise ValueError(
            "The model has no sparse attention, expected the output of Sparse Attention with a supported model. Connect that "
            "node's model, or one that comes from it."
        )
    return hook.report
