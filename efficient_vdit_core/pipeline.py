"""Text to video without ComfyUI: encode the prompt, sample latents, decode them.

Shapes: latents z (1, 4, T, H/8, W/8) float32, variance-preserving; with guidance the batch is [negative, positive].
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from .attention.hook.prepare import Preparation
from .attention.hook.residual import Room
from .attention.hook.state import FORWARD_KEY, Around, ForwardState, once
from .attention.report.report import AttentionReport
from .attention.sdpa import OVERRIDE_KEY
from .generation.devices import pick_device, pick_dtype
from .generation.model_folder import TINY, find_model
from .generation.model_header import ModelHeader
from .generation.request import VideoRequest
from .generation.run_shape import RunShape
from .limits.quote import quoted
from .media.video import to_frames
from .plan import TilePlan
from .sampling import Denoiser, DiscreteSchedule, consistency_sigmas, sample_consistency
from .sampling.reference import sample_reference

if TYPE_CHECKING:
    from .models.distilled import DistillMetadata

FPS = 24

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass
class Video:
    """frames: uint8 (F, H, W, 3). metadata: what made them, JSON-able. report: the attention's counts."""

    frames: np.ndarray
    metadata: dict[str, Any]
    report: AttentionReport = field(default_factory=AttentionReport)


class Pipeline:
    """The three parts of a model on one device.

    Args:
        transformer: OpenSoraT2V. vae: CausalVAE. text_encoder: has encode(list of prompts) -> (context, mask).
        offload: keep each part on the CPU while another one works.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        *,
        name: str = "model",
        device: str = "cpu",
        offload: bool = False,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.name, self.device, self.offload = name, torch.device(device), offload
        self.distilled: DistillMetadata | None = None

    @classmethod
    def from_model(
        cls,
        model: str | Path = TINY,
        *,
        text_encoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: bool | None = None,
        transformer: str | Path | None = None,
        loras: Sequence[str | Path] = (),
    ) -> Pipeline:
        """Loads a built-in model or the parts found in a folder (see `model_folder`).

        Args:
            transformer: other weights than the model's, such as a distilled one.
            loras: files of ``evdit distill`` that it wears, in the order of their training.
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
            dtype: "auto" (float32 for tiny and on the CPU, else bfloat16), "float32", "bfloat16", "float16".
            offload: None decides by the device's free memory.

        Raises:
            ValueError: a part is missing or no such model, no such device or dtype, a LoRA of another model.
        """
        from .distill.lora.files import attach_frozen
        from .models.distilled import metadata_of
        from .models.opensora_plan.checkpoint import load_transformer, load_vae
        from .models.opensora_plan.text import TextEncoder

        folder = find_model(model, text_encoder)
        target = pick_device(device)
        kind = pick_dtype(dtype, target, built_in=folder.built_in)
        source = Path(transformer) if transformer else folder.transformer
        weights = load_transformer(source, dtype=kind)
        attach_frozen(weights, loras)
        vae = load_vae(folder.vae, dtype=kind)
        # mT5 is twice the size of the transformer, so it keeps the file's dtype unless another one is asked for.
        text_dtype = None if dtype == "auto" and not folder.built_in else kind
        encoder = TextEncoder.from_folder(folder.text_encoder, dtype=text_dtype)
        self = cls(weights, vae, encoder, name=folder.name, device=target, offload=False)
        self.offload = self._must_offload() if offload is None else offload
        self.distilled = metadata_of(source, loras)
        return self

    @property
    def header(self) -> ModelHeader:
        """What the model's files say about it."""
        return ModelHeader(self.name, self.transformer.config, self.distilled)

    def request(self, prompt: str, **choices: Any) -> VideoRequest:
        """A checked request; what is not chosen is what this model was trained for. See `VideoRequest`."""
        return self.header.request(prompt, **choices)

    @property
    def tuned_plan(self) -> TilePlan | None:
        """The plan under which the weights were distilled; None where they were not, or for full attention."""
        return self.header.tuned_plan

    def check_plan(self, plan: TilePlan) -> None:
        """ValueError if the plan was made for another model."""
        self.header.check_plan(plan)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | VideoRequest,
        *,
        plan: TilePlan | None = None,
        template: str | None = None,
        progress: Progress | None = None,
        residual_every: int = 0,
        **choices: Any,
    ) -> Video:
        """Makes one video.

        Args:
            prompt: the text, with the fields of `VideoRequest` as keywords; or a request from `request`.
            plan: tile patterns for self-attention; None is dense.
            template: a name of `captions.TEMPLATES` that the prompt is put into; None is the bare prompt.
            progress: progress(steps done, steps in all).
            residual_every: sparse layers keep their difference to dense attention for so many steps, 0 = never.

        Raises:
            ValueError: what was asked for cannot be made; raised before sampling starts.
        """
        if isinstance(prompt, VideoRequest) and choices:
            raise ValueError(
                f"{', '.join(choices)} cannot be chosen beside a request, which says it all. Ask for another request."
            )
        if residual_every and plan is None:
            raise ValueError(
                f"residual_every is {residual_every}, but there is no plan that leaves anything out. Give a plan."
            )
        request = prompt if isinstance(prompt, VideoRequest) else self.request(prompt, **choices)
        if plan is not None:
            self.check_plan(plan)
        report = AttentionReport()
        preparation = None if plan is None else Preparation(plan, report, residual_every=residual_every)
        shape = self._shape(request)
        shape.check_memory(preparation)
        context, mask = self._encode(request, template)
        with self._working(self.transformer):
            network = self._guided_network(request, context, mask, shape.attention_options(preparation))
            z = self._sample(request, network, progress)
        if not bool(z.isfinite().all()):
            raise ValueError(
                f"The model's result is not finite in {_dtype_name(self.transformer)}; use --dtype float32."
            )
        frames = self._decode(z)[: request.frames, : request.height, : request.width]
        return Video(frames, self._metadata(request, plan, template, report, residual_every), report)

    @torch.inference_mode()
    def observe(self, request: VideoRequest, override: Callable[..., Tensor], around: Around = once) -> None:
        """Samples latents as `generate` does, with this attention override looking on, and throws them away. ``around``
        computes each forward, as often as it likes, and returns what it gives."""
        context, mask = self._encode(request, None)
        layout = self._shape(request).layout
        with self._working(self.transformer):
            options = lambda: {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout)}  # noqa: E731
            self._sample(request, self._guided_network(request, context, mask, options, around), None)

    def noise_levels(self, request: VideoRequest) -> list[float]:
        """The sigmas at which the consistency sampler evaluates the model."""
        sigmas = consistency_sigmas(
            DiscreteSchedule().sigma, request.segments or request.steps or 0, request.steps or 0
        )
        return sigmas[:-1].tolist()

    def _shape(self, request: VideoRequest) -> RunShape:
        return RunShape(self.transformer, self.device, request)

    def residual_room(self, request: VideoRequest, plan: TilePlan, every: int) -> Room | None:
        """Where a run would keep the cached residual, and its bytes; None where it keeps none. Raises ValueError where
        there is no memory for it."""
        return self._shape(request).residual_room(Preparation(plan, AttentionReport(), residual_every=every))

    def _encode(self, request: VideoRequest, template: str | None) -> tuple[Tensor, Tensor]:
        """Text states (B, L, C) and mask (B, L) of [negative, positive], or of [positive] where guidance is off."""
        from .models.opensora_plan.captions import TEMPLATES, clean_caption

        if template is not None and template not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {quoted(template)}.")
        # Empty text stays empty: it is the unconditional prompt of the training.
        into = TEMPLATES[template] if template and request.prompt.strip() else "{}"
        positive = into.format(request.prompt)
        texts = [request.negative, positive][-self._shape(request).prompts :]
        # The reference cleans twice: the second pass removes what the first one uncovers.
        cleaned = [clean_caption(clean_caption(text)) for text in texts]
        with self._working(self.text_encoder):
            context, mask = self.text_encoder.encode(cleaned)
        return context.to(self.device), mask.to(self.device)

    def _guided_network(
        self,
        request: VideoRequest,
        context: Tensor,
        mask: Tensor,
        options: Callable[[], dict[str, Any]],
        around: Around = once,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """network(z (1, ...), timestep (1,)) -> the raw prediction after classifier-free guidance, float32."""

        def network(z: Tensor, timestep: Tensor) -> Tensor:
            n = len(context)
            inputs = z.to(self.transformer.dtype).expand(n, -1, -1, -1, -1)
            given = inputs, timestep.float().expand(n), context, mask
            out = around(lambda: self.transformer(*given, options())).float()
            if n == 1:
                return out
            negative, positive = out.chunk(2)
            return negative + request.guidance * (positive - negative)

        return network

    def _sample(self, request: VideoRequest, network: Callable[..., Tensor], progress: Progress | None) -> Tensor:
        """Latents of the request's size. All noise is drawn on the CPU, so a seed means the same on every device."""
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(1, self.transformer.config.in_channels, *request.latent_size, generator=generator)
        noise = noise.to(self.device)
        kind, steps = self.transformer.config.prediction_type, request.steps or 0
        report = progress or (lambda done, total: None)
        if request.sampler != "consistency":
            return sample_reference(
                network,
                noise,
                request.sampler,
                steps,
                kind,
                generator=generator,
                callback=lambda done: report(done, steps),
            )
        schedule = DiscreteSchedule()
        sigmas = consistency_sigmas(schedule.sigma, request.segments or steps, steps).to(self.device)
        x = noise * (1.0 + sigmas[0] ** 2).sqrt()  # unit variance in the model's own coordinates
        return sample_consistency(
            Denoiser(network, schedule, kind),
            x,
            sigmas,
            gamma=request.gamma,
            noise_seed=request.seed,
            callback=lambda state: report(state["i"] + 1, steps),
        )

    def _decode(self, z: Tensor) -> np.ndarray:
        """Latents (1, 4, T, h, w) to uint8 frames (4 (T - 1) + 1, 8 h, 8 w, 3)."""
        from .models.opensora_plan.config import LATENT_SCALE
        from .models.opensora_plan.vae_tiling import tiled_decode

        with self._working(self.vae):
            weights = next(self.vae.parameters())
            return to_frames(tiled_decode(self.vae, (z / LATENT_SCALE).to(weights.dtype))[0])

    def _metadata(
        self,
        request: VideoRequest,
        plan: TilePlan | None,
        template: str | None,
        report: AttentionReport,
        residual_every: int,
    ) -> dict[str, Any]:
        import json

        return {
            **asdict(request),
            "model": self.name,
            "template": template,
            "fps": FPS,
            "plan": None if plan is None else json.loads(plan.to_json()),
            "attention": report.summary() if plan is not None else "dense",
            **({"residual_every": residual_every} if residual_every else {}),
            "device": self.device.type,
            "dtype": _dtype_name(self.transformer),
            "versions": {
                "efficient-vdit": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _must_offload(self) -> bool:
        """Whether all three parts together leave less than a third of the GPU's free memory for the work."""
        if self.device.type != "cuda":
            return False
        parts = [m for m in map(_module, (self.transformer, self.vae, self.text_encoder)) if m is not None]
        size = sum(p.numel() * p.element_size() for m in parts for p in m.parameters())
        return size > torch.cuda.mem_get_info(self.device)[0] * 2 / 3

    @contextmanager
    def _working(self, part: Any) -> Iterator[None]:
        """Has a part on the device while it works."""
        module = _module(part)
        if module is not None:
            module.to(self.device)
        try:
            yield
        finally:
            if self.offload and module is not None:
                module.to("cpu")


def _module(part: Any) -> nn.Module | None:
    """The torch module of a part: itself, or its `model`."""
    found = part if isinstance(part, nn.Module) else getattr(part, "model", None)
    return found if isinstance(found, nn.Module) else None


def _dtype_name(module: Any) -> str:
    return str(module.dtype).removeprefix("torch.")
