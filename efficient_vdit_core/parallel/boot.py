"""What a worker process runs: by path, so that nothing needs to be installed and no folder of the pack lands on
sys.path.

Also for torchrun, on one machine:
`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file --nproc-per-node 4
path/to/efficient_vdit_core/parallel/boot.py`. The help page of Sequence Parallel has several machines.
"""

import ctypes
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

_PR_SET_PDEATHSIG = 1


def end_with_torchrun() -> None:
    """Have Linux end this process when torchrun ends, however that does and whatever this process is doing then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if not is_below_python():
        sys.exit("torchrun, which started this worker, is gone")  # before it could be asked for


def is_below_python() -> bool:
    """Whether a process above this one runs the same Python; an orphan has only the system's above it."""
    process, mine = os.getppid(), os.readlink("/proc/self/exe")
    while process:
        try:
            if os.readlink(f"/proc/{process}/exe") == mine:
                return True
        except OSError:
            pass  # another user's
        try:
            process = int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
        except OSError:
            return False  # hidden, or gone
    return False


def core(module: str) -> ModuleType:
    """That module of the core, which goes in by its path."""
    folder = Path(__file__).resolve().parents[1]
    if folder.name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[folder.name] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{folder.name}.{module}")


def main() -> None:
    if "RANK" in os.environ and sys.platform == "linux":  # other starters have a watcher, and may start from any thread
        end_with_torchrun()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    core("parallel.pool.worker").main()


if __name__ == "__main__":
    main()
