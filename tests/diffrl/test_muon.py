"""Muon in float32 does what torch's does in bfloat16, but for the rounding."""

import copy

import pytest
import torch

from diffrl.muon import Muon, orthogonalised

COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7
SHAPES = [(24, 24), (48, 16), (16, 48)]


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_values_become_one(shape: tuple[int, int]):
    update = matrix(shape, 0).double()
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    scaled = s / update.norm()
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):  # what the iteration does to each singular value
        scaled = a * scaled + b * scaled**3 + c * scaled**5
    torch.testing.assert_close(orthogonalised(update, COEFFICIENTS, STEPS, EPS), u @ scaled.diag() @ vh)
    single = orthogonalised(update.float(), COEFFICIENTS, STEPS, EPS)
    torch.testing.assert_close(single.double(), u @ scaled.diag() @ vh, rtol=1e-3, atol=1e-4)
    assert (scaled > 0.6).all() and (scaled < 1.3).all() and s.max() / s.min() > 2


def test_no_gradient_no_direction():
    assert torch.equal(orthogonalised(torch.zeros(3, 5), COEFFICIENTS, STEPS, EPS), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int]):
    ours, theirs = (torch.nn.Parameter(matrix(shape, 1)) for _ in range(2))
    options = {"lr": 0.05, "weight_decay": 0.1}
    muon = Muon([ours], **options)
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    assert muon.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
    start = ours.detach().clone()
    for seed in range(4):
        ours.grad, theirs.grad = matrix(shape, 10 + seed), matrix(shape, 10 + seed)
        muon.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bfloat16 has 8 bits
    assert torch.equal(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_a_loaded_state_goes_on():
    parameter = torch.nn.Parameter(matrix((4, 6), 2))
    muon = Muon([parameter], lr=0.1, weight_decay=0.0)
    parameter.grad = matrix((4, 6), 3)
    muon.step()
    again = torch.nn.Parameter(parameter.detach().clone())
    other = Muon([again], lr=0.1, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(muon.state_dict()))
    again.grad = parameter.grad.clone()
    muon.step()
    other.step()
    assert torch.equal(parameter, again)
