"""Shared by the core tests: few threads, Triton's interpreter where there is no GPU, and the slow masked oracle."""

import importlib.util
import os

import pytest
import torch
from pools import Started, X, launch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Triton decides at its first import whether its own functions are interpreted, and other libraries import it: so it is
# imported here, before them. The variable itself must not outlive that, or every backend status and subprocess sees it.
if TRITON_INSTALLED and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401


@pytest.fixture
def start():
    """Starts a command in this environment; all are ended with the test."""
    started = Started()
    yield started
    started.end()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder, and with it a pool file, of this test's own, for workers of one thread each."""
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def session(own_cache):
    """Two workers that have computed a step."""
    from efficient_vdit_core.parallel.pool.session import Session

    running = Session()
    running.step(launch(), {}, {"x": X})
    yield running
    running.stop()


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="module")
def triton_device():
    """Where Triton kernels run during a module: the GPU, else the CPU through the interpreter."""
    if not TRITON_INSTALLED:
        pytest.skip("SKIPPED THE TRITON KERNELS: the package triton is not installed (pip install triton, on Linux)")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from efficient_vdit_core.attention.backends import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from efficient_vdit_core.attention.backends import arrow_kernels

        assert arrow_kernels.INTERPRETED.value, "something imported arrow_kernels before, compiled"
        registry.statuses_on.cache_clear()
        yield torch.device("cpu")
    registry.statuses_on.cache_clear()


def masked_scores(q, k, frames, tokens_per_frame, references, prefix=0, suffix=0, window=0):
    """Scores under the arrow mask from its definition: an explicit N x N mask, -inf where it hides, all in float64.

    Written apart from the engine; ``references`` is the list of reference frames. A frame sees those at most ``window``
    away.
    """
    count = prefix + frames * tokens_per_frame + suffix
    owner = [-1] * prefix + [f for f in range(frames) for _ in range(tokens_per_frame)] + [-1] * suffix
    sees_all = [o == -1 or o in references for o in owner]
    live = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            live[i, j] = abs(owner[i] - owner[j]) <= window or sees_all[i] or sees_all[j]
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~live.to(q.device), float("-inf"))


def masked_attention(q, k, v, *layout):
    """Attention under the arrow mask: a softmax of ``masked_scores``, in float64; ``layout`` is as there."""
    return masked_scores(q, k, *layout).softmax(-1) @ v.double()


@pytest.fixture
def oracle():
    return masked_attention


@pytest.fixture
def score_oracle():
    return masked_scores
