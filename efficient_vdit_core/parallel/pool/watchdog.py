"""Ends the workers once the process that started them is gone, however it went and whatever they do.

A process of its own, so that it waits for nobody's interpreter. On its standard input stand a line of JSON (``folder``
and ``address_file`` to remove, and the name of the ``pool``), and then the process group of each worker, one a line.
The end of that input, or of its parent, is its sign. It runs by path and imports next to nothing.
"""

import json
import os
import select
import shutil
import signal
import sys

_LOOK_SECONDS = 0.5


def read_to_the_end() -> bytes:
    """What the starter wrote until it was gone."""
    if sys.platform == "win32":  # pipes cannot be waited for with a timeout there
        return sys.stdin.buffer.read()
    parent, data = os.getppid(), b""
    # The pipe alone would not do: a process that the starter has forked may hold it open.
    while os.getppid() == parent:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            part = os.read(0, 2**16)
            if not part:
                break
            data += part
    return data


def end(worker: int) -> None:
    """End a worker, and what it has started."""
    try:
        if sys.platform == "win32":
            os.kill(worker, signal.SIGTERM)  # ends it at once there
        else:
            os.killpg(worker, signal.SIGKILL)
    except OSError:
        pass  # gone already


def main() -> None:
    first, *workers = read_to_the_end().decode().splitlines()
    for worker in workers:
        end(int(worker))
    about = json.loads(first)
    try:
        with open(about["address_file"], encoding="utf-8") as file:
            ours = json.load(file).get("pool") == about["pool"]
        if ours:
            os.unlink(about["address_file"])
    except (OSError, ValueError, AttributeError):
        pass
    shutil.rmtree(about["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
