"""What an installer and the registry read."""

import ast
import re
from pathlib import Path

import efficient_vdit_core
from efficient_vdit_core.commands import ISSUES

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
    assert total <= 32e6, f"assets weigh {total / 1e6:.1f} MB"


def test_reports_go_where_the_package_says():
    assert f'"Bug Tracker" = "{ISSUES}"' in PYPROJECT
    for file in ("README.md", "docs/measurements.md"):
        assert f"({ISSUES})" in (ROOT / file).read_text(encoding="utf-8"), file


def documents():
    """What people read, workflows with their notes too, but for the list of what has changed."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "workflows").glob("*.json")]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "web" / "docs").rglob("*.md")]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_commands_are_written_as_every_python_and_shell_takes_them():
    """An isolated Python, as of ComfyUI's portable build, finds no package in the current folder; cmd.exe keeps single quotes."""
    texts = documents()
    texts |= {f.name: f.read_text(encoding="utf-8") for f in (ROOT / "efficient_vdit_core" / "commands").rglob("*.py")}
    bad = re.compile(r"efficient_vdit_core\.cli\b|python -m efficient_vdit_core|pip install (-e )?'")
    assert not {name: hit[0] for name, text in texts.items() if (hit := bad.search(text))}


# Its text is for an environment that it says how to make.
OF_ANOTHER_PYTHON = {"quality/vbench.py"}


def test_no_message_names_a_pip_that_may_be_another_python_s():
    core, found = ROOT / "efficient_vdit_core", {}
    for file in core.rglob("*.py"):
        texts = [n.value for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)]
        if any(isinstance(text, str) and "pip install" in text for text in texts):
            found[file.relative_to(core).as_posix()] = True
    assert found.keys() == OF_ANOTHER_PYTHON
