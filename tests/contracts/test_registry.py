"""The registry's entry, by the published specification (docs.comfy.org/registry/specifications)."""

import os
import re
import struct
import subprocess
import textwrap
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="NO TOMLLIB (Python 3.10): the registry's entry was not checked")

ROOT = Path(__file__).parents[2]
TREE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = TREE["project"], TREE["tool"]["comfy"]
SYSTEMS = {"OS Independent", "Microsoft :: Windows", "POSIX :: Linux", "MacOS"}
DEVICES = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}


def test_the_name_is_one_that_lasts():
    name = PROJECT["name"]
    assert len(name) < 100 and re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name) and "comfyui" not in name


def test_the_version_is_three_numbers():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])


def test_the_license_is_a_table_as_the_registry_reads_it():
    assert PROJECT["license"] in ({"text": "Apache-2.0"}, {"file": "LICENSE"})
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:400]


def test_the_rest_of_the_project_is_said():
    assert PROJECT["description"] and PROJECT["requires-python"].startswith(">=3.")
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", PROJECT["urls"]["Repository"])
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())


def test_the_classifiers_are_known_ones():
    kinds = dict(c.split(" :: ", 1) for c in PROJECT["classifiers"])
    assert kinds["Operating System"] in SYSTEMS and kinds["Environment"] in DEVICES


def test_the_publisher_owns_the_repository():
    owner = PROJECT["urls"]["Repository"].split("/")[3]
    assert COMFY["PublisherId"] == owner and COMFY["DisplayName"]
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert f"github.repository == '{owner}/{PROJECT['name']}'" in workflow


def test_the_comfyui_range_is_readable():
    assert re.fullmatch(
        r"(<=|>=|~=|<>|!=|<|>)\d+\.\d+\.\d+(,(<=|>=|~=|<>|!=|<|>)\d+\.\d+\.\d+)*", COMFY["requires-comfyui"]
    )


def size(name: str) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = (ROOT / "web" / name).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_a_picture_is_where_its_link_points(key):
    assert (
        COMFY[key]
        == f"{PROJECT['urls']['Repository'].replace('github.com', 'raw.githubusercontent.com')}/main/web/{key.lower()}.png"
    )


def test_the_pictures_have_the_registrys_shapes():
    width, height = size("icon.png")
    assert width == height <= 400
    width, height = size("banner.png")
    assert width * 9 == height * 21


def test_comfyui_is_told_the_web_folder_once():
    """It serves WEB_DIRECTORY, where it also looks for help pages, under the pack's folder's name, and [tool.comfy] web under the
    project's: with both, a folder of another name has the page load each script twice."""
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert 'WEB_DIRECTORY = "./web"' in source and (ROOT / "web").is_dir() and "web" not in COMFY


def test_only_a_new_version_is_published():
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "needs.version.outputs.changed == 'true'" in workflow and "needs: test" in workflow


@pytest.mark.parametrize(
    ("versions", "changed"), [("112", "true"), ("122", "true"), ("111", "false"), ("222", "false")]
)
def test_a_version_is_new_in_whichever_commit_of_a_push(tmp_path, versions, changed):
    """The workflow's own script, in a repository whose last two commits were pushed at once."""
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    script = re.search(r"id: compare\n(?: {8}\w.*\n| {10}\w.*\n)*? {8}run: \|\n((?: {10}.*\n)+)", workflow)
    assert script

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for number, version in enumerate(versions):
        (tmp_path / "pyproject.toml").write_text(f'version = "0.0.{version}"\n# {number}\n')
        git("add", ".")
        git("commit", "-qm", "a")
    variables = {**os.environ, "BEFORE": git("rev-parse", "HEAD~2"), "GITHUB_OUTPUT": str(tmp_path / "said")}
    subprocess.run(["bash", "-e", "-c", textwrap.dedent(script[1])], cwd=tmp_path, env=variables, check=True)
    assert (tmp_path / "said").read_text() == f"changed={changed}\n"
