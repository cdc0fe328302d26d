"""What the registry's archive holds: all tracked files less .comfyignore."""

import ast
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESS = {"subprocess", "multiprocessing", "pty"}
PROCESS_CALLS = {"system", "popen", "spawnl", "spawnv", "execv", "execvp", "fork"}


def ignored(path: str, patterns: list[str]) -> bool:
    """The part of gitignore's syntax that .comfyignore uses: folders with a slash at the end, and file patterns."""
    return any(path.startswith(p) or f"/{p}" in f"/{path}" if p.endswith("/") else fnmatch(Path(path).name, p) for p in patterns)


def archive() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [Path(name) for name in listed if name and not ignored(name, patterns)]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("NOT A GIT CHECKOUT: the archive's content was not checked")
    return archive()


def process_starts(source: str) -> list[str]:
    """Imports of process modules and calls of os that start a process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in PROCESS]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in PROCESS_CALLS:
            found.append(f"os.{node.attr}")
    return found


def test_it_holds_what_a_user_needs(files):
    names = {f.as_posix() for f in files}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= names
    for folder in ("nodes", "efficient_vdit_core/assets", "web/docs", "locales/en", "locales/zh", "workflows"):
        assert any(name.startswith(folder + "/") for name in names), folder


def test_it_holds_nothing_else(files):
    assert {f.parts[0] for f in files if len(f.parts) > 1} <= {"nodes", "efficient_vdit_core", "web", "locales", "workflows"}
    assert not [f for f in files if f.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pyc", ".log")]


def test_it_is_small(files):
    assert sum((ROOT / f).stat().st_size for f in files) < 30e6


def test_no_process_is_started(files):
    found = {str(f): process_starts((ROOT / f).read_text(encoding="utf-8")) for f in files if f.suffix == ".py"}
    assert not {name: starts for name, starts in found.items() if starts}


def test_the_check_sees_a_start():
    for source in ("import subprocess", "from multiprocessing import spawn", "import os\nos.system('x')", "import os\nos.fork()"):
        assert process_starts(source)
