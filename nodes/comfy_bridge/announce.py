"""Tells the page what a run did: the plan's chart shows it, or the node itself as a line of text."""

from __future__ import annotations

from collections.abc import Callable

from server import PromptServer

from ...efficient_vdit_core.attention.report import AttentionReport
from ...efficient_vdit_core.attention.summary import bound_of_run

EVENT = "efficient_vdit.report"


def announce_to_page(node: str | None, plan: str) -> Callable[[AttentionReport, int, float], None]:
    """A function to call after each run; it sends one message to the page that queued the prompt.

    The message: ``node`` the execution id of Sparse Attention, ``plan`` the plan's text, ``layers`` and ``frames``
    (latent) of the model, ``sparse`` calls and their mean ``density`` 0 to 1, ``dense`` calls by reason, ``seconds`` of
    sampling. What the clip can gain at most stands on the node itself.
    """

    def after_run(report: AttentionReport, layers: int, seconds: float) -> None:
        server = getattr(PromptServer, "instance", None)
        if server is None or server.client_id is None:  # sent to nobody, it would reach every page
            return
        with report.lock:
            density = report.density_sum / report.sparse if report.sparse else 0.0
            frames = report.layout.grid.t if report.layout else 0
            counts = {"frames": frames, "sparse": report.sparse, "density": density, "dense": dict(report.dense)}
        server.send_sync(
            EVENT, {"node": node, "plan": plan, "layers": layers, "seconds": seconds, **counts}, server.client_id
        )
        if text := bound_of_run(report):
            show_on_node(node, text)

    return after_run


def show_on_node(node: str | None, text: str) -> None:
    """Show ``text`` on the node of that execution id, on the page that queued the prompt."""
    server = getattr(PromptServer, "instance", None)
    if node is not None and server is not None and server.client_id is not None:
        server.send_progress_text(text, node, server.client_id)
