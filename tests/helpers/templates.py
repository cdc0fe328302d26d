"""The shipped templates by their names for scripts. Their files are called by the titles that the page shows."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = {
    json.loads(path.read_text(encoding="utf-8"))["extra"]["template"]: path
    for path in sorted((ROOT / "workflows").glob("*.json"))
}
GRAPHS = [name for name, path in PATHS.items() if not path.stem.endswith(".app")]  # the others open in App Mode


def workflow(name: str) -> dict:
    """As the page opens it."""
    return json.loads(PATHS[name].read_text(encoding="utf-8"))


def prompt(name: str) -> dict:
    """As a script sends it."""
    return json.loads((ROOT / "web" / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
