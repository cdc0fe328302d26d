"""LoRAs in files, under ComfyUI's key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...limits.quote import named, quoted
from ...storage.weight_files import read_state_dict
from .comfy_names import ComfyLayer
from .layers import STUDENT, LoRALinear, adaptable, adapted

Place = Callable[[str], ComfyLayer]
Factors = tuple[Tensor, Tensor]  # down (rank, in) and up (out, rank)

COMFY_PREFIX = "diffusion_model."
LOST = 0.05  # share of a change, in the norm, that rounding may take


def comfy_lora(module: nn.Module, state: dict[str, Tensor], place: Place = ComfyLayer) -> dict[str, Tensor]:
    """The student's adapters in ``state`` (the module's names) as a LoRA file that ComfyUI's loaders take.

    ``place`` says where a layer is in ComfyUI, where it is elsewhere. Layers that are one there become one LoRA, of their
    ranks together.
    """
    pieces: dict[str, dict[int, Factors]] = {}
    about: dict[str, tuple[float, int]] = {}
    for name, layer in adapted(module).items():
        there = place(name)
        down, up = state[f"{name}.{STUDENT}_down"], state[f"{name}.{STUDENT}_up"]
        pieces.setdefault(there.name, {})[there.part] = down, there.outputs(up)
        about[there.name] = layer.scales[STUDENT], there.parts
    out = {}
    for name, found in pieces.items():
        scale, parts = about[name]
        down, up = _joined(found, parts)
        key = COMFY_PREFIX + name
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down, up
        out[f"{key}.alpha"] = torch.tensor(scale * len(down))
    return out


def _joined(pieces: dict[int, Factors], parts: int) -> Factors:
    """One LoRA of a layer whose outputs are those of ``parts`` layers of one size, one after another."""
    if parts == 1:
        return pieces[0]
    ups = [pieces[part][1] if part in pieces else None for part in range(parts)]
    empty = next(up for up in ups if up is not None)[:, :0]
    return torch.cat([pieces[part][0] for part in sorted(pieces)]), torch.block_diag(
        *(empty if up is None else up for up in ups)
    )


def _piece(down: Tensor, up: Tensor, there: ComfyLayer) -> Factors:
    """What is one layer's of a LoRA for the layer in ComfyUI: without the ranks that `_joined` gave to the others."""
    rows = there.outputs(up.chunk(there.parts)[there.part])
    rank = len(down) // there.parts
    own = slice(there.part * rank, (there.part + 1) * rank)
    if there.parts == 1 or len(down) % there.parts or rows.count_nonzero() > rows[:, own].count_nonzero():
        return down, rows
    return down[own], rows[:, own]


def start_from(module: nn.Module, file: Path, place: Place = ComfyLayer) -> None:
    """Give the student's adapters the weights of a file of `comfy_lora`. Raises ValueError where it is of another rank or
    model."""
    found = _read(module, file, place)
    for name, layer in adapted(module).items():
        own, scale = layer.part(STUDENT), layer.scales[STUDENT]
        down, up, given_scale = found.get(name, (None, None, 0.0))
        alike = math.isclose(given_scale, scale, rel_tol=1e-2)  # older files hold alpha in the weights' precision
        if down is None or up is None or not alike or (down.shape, up.shape) != (own[0].shape, own[1].shape):
            raise ValueError(
                f"{named(file.name)} does not fit layer {name}, which wants rank {len(own[0])} and alpha "
                f"{scale * len(own[0]):g} as model.lora_rank and lora_alpha say. Set these to the LoRA's, or choose another."
            )
        own[0].data.copy_(down)
        own[1].data.copy_(up)


def attach_frozen(module: nn.Module, files: Sequence[str | Path], place: Place = ComfyLayer) -> None:
    """Put files of `comfy_lora` on the module, beside its weights: in their precision a small change would be lost.

    Raises ValueError where a file is for another model.
    """
    for file in map(Path, files):
        for name, (down, up, scale) in _read(module, file, place).items():
            adaptable(module, name).attach_frozen(down, up, scale)


def _read(module: nn.Module, file: Path, place: Place) -> dict[str, tuple[Tensor, Tensor, float]]:
    """down, up and scale of each layer of the module that the file changes."""
    lora, _ = read_state_dict(file)
    layers: dict[str, list[tuple[str, nn.Linear, ComfyLayer]]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | LoRALinear):
            there = place(name)
            linear = layer.base if isinstance(layer, LoRALinear) else layer
            layers.setdefault(COMFY_PREFIX + there.name, []).append((name, linear, there))
    stems, wrong = _stems(lora)
    found = {}
    for key in stems:
        down, up = (lora.get(f"{key}.lora_{part}.weight") for part in ("down", "up"))
        sizes = {(linear.in_features, there.parts * linear.out_features) for _, linear, there in layers.get(key, [])}
        if down is None or up is None or sizes != {(down.shape[1], up.shape[0])}:
            wrong.append(key)
            continue
        for name, _, there in layers[key]:
            found[name] = *_piece(down, up, there), float(lora[f"{key}.alpha"]) / len(down)
    if wrong or not found:
        raise ValueError(
            f"{named(file.name)} is no LoRA of this model as evdit distill writes it"
            + (f" ({len(wrong)} of its parts do not fit, such as {quoted(wrong[0])})" if wrong else "")
            + ". Choose another."
        )
    return found


def _stems(lora: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """The layers that a file changes, and those of its keys that are no part of a low-rank change of one: a file of others may
    have some without an alpha, or changes of biases."""
    stems = sorted(key.removesuffix(".alpha") for key in lora if key.endswith(".alpha"))
    known = {stem + part for stem in stems for part in (".alpha", ".lora_down.weight", ".lora_up.weight")}
    return stems, sorted(lora.keys() - known)


def merged(base: dict[str, Tensor], lora: dict[str, Tensor], place: Place = ComfyLayer) -> dict[str, Tensor]:
    """Full weights: ``base`` with a file of ``comfy_lora`` added, in the base's precision where that holds the change.

    Raises ValueError where a layer that the file changes is not in ``base``, or not all of the file is a LoRA's.
    """
    stems, others = _stems(lora)
    if others:
        raise ValueError(
            f"The LoRA has {len(others)} parts that are none of a low-rank change with an alpha, such as {quoted(others[0])}, and "
            "would lose them. Choose one that evdit distill wrote."
        )
    out, unused = dict(base), set(stems)
    for name, value in base.items():
        there = place(name.removesuffix(".weight"))
        stem = COMFY_PREFIX + there.name
        if name.endswith(".weight") and f"{stem}.alpha" in lora:
            down, up = lora[f"{stem}.lora_down.weight"].float(), lora[f"{stem}.lora_up.weight"].float()
            scale = float(lora[f"{stem}.alpha"]) / len(down)
            down, up = _piece(down, up, there)
            out[name] = changed(value, scale * up @ down)
            unused.discard(stem)
    if unused:
        raise ValueError(
            f"The weights have none of {len(unused)} layers that the LoRA changes, such as {quoted(min(unused))}: it is of another "
            "model. Choose the one that it was trained on."
        )
    return out


def changed(value: Tensor, change: Tensor) -> Tensor:
    """value + change in the value's precision; in float32 where rounding takes more than `LOST` of the change.

    Weights of bf16 lie on a grid of 1 / 256 of themselves: a change below half a step vanishes.
    """
    exact = value.float() + change
    rounded = exact.to(value.dtype)
    lost = torch.linalg.vector_norm(rounded.float() - exact)
    return rounded if lost <= LOST * torch.linalg.vector_norm(change) else exact
