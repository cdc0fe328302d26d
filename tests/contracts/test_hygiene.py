"""What a reader, an importer and the registry's scanners would stumble over."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".json", ".yml", ".txt", ".js", ""}
SKIPPED = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "dist", "out", "runs"}
# Assembled here, so that this file does not match itself.
MACHINE_PATHS = re.compile(
    "|".join(["/" + name + "/" for name in ("root", "work", "home/[a-z]+", "Users/[A-Za-z]+", "tmp")])
)
PACKAGE_HOSTS = re.compile("(" + "|".join(["pypi" + r"\.", "pythonhosted" + r"\.", "index" + "-url"]) + ")")
HEAVY = ("torch", "diffusers", "transformers", "triton", "accelerate", "imageio", "sentencepiece", "comfy")


def texts():
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        if (
            file.is_file()
            and file.suffix in TEXT
            and not SKIPPED & set(parts)
            and not any(p.endswith(".egg-info") for p in parts)
        ):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, PACKAGE_HOSTS], ids=["machine paths", "package hosts"])
def test_the_text_speaks_of_no_machine(pattern):
    found = [f"{path}: {hit[0]}" for path, text in texts() if (hit := pattern.search(text))]
    assert not found, found


def test_no_half_of_a_merge_is_left():
    marks = re.compile(r"^(<{7} |>{7} )", re.M)
    assert marks.search("a\n" + 7 * "<" + " HEAD\n") and not [path for path, text in texts() if marks.search(text)]


@pytest.mark.parametrize("sample", ["open('/ro" + "ot/x')", "cd /wo" + "rk/main", "/ho" + "me/ann/x"])
def test_the_search_for_machine_paths_sees_one(sample):
    assert MACHINE_PATHS.search(sample)


def test_every_json_file_can_be_read_by_any_reader():
    def refuse(word: str) -> None:
        raise AssertionError(f"{path}: {word} is no JSON")

    for path, text in texts():
        if path.endswith(".json"):
            json.loads(text, parse_constant=refuse)


def test_importing_the_core_loads_nothing_heavy():
    code = "import sys, efficient_vdit_core, efficient_vdit_core.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if name in HEAVY and name != "torch"] == []


def test_the_pack_root_imports_without_comfyui():
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.']);"
        "m = u.module_from_spec(s); sys.modules['pack'] = m; s.loader.exec_module(m); print(m.WEB_DIRECTORY, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["./web", "False"]


def test_every_workflow_lies_flat_with_its_picture():
    # ComfyUI's template browser lists one level only.
    assert not [p for p in (ROOT / "workflows").rglob("*.json") if p.parent.name != "workflows"]


def test_only_released_folders_reach_the_registry():
    ignored = {pattern.lstrip("/") for pattern in (ROOT / ".comfyignore").read_text(encoding="utf-8").split()}
    assert {"tests/", ".ci/", ".github/"} <= ignored
    assert not {"efficient_vdit_core/", "nodes/", "web/", "locales/", "workflows/"} & ignored


def test_no_node_code_starts_processes():
    calls = re.compile(r"^\s*(import|from) (subprocess|multiprocessing|socket)\b|\bos\.(system|popen|exec|spawn)", re.M)
    assert [f.name for f in (ROOT / "nodes").rglob("*.py") if calls.search(f.read_text(encoding="utf-8"))] == []
