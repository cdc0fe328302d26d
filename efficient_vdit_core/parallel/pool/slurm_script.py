"""The job script by which SLURM starts a pool: a rank for each GPU, by srun, and again where one has ended.

It is text, and nothing here runs it. All that goes into it is a number, a word of a few plain characters, or quoted.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ...limits.quote import quoted
from .imports import PACK, VARIABLE
from .slurm import STORE

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_TIME = re.compile(r"(\d{1,3}-)?\d{1,2}:[0-5]\d:[0-5]\d")
# A pool that lived for less is not started again: what ended it would end the next one too.
_LIVED_SECONDS = 60
# The ranks end by themselves once one has, and rank 0 says which; srun ends the one that hangs.
_WAIT_SECONDS = 5

_SCRIPT = """\
#!/bin/bash
# A pool of workers for ComfyUI's Sequence Parallel, written by `evdit workers --engine slurm`.
# `sbatch FILE` gives it a job of its own, and takes what your site wants besides, such as --mem and --cpus-per-task;
# `bash FILE` runs it in an allocation that you have. `scancel`, or Ctrl-C, ends it.
{options}
trap 'exit 130' INT TERM
{imports}first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export {store}="$first:$((20000 + SLURM_JOB_ID % 10000))"{listen}
while true; do
    SECONDS=0
    srun --nodes={nodes} --ntasks={ranks} --ntasks-per-node={gpus} --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" \\
        --kill-on-bad-exit=0 --wait={wait} --quit-on-interrupt {python} {boot} && status=0 || status=$?
    if [ "$status" -eq 0 ] || [ "$SECONDS" -lt {lived} ]; then
        exit "$status"
    fi
    echo "a rank ended; starting the workers anew"
done
"""


@dataclass(frozen=True)
class Job:
    """``nodes`` machines with ``gpus`` GPUs on each; what is empty is left to SLURM. ``time`` is [DAYS-]HOURS:MINUTES:SECONDS.

    Raises ValueError for what SLURM would not take.
    """

    nodes: int
    gpus: int
    time: str = ""
    partition: str = ""
    account: str = ""

    def __post_init__(self) -> None:
        if self.nodes * self.gpus < 2:
            raise ValueError(
                "--nodes and --gpus-per-node make one GPU, expected two or more: one alone needs no workers. Name more."
            )
        if self.time and not _TIME.fullmatch(self.time):
            raise ValueError(f"--time is {quoted(self.time)}, expected HH:MM:SS or D-HH:MM:SS, such as 04:00:00.")
        for name, value in (("--partition", self.partition), ("--account", self.account)):
            if value and not _WORD.fullmatch(value):
                raise ValueError(
                    f"{name} is {quoted(value)}, expected a name of letters, digits, '_', '-' and '.', as `sinfo` or "
                    "`sacctmgr` shows it."
                )


def script(job: Job, imports: Sequence[str] = ()) -> str:
    """The script, for this Python and this pack, whose workers may import from the folders ``imports`` too. Raises
    ValueError for a path with a line break or the like in it."""
    wanted = {"job-name": "evdit-workers", "output": "evdit-workers-%j.log", "nodes": job.nodes}
    wanted |= {"ntasks-per-node": job.gpus, "gpus-per-node": job.gpus}
    wanted |= {"time": job.time, "partition": job.partition, "account": job.account}
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH --{name}={value}" for name, value in wanted.items() if value),
        imports=f"export {VARIABLE}={_word(':'.join(imports))}\n" if imports else "",
        store=STORE,
        # The other machines must reach rank 0; on one machine nobody but it does.
        listen="" if job.nodes == 1 else ' EVDIT_LISTEN="$first"',
        nodes=job.nodes,
        ranks=job.nodes * job.gpus,
        gpus=job.gpus,
        python=_word(sys.executable),
        boot=_word(str(PACK / "efficient_vdit_core" / "parallel" / "boot.py")),
        lived=_LIVED_SECONDS,
        wait=_WAIT_SECONDS,
    )


def _word(text: str) -> str:
    if not text.isprintable():
        raise ValueError(
            f"The path {quoted(text)} cannot stand in a job script, expected printable characters. Rename it."
        )
    return shlex.quote(text)
