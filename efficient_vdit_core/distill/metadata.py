"""What a distilled checkpoint says about itself: one JSON entry ``evdit`` in the safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..plan import TilePlan

KEY = "evdit"


@dataclass(frozen=True)
class DistillMetadata:
    """method: consistency or knowledge. segments: of diffusion time; steps: the sampler's. schedule, prediction: of the
    model.
    guidance: the teacher's, now inside the weights, so that the sampler's must be 1. plan: the tile plan's JSON, or
    None.
    """

    method: str
    segments: int
    steps: int
    schedule: dict[str, Any] = field(default_factory=dict)
    prediction: str = ""
    guidance: float | tuple[float, float] | None = None
    plan: dict[str, Any] | None = None
    version: str = ""

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
        try:
            values = json.loads(metadata[KEY])
            segments, steps = int(values["segments"]), int(values["steps"])
            if not 1 <= segments <= steps <= 1000:
                raise ValueError(f"{segments} segments in {steps} steps")
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            return cls(**{**known, "segments": segments, "steps": steps})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint's distillation metadata is damaged ({error}). Distil again, or set steps by hand."
            ) from error


def read_metadata(path: str | Path) -> DistillMetadata | None:
    """The metadata of a safetensors file, or of the first one in a folder, without reading its weights; None where it
    has none."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix not in (".safetensors", ".sft"):
        return None
    try:
        with safe_open(files[0], framework="pt") as opened:
            return DistillMetadata.from_entries(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{files[0].name} cannot be read as safetensors: {error}. It is damaged; write or download it again."
        ) from error
