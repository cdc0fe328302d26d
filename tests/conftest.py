"""Says at the end of a run, in one line, what was not tested for want of something, and how to get it."""

import os
import signal

import pytest

# Where several processes share out the tests, each test's arithmetic, and that of the processes it starts, keeps to one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start and end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_run(tmp_path_factory):
    """What was found out about this machine before, by a user or by other tests, is neither read nor changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVDIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# A word of a skip's reason, what is missing, and how to have it.
WANTED = (
    ("NO COMFYUI", "ComfyUI", "set COMFYUI_PATH (and COMFYUI_PYTHON) to a checkout, or put one at ~/comfy/ComfyUI"),
    ("NO CUDA", "an NVIDIA GPU", "run `pytest tests/gpu` on a machine with one"),
    ("RAY IS NOT", "Ray", "pip install ray"),
    ("NO SBATCH", "SLURM's parser", "apt install slurm-client"),
    ("PLAYWRIGHT", "a browser", "pip install playwright and Chromium, then run `pytest tests/e2e`"),
)


def not_tested(reasons: list[str], *, usual: bool) -> str:
    """The line, or an empty text where all ran. ``reasons``: why each skipped test was. A ``usual`` run leaves the
    browser's tests out."""
    counts = [(sum(mark in reason.upper() for reason in reasons), what, how) for mark, what, how in WANTED]
    others = len(reasons) - sum(count for count, *_ in counts)
    parts = [f"{count} skipped for want of {what} ({how})" for count, what, how in counts if count]
    parts += [f"{others} skipped for other reasons (listed above)"] if others else []
    parts += ["the page in a browser (`pytest tests/e2e`, which takes minutes)"] if usual else []
    return f"NOT TESTED: {'; '.join(parts)}." if parts else ""


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped]
    line = not_tested(reasons, usual=config.args == config.getini("testpaths"))
    if line:
        terminalreporter.write_line(line, yellow=True)
