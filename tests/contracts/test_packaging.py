"""What an installer and the registry read."""

import re
from pathlib import Path

import efficient_vdit_core

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FORBIDDEN = ("torch", "triton", "diffusers", "transformers")


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_requirements_and_dependencies_say_the_same():
    listed = re.search(r"^dependencies = \[(.*?)\]", PYPROJECT, re.M | re.S)
    assert listed
    assert re.findall(r'"([^"]+)"', listed[1]) == requirement_lines()


def test_comfyui_users_keep_their_torch():
    assert not [r for r in requirement_lines() if re.split(r"[<>=!~ \[]", r)[0].lower() in FORBIDDEN]


def test_one_version():
    version = re.search(r'^version = "([^"]+)"', PYPROJECT, re.M)
    assert version and version[1] == efficient_vdit_core.__version__
    # Nowhere else: all code asks the package.
    assert [
        f for f in (ROOT / "efficient_vdit_core").rglob("*.py") if f'"{version[1]}"' in f.read_text(encoding="utf-8")
    ] == []


def test_assets_stay_small():
    total = sum(f.stat().st_size for f in (ROOT / "efficient_vdit_core" / "assets").rglob("*") if f.is_file())
    assert total <= 25e6, f"assets weigh {total / 1e6:.1f} MB"
