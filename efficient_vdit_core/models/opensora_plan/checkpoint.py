"""Reads Open-Sora-Plan v1.2 weights: safetensors (one file or shards) and the VAE's checkpoint.ckpt.

The configuration comes from the safetensors metadata entry ``config``, else from config.json beside the file, else it
is that of the published checkpoints. Loading is strict: a file either is the model, or is refused with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...limits.documents import parse_json, read_text
from ...limits.quote import named, quoted
from ...storage.weight_files import read_metadata, read_state_dict
from .config import OSP_29X720P, OSP_VAE, DiTConfig, VAEConfig
from .detect import (
    TRANSFORMER_KINDS,
    VAE_KINDS,
    check_depth,
    check_transformer_config,
    check_transformer_keys,
    check_vae_keys,
    unify_names,
)
from .transformer import OpenSoraT2V
from .vae import CausalVAE
from .weights import check_weights

log = logging.getLogger("efficient_vdit")
_taken_as_published: set[Path] = set()


def load_transformer(path: str | Path, dtype: torch.dtype | None = None) -> OpenSoraT2V:
    """The transformer of a file or folder, in ``dtype`` (the file's own where None), ready for inference."""
    state_dict, config = read_transformer(path)
    return _filled(OpenSoraT2V, config, state_dict, dtype)


def load_vae(path: str | Path, dtype: torch.dtype | None = None) -> CausalVAE:
    """The VAE of a file or folder, in ``dtype`` (the file's own where None), ready for inference."""
    state_dict, config = read_vae(path)
    return _filled(CausalVAE, config, state_dict, dtype)


def read_transformer(path: str | Path) -> tuple[dict[str, Tensor], DiTConfig]:
    """State dict under the reference names, and the configuration. Raises ValueError for any other model's file."""
    state_dict, metadata = read_state_dict(path)
    state_dict = unify_names(state_dict)
    values = _config_values(path, metadata, TRANSFORMER_KINDS)
    with _naming(path):
        check_transformer_config(values)
        check_transformer_keys(state_dict)
        config = DiTConfig.from_dict(values) if values else _as_published(path)
        check_depth(state_dict, config.num_layers)  # before a network of that depth is built to compare with
    _check_manifest(state_dict, OpenSoraT2V, config, "transformer", path)
    check_weights(state_dict, Path(path).name)
    return state_dict, config


def read_transformer_config(path: str | Path) -> DiTConfig:
    """The configuration alone; no weights are read. Raises ValueError for any other model's file."""
    values = _config_values(path, read_metadata(path), TRANSFORMER_KINDS)
    with _naming(path):
        check_transformer_config(values)
        return DiTConfig.from_dict(values) if values else _as_published(path)


def read_vae(path: str | Path) -> tuple[dict[str, Tensor], VAEConfig]:
    """State dict under the reference names, and the configuration. Raises ValueError for any other VAE's file."""
    state_dict, metadata = read_state_dict(path)
    values = _config_values(path, metadata, VAE_KINDS)
    with _naming(path):
        check_vae_keys(state_dict)
        config = VAEConfig.from_dict(values) if values else OSP_VAE
    state_dict = {name: value for name, value in state_dict.items() if "loss" not in name}
    _check_manifest(state_dict, CausalVAE, config, "VAE", path)
    check_weights(state_dict, Path(path).name)
    return state_dict, config


def _as_published(path: str | Path) -> DiTConfig:
    """What weights without a configuration are taken for, told once for each: their shapes do not tell it."""
    path = Path(path)
    if path not in _taken_as_published:
        _taken_as_published.add(path)
        log.warning(
            "%s has no configuration, nor a config.json of class OpenSoraT2V beside it, so it is taken for the published 29x720p. "
            "Other weights, such as those of 480p, have the same shapes and other RoPE scales: keep their config.json beside them.",
            named(path.name),
        )
    return OSP_29X720P


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{named(Path(path).name)} cannot be used: {error}") from error


def _config_values(path: str | Path, metadata: Mapping[str, str], kinds: Collection[str]) -> dict[str, Any]:
    """The file's own configuration, else that of config.json; of one beside a file only where it says its
    kind, one of ``kinds``."""
    path = Path(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    text, where = (metadata["config"], "metadata") if "config" in metadata else (None, beside.name)
    what = f"The configuration of {named(path.name)} ({where})"
    if text is None and beside.is_file():
        text = read_text(beside, what)
    values = parse_json(text, what, advice="Download it again.") if text else {}
    if not isinstance(values, dict):
        return {}
    # A folder that collects many models' files may hold a config.json of something else.
    kind = values.get("_class_name")
    return values if path.is_dir() or where == "metadata" or kind in kinds else {}


def _check_manifest(state_dict: Mapping[str, Tensor], kind: Any, config: Any, part: str, path: str | Path) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in kind(config).state_dict().items()}
    got = {name: tuple(value.shape) for name, value in state_dict.items()}
    missing, unknown = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    differ = [f"{n} is {quoted(got[n])}, expected {s}" for n, s in wanted.items() if n in got and got[n] != s]
    if missing or unknown or differ:
        faults = [f"{len(missing)} tensors are missing ({named(missing[0])})"] if missing else []
        faults += [f"{len(unknown)} are unknown ({named(unknown[0])})"] if unknown else []
        faults += [f"{len(differ)} have another shape ({differ[0]})"] if differ else []
        raise ValueError(
            f"{named(Path(path).name)} is not the {part} that its configuration describes: {', '.join(faults)}. "
            "Keep the config.json of the checkpoint beside it, or download the file again."
        )


def _filled(kind: Any, config: Any, state_dict: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    dtype = dtype or next(iter(state_dict.values())).dtype
    with torch.device("meta"):
        model: nn.Module = kind(config, dtype=dtype)
    # Tensors are taken over as they are: a second copy of the model never exists.
    model.load_state_dict({name: value.to(dtype) for name, value in state_dict.items()}, assign=True)
    return model.eval().requires_grad_(False)
