"""Layer-wise search (Efficient-vDiT, stage 2): what each candidate pattern costs each layer, and the plan that
follows."""

from .blocks import replay_blocks
from .candidates import parse_candidates
from .output import measure_output
from .plan_from_record import plan_from_record
from .probe import make_probe_override
from .record import ProbeRecord
from .select import choose_for_speedup, choose_under_threshold
from .settings import SearchSettings

__all__ = [
    "ProbeRecord",
    "SearchSettings",
    "choose_for_speedup",
    "choose_under_threshold",
    "make_probe_override",
    "measure_output",
    "parse_candidates",
    "plan_from_record",
    "replay_blocks",
]
