"""Progress of long work that is not sampling, as ComfyUI shows it."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as mm
import comfy.utils


def cancellable_progress(total: int) -> Callable[[int, int], None]:
    """Called with (done, total): moves the node's bar, and stops the work where the user has cancelled the prompt."""
    bar = comfy.utils.ProgressBar(total)

    def progress(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress
