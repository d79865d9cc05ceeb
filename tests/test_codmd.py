"""codmd.py: the relation loss against its own gradient formula, by hand, and across ranks."""

import math

import pytest
import torch

import codmd
from tests.gathered import student_gradient
from tests.ranks import on_ranks


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """Two rows at known angles, of any length, in float64 on paper: KL of two distributions of two outcomes."""
    tau, angles = 0.5, (0.3, 1.1, 0.7)  # between the rows of student, teacher, fake
    rows_at = [torch.tensor([[3.0, 0.0], [0.1 * math.cos(angle), 0.1 * math.sin(angle)]]) for angle in angles]
    s, r, f = (math.cos(angle) for angle in angles)
    p = 1 / (1 + math.exp((s - (f - r) - 1) / tau))  # of the diagonal, whose similarity is 1 in all three
    q = 1 / (1 + math.exp((s - 1) / tau))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert codmd.relation_kl(*rows_at, tau).item() == pytest.approx(expected, rel=1e-5)


def test_its_gradient():
    """(Q - P) / (tau * N) with respect to the similarities, from there to the rows by the derivative of a cosine; 0
    where teacher and fake score agree; within the span of the batch, so a mode that no sample shows is in no push; and
    of samples that are alike but for eps a multiple of eps (docs/codmd.md).
    """
    real, fake, own, shared, tau, n = *(rows(4, 9, seed=i) for i in range(3)), rows(1, 9, seed=3), 0.1, 4

    def push(x, fake=fake):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(codmd.relation_kl(x, real, fake, tau), x)[0]

    z = own / own.norm(dim=1, keepdim=True)
    s, r, f = (codmd.relation_matrix(x) for x in (own, real, fake))
    w = (torch.softmax(s / tau, 1) - torch.softmax((s - (f - r)) / tau, 1)) / (tau * n)
    w = w + w.T
    formula = (w @ z - (w * s).sum(1, keepdim=True) * z) / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(push(own), formula, atol=1e-5, rtol=1e-4)
    assert push(own).norm() > 0.1 and push(own, fake=real).norm() < 1e-5
    inside = torch.linalg.lstsq(own.T, push(own).T).solution  # each push as a sum of the four samples
    assert (own.T @ inside - push(own).T).norm() < 1e-5 * push(own).norm()
    sizes = [push(shared + eps * own).norm().item() for eps in (0.02, 0.01, 0.0)]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.1) and sizes[2] < 1e-3 * sizes[1]


def test_one_row_gives_zero():
    """One latent frame, one sample: no relation, no NaN, also where a row is all zero."""
    x0 = rows(1, 4, 1, 2, 2).requires_grad_()
    loss = codmd.relation_loss(x0, rows(1, 4, 1, 2, 2, seed=1), torch.zeros(1, 4, 1, 2, 2), 1.0, 1.0, 0.1)
    loss.backward()
    assert loss.item() == 0 and torch.equal(x0.grad, torch.zeros_like(x0))


def test_sample_relations_do_not_depend_on_the_ranks(tmp_path):
    """A gather whose backward does not sum over ranks leaves 1 / world of this gradient."""
    on_ranks(2, student_gradient, tmp_path / "gradient.pt")
    got = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(got, student_gradient(), atol=1e-6, rtol=1e-4)
