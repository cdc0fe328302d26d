"""Tells the page what a run did: the plan's chart and the node itself show it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ...efficient_vdit_core.attention.report.report import AttentionReport
from ...efficient_vdit_core.attention.report.summary import shorten_measure

EVENT = "efficient_vdit.report"


def announce_to_page(node: str | None, plan: str) -> Callable[[AttentionReport, int], None]:
    """A function to call after each run; it sends one message to the page that queued the prompt.

    The message: ``prompt_id`` as in ComfyUI's own events, ``node`` the execution id of Sparse Attention, ``plan`` the
    plan's text, ``layers`` and ``frames`` (latent) of the model, ``sparse`` calls, ``density`` the share of dense
    attention that the run computed (0 to 1), ``dense`` calls by reason, ``seconds`` of sampling; ``bound``, how many
    times faster a step of this clip becomes at most, and ``video``, the share of the sequence that can be sparse, both 0
    where they are not known; ``dense_step`` and ``sparse_step``, the measured seconds of a step (of a sparse one in the mean,
    where a residual is renewed), both 0 where none was; ``calls`` of the self-attention over the video, sparse and dense,
    and ``why`` none was sparse, "" where one was. A MODEL that stays dense as a whole has 0 layers and no calls.
    What was measured, or why nothing was, stands on the node as well.
    """

    def after_run(report: AttentionReport, layers: int) -> None:
        server = _server()
        if server is None:
            return
        counts, cost, measure = report.snapshot(), report.cost, report.measure
        message = {
            "prompt_id": getattr(server, "last_prompt_id", None),
            "node": node,
            "plan": plan,
            "layers": layers,
            "frames": report.layout.grid.t if report.layout else 0,
            "seconds": report.seconds,
            "sparse": counts.sparse,
            "density": counts.density if counts.sparse else 0.0,
            "dense": dict(counts.dense),
            "bound": cost.bound(counts.density) if cost and counts.sparse else 0.0,
            "video": cost.video_share if cost else 0.0,
            "dense_step": measure.dense if measure and measure.mean_step else 0.0,
            "sparse_step": measure.mean_step if measure else 0.0,
            "calls": counts.calls,
            "why": counts.why_dense,
        }
        server.send_sync(EVENT, message, server.client_id)
        if measure is not None:
            show_on_node(node, shorten_measure(report))

    return after_run


def show_on_node(node: str | None, text: str) -> None:
    """Show ``text`` on the node of that execution id, on the page that queued the prompt."""
    server = _server()
    if node is not None and server is not None:
        server.send_progress_text(text, node, server.client_id)


def _server() -> Any:
    """ComfyUI's server, where a page queued the prompt: what is sent to nobody would reach every page. None in a worker or a
    script too, which would take a second to load it."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return server if server is not None and server.client_id is not None else None
