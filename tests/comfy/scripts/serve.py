"""Runs scripts of this folder, each in a process forked from this one, which has ComfyUI and the pack loaded: that takes
seconds.

A line of stdin asks for one, as JSON: ``script``, its ``environment``, and the files ``out`` and ``err`` for what it
prints. A line of stdout tells with what it ended.
"""

import gc
import json
import os
import runpy
import sys

import own_ranks  # noqa: F401  # one thread, before torch is loaded

import host  # isort: skip

ANSWERS = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # what a library prints is no answer
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def take_place_of(asked: dict) -> None:
    """Make this process what it would be if it had been started for the script alone."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    for stream, file in ((sys.stdout, asked["out"]), (sys.stderr, asked["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    ANSWERS.close()
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[0] = asked["script"]
    gc.freeze()  # or each collection of garbage goes through all that ComfyUI has made


host.load_pack()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        take_place_of(asked)
        runpy.run_path(asked["script"], run_name="__main__")
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=ANSWERS, flush=True)
