"""What keeps a pool of older code from a newer ComfyUI, also where both call themselves the same version."""

import shutil

import pytest

from efficient_vdit_core.parallel.pool.code_version import CODE_VERSION, code_version
from efficient_vdit_core.parallel.pool.imports import PACK


@pytest.fixture
def copy(tmp_path):
    """Another copy of the pack's sources."""
    for folder in ("efficient_vdit_core", "nodes"):
        shutil.copytree(
            PACK / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors", "results", "__pycache__")
        )
    shutil.copy(PACK / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_same_sources_have_the_same_one_however_their_lines_end(copy):
    for file in copy.rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "efficient_vdit_core" / "note.txt").write_text("no code")
    assert code_version(copy) == CODE_VERSION


@pytest.mark.parametrize("name", ["efficient_vdit_core/tiles.py", "nodes/comfy_bridge/parallel/host.py"])
def test_one_line_more_makes_another(copy, name):
    with (copy / name).open("a") as file:
        file.write("\n# new\n")
    assert code_version(copy) != CODE_VERSION


def test_a_file_of_another_name_makes_another(copy):
    (copy / "nodes" / "inputs.py").rename(copy / "nodes" / "widgets.py")
    assert code_version(copy) != CODE_VERSION


def test_without_the_pack_around_the_engine_its_neighbours_do_not_count(copy):
    """As in site-packages, where a folder named nodes is somebody else's."""
    (copy / "pyproject.toml").unlink()
    alone = code_version(copy)
    (copy / "nodes" / "theirs.py").write_text("x = 1\n")
    assert code_version(copy) == alone
