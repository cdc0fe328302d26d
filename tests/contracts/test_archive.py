"""What the registry's archive holds, as its scanners read it."""

import ast
import json
import re
from pathlib import Path

import pytest
from archive import archive, install

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "requests",
    "urllib",
    "http",
    "aiohttp",
    "httpx",
    "huggingface_hub",
}
PROCESS = {"subprocess", "multiprocessing", "pty"}
PROCESS_CALLS = {"system", "popen", "spawnl", "spawnv", "execv", "execvp", "fork"}


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
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in PROCESS_CALLS
        ):
            found.append(f"os.{node.attr}")
    return found


def forbidden(source: str) -> list[str]:
    """Imports of network and pickle modules, and calls of eval, exec and __import__."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [
            name
            for name in names
            if name.split(".")[0] in FORBIDDEN and name not in ("urllib.parse", "http.HTTPStatus")
        ]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec", "__import__")
        ):
            found.append(node.func.id)
    return found


def test_it_holds_what_a_user_needs(files):
    names = {f.as_posix() for f in files}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= names
    for folder in (
        "nodes",
        "efficient_vdit_core/assets",
        "web/docs",
        "web/js",
        "locales/en",
        "locales/zh",
        "workflows",
        "subgraphs",
        "docs",
        "web/prompts",
    ):
        assert any(name.startswith(folder + "/") for name in names), folder


def test_it_holds_nothing_else(files):
    assert {f.parts[0] for f in files if len(f.parts) > 1} <= {
        "nodes",
        "efficient_vdit_core",
        "web",
        "locales",
        "workflows",
        "subgraphs",
        "docs",
    }
    assert not [f for f in files if f.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pyc", ".log")]


# Whoever imports one of these says what to do without it.
LEFT_OUT = {
    "bench/compile_ahead.py", "media/ffmpeg.py", "media/read_sound.py", "media/read_video.py", "parallel/pool/processes.py",
    "parallel/pool/ray_cluster.py", "parallel/pool/ray_head.py", "parallel/pool/ray_pool.py", "parallel/pool/ray_rank.py",
    "parallel/pool/start_workers.py",
}  # fmt: skip


def imported(file: Path) -> set[Path]:
    """The modules and packages of the pack that a file imports, without ".py"."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inner = {module / alias.name for alias in node.names}
            found |= {m for m in inner if (ROOT / m).is_dir() or (ROOT / f"{m}.py").is_file()} or {module}
    return found


def test_the_core_is_whole_but_for_what_starts_processes(files):
    names = {f.relative_to("efficient_vdit_core").as_posix() for f in files if f.parts[0] == "efficient_vdit_core"}
    core = ROOT / "efficient_vdit_core"
    assert {f.relative_to(core).as_posix() for f in core.rglob("*.py")} - names == LEFT_OUT
    modules = {f.with_suffix("") for f in files} | {folder for f in files for folder in f.parents}
    missing = {module for f in files if f.suffix == ".py" for module in imported(f)} - modules
    assert {f"{m.relative_to('efficient_vdit_core').as_posix()}.py" for m in missing} <= LEFT_OUT


def test_it_is_small(files):
    assert sum((ROOT / f).stat().st_size for f in files) < 35e6


def test_no_process_is_started(files):
    sources = [f for f in files if f.suffix == ".py"]
    found = {str(f): process_starts((ROOT / f).read_text(encoding="utf-8")) for f in sources}
    assert not {name: starts for name, starts in found.items() if starts}


def test_the_check_sees_a_start():
    for source in (
        "import subprocess",
        "from multiprocessing import spawn",
        "import os\nos.system('x')",
        "import os\nos.fork()",
    ):
        assert process_starts(source)


def test_nothing_reaches_for_the_network_or_runs_text(files):
    found = {str(f): forbidden((ROOT / f).read_text(encoding="utf-8")) for f in files if f.suffix == ".py"}
    assert not {name: hits for name, hits in found.items() if hits}


def test_that_check_sees_a_fault():
    for source in (
        "import pickle",
        "from urllib.request import urlopen",
        "eval('1')",
        "def f():\n    import requests",
        "__import__('os')",
    ):
        assert forbidden(source)
    assert not forbidden("from urllib.parse import quote\nfrom .http import x")


def test_no_developers_file_is_in_it(files):
    assert not [
        f for f in files if f.name.startswith((".", "Makefile", "conftest", "test_")) or f.suffix in (".sh", ".yml")
    ]


def test_every_file_of_the_pack_reads_as_what_it_is(files):
    for file in files:
        if file.suffix == ".json":
            json.loads((ROOT / file).read_text(encoding="utf-8"))
        if file.suffix == ".js":
            assert re.match(r"/\*\*|//", (ROOT / file).read_text(encoding="utf-8")), file


def test_installing_writes_the_archive_alone(files, tmp_path):
    install(tmp_path / "pack")
    assert {p.relative_to(tmp_path / "pack") for p in (tmp_path / "pack").rglob("*") if p.is_file()} == set(files)
