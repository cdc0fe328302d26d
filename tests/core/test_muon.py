"""Muon on a CPU, against PyTorch's and against a singular value decomposition."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from efficient_vdit_core.training.muon import Muon, muon_and_adamw, orthogonal

SHAPES = ((24, 24), (7, 40), (40, 7))
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def stepped(kind, steps, **settings):
    """The weights after so many steps on gradients of their own, one of which is missing at times."""
    trained, generator = weights(), torch.Generator().manual_seed(1)
    muon = kind(trained, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(steps):
        for i, weight in enumerate(trained):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = None if (step, i) == (1, 0) else gradient
        muon.step()
    return trained, muon


@pytest.mark.parametrize("steps", [1, 4])
def test_it_steps_as_pytorch_s_does_within_bfloat16(steps):
    (ours, _), (theirs, _) = stepped(Muon, steps), stepped(torch.optim.Muon, steps)
    for start, one, other in zip(weights(), ours, theirs, strict=True):
        assert float(((one - other).norm() / (other - start).norm()).detach()) < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_keeps_the_directions_and_evens_out_their_lengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    lengths = torch.linalg.svdvals(orthogonal(matrix, COEFFICIENTS, 5))
    assert 0.6 < float(lengths.min()) and float(lengths.max()) < 1.3
    within = u.T @ orthogonal(matrix, COEFFICIENTS, 5) @ v.T  # diagonal in the matrix's own directions
    assert float((within - within.diag().diag()).abs().max()) < 1e-4


def test_a_run_that_pytorch_s_began_goes_on():
    theirs_trained, theirs = stepped(torch.optim.Muon, 3)
    trained = deepcopy(theirs_trained)
    for copy, weight in zip(trained, theirs_trained, strict=True):
        copy.grad = weight.grad
    ours = Muon(trained, lr=1.0, adjust_lr_fn="match_rms_adamw")
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    before = [weight.detach().clone() for weight in trained]
    ours.step()
    theirs.step()
    for start, one, other in zip(before, trained, theirs_trained, strict=True):
        assert float(((one - other).norm() / (other - start).norm()).detach()) < 0.03


def test_what_is_no_matrix_goes_to_adamw():
    matrix, vector = nn.Parameter(torch.zeros(8, 9)), nn.Parameter(torch.zeros(8))
    muon, adamw = muon_and_adamw([matrix], [matrix, vector], rates=(1e-3, 1e-3), decays=(0.0, 0.0))
    assert type(muon) is Muon and muon.param_groups[0]["params"] == [matrix]
    assert [id(weight) for weight in adamw.param_groups[0]["params"]] == [id(vector)]
