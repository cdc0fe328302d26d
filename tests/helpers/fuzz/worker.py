"""Runs cases in one process, one a line of standard input, and says in one line of JSON how each ended.

fine: served. refused: by a sentence of ours. bad: anything else, and why.
"""

import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

MESSAGE = 400
# Words of Python, PyTorch and Pillow, which tell a user nothing.
FOREIGN = re.compile(
    r"codec can't|null byte|unexpected pos|Weights only|has no attribute|object is not|not subscriptable|Traceback|invalid literal|"
    r"to unpack|NoneType|index out of range|Exceeds the limit|not supported between|Errno|unhashable|must be str|Overflow"
)
CORE = "efficient_vdit_core"


def judge_message(text: str) -> str:
    """What is wrong with a message; nothing, mostly."""
    if not text.strip():
        return "an empty message"
    if len(text.rstrip("\n")) > MESSAGE:
        return f"a message of {len(text)} characters"
    if not text.replace("\n", "").isprintable():
        return "a message that cannot be printed"
    found = FOREIGN.search(text)
    return f"foreign words: {found[0]}" if found else ""


def run_case(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """One case, judged."""
    from . import cases
    from .command import Said

    rng = random.Random(f"{kind} {seed}")
    call = cases.KINDS[kind](rng, folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            said = call()
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        wrong = judge_message(str(error)) or (
            "" if CORE in where else f"a bare {type(error).__name__} of {Path(where).name}"
        )
        return {"outcome": "bad" if wrong else "refused", "why": wrong, "message": str(error)[:500]}
    except BaseException as error:
        last = "".join(traceback.format_exception(error)[-3:])
        return {"outcome": "bad", "why": f"a traceback: {type(error).__name__}", "message": last[-1500:]}
    if isinstance(said, Said):  # what a command printed as its error
        wrong = judge_message(said)
        return {"outcome": "bad" if wrong else "refused", "why": wrong, "message": said[:500]}
    return {"outcome": "fine", "why": "", "message": ""}


def main() -> None:
    """Answers on the original standard output; whatever the cases print goes nowhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from . import cases

    cases.warm_up()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        case = json.loads(line)
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        before = os.getcwd()
        os.chdir(folder)
        try:
            result = run_case(case["kind"], case["seed"], folder)
        finally:
            os.chdir(before)
            shutil.rmtree(folder, ignore_errors=True)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
