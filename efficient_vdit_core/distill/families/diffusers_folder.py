"""What the adapters of diffusers' models share: a folder in its layout, and its transformer read, saved and tapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...generation.devices import DTYPES
from ...limits.documents import parse_json, read_text
from ...limits.quote import named, quoted
from ...plan import TilePlan
from ...storage.weight_files import read_shapes, read_state_dict
from ..config import ModelConfig
from ..lora.comfy_names import ComfyLayer, comfy_layer, comfy_name
from ..lora.files import COMFY_PREFIX, attach_frozen
from .intercept import checkpointed


class DiffusersFolder:
    """The part of `model.FamilyModel` that is the same for every class of diffusers. ``FAMILIES``: the classes that an
    adapter takes, and their names in plans."""

    FAMILIES: ClassVar[dict[str, str]] = {}

    def __init__(self, config: ModelConfig) -> None:
        self.folder, self.expert = Path(config.path), config.expert
        self.config = read_json(self.folder / "transformer" / "config.json")
        self.kind = self.config.get("_class_name", "")
        if config.dtype not in DTYPES:
            raise ValueError(
                f"model.dtype is {quoted(config.dtype)}, expected one of {', '.join(DTYPES)}. Correct the configuration."
            )
        self.family, self.dtype, self.loras = self.FAMILIES[self.kind], DTYPES[config.dtype], config.loras
        self.saved_dtype = self.dtype
        self.transformer_file = Path(config.transformer) if config.transformer else self.folder / "transformer"
        self.layers, self.heads = int(self.config["num_layers"]), int(self.config["num_attention_heads"])

    def load(self, weights: str = "") -> nn.Module:
        import diffusers

        kind = getattr(diffusers, self.kind)
        source = Path(weights) if weights else self.transformer_file
        if source.is_dir():
            module = kind.from_pretrained(str(source), torch_dtype=self.dtype)
        else:
            module = self._from_file(kind, source)
        module.train().requires_grad_(True)
        attach_frozen(module, self.loras, self.comfy_layer)
        return module

    def _from_file(self, kind: Any, file: Path) -> nn.Module:
        """Made without weights first: those that a class starts with are in float32, more than the host may have."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            module = _in_precision(kind.from_config(self.config), self.dtype)
        wanted = {name: x.dtype for name, x in module.state_dict().items()}
        state, _ = read_state_dict(file)
        for name, x in state.items():
            state[name] = x.to(wanted.get(name, x.dtype), copy=True)
        module.load_state_dict(state, assign=True)
        return module

    def skeleton(self) -> nn.Module:
        module = self._hollow()
        attach_frozen(module, self.loras, self.comfy_layer)
        return module

    def check_weights(self, weights: str = "") -> None:
        source = Path(weights) if weights else self.transformer_file
        if not source.is_dir():  # diffusers reads its own folders
            wanted = {name: tuple(x.shape) for name, x in self._hollow().state_dict().items()}
            check_shapes(self.kind, wanted, source)

    def _hollow(self) -> nn.Module:
        """Without LoRAs, and without weights."""
        import diffusers

        with torch.device("meta"):
            return _in_precision(getattr(diffusers, self.kind).from_config(self.config), self.dtype).train()

    def check_plan(self, plan: TilePlan) -> None:
        plan.check_fits(family=self.family, layers=self.layers, heads=self.heads)

    def checkpoint_blocks(self, module: nn.Module) -> None:
        module.enable_gradient_checkpointing(checkpointed)  # pyright: ignore[reportCallIssue]

    def comfy_layer(self, layer: str) -> ComfyLayer:
        return comfy_layer(self.kind, layer)

    def config_entry(self) -> dict[str, Any]:
        return self.config


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, C, 1, 1, 1) by which latents are normalised, or 0 and 1 / scaling_factor."""
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean and deviation:
        return torch.tensor(mean).view(1, -1, 1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1, 1)
    return torch.zeros(1), torch.tensor(1.0 / vae.config.scaling_factor)


def check_shapes(kind: str, wanted: dict[str, tuple[int, ...]], file: Path) -> None:
    """Raises ValueError where the tensors in a file are not those of a model of class ``kind``, ``wanted`` by name."""
    found = read_shapes(file)
    unknown, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    differing = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    advice = "Check model.transformer and model.init."
    if unknown:
        what = f"{quoted(unknown[0])} is none of its tensors"
        comfy = {comfy_name(kind, name) for name in wanted} - wanted.keys()
        if any(name.removeprefix("model.").removeprefix(COMFY_PREFIX) in comfy for name in unknown):
            advice = f"The names in it are ComfyUI's, not diffusers', which are needed here. {advice}"
    elif missing:
        what = f"{quoted(missing[0])} is missing"
    elif differing:
        what = f"{quoted(differing[0])} has shape {found[differing[0]]}, expected {wanted[differing[0]]}"
    else:
        return
    raise ValueError(f"{named(file.name)} does not hold the weights of this {kind}: {what}. {advice}")


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file of a model's folder. Raises ValueError where it is missing or damaged."""
    if not file.is_file():
        raise ValueError(
            f"{quoted(str(file), 120)} does not exist, expected a model folder in diffusers' layout. Check model.path."
        )
    what = f"{file.name} in {named(file.parent.name)}"
    values = parse_json(read_text(file, what), what, advice="Download it again.")
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {quoted(values)}, expected an object of settings. Download it again.")
    return values


def _in_precision(module: Any, dtype: torch.dtype) -> Any:
    """In ``dtype``, but for what diffusers' own reader keeps in float32: embeddings of time and positions, and norms."""
    kept = set(module._keep_in_fp32_modules or ())
    for prefix, part in module.named_modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, x in own:
            if x.is_floating_point() and not kept & set(f"{prefix}.{name}".split(".")):
                x.data = x.data.to(dtype)
    return module
