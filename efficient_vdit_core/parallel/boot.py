"""What a worker process runs: by path, so that nothing needs to be installed and no folder of the pack lands on
sys.path.

Also for torchrun: `torchrun --nnodes 2 --node-rank N --nproc-per-node 4 ...
path/to/efficient_vdit_core/parallel/boot.py`.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    core = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    spec = importlib.util.spec_from_file_location(
        core.name, core / "__init__.py", submodule_search_locations=[str(core)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[core.name] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"{core.name}.parallel.pool.worker").main()


if __name__ == "__main__":
    main()
