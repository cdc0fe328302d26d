"""What the registry's archive holds: all tracked files less .comfyignore."""

import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def ignored(path: str, patterns: list[str]) -> bool:
    """The part of gitignore's syntax that .comfyignore uses: folders with a slash at the end, and file patterns."""
    return any(
        path.startswith(p) or f"/{p}" in f"/{path}" if p.endswith("/") else fnmatch(Path(path).name, p)
        for p in patterns
    )


def archive() -> list[Path]:
    """Relative paths. Files that are not committed yet count as well, unless git ignores them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [Path(name) for name in listed if name and not ignored(name, patterns) and (ROOT / name).is_file()]


def install(folder: Path, *, whole: bool = False) -> None:
    """Put the pack into ``folder`` as the Manager does: the archive's files alone. ``whole``, or outside a git
    checkout: the whole tree."""
    if whole or not (ROOT / ".git").exists():
        folder.symlink_to(ROOT)
        return
    for name in archive():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
