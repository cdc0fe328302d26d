"""evdit doctor: what this machine can run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from .. import __version__
from ..limits.packages import install
from ..limits.quote import first_cause, reason
from ..storage.cache_folder import cache_folder
from . import ISSUES, say

# name on PyPI -> what it is for; the first group is what the built-in model needs
NEEDED = {
    "torch": "everything",
    "einops": "everything",
    "numpy": "everything",
    "safetensors": "reading weights",
    "transformers": "the text encoder",
    "sentencepiece": "the text encoder",
    "tqdm": "progress bars",
    "pillow": "gif and webp",
}
OPTIONAL = {
    "imageio": "the tests; this pack's own code does without",
    "imageio-ffmpeg": "mp4, and reading videos to train on",
    "av": "mp4, where imageio-ffmpeg is missing",
    "diffusers": "training Wan, CogVideoX and MiniMax-H3; the samplers ddim and euler_ancestral",
    "ftfy": "cleaning prompts as the reference does",
    "beautifulsoup4": "cleaning prompts as the reference does",
    "triton": "fused attention on a GPU",
    "accelerate": "any training (evdit distill, evdit recipe)",
    "tensorboard": "training curves",
    "torchvision": "training MiniMax-H3, whose text encoder asks for it",
    "bitsandbytes": "training.optimizer adamw8bit, on an NVIDIA GPU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; the status is 1 if the built-in model cannot run here."""
    findings = examine()
    say(json.dumps(findings, indent=2) if args.json else format_findings(findings))
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """All findings, JSON-able. "problems" lists what keeps the built-in model from running."""
    problems: list[str] = []
    packages = {
        name: {"version": _version(name), "for": use, "needed": name in NEEDED}
        for name, use in {**NEEDED, **OPTIONAL}.items()
    }
    for name in NEEDED:
        if packages[name]["version"] is None:
            problems.append(f"The package {name!r} is missing; it is needed for {NEEDED[name]}. {install(name)}")
    if not packages["av"]["version"] and not _guarded(_ffmpeg, problems, "ffmpeg"):
        problems.append(f"No .mp4 can be written or read. {install('av', instead='Write .gif and .webp')}")
    if packages["transformers"]["version"] and packages["sentencepiece"]["version"]:
        problems += _why_no_text_encoder()
    return {
        "versions": {
            "efficient-vdit": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "folders": _folders(),
        "devices": _guarded(_devices, problems, "devices"),
        "attention_backends": _guarded(_backends, problems, "attention backends"),
        "backend_choices": _guarded(_choices, problems, "the choices of backends"),
        "packages": packages,
        "tiny_model": _guarded(_tiny_model, problems, "the built-in model"),
        "problems": problems,
    }


def format_findings(findings: dict[str, Any]) -> str:
    """The findings as lines for a person."""
    lines = ["versions"]
    lines += [f"  {name:<16} {value}" for name, value in findings["versions"].items()]
    lines += ["folders"]
    lines += [f"  {name:<16} {folder}" for name, folder in findings["folders"].items()]
    lines += ["devices"]
    lines += [f"  {d['name']:<16} {d['what']}" for d in findings["devices"] or []]
    lines += ["attention backends"]
    for backend in findings["attention_backends"] or []:
        lines.append(f"  {backend['name']:<16} {'yes' if backend['available'] else 'no'}: {backend['reason']}")
    lines += ["what auto chose", *_format_choices(findings["backend_choices"] or {})]
    lines += ["packages"]
    for name, found in findings["packages"].items():
        lines.append(f"  {name:<16} {found['version'] or 'not installed':<16} {found['for']}")
    tiny = findings["tiny_model"]
    lines += ["built-in model", f"  {tiny['megabytes']:.1f} MB in {len(tiny['files'])} files" if tiny else "  missing"]
    problems = findings["problems"]
    lines += ["problems", *(f"  {p}" for p in problems)] if problems else ["no problems found"]
    lines += ["", f"Is something wrong? Put all of this into a report: {ISSUES}"]
    return "\n".join(lines)


def _format_choices(choices: dict[str, Any]) -> list[str]:
    if not choices:
        return ["  nothing yet: backends are measured at the first long call of each kind of shape"]
    from ..attention.autotune.trial import Choice  # needs torch, which the doctor may have found missing

    lines = []
    for shapes, choice in choices.items():
        times = Choice(**choice).times()
        why = "; no sparse backend is faster" if choice["backend"] == "dense" else ""
        lines += [f"  {choice['backend']:<16} {shapes}", f"  {'':<16} ms of a trial: {times}{why}"]
    return lines


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # slow, and every --help reads this file

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _guarded(look: Any, problems: list[str], what: str) -> Any:
    """A broken installation must not keep the doctor from telling the rest."""
    try:
        return look()
    except Exception as error:  # whatever an import or a driver raises
        problems.append(f"Could not examine {what}: {type(error).__name__}: {error}")
        return None


def _ffmpeg() -> bool:
    from ..media.video import has_ffmpeg

    return has_ffmpeg()


def _why_no_text_encoder() -> list[str]:
    """Its packages may be here and not load: transformers brings in others, such as a torchaudio for another torch."""
    try:
        from transformers import MT5EncoderModel  # noqa: F401 # pyright: ignore[reportUnusedImport]

        import sentencepiece  # noqa: F401 # pyright: ignore[reportUnusedImport] # isort: skip
    except Exception as error:  # whatever an import raises
        why = first_cause(error)
        return [
            f"The text encoder's packages do not load ({type(why).__name__}: {reason(why)}). Install what this names anew, with "
            "transformers and sentencepiece."
        ]
    return []


def _folders() -> dict[str, str]:
    """Where the pack runs from, which may be another copy than was meant, and where it keeps what it measured."""
    return {"pack": str(Path(__file__).parents[2]), "cache": str(cache_folder())}


def _devices() -> list[dict[str, Any]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [{"name": "cpu", "what": f"{cores} cores, {torch.get_num_threads()} threads, {platform.machine()}"}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        what = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        devices.append({"name": f"cuda:{i}", "what": what})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "what": "Apple GPU"})
    return devices


def _backends() -> list[dict[str, Any]]:
    from ..attention import available_backends

    return [{"name": b.name, "available": b.available, "reason": b.reason} for b in available_backends()]


def _choices() -> dict[str, Any]:
    from dataclasses import asdict

    from ..attention.autotune.choose import default_book

    return {shapes: asdict(choice) for shapes, choice in default_book().choices.items()}


def _tiny_model() -> dict[str, Any]:
    from .. import assets

    parts = {assets.tiny_path(part, model) for model in assets.TINY_MODELS for part in assets.TINY_PARTS}
    files = [f for part in sorted(parts) for f in _files(part)]
    if not any(f.suffix == ".safetensors" for f in files):
        raise FileNotFoundError("its weights are not installed; reinstall the package")
    return {
        "files": [f"{f.parent.name}/{f.name}" for f in files],
        "megabytes": sum(f.stat().st_size for f in files) / 1e6,
    }


def _files(path: Any) -> list[Any]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
