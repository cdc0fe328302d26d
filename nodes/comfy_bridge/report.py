"""Finds the counts of a patched MODEL's last run."""

from __future__ import annotations

from typing import Any

from ...efficient_vdit_core.attention.report import AttentionReport
from .patch import OVERRIDE


def report_of(model: Any) -> AttentionReport:
    """The counts that Sparse Attention keeps. Raises ValueError where the MODEL has not been through that node."""
    override = model.model_options.get("transformer_options", {}).get(OVERRIDE)
    report = getattr(override, "report", None)
    if report is None:
        found = "another node's attention override in front" if override is not None else "no sparse attention"
        raise ValueError(
            f"The model has {found}, expected the output of Sparse Attention with a supported model. "
            "Connect that node's model directly."
        )
    return report
