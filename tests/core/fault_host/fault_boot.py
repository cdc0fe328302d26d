"""boot.py for pools whose host is the tests': what builds models is fixed when a pool starts, by no message."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from efficient_vdit_core.parallel import boot  # noqa: E402
from efficient_vdit_core.parallel.pool import imports  # noqa: E402

imports.COMFYUI_HOST = imports.Host(str(HERE), "host", "Host")

if __name__ == "__main__":
    if sys.argv[1:2] == ["evdit"]:
        from efficient_vdit_core.cli import main

        sys.exit(main(sys.argv[2:]))
    boot.main()
