"""Who may import whom. Each rule is checked on the real tree, and the checker itself on small wrong examples."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "efficient_vdit_core"
COMFY = {
    "comfy",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "nodes",
    "execution",
    "latent_preview",
    "node_helpers",
}
HEAVY = {"triton", "diffusers", "transformers", "accelerate", "sentencepiece", "imageio", "tqdm", "ftfy", "bs4"}
NETWORK = {"requests", "urllib", "http", "aiohttp", "httpx", "huggingface_hub"}
PICKLE = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}

# A part of the core, or PART.ROOM of it, may import itself and what stands here; the top-level modules above them may import all.
ALLOWED = {
    "limits": set(),
    "assets": set(),
    "timing": set(),
    "storage": {"limits"},
    "tiles": {"limits"},
    "plan": {"assets", "tiles", "storage", "limits"},
    "attention": {"tiles", "plan", "storage", "limits", "timing"},
    "sampling": {"limits"},
    "media": {"storage", "limits"},
    "models": {"tiles", "plan", "attention", "storage", "limits"},
    "search": {"tiles", "plan", "attention", "limits", "timing"},
    "parallel": {"tiles", "plan", "attention", "storage", "limits"},
    "training": {"storage", "limits"},
    "quality": {"media", "storage", "limits"},
    "distill": {
        "tiles",
        "plan",
        "attention",
        "sampling",
        "models",
        "search",
        "parallel",
        "training",
        "tinyworld.worlds",
        "tinyworld.train",
        "generation",
        "media",
        "storage",
        "limits",
    },
    # What a distillation takes of the tiny world knows of none; its tables do.
    "tinyworld.worlds": {"tinyworld.moving", "tinyworld.crossing", "generation"},
    "tinyworld.train": {"tinyworld.worlds", "models", "training", "storage", "limits"},
}
# Rooms of a part; each may import itself and what stands here.
ROOMS = {
    "attention": {
        "backends": set(),
        "autotune": set(),
        "report": set(),
        "hook": {"backends", "report"},
    },
    "parallel": {"sharding": set(), "pool": {"sharding"}},
    "distill": {
        "lora": set(),
        "objectives": {"lora"},
        "families": {"lora", "objectives"},
        "data": {"objectives", "families"},
        "runs": {"lora", "objectives", "families", "data"},
        "forecast": {"lora", "objectives", "families", "runs"},
    },
    "tinyworld": {"moving": set(), "crossing": {"moving"}, "train": set(), "tables": {"moving", "train"}},
}
# Rooms that the files beside them do not import: a part's upper floor.
UPPER = {"attention": {"hook"}}
BACKENDS = {"frames", "triton", "flex", "parts"}
# Triton's kernels are functions of a module: that file imports it, and is itself imported inside functions only.
KERNELS = {f"efficient_vdit_core/attention/backends/{name}_kernels.py" for name in ("arrow", "merge")}


def imports_of(tree: ast.AST, module: str):
    """Yield (absolute name, inside a function, line) of all imports; ``module`` is dotted, for relative ones."""
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            stem = [*base, *(node.module or "").split(".")] if node.module else base
            yield ".".join(stem), id(node) in inside, node.lineno
            if not node.module:
                for alias in node.names:
                    yield ".".join([*stem, alias.name]), id(node) in inside, node.lineno


def violations(path: str, source: str) -> list[str]:
    """The rules that a file breaks; ``path`` is relative to the repository, with forward slashes."""
    tree, found = ast.parse(source), []
    parts = path.removesuffix(".py").split("/")
    module = ".".join(parts)
    for name, nested, line in imports_of(tree, module):
        top, where = name.split(".")[0], f"{path}:{line}"
        in_bridge = parts[:2] == ["nodes", "comfy_bridge"]
        if parts[0] in ("efficient_vdit_core", "nodes") and top == parts[0] and _is_absolute(tree, line):
            found.append(f"{where}: absolute import of {name}, use a relative one")
        if top in COMFY and not name.startswith(parts[0] + ".") and not in_bridge and _is_absolute(tree, line):
            found.append(f"{where}: {name} outside nodes/comfy_bridge")
        if top in HEAVY and not nested and path not in KERNELS:
            found.append(f"{where}: {name} at import time")
        if top in NETWORK | PICKLE and name not in ("urllib.parse", "http.HTTPStatus"):
            found.append(f"{where}: {name} is not allowed")
        if parts[0] == "efficient_vdit_core" and name.startswith(("nodes", "comfy_api")):
            found.append(f"{where}: the core imports {name}")
        if parts[0] == "efficient_vdit_core" and name.startswith("efficient_vdit_core."):
            mine, other = parts[1], name.split(".")[1]
            for part in ALLOWED.keys() & {mine, ".".join(parts[1:3])}:
                if not any(_is_within(name, allowed) for allowed in ALLOWED[part] | {part, "__version__"}):
                    found.append(f"{where}: {part} imports {other}")
            rooms, room, theirs = ROOMS.get(mine, {}), "".join(parts[2:3]), name.split(".")[2:3]
            closed = rooms.keys() - rooms[room] - {room} if room in rooms else UPPER.get(mine, set())
            if mine == other and closed.intersection(theirs):
                found.append(f"{where}: {mine}/{room} imports {mine}/{theirs[0]}")
            if (
                parts[1:3] == ["attention", "backends"]
                and parts[-1] in BACKENDS
                and name.split(".")[-1] in BACKENDS - {parts[-1]}
            ):
                found.append(f"{where}: backend {parts[-1]} imports {name.split('.')[-1]}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"{path}:{node.lineno}: {reason}" for reason in _bad_call(node)]
    return found


def _is_within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"efficient_vdit_core.{part}.")


def _is_absolute(tree: ast.AST, line: int) -> bool:
    return not any(isinstance(n, ast.ImportFrom) and n.lineno == line and n.level for n in ast.walk(tree))


def _bad_call(node: ast.Call) -> list[str]:
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return [node.func.id]
    text = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if text == "torch.load" and keywords.get("weights_only") != "True":
        return ["torch.load without weights_only=True"]
    return []


def sources():
    for folder in (CORE, ROOT / "nodes"):
        for file in sorted(folder.rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


def test_the_tree_keeps_the_rules():
    found = [v for path, source in sources() for v in violations(path, source)]
    assert not found, "\n".join(found)


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a circle, inside functions too; none where there is no circle. ``sources``: the
    text of each by its dotted name."""
    graph = {
        module: {name for name, *_ in imports_of(ast.parse(text), module) if name in sources and name != module}
        for module, text in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_one_another_in_a_circle():
    assert not circle({path.removesuffix(".py").replace("/", "."): source for path, source in sources()})


def test_that_checker_sees_a_circle():
    found = circle({"p.a": "from . import b", "p.b": "def f():\n    from .a import x", "p.c": "from .a import y"})
    assert set(found) == {"p.a", "p.b"}
    assert not circle({"p.a": "from . import b", "p.b": "", "p.c": "from .a import y"})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("efficient_vdit_core/tiles.py", "import comfy.ops"),
        ("efficient_vdit_core/models/a.py", "import folder_paths"),
        ("nodes/loader.py", "from comfy.sd import VAE"),
        ("efficient_vdit_core/tiles.py", "from .attention import x"),
        ("efficient_vdit_core/sampling/a.py", "from ..tiles import x"),
        ("efficient_vdit_core/sampling/a.py", "from ..models.b import x"),
        ("efficient_vdit_core/attention/backends/triton.py", "from .frames import x"),
        ("efficient_vdit_core/attention/dense_call.py", "from .hook.state import x"),
        ("efficient_vdit_core/parallel/sharding/a.py", "from ..pool.messages import x"),
        ("efficient_vdit_core/parallel/sharding/a.py", "from .. import pool"),
        ("efficient_vdit_core/parallel/pool/a.py", "from ...models import x"),
        ("efficient_vdit_core/distill/data/a.py", "from ...tinyworld.tables.rows import x"),
        ("efficient_vdit_core/distill/data/a.py", "from ...tinyworld import tables"),
        ("efficient_vdit_core/tinyworld/train/a.py", "from ...distill.config import x"),
        ("efficient_vdit_core/a.py", "from efficient_vdit_core.tiles import x"),
        ("efficient_vdit_core/a.py", "import diffusers"),
        ("efficient_vdit_core/a.py", "import pickle"),
        ("efficient_vdit_core/a.py", "def f():\n    import urllib.request"),
        ("efficient_vdit_core/a.py", "eval('1')"),
        ("efficient_vdit_core/a.py", "import torch\ntorch.load('x')"),
        ("efficient_vdit_core/a.py", "import torch\ntorch.load('x', weights_only=False)"),
        ("efficient_vdit_core/a.py", "from ..nodes import x"),
    ],
)
def test_the_checker_sees_a_violation(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("efficient_vdit_core/attention/backends/frames.py", "from ..tiles import TokenGrid"),
        ("efficient_vdit_core/parallel/pool/a.py", "from ..sharding.communicator import Communicator"),
        ("efficient_vdit_core/parallel/sharding/a.py", "from .communicator import Communicator"),
        ("efficient_vdit_core/distill/data/a.py", "from ...tinyworld.train.latents import cache_clips"),
        ("efficient_vdit_core/tinyworld/tables/a.py", "from ...distill.config import DistillConfig"),
        ("efficient_vdit_core/a.py", "def f():\n    import diffusers"),
        ("nodes/comfy_bridge/a.py", "import comfy.ops\nimport folder_paths"),
        ("nodes/loader.py", "from comfy_api.latest import io"),
        ("nodes/loader.py", "from .comfy_bridge import patch"),
    ],
)
def test_the_checker_lets_the_rest_pass(path, source):
    assert not violations(path, source)
