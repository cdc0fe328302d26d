"""evdit workers: start a pool of workers on this machine, which ComfyUI's EVDiTSequenceParallel then finds; Ctrl-C ends
it.

Over several machines make a secret on the first, HOST, and copy the file that is named to the same place on the others:
evdit workers --make-secret
Then run the same worker under torchrun on each of them, with N = 0 on HOST, 1 on the next, and so on:
EVDIT_LISTEN=HOST torchrun --nnodes 2 --node-rank N --nproc-per-node 4 --master-addr HOST --master-port 29400 \
    PACK/efficient_vdit_core/parallel/boot.py
"""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

from . import say
from .arguments import quantity

_CHECK_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--devices", default="auto", help='"auto" for all GPUs, or numbers such as 0,1; cpu,cpu for two CPU ranks'
    )
    parser.add_argument(
        "--start-timeout", type=quantity(1, 86_400), default=120.0, metavar="SECONDS", help="default: %(default)s"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a ComfyUI, or a folder of node packs, that the workers may load code from, beside the one this pack lies in",
    )
    parser.add_argument(
        "--make-secret",
        action="store_true",
        help="make the secret of pools over several machines, say where it lies, and start nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Keeps a pool running until Ctrl-C; one whose rank ends is started anew. Raises ValueError where there is one
    already."""
    from ..parallel.pool.pool_file import default_pool_file
    from ..parallel.pool.secret import secret_file, shared_secret
    from ..parallel.pool.session import parse_devices

    if args.make_secret:
        shared_secret(make=True)
        say(
            f"The secret is in {secret_file()}. Copy that file to the same place on the other machines, with mode 0600."
        )
        return 0
    if _pool_runs():
        raise ValueError(
            "A pool of workers runs already, and ComfyUI finds one only. Use it, or end it with Ctrl-C where it was started."
        )
    devices = parse_devices(args.devices)
    if len(devices) < 2:
        raise ValueError(
            f"--devices means {', '.join(devices)}, expected two or more devices: one alone needs no workers."
        )
    workers: Any = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way of Ctrl-C
    try:
        while True:
            workers = _start(devices, args.start_timeout, args.imports)
            say(
                f"{len(devices)} workers are ready on {', '.join(devices)}; ComfyUI finds them by {default_pool_file()}. Ctrl-C ends them."
            )
            while not workers.ended():
                time.sleep(_CHECK_SECONDS)
            time.sleep(_CHECK_SECONDS)
            for rank, how in workers.ended().items():
                say(f"rank {rank} ended ({how}); its last lines:\n{workers.last_lines(rank)}")
            workers.stop()
            say("starting the workers anew")
    except KeyboardInterrupt:
        say("the workers have ended")
        return 0
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    finally:
        if workers is not None:
            workers.stop()


def _pool_runs() -> bool:
    """Whether one does, on whatever devices; the file of one that is gone is removed."""
    from ..parallel.pool.client import PoolFault
    from ..parallel.pool.session import parse_devices, running_pool

    try:
        found = running_pool(parse_devices("auto"))
    except PoolFault:  # a ComfyUI uses it
        return True
    if found is not None:
        found.close()
    return found is not None


def _start(devices: tuple[str, ...], seconds: float, imports: list[str]) -> Any:
    from ..parallel.pool.imports import COMFYUI_HOST, PACK, usual_folders
    from ..parallel.pool.pool_file import default_pool_file
    from ..parallel.pool.session import starter

    if not (PACK / "nodes").is_dir():
        raise ValueError(
            f"{PACK} holds no nodes for the workers, expected the pack. Run `python -m efficient_vdit_core.cli workers` in its folder."
        )
    backend = "nccl" if devices[0].startswith("cuda") else "gloo"
    folders = (*usual_folders(), *imports)
    workers = starter().Workers(devices, backend, COMFYUI_HOST, folders, address_file=default_pool_file())
    workers.wait(seconds)
    return workers
