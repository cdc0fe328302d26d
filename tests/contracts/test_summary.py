"""The last line of a run names what it did not test."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def not_tested(reasons, usual=False):
    spec = importlib.util.spec_from_file_location("top_conftest", ROOT / "tests" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.not_tested(reasons, usual=usual)


def test_what_is_missing_is_counted_and_how_to_have_it_is_said():
    line = not_tested(["NO COMFYUI at x"] * 3 + ["no CUDA GPU was found", "another reason"])
    assert "3 skipped for want of ComfyUI (set COMFYUI_PATH" in line and "1 skipped for want of an NVIDIA GPU" in line
    assert "1 skipped for other reasons" in line and "\n" not in line
    assert not_tested([]) == "" and "pytest tests/e2e" in not_tested([], usual=True)


def test_a_run_without_comfyui_says_so_in_its_last_lines(tmp_path):
    import os

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/comfy/test_prompt.py"]
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "NOT TESTED: " in done.stdout and "for want of ComfyUI" in done.stdout.split("NOT TESTED")[1]
