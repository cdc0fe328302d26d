"""What a model's files say about it before any weight is read: sizes, layers, and how it was distilled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits.quote import quoted
from ..plan import TilePlan
from .model_folder import FAMILY, TINY, find_model, is_built_in
from .request import GUIDANCE, SPACE, TIME, TINY_GUIDANCE, VideoRequest

if TYPE_CHECKING:
    from ..models.distilled import DistillMetadata
    from ..models.opensora_plan.config import DiTConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelHeader:
    """A model's name, its transformer's configuration, and how it was distilled, if it was."""

    name: str
    config: DiTConfig
    distilled: DistillMetadata | None = None

    @classmethod
    def read(
        cls,
        model: str | Path = TINY,
        *,
        text_encoder: str | Path | None = None,
        transformer: str | Path | None = None,
        loras: Sequence[str | Path] = (),
    ) -> ModelHeader:
        """From the files that `Pipeline.from_model` would load. Raises ValueError where one is missing or another model's."""
        from ..models.distilled import metadata_of
        from ..models.opensora_plan.checkpoint import read_transformer_config

        folder = find_model(model, text_encoder)
        source = Path(transformer) if transformer else folder.transformer
        for lora in loras:
            if not Path(lora).is_file():
                raise ValueError(f"The LoRA {quoted(str(lora), 120)} is no file. Check the path.")
        return cls(folder.name, read_transformer_config(source), metadata_of(source, loras))

    def request(self, prompt: str, **choices: Any) -> VideoRequest:
        """A checked request; what is not chosen is what this model was trained for. See `VideoRequest`."""
        trained = {
            "frames": (self.config.sample_size_t - 1) * TIME + 1,
            "height": self.config.sample_size[0] * SPACE,
            "width": self.config.sample_size[1] * SPACE,
        }
        defaults = {
            **trained,
            "guidance": TINY_GUIDANCE if is_built_in(self.name) else GUIDANCE,
            "negative": self._default_negative(),
        }
        chosen = {k: v for k, v in choices.items() if v is not None}
        if (about := self.distilled) and about.guidance is not None:
            defaults["guidance"] = 1.0
            if chosen.get("guidance", 1.0) != 1.0:
                log.warning(
                    "guidance is %g, but it is already inside this distilled model: set it to 1.", chosen["guidance"]
                )
        if about and chosen.get("sampler", VideoRequest.sampler) == "consistency":
            defaults.update(segments=about.segments, steps=max(about.steps, about.segments))
        asked = VideoRequest(prompt, **{**defaults, **chosen})
        request = asked.check()
        for remark in asked.remarks():
            log.warning(remark)
        if any(getattr(request, k) != v for k, v in trained.items()):
            log.warning(
                "%dx%d with %d frames is not what this model was trained for (%dx%d with %d), so expect less.",
                request.width,
                request.height,
                request.frames,
                trained["width"],
                trained["height"],
                trained["frames"],
            )
        return request

    @property
    def tuned_plan(self) -> TilePlan | None:
        """The plan under which the weights were distilled; None where they were not, or for full attention."""
        return self.distilled.tile_plan if self.distilled else None

    def check_plan(self, plan: TilePlan) -> None:
        """ValueError if the plan was made for another model."""
        plan.check_fits(family=FAMILY, layers=self.config.num_layers, heads=self.config.num_attention_heads)

    def _default_negative(self) -> str:
        from ..models.opensora_plan.captions import NEGATIVE_PROMPT

        return "" if is_built_in(self.name) else NEGATIVE_PROMPT
