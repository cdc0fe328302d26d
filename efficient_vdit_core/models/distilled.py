"""What a distilled checkpoint says about itself: one JSON entry ``evdit`` in the safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..limits.documents import parse_json
from ..limits.numbers import number, whole
from ..limits.quote import quoted
from ..plan import TilePlan
from ..storage import weight_files

KEY = "evdit"
WHAT, ADVICE = "The checkpoint's distillation metadata", "Distil again, or set steps by hand."
_KINDS = {"method": str, "schedule": dict, "prediction": str, "version": str, "expert": str, "jumps_only": bool}


@dataclass(frozen=True)
class DistillMetadata:
    """method: consistency, knowledge or score. segments: of diffusion time; steps: the sampler's. schedule, prediction: of the
    model.
    guidance: the teacher's, now inside the weights, so that the sampler's must be 1. plan: the tile plan's JSON, or
    None. expert: high or low, which of two networks it is, or nothing. jumps_only: whether it has learnt its jumps from one
    segment's beginning to the next alone, and is right in no more steps than that.
    """

    method: str
    segments: int
    steps: int
    schedule: dict[str, Any] = field(default_factory=dict)
    prediction: str = ""
    guidance: float | tuple[float, float] | None = None
    plan: dict[str, Any] | None = None
    version: str = ""
    expert: str = ""
    jumps_only: bool = False

    def more_steps(self, steps: int) -> str:
        """What is to be said of so many steps where they ask it between its jumps; "" where they do not."""
        if not self.jumps_only or steps <= self.segments:
            return ""
        return (
            f"{steps} steps were asked of a model that has learnt {self.segments} jumps and nothing between: "
            f"set steps to {self.segments}."
        )

    @property
    def tile_plan(self) -> TilePlan | None:
        """The plan that the weights were made for; None for full attention."""
        return TilePlan.from_json(json.dumps(self.plan)) if self.plan else None

    def to_entry(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self))}

    @classmethod
    def from_entries(cls, metadata: Mapping[str, str]) -> DistillMetadata | None:
        """None where the file says nothing; ValueError where what it says cannot be read."""
        if KEY not in metadata:
            return None
        values = parse_json(metadata[KEY], f"{WHAT} is damaged: it", advice=ADVICE)
        known = (
            {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            if isinstance(values, dict)
            else {}
        )
        fits = all(isinstance(known.get(name, kind()), kind) for name, kind in _KINDS.items())
        if not fits or not {"method", "segments", "steps"} <= known.keys() or not _is_guidance(known.get("guidance")):
            raise ValueError(f"{WHAT} is damaged ({quoted(values)}). {ADVICE}")
        whole(known["steps"], f"{WHAT} is damaged: steps", 1, 1000, ADVICE)
        whole(known["segments"], f"{WHAT} is damaged: segments", 1, known["steps"], ADVICE)
        if "shift" in (schedule := known.get("schedule", {})):
            number(schedule["shift"], f"{WHAT} is damaged: its shift", 0, 100, above=True, why=ADVICE)
        if isinstance(known.get("guidance"), list):
            known["guidance"] = tuple(known["guidance"])
        found = cls(**known)
        _ = found.tile_plan  # refused here, where the file is named, and not by whoever samples
        return found


def _is_guidance(value: Any) -> bool:
    """One scale, a pair of them, or none."""
    scales = value if isinstance(value, list) and len(value) == 2 else [] if value is None else [value]
    return all(isinstance(scale, int | float) and not isinstance(scale, bool) and 0 <= scale <= 1e6 for scale in scales)


def read_metadata(path: str | Path) -> DistillMetadata | None:
    """What the weights that are loaded from a file or a folder say, none of which are read; None where they say nothing, or
    there are none. Raises ValueError for a damaged file."""
    return DistillMetadata.from_entries(weight_files.read_metadata(path)) if weight_files.find_weights(path) else None


def metadata_of(weights: str | Path, loras: Sequence[str | Path] = ()) -> DistillMetadata | None:
    """Of weights that wear LoRAs: what the last of these files says that says something."""
    return next(filter(None, map(read_metadata, [*reversed(loras), weights])), None)
