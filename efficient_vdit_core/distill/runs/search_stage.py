"""Stage 2 inside the recipe: one probing run of the few-step model on its own samples, then a plan for each target.

folder/r-0.1.json      a plan; one that stands is never searched again
folder/settings.json   what the plans were searched with: their names tell the targets alone
folder/errors-of-4.pt  what a search by the model's output has measured, 4 samples at once: it goes on from there, and so does
                       one for further targets
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import TokenLayout
from ...attention.dense_call import Override
from ...attention.hook.state import Around, once
from ...limits.numbers import MAX_TORCH_SEED, whole
from ...limits.quote import named, quoted
from ...plan import TilePlan
from ...sampling.schedule import segment_edges
from ...search import (
    ProbeRecord,
    SearchSettings,
    make_probe_override,
    measure_output,
    parse_candidates,
    plan_from_record,
)
from ...search.record import ATTENTION, OUTPUT
from ...storage.folder_record import check_settings, claim_folder
from ..data.clips import ClipSet
from ..data.stamp import texts_stamp
from ..families.fingerprints import teacher_stamp
from ..families.model import FamilyModel
from ..families.texts import TextBank
from ..objectives.rollout import guided, roll_down
from .kept_errors import KeptErrors

BEFORE = {"search.error": ATTENTION}  # of searches that were made before there was another
SEARCHED = "Go on with the same ones; to search anew, delete that folder and those of the trainings under its plans."


@dataclass(frozen=True)
class SearchConfig:
    """thresholds: largest relative error of a layer, a plan for each; speedups: of the attention, a plan
    for each.

    candidates: numbers of reference frames, or such as 2~1 with a window. captions: samples that the errors are
    averaged over. head_groups: at most as many different patterns in a layer, over its heads; 1 is the paper's search.
    error: "attention", or "output" for what each layer's pattern does to the model's own output: a forward for each layer and candidate.
    """

    thresholds: tuple[float, ...] = (0.1,)
    speedups: tuple[float, ...] = ()
    candidates: str = "1,2,4"
    captions: int = 8
    seed: int = 0
    head_groups: int = 1
    error: str = ATTENTION

    def __post_init__(self) -> None:
        whole(self.captions, "search.captions", 1, 10_000, "Correct the configuration.")
        whole(self.seed, "search.seed", 0, MAX_TORCH_SEED, "Correct the configuration.")
        for name in ("thresholds", "speedups"):
            whole(len(getattr(self, name)), f"The count of search.{name}", 0, 32, "Correct the configuration.")
        if len(plan_names(self)) < len(self.thresholds) + len(self.speedups):
            raise ValueError(
                "Two of search.thresholds or search.speedups agree in six digits, by which plans are named. Leave one out."
            )
        self.settings()  # refuses what cannot be used
        if self.error not in (ATTENTION, OUTPUT):
            raise ValueError(
                f"search.error is {quoted(self.error)}, expected attention or output. Correct the configuration."
            )

    def check(self, frames: int) -> None:
        """Raises ValueError where a target is out of reach for a video of ``frames`` latent frames."""
        self.settings().check(frames)
        for target in plan_names(self).values():
            self.settings(*target).check(frames)

    def settings(self, threshold: float = 0.0, speedup: float = 0.0) -> SearchSettings:
        """The search for one target. Raises ValueError where the candidates or head groups cannot be used."""
        candidates = parse_candidates(self.candidates)
        return SearchSettings(candidates, threshold, speedup, self.error, head_groups=self.head_groups)


def check_targets(config: SearchConfig) -> None:
    """Raises ValueError where no plan is asked for."""
    if not plan_names(config):
        raise ValueError(
            "search.thresholds and search.speedups are empty, so that no plan would be searched and none trained. Name one; "
            "`evdit distill consistency` is stage 1 alone."
        )


def plan_names(config: SearchConfig) -> dict[str, tuple[float, float]]:
    """(threshold, speed-up) of each plan, of which one is asked for, by its name."""
    return {f"r-{r:g}": (r, 0.0) for r in config.thresholds} | {f"x-{x:g}": (0.0, x) for x in config.speedups}


def plan_files(config: SearchConfig, folder: Path) -> dict[str, Path]:
    """Where the search in ``folder`` keeps each plan."""
    return {name: folder / f"{name}.json" for name in plan_names(config)}


def found_plans(config: SearchConfig, folder: Path) -> dict[str, Path]:
    """The plan files of a search that another process may have made. Raises ValueError where they are not to be seen."""
    files = plan_files(config, folder)
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(
            f"The first process searched the plans, but {named(missing[0])} is not in {quoted(str(folder), 120)} here. Put --out on "
            "a disk that all machines share."
        )
    return files


def search_plans(
    config: SearchConfig,
    model: FamilyModel,
    load: Callable[[], nn.Module],
    clips: ClipSet,
    bank: TextBank,
    folder: Path,
    *,
    segments: int,
    steps: int,
    at_once: int,
    device: torch.device,
) -> dict[str, Path]:
    """Plan files by name, such as ``r-0.1`` and ``x-2.5``; those that exist are kept, and the network is loaded
    only where one is missing. ``at_once`` samples are made together, as many as a training's step takes.

    Raises ValueError where those that exist were searched with other settings, or of another model.
    """
    files = plan_files(config, folder)
    missing = {name: target for name, target in plan_names(config).items() if not files[name].is_file()}
    settings = search_settings(config, model, clips, segments=segments, steps=steps)
    check_settings(folder, settings, SEARCHED, BEFORE)
    by_output, plans = config.error == OUTPUT, {}
    if missing:
        if by_output:
            claim_folder(folder, settings, SEARCHED, BEFORE)
        texts = sampled_texts(config, clips)
        clean = None
        if model.expert:  # it cannot sample alone
            clean = torch.stack([clips.latents[i % len(clips.captions)].float() for i in range(config.captions)])
        shape = tuple(clips.latents[0].shape)
        run = WatchedRun(model, load(), bank, texts, shape, segments, steps, at_once, device, clean)
        with KeptErrors(folder / f"errors-of-{at_once}.pt") if by_output else nullcontext() as kept:
            plans = _search(config, missing, run, kept)
    # Not before: a search by the attention that was stopped has left nothing to go on from.
    claim_folder(folder, settings, SEARCHED, BEFORE)
    for name, plan in plans.items():
        plan.save(files[name])
    return files


def search_settings(
    config: SearchConfig, model: FamilyModel, clips: ClipSet, *, segments: int, steps: int
) -> dict[str, Any]:
    """All that the plan for a target depends on. Of the clips it is their size: the trainings keep to the rest."""
    asked = {
        f"search.{name}": value for name, value in asdict(config).items() if name not in ("thresholds", "speedups")
    }
    asked |= {"segments": segments, "steps": steps, "latents": list(clips.latents[0].shape)}
    if config.error == OUTPUT:  # what was measured is kept by its place in the search alone
        asked["captions"] = texts_stamp(sampled_texts(config, clips))
    return {**asked, "model": teacher_stamp(model), "schedules": model.schedules}


def sampled_texts(config: SearchConfig, clips: ClipSet) -> list[str]:
    """What the samples that a search looks at are made for."""
    return [clips.captions[i % len(clips.captions)][0] for i in range(config.captions)]


def asked_times(model: FamilyModel, segments: int, steps: int) -> Tensor:
    """The times at which a network is asked that samples in ``steps`` steps over ``segments``; an expert, at its own alone."""
    edges = segment_edges(segments, steps, start=model.path.start, clean=model.path.clean)[:-1]
    return edges[model.serves(edges)]


@dataclass(frozen=True)
class WatchedRun:
    """What a search looks at: samples of ``shape`` (C, T, h, w) that ``module`` makes for ``texts`` without guidance,
    ``at_once`` of them together, in ``steps`` steps over ``segments``.

    With ``clean`` latents (n, *shape) the network is asked about these with noise on top, at each of its own steps, in
    place of its samples.
    """

    model: FamilyModel
    module: nn.Module
    bank: TextBank
    texts: list[str]
    shape: tuple[int, ...]
    segments: int
    steps: int
    at_once: int
    device: torch.device
    clean: Tensor | None = None

    @property
    def times(self) -> Tensor:
        """Those of the run's steps at which the network is asked."""
        return asked_times(self.model, self.segments, self.steps)

    @property
    def forwards(self) -> int:
        """Of all texts."""
        return len(self.times) * -(-len(self.texts) // self.at_once)

    @torch.no_grad()
    def watch(self, override: Override, seed: int, around: Around = once) -> None:
        """Run it with this attention override looking on; ``seed``: of the noise. ``around`` computes each forward, as often
        as it likes, and returns what it gives."""
        model, device, options = self.model, self.device, self.model.options_with(override)
        noise = torch.randn(len(self.texts), *self.shape, generator=torch.Generator().manual_seed(seed))
        grid = {"segments": self.segments, "steps": self.steps}
        for first in range(0, len(self.texts), self.at_once):
            some = slice(first, first + self.at_once)
            condition = self.bank.batch(self.texts[some], device)

            def predict(z: Tensor, t: Tensor, c: Any) -> Tensor:
                return around(lambda: model.predict(self.module, z, t, c, options(z)))

            network = guided(predict, condition, None, 1.0)
            if self.clean is None:
                roll_down(network, model.path, model.prediction, noise[some].to(device), **grid)
                continue
            times = self.times
            for time, a, s in zip(times, *(c.tolist() for c in model.path.coefficients(times)), strict=True):
                z = (a * self.clean[some] + s * noise[some]).to(device)
                network(z, model.path.network_time(time[None]).to(device).expand(len(z)))


def _search(
    config: SearchConfig, targets: dict[str, tuple[float, float]], run: WatchedRun, kept: KeptErrors | None
) -> dict[str, TilePlan]:
    """A plan for each of the ``targets`` (threshold, speed-up), by its name, from one probing run."""
    record, model = probe(config, run, kept), run.model
    about = {"segments": run.segments, "steps": run.steps, "captions": run.texts, "guidance": 1.0, "seed": config.seed}
    of_model = {"layers": model.layers, "family": model.family, "heads": model.heads}
    return {
        name: plan_from_record(record, config.settings(*target), **of_model, about=about)
        for name, target in targets.items()
    }


def probe(config: SearchConfig, run: WatchedRun, kept: KeptErrors | None = None) -> ProbeRecord:
    """Measure every candidate in every layer of a run; ``kept``: errors of the output that an earlier one measured."""
    record = config.settings().record(run.shape[1])

    def begun(layout: TokenLayout) -> None:
        for target in plan_names(config).values():
            config.settings(*target).check_reach(layout)

    override = make_probe_override(record, begun=begun)
    if config.error != OUTPUT:
        run.watch(override, config.seed)
        return record
    from tqdm import tqdm

    total = run.forwards * run.model.layers * len(record.candidates)
    with tqdm(total=total, desc="search", mininterval=5) as bar:

        def count(_: int) -> None:
            bar.update()

        keep = kept.next if kept else None
        run.watch(override, config.seed, partial(measure_output, record, progress=count, keep=keep))
    return record
