"""`evdit` where nothing is installed: `python efficient_vdit_core doctor`, with this folder's path from wherever it is run.

ComfyUI's portable Python for Windows is isolated: it has no current folder to find a package in, so that `python -m` fails
there. A folder that is given by its path it runs all the same.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    if not __package__:  # run by its path, where Python looks for modules first: it has a `media` and a `plan`
        sys.path[0] = str(folder.parent)
    sys.exit(importlib.import_module(f"{folder.name}.cli").main())
