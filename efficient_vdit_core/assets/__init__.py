"""The weights and plans that ship with the package."""

from __future__ import annotations

from pathlib import Path

TINY_PARTS = ("transformer", "vae", "text_encoder")
# The tiny model; what the three stages made of its transformer: 8 steps without guidance, and those under a searched plan; one
# that predicts the noise, as the paper's model does; and 4 steps without guidance.
TINY_MODELS = {
    "tiny": "transformer",
    "tiny-8-steps": "transformer_8_steps",
    "tiny-8-steps-sparse": "transformer_8_steps_sparse",
    "tiny-epsilon": "transformer_epsilon",
    "tiny-4-steps": "transformer_4_steps",
}


def tiny_path(part: str, model: str = "tiny") -> Path:
    """Folder of a part of a built-in model. Raises ValueError for an unknown part or model."""
    if part not in TINY_PARTS:
        raise ValueError(f"The tiny model has no part {part!r}, expected one of {', '.join(TINY_PARTS)}.")
    if model not in TINY_MODELS:
        raise ValueError(f"There is no built-in model {model!r}, expected one of {', '.join(TINY_MODELS)}.")
    return Path(__file__).parent / "tiny" / (TINY_MODELS[model] if part == "transformer" else part)


def preset_names() -> list[str]:
    """The model families for which a plan ships: chosen by hand to be careful, not searched."""
    return sorted(path.stem for path in (Path(__file__).parent / "plans").glob("*.json"))


def preset_path(family: str) -> Path:
    """A shipped plan file. Raises ValueError for a family without one."""
    if family not in preset_names():
        raise ValueError(f"There is no preset plan {family!r}, expected one of {', '.join(preset_names())}.")
    return Path(__file__).parent / "plans" / f"{family}.json"


def recipe_path(name: str) -> Path:
    """A distillation recipe in TOML: tiny; three_stage and three_stage_93 for Open-Sora-Plan; wan_1_3b, wan_1_3b_turbo,
    wan_ti2v_5b; wan22_14b, wan22_14b_turbo; minimax_h3, minimax_h3_turbo; cogvideox_2b."""
    return Path(__file__).parent / "recipes" / f"{name}.toml"
