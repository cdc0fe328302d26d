"""evdit search: which tile pattern each layer can take, as a plan file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits.numbers import MAX_TORCH_SEED
from ..limits.quote import quoted
from ..storage.files import check_writable_file, write_numbered, write_text
from . import INTERRUPTED, say

if TYPE_CHECKING:
    from ..generation.request import VideoRequest
    from ..pipeline import Pipeline
    from ..plan import TilePlan
    from ..search import ProbeRecord, SearchSettings

MAX_PROBES = 100
ERRORS = "errors.pt"
MEASURED = "Ask for the same, or delete that folder: all is measured anew then."
CHOICES = ("negative", "frames", "height", "width", "guidance", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    add = parser.add_argument
    add(
        "--model",
        default="tiny",
        help="built in: tiny, tiny-8-steps, tiny-4-steps, tiny-epsilon; or a folder with transformer, vae, text_encoder",
    )
    add("--text-encoder", metavar="PATH", help="file or folder of the mT5 encoder, if it lies elsewhere")
    add("--prompt", required=True, action="append", help="what a video shows; repeat it to average over several")
    add("--negative", help="as for generate")
    add("--frames", type=int, help="number of frames, 4k+1 (default: as the model was trained)")
    add("--height", type=int, help="pixels, a multiple of 16 (default: as the model was trained)")
    add("--width", type=int, help="pixels, a multiple of 16 (default: as the model was trained)")
    add("--guidance", type=float, help="classifier-free guidance, 1 is off (default: as for generate)")
    add(
        "--probes",
        type=int,
        default=3,
        help=f"noise levels at which the model is run, 1..{MAX_PROBES} (default: %(default)s)",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--threshold",
        type=float,
        metavar="R",
        help="largest relative error of a layer; takes the sparsest pattern below",
    )
    target.add_argument(
        "--speedup",
        type=float,
        metavar="X",
        help="how many times less attention; the plan with the least error is taken",
    )
    add("--candidates", default="1,2,4", help="numbers of reference frames to try; 2~1 also sees neighbours up to 1 frame away, "
        "2~1+1 also the mean of the frames left out; 0,1,2,0~1,1~1,0+1,1+1,0~1+1,1~1+1 with --head-groups 3 errs much less at the "
        "same cost (default, the paper's: %(default)s)")  # fmt: skip
    add("--error", choices=("attention", "block", "output"), default="attention", help="where it is measured: in the attention's output; "
        "several times slower, in the whole block's; or in the model's, by a forward for each layer and candidate, which found "
        "the built-in model's best plans (default: %(default)s)")  # fmt: skip
    add("--costs", choices=("flops", "measured"), default="flops", help="what a pattern costs; measured times differ from run to run "
        "(default: %(default)s)")  # fmt: skip
    add("--head-groups", type=int, default=1, metavar="G", help="at most as many different patterns in a layer, over its heads, 1..4; "
        "3 keeps more quality at the same cost (default, the paper's search by layer: %(default)s)")  # fmt: skip
    add("--seed", type=int, help=f"0 to {MAX_TORCH_SEED:,} (default: 0)")
    add("--out", required=True, metavar="FILE", help="the plan file, .json; must not exist yet")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Measures, chooses and writes. Whatever can be refused is refused before the weights are read. A search by the output keeps
    what it has measured in a folder beside the plan to come, until that is written."""
    from ..generation.model_header import ModelHeader
    from ..generation.request import VideoRequest
    from ..storage.folder_record import claim_folder

    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out is {quoted(args.out, 120)}, but must end in .json. Choose such a name.")
    if out.exists():
        raise ValueError(
            f"--out {quoted(args.out, 120)} exists already, and no plan is written over. Choose another name."
        )
    check_writable_file(out)
    settings = _settings(args)
    choices = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    choices |= {"steps": args.probes, "segments": args.probes}  # also where the model was distilled for another number
    for prompt in args.prompt:
        VideoRequest(prompt, **choices).check()
    header = ModelHeader.read(args.model, text_encoder=args.text_encoder)
    requests = header.requests(args.prompt, **choices)
    record = settings.record(requests[0].latent_size[0])
    kept = out.with_suffix(".measured") if settings.error == "output" else None
    if kept is not None:
        claim_folder(kept, _measured(args, requests, record), MEASURED)
    try:
        with _kept_until_written(kept):
            say(f"loading {args.model}")
            from ..pipeline import Pipeline

            pipeline = Pipeline.from_model(
                args.model, text_encoder=args.text_encoder, device=args.device, dtype=args.dtype
            )
            _measure(pipeline, requests, settings, record, kept)
            written = _save(_plan(pipeline, args.prompt, requests[0], settings, record), out)
    except KeyboardInterrupt:
        if kept is None or not kept.is_dir():
            raise
        say(f"interrupted; the same command goes on from {kept}")
        return INTERRUPTED
    say(f"wrote {written}")
    return 0


def _save(plan: TilePlan, out: Path) -> Path:
    """Writes the plan and returns where: beside a file that has come to lie at ``out`` meanwhile, under a number."""
    text = plan.to_json()
    try:
        write_text(out, text, new=True)
        return out
    except FileExistsError:
        say(f"{out} has come to lie there meanwhile and stays as it is")
    try:
        return out.with_name(write_numbered(out.parent, out.stem, text))
    except ValueError:  # too long a name for a number behind it, say
        return out.with_name(write_numbered(out.parent, "plan", text))


def _settings(args: argparse.Namespace) -> SearchSettings:
    """Raises ValueError for what no search can be, whatever the model."""
    from ..search import SearchSettings, parse_candidates
    from ..search.select import check_speedup, check_threshold

    candidates = parse_candidates(args.candidates)
    if not 1 <= args.probes <= MAX_PROBES:
        raise ValueError(f"--probes must lie in 1..{MAX_PROBES}, got {quoted(args.probes)}.")
    threshold, speedup = args.threshold or 0.0, args.speedup or 0.0
    settings = SearchSettings(candidates, threshold, speedup, args.error, args.costs, args.head_groups)
    if args.speedup is not None:
        check_speedup(args.speedup)  # 0 is none here
    else:
        check_threshold(args.threshold)
    return settings


def _measured(args: argparse.Namespace, requests: list[VideoRequest], record: ProbeRecord) -> dict[str, Any]:
    """All that a search by the output measures; the target is no part of it."""
    from ..distill.families.fingerprints import weights_stamp
    from ..generation.model_folder import find_model

    model = find_model(args.model, args.text_encoder)
    return {
        **{name: getattr(requests[0], name) for name in (*CHOICES, "steps")},
        "prompts": args.prompt,
        "candidates": [pattern.short_name for pattern in record.candidates],
        "dtype": args.dtype,
        "model": weights_stamp([model.transformer, model.text_encoder]),
    }


@contextmanager
def _kept_until_written(folder: Path | None) -> Iterator[None]:
    """Takes the folder's own files away at the end, and it where nothing else is in it: unless the plan was not written, and
    something has been measured."""
    from ..storage.folder_record import RECORD

    written = False
    try:
        yield
        written = True
    finally:
        if folder is not None and (written or not (folder / ERRORS).is_file()):
            for name in (ERRORS, RECORD):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def _plan(
    pipeline: Pipeline, prompts: list[str], request: VideoRequest, settings: SearchSettings, record: ProbeRecord
) -> TilePlan:
    """The plan of what was measured, told as well. ``request``: that of any prompt."""
    from ..generation.model_folder import FAMILY
    from ..search import plan_from_record
    from ..search.describe import describe_plan

    config = pipeline.transformer.config
    about = {
        "model": pipeline.name,
        "prompts": prompts,
        "negative": request.negative,
        "guidance": request.guidance,
        "seed": request.seed,
        "sigmas": [round(s, 6) for s in pipeline.noise_levels(request)],
    }
    of_model = {"layers": config.num_layers, "family": FAMILY, "heads": config.num_attention_heads}
    plan = plan_from_record(record, settings, **of_model, about=about)
    say(describe_plan(plan))
    return plan


def _measure(
    pipeline: Pipeline, requests: list[VideoRequest], settings: SearchSettings, record: ProbeRecord, kept: Path | None
) -> None:
    """One dense sampling of ``probes`` steps for each prompt, behind a progress bar. Errors of the output are kept in the
    folder ``kept``, and known from there."""
    from tqdm import tqdm

    from ..attention.hook.state import once
    from ..distill.runs.kept_errors import KeptErrors
    from ..search import make_probe_override, measure_output, replay_blocks
    from ..search.record import BLOCK, OUTPUT

    blocks = list(pipeline.transformer.transformer_blocks)
    each = 1 + len(record.candidates) if settings.error == OUTPUT else 1
    total = len(requests) * (requests[0].steps or 0) * len(blocks) * each
    with tqdm(total=total, desc="probing", unit="layer") as bar, ExitStack() as stack:

        def progress(layer: int) -> None:
            bar.update(1)

        override = make_probe_override(record, progress=progress, begun=settings.check_reach)
        around = once
        if kept is not None:
            keep = stack.enter_context(KeptErrors(kept / ERRORS)).next
            around = partial(measure_output, record, progress=progress, keep=keep)
        if settings.error == BLOCK:
            stack.enter_context(replay_blocks(blocks, record))
        for request in requests:
            pipeline.observe(request, override, around)
