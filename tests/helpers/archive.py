"""What the registry's archive holds: all tracked files less .comfyignore."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def archive() -> list[Path]:
    """Relative paths. Files that are not committed yet count as well, unless git ignores them."""
    left_out = set(_listed("--ignored", "--exclude-from=.comfyignore"))
    return [Path(name) for name in _listed("--exclude-standard") if name not in left_out and (ROOT / name).is_file()]


def _listed(*options: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def install(folder: Path, *, whole: bool = False) -> None:
    """Put the pack into ``folder`` as the Manager does: the archive's files alone. ``whole``, or outside a git
    checkout: the whole tree."""
    if whole or not (ROOT / ".git").exists():
        folder.symlink_to(ROOT)
        return
    for name in archive():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
