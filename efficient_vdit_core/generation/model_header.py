"""What a model's files say about it before any weight is read: sizes, layers, and how it was distilled."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits.quote import quoted
from ..plan import TilePlan
from .model_folder import FAMILY, TINY, find_model, is_built_in
from .request import GUIDANCE, GUIDANCE_29X480P, SPACE, TIME, TINY_GUIDANCE, VideoRequest

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
        return self.requests([prompt], **choices)[0]

    def requests(self, prompts: Sequence[str], **choices: Any) -> list[VideoRequest]:
        """A request for each prompt; what is to be remarked on several of them is logged once."""
        chosen = {k: v for k, v in choices.items() if v is not None}
        defaults = self._defaults(chosen)
        asked = [VideoRequest(prompt, **{**defaults, **chosen}) for prompt in prompts]
        requests = [one.check() for one in asked]
        remarks = [remark for one in asked for remark in one.remarks()]
        for remark in dict.fromkeys([*self._distilled_remarks(requests), *remarks, *map(self._size_remark, requests)]):
            if remark:
                log.warning(remark)
        return requests

    @property
    def _trained(self) -> dict[str, int]:
        """The clip that the model was trained for: frames, and pixels."""
        return {
            "frames": (self.config.sample_size_t - 1) * TIME + 1,
            "height": self.config.sample_size[0] * SPACE,
            "width": self.config.sample_size[1] * SPACE,
        }

    def _defaults(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """What a request has where it is not chosen."""
        about = self.distilled
        small = (self.config.sample_size_t, *self.config.sample_size) == (8, 60, 80)
        guidance = TINY_GUIDANCE if is_built_in(self.name) else GUIDANCE_29X480P if small else GUIDANCE
        if about and about.guidance is not None:
            guidance = 1.0
        defaults = {**self._trained, "guidance": guidance}
        if chosen.get("guidance", guidance) != 1.0:
            defaults["negative"] = self._default_negative()
        if about and chosen.get("sampler", VideoRequest.sampler) == "consistency":
            defaults |= {"segments": about.segments, "steps": max(about.steps, about.segments)}
        return defaults

    def _distilled_remarks(self, requests: Sequence[VideoRequest]) -> Iterator[str]:
        about = self.distilled
        if about is None:
            return
        for request in requests:
            yield about.more_steps(request.steps or 0)
            if about.guidance is not None and request.guidance != 1.0:
                yield f"guidance is {request.guidance:g}, but it is already inside this distilled model: set it to 1."

    def _size_remark(self, request: VideoRequest) -> str:
        trained = self._trained
        if all(getattr(request, name) == size for name, size in trained.items()):
            return ""
        return (
            f"{request.width}x{request.height} with {request.frames} frames is not what this model was trained for "
            f"({trained['width']}x{trained['height']} with {trained['frames']}), so expect less."
        )

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
