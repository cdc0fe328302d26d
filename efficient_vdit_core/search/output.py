"""Computes a forward again with one layer under each candidate, to see what each does to the network's own output.

An attention's error says little of that: on the tiny model the same error of the first layer moves the output five times as much
where it comes of mean frames. A forward for each layer and candidate makes a search by so many times longer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .errors import flat, relative_error
from .record import OUTPUT, ProbeRecord, Replay

Keep = Callable[[Callable[[], float]], float]


def measure_output(
    record: ProbeRecord,
    forward: Callable[[], Tensor],
    progress: Callable[[int], None] | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """``forward()``, and into ``record`` the error of each other one, of the layers that attend in it: guidance may leave some
    out. ``keep`` gives an error by what measures it, or knows it.

    ``forward`` must run with ``make_probe_override(record)`` and count its layers anew each time. ``progress`` is told the
    layer before each; what it raises ends the run.
    """
    before = record.calls
    exact = forward()
    exact_values = flat(exact)
    attended = [layer for layer, calls in record.calls.items() if calls > before[layer]]

    def measure() -> float:
        record.replaying = Replay(pattern, layer)
        try:
            approximate = forward()
        finally:
            record.replaying = None
        return relative_error(flat(approximate), exact_values)

    for layer in sorted(attended):
        for pattern in record.candidates:
            if progress is not None:
                progress(layer)
            record.compared(OUTPUT, layer, pattern, keep(measure) if keep else measure(), exact_values)
    return exact
