"""Shared by the core tests: one thread (the machine has few cores) and the slow masked oracle."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(2)


def masked_attention(q, k, v, frames, tokens_per_frame, references, prefix=0, suffix=0):
    """Attention under the arrow mask from its definition: an explicit N x N mask and a softmax, all in float64.

    Written apart from the engine; ``references`` is the list of reference frames.
    """
    count = prefix + frames * tokens_per_frame + suffix
    owner = [-1] * prefix + [f for f in range(frames) for _ in range(tokens_per_frame)] + [-1] * suffix
    sees_all = [o == -1 or o in references for o in owner]
    live = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            live[i, j] = owner[i] == owner[j] or sees_all[i] or sees_all[j]
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~live, float("-inf")).softmax(-1) @ v.double()


@pytest.fixture
def oracle():
    return masked_attention
