"""Where the three parts of a model lie: in the built-in tiny model, a diffusers folder, or a copy of the hub
repository.

tiny                          a model that ships with the package (`assets.TINY_MODELS`)
DIR/transformer, DIR/vae, DIR/text_encoder
DIR/29x720p, ..., DIR/vae     the hub repository: name the resolution, DIR/29x720p
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import assets
from ..limits.quote import quoted

TINY = "tiny"
FAMILY = "opensora_plan"  # of all models here, for plans
HUB_FOLDERS = ("29x480p", "29x720p", "93x480p", "93x720p")


@dataclass(frozen=True)
class ModelFolder:
    """Paths of a model's parts; each is a file or a folder that the loaders take."""

    name: str
    transformer: Path
    vae: Path
    text_encoder: Path

    @property
    def built_in(self) -> bool:
        return is_built_in(self.name)


def is_built_in(name: str) -> bool:
    """Whether a model's name stands for the tiny model or one of its distilled forms."""
    return name in assets.TINY_MODELS


def find_model(model: str | Path, text_encoder: str | Path | None = None) -> ModelFolder:
    """Finds the parts of `model`, a built-in one or a folder, without opening them.

    Args:
        text_encoder: file or folder of the mT5 encoder, where it does not lie in the model's folder.

    Raises:
        ValueError: a part is missing; the message names it and the place where it was expected.
    """
    if is_built_in(str(model)) and not Path(model).is_dir():
        found = ModelFolder(str(model), *(assets.tiny_path(part, str(model)) for part in assets.TINY_PARTS))
    else:
        found = _in_folder(Path(model))
    if text_encoder is not None:
        found = ModelFolder(found.name, found.transformer, found.vae, Path(text_encoder))
    for part in ("transformer", "vae", "text_encoder"):
        if not getattr(found, part).exists():
            raise ValueError(
                f"The model {quoted(found.name)} has no {part.replace('_', ' ')}: {quoted(str(getattr(found, part)), 120)} does not "
                f"exist. {_ADVICE[part]}"
            )
    return found


_ADVICE = {
    "transformer": "Put the transformer's config.json and safetensors there.",
    "vae": "Copy the 'vae' folder of the hub repository there, next to the transformer's folder.",
    "text_encoder": "Convert mT5 with 'evdit convert text-encoder' and name the result with --text-encoder.",
}


def _in_folder(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        raise ValueError(
            f"There is no model at {quoted(str(folder), 120)}: expected one of {', '.join(assets.TINY_MODELS)} or a folder with the "
            "model's parts; check the path."
        )
    name = folder.resolve().name
    if (folder / "transformer").exists():
        return ModelFolder(name, folder / "transformer", folder / "vae", folder / "text_encoder")
    if _holds_weights(folder):  # one resolution of the hub repository; the shared parts lie beside it
        # A link to another disk has them beside itself, or beside what it stands for.
        roots = (folder, folder.absolute().parent, folder.resolve().parent)
        root = next((root for root in roots if (root / "vae").exists()), roots[1])
        return ModelFolder(name, folder, root / "vae", root / "text_encoder")
    present = [n for n in HUB_FOLDERS if (folder / n).is_dir()]
    if len(present) == 1:
        return ModelFolder(present[0], folder / present[0], folder / "vae", folder / "text_encoder")
    if present:
        raise ValueError(
            f"{quoted(str(folder), 120)} holds {len(present)} models ({', '.join(present)}); name one, "
            f"for example {quoted(str(folder / present[0]), 120)}."
        )
    raise ValueError(
        f"{quoted(str(folder), 120)} is no model folder: it has neither 'transformer' nor one of {', '.join(HUB_FOLDERS)} nor "
        "weights of its own; check the path."
    )


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
