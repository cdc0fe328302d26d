"""evdit workers: start a pool of workers, which ComfyUI's EVDiTSequenceParallel then finds; Ctrl-C ends it.

--engine local runs one on this machine. --engine ray has Ray place the ranks: on this machine alone, or on the cluster
that RAY_ADDRESS names. --engine slurm starts nothing: it prints a job script for sbatch, or for bash in an allocation.

Over several machines make a secret on the first, HOST, and copy the file that is named to the same place on the others,
unless they share your home folder:
evdit workers --make-secret
With Ray then set EVDIT_LISTEN=HOST. Without Ray or SLURM run the same worker under torchrun on each machine, with N = 0
on HOST, 1 on the next, and so on:
EVDIT_LISTEN=HOST torchrun --nnodes 2 --node-rank N --nproc-per-node 4 --master-addr HOST --master-port 29400 \
    PACK/efficient_vdit_core/parallel/boot.py
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import Any

from ..limits.quote import quoted
from . import say
from .arguments import count, quantity, refuse_unheard

_CHECK_SECONDS = 0.5
# The options that speak to some engines only.
_ENGINES_OF = {
    "devices": ("local", "ray"),
    "start_timeout": ("local", "ray"),
    "ranks": ("ray",),
    "nodes": ("slurm",),
    "gpus_per_node": ("slurm",),
    "time": ("slurm",),
    "partition": ("slurm",),
    "account": ("slurm",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--devices",
        help='"auto", the default, for all GPUs, or numbers such as 0,1; cpu,cpu for two CPU ranks. Ray takes no numbers',
    )
    parser.add_argument("--start-timeout", type=quantity(1, 86_400), metavar="SECONDS", help="default: 120.0")
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
    parser.add_argument(
        "--engine",
        choices=("local", "ray", "slurm"),
        default="local",
        help="what starts the ranks; default: %(default)s",
    )
    parser.add_argument("--ranks", type=count(2, 4096), metavar="N", help="ray: how many GPUs; default: all of Ray's")
    parser.add_argument("--nodes", type=count(1, 1024), metavar="N", help="slurm: how many machines; default: 1")
    parser.add_argument("--gpus-per-node", type=count(1, 64), metavar="N", help="slurm: how many GPUs of each; needed")
    parser.add_argument("--time", metavar="HH:MM:SS", help="slurm: how long the job may run, also D-HH:MM:SS")
    parser.add_argument("--partition", metavar="NAME", help="slurm: where the job runs")
    parser.add_argument("--account", metavar="NAME", help="slurm: who the job is charged to")


def run(args: argparse.Namespace) -> int:
    """Keeps a pool running until Ctrl-C; one whose rank ends is started anew. Raises ValueError where there is one
    already."""
    from ..parallel.pool.secret import secret_file, shared_secret

    refuse_unheard(args, _ENGINES_OF, args.engine, "--engine")
    if args.make_secret:
        shared_secret(make=True)
        say(
            f"The secret is in {secret_file()}. Copy that file to the same place on the other machines, with mode 0600."
        )
        return 0
    if args.engine == "slurm":
        return _print_script(args)
    if _pool_runs():
        raise ValueError(
            "A pool of workers runs already, and ComfyUI finds one only. Use it, or end it with Ctrl-C where it was started."
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way of Ctrl-C
    engine: Any = None
    try:
        engine = _ray(args) if args.engine == "ray" else _Local(args)
        _keep_running(engine, _seconds(args))
    except KeyboardInterrupt:
        say("the workers have ended")
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    finally:
        if engine is not None:
            engine.stop()
    return 0


def _seconds(args: argparse.Namespace) -> float:
    return 120.0 if args.start_timeout is None else args.start_timeout


def _print_script(args: argparse.Namespace) -> int:
    from ..parallel.pool.secret import shared_secret
    from ..parallel.pool.slurm_script import Job, script

    if args.gpus_per_node is None:
        raise ValueError("--engine slurm needs --gpus-per-node, which is how many GPUs, and ranks, each machine gives.")
    job = Job(args.nodes or 1, args.gpus_per_node, args.time or "", args.partition or "", args.account or "")
    text = script(job, args.imports)
    shared_secret(make=True)  # before the ranks of two machines with one home folder look for it
    sys.stdout.write(text)
    return 0


class _Local:
    """A process for each device of this machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ..parallel.pool.session import parse_devices, starter

        self.starter, self.imports = starter(), _imports(args)
        self.devices = parse_devices(args.devices or "auto")
        if len(self.devices) < 2:
            raise ValueError(
                f"--devices means {', '.join(self.devices)}, expected two or more devices: one alone needs no workers."
            )
        self.title = f"{len(self.devices)} workers are ready on {', '.join(self.devices)}"

    def start(self, seconds: float) -> Any:
        from ..parallel.pool.backend import backend_for
        from ..parallel.pool.imports import COMFYUI_HOST
        from ..parallel.pool.pool_file import default_pool_file

        backend, path = backend_for(self.devices[0]), default_pool_file()
        workers = self.starter.Workers(self.devices, backend, COMFYUI_HOST, self.imports, address_file=path)
        try:
            workers.wait(seconds)
        except BaseException:
            workers.stop(gently=False)
            raise
        return workers

    def stop(self) -> None:
        pass


def _ray(args: argparse.Namespace) -> Any:
    from ..parallel.pool.imports import COMFYUI_HOST
    from ..parallel.pool.session import starter

    starter()
    from ..parallel.pool.ray_pool import RayPools

    words = [word.strip() for word in (args.devices or "auto").lower().split(",")]
    on_cpu = all(word == "cpu" for word in words)
    if not on_cpu and words != ["auto"]:
        raise ValueError(
            f"--devices is {quoted(args.devices)}, expected auto or cpu,cpu: Ray chooses the GPUs. Say by --ranks how many."
        )
    if on_cpu and args.ranks is not None:
        raise ValueError(
            "--ranks is how many GPUs Ray gives, expected none with CPU ranks. Name each of them in --devices."
        )
    return RayPools(len(words) if on_cpu else args.ranks or 0, not on_cpu, COMFYUI_HOST, _imports(args), _seconds(args))


def _imports(args: argparse.Namespace) -> tuple[str, ...]:
    """The folders that the workers may import from. Raises ValueError where the pack's nodes are not there."""
    from ..parallel.pool.imports import PACK, usual_folders

    if not (PACK / "nodes").is_dir():
        raise ValueError(
            f"{PACK} holds no nodes for the workers, expected the pack. Run `python efficient_vdit_core workers` in its folder."
        )
    return (*usual_folders(), *args.imports)


def _keep_running(engine: Any, seconds: float) -> None:
    from ..parallel.pool.pool_file import default_pool_file

    while True:
        workers = engine.start(seconds)
        try:
            say(f"{engine.title}; ComfyUI finds them by {default_pool_file()}. Ctrl-C ends them.")
            while not workers.ended():
                time.sleep(_CHECK_SECONDS)
            time.sleep(_CHECK_SECONDS)
            for rank, how in workers.ended().items():
                say(f"rank {rank} ended ({how}); its last lines:\n{workers.last_lines(rank)}")
        finally:
            workers.stop()
        say("starting the workers anew")


def _pool_runs() -> bool:
    """Whether one does, on whatever devices; the file of one that is gone is removed."""
    from ..parallel.pool.faults import PoolFault
    from ..parallel.pool.session import parse_devices, running_pool

    try:
        found = running_pool(parse_devices("auto"))
    except PoolFault:  # a ComfyUI uses it
        return True
    if found is not None:
        found.close()
    return found is not None
