"""Judges a model of the tiny world by many clips: what they show, how they move, and how far they are from the
teacher's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...distill.families.model import Options
from ...distill.families.opensora_plan import OpenSoraPlanModel
from ...distill.families.texts import TextBank
from ...distill.objectives.rollout import guided, roll_down
from ...limits.documents import parse_json, read_text
from ...models.opensora_plan.config import LATENT_SCALE
from ...storage.files import read_torch, write_text, write_torch
from ..moving.figures import figures_of
from ..moving.scene import ATTRIBUTES, Scene, held_out_scenes, random_scene, render
from ..train.vae import to_model_range, to_pixels

AT_ONCE = 32
TRUE_SEED = 55_001


class Judge:
    """Samples the same captions from the same noise for every model.

    captions x noises clips: held-out captions, each with several noises; ``seed`` shifts the noise.
    """

    def __init__(self, model: OpenSoraPlanModel, *, captions: int, noises: int, seed: int = 0) -> None:
        self.model = model
        self.scenes: list[Scene] = [s for s in held_out_scenes(captions) for _ in range(noises)]
        texts = [s.caption() for s in self.scenes]
        self.bank = TextBank.build([*texts, ""], partial(model.text_encoder, torch.device("cpu")))
        self.texts = texts
        shape = model.latent_shape(model.size(0, 0, 0))
        draw = [torch.Generator().manual_seed(1_000_003 * (seed + 1) + i) for i in range(len(texts))]
        self.noise = torch.stack([torch.randn(shape, generator=g) for g in draw])

    @torch.no_grad()
    def sample(
        self,
        module: nn.Module,
        *,
        steps: int,
        guidance: float = 1.0,
        options: Options | None = None,
    ) -> Tensor:
        """Latents (n, C, T, h, w) of all clips by ``steps`` deterministic jumps."""
        out = []
        for start in range(0, len(self.texts), AT_ONCE):
            texts, noise = self.texts[start : start + AT_ONCE], self.noise[start : start + AT_ONCE]
            context, mask = self.bank.batch([""])
            negative = (context.expand(len(texts), -1, -1), mask.expand(len(texts), -1))
            network = guided(self._predictor(module, options), self.bank.batch(texts), negative, guidance)
            out.append(roll_down(network, self.model.path, self.model.prediction, noise, segments=steps))
        return torch.cat(out)

    def _predictor(self, module: nn.Module, options: Options | None) -> Callable[[Tensor, Tensor, Any], Tensor]:
        return lambda z, t, c: self.model.predict(module, z, t, c, options(z) if options else None)

    def reference(self, module: nn.Module, steps: int, guidance: float, file: Path) -> Tensor:
        """The teacher's fine solution from the same noise, kept in ``file``."""
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_torch(file, self.sample(module, steps=steps, guidance=guidance))
        return read_torch(file, "Delete it; the same command makes it anew.")

    def figures(self, latents: Tensor, reference: Tensor | None = None) -> dict[str, Any]:
        """The columns of the table for sampled latents, and ``broken_clips``, the number of those whose latents are not finite.
        endpoint_error is None where one of these or of the reference's is not."""
        found = figures_of(self.decode(latents), self.scenes)
        found["broken_clips"] = int((~latents.isfinite().flatten(1).all(1)).sum())
        if reference is not None:
            # In float64, in which the squares of what is finite are finite.
            error = float((latents.double() - reference.double()).square().flatten(1).mean(1).sqrt().mean())
            found["endpoint_error"] = error if isfinite(error) else None
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """uint8 clips (F, H, W, 3)."""
        vae = self.model.vae()
        return [to_pixels(vae.decode(z[None] / LATENT_SCALE))[0] for z in latents]

    def bounds(self) -> dict[str, dict[str, Any]]:
        """The same columns for clips that no model made, by row: true clips; the same through the VAE, which is the
        ceiling of every model; and true clips of other captions, which is what chance gets."""
        rng = np.random.default_rng(TRUE_SEED)
        clips = [render(_restarted(scene, rng)) for scene in self.scenes]
        others = [render(random_scene(rng)) for _ in self.scenes]
        rows = {"true clips": clips, "true clips through the VAE": self._coded(clips), "chance": others}
        return {name: {**figures_of(found, self.scenes), "endpoint_error": None} for name, found in rows.items()}

    @torch.no_grad()
    def _coded(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        vae = self.model.vae()
        return [to_pixels(vae.decode(vae.encode(to_model_range(clip[None]))))[0] for clip in clips]


def _restarted(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene of the same caption with another start and size."""
    while True:  # shape and colours do not touch the start, so only direction and speed have to be met
        other = random_scene(rng)
        if (other.direction, other.speed) == (scene.direction, scene.speed):
            return replace(other, **{name: getattr(scene, name) for name in ATTRIBUTES})


def attention_speeds(file: Path, counts: tuple[int, ...]) -> dict[int, float]:
    """Measured speed-up over dense of one attention head at 29 frames of 720p (8 x 3600 tokens, head_dim 96), by reference
    frames; kept in ``file``, and timed anew where one of ``counts`` is not in it."""
    found = _kept_speeds(file) if file.is_file() else {}
    if not found.keys() >= set(counts):
        found = _time_speeds(sorted({*counts, *found}))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found))
    return found


def _time_speeds(counts: list[int]) -> dict[int, float]:
    from ...attention import TokenLayout, tile_attention
    from ...tiles import TilePattern, TokenGrid

    layout = TokenLayout(TokenGrid(8, 45, 80))
    q, k, v = torch.randn(3, 1, 1, layout.tokens, 96, generator=torch.Generator().manual_seed(0)).unbind(0)

    def seconds(count: int | None) -> float:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            tile_attention(q, k, v, layout, TilePattern(count), backend="frames")
            times.append(time.perf_counter() - start)
        return min(times)

    dense = seconds(None)
    return {count: dense / seconds(count) for count in counts}


def _kept_speeds(file: Path) -> dict[int, float]:
    advice = "Delete it; the same command makes it anew."
    values = parse_json(read_text(file, file.name), file.name, advice=advice)
    if not isinstance(values, dict) or not all(k.isdecimal() and isinstance(v, float) for k, v in values.items()):
        raise ValueError(f"{file.name} holds no speed-ups by reference frames. {advice}")
    return {int(k): v for k, v in values.items()}
