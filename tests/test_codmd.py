"""codmd.py: the relation loss against its own gradient formula, by hand, and across ranks."""

import math

import pytest
import torch

import codmd
import dmd2
from tests.conftest import distance, on_ranks, same, small_args, student_weights, train_on_ranks
from tests.gathered import gradients, student_gradient


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_with_respect_to_the_similarities():
    """(Q - P) / (tau * N), by autograd through the matrix itself."""
    tau, kept = 0.1, []
    matrix = codmd.relation_matrix
    features = [rows(5, 8, seed=i) for i in range(3)]

    def keep(x):
        s = matrix(x).detach().requires_grad_()
        kept.append(s)
        return s

    codmd.relation_matrix = keep
    try:
        codmd.relation_kl(*features, tau).backward()
    finally:
        codmd.relation_matrix = matrix
    s, r, f = (x.detach() for x in kept)
    p, q = torch.softmax((s - (f - r)) / tau, -1), torch.softmax(s / tau, -1)
    torch.testing.assert_close(kept[0].grad, (q - p) / (tau * 5))
    assert kept[1].grad is None and kept[2].grad is None


def test_by_hand():
    """Two rows at known angles, in float64 on paper: KL of two distributions of two outcomes."""
    tau, (a, b, c) = 0.5, (0.3, 1.1, 0.7)  # angles between the rows of student, teacher, fake
    at = lambda angle: torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])  # noqa: E731
    s, r, f = math.cos(a), math.cos(b), math.cos(c)
    p = 1 / (1 + math.exp((s - (f - r) - 1) / tau))  # of the diagonal, whose similarity is 1 in all three
    q = 1 / (1 + math.exp((s - 1) / tau))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert codmd.relation_kl(at(a), at(b), at(c), tau).item() == pytest.approx(expected, rel=1e-5)


def test_zero_where_teacher_and_fake_score_agree():
    student, both = rows(6, 8).requires_grad_(), rows(6, 8, seed=1)
    loss = codmd.relation_kl(student, both, both, 0.1)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6
    assert codmd.relation_kl(student, both, rows(6, 8, seed=2), 0.1).item() > 0.1


def test_lengths_of_rows_do_not_matter():
    features = [rows(6, 8, seed=i) for i in range(3)]
    scaled = [x * torch.tensor([0.1, 1, 2, 3, 5, 7])[:, None] for x in features]
    expected = codmd.relation_kl(*features, 0.1)
    torch.testing.assert_close(codmd.relation_kl(*scaled, 0.1), expected)


def test_it_pushes_within_the_span_of_the_batch_and_not_at_all_where_all_are_alike():
    """docs/codmd.md, Limits: teacher and fake score enter as numbers only, so a mode that no sample shows is in no
    push; and samples that are alike but for eps are pushed by a multiple of eps.
    """
    real, fake, shared, own = rows(4, 9, seed=1), rows(4, 9, seed=2), rows(1, 9, seed=3), rows(4, 9, seed=4)

    def push(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(codmd.relation_kl(x, real, fake, 0.1), x)[0]

    spread, z = push(own), torch.nn.functional.normalize(own, dim=1)
    s, r, f = (codmd.relation_matrix(x) for x in (own, real, fake))
    w = (torch.softmax((s - f + r) / 0.1, 1) - torch.softmax(s / 0.1, 1)) / (0.1 * 4)
    w = w + w.T
    formula = -(w @ z - (w * s).sum(1, keepdim=True) * z) / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(spread, formula, atol=1e-5, rtol=1e-4)
    inside = torch.linalg.lstsq(own.T, spread.T).solution  # each push as a sum of the four samples
    assert spread.norm() > 0.1 and (own.T @ inside - spread.T).norm() < 1e-5 * spread.norm()
    assert (spread * own).sum(1).abs().max() < 1e-5, "and across its own sample: a cosine does not know a length"
    sizes = [push(shared + eps * own).norm().item() for eps in (0.02, 0.01, 0.0)]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.1) and sizes[2] < 1e-3 * sizes[1]


def test_one_row_gives_zero():
    """One latent frame, one sample: no relation, no NaN, also where a row is all zero."""
    x0 = rows(1, 4, 1, 2, 2).requires_grad_()
    loss = codmd.relation_loss(x0, rows(1, 4, 1, 2, 2, seed=1), torch.zeros(1, 4, 1, 2, 2), 1.0, 1.0, 0.1)
    loss.backward()
    assert loss.item() == 0 and torch.equal(x0.grad, torch.zeros_like(x0))


def test_frame_relations_are_each_samples_own():
    x = [rows(3, 4, 5, 2, 2, seed=i) for i in range(3)]
    alone = [codmd.relation_loss(*(part[i : i + 1] for part in x), 0.0, 1.0, 0.1) for i in range(3)]
    torch.testing.assert_close(codmd.relation_loss(*x, 0.0, 1.0, 0.1), torch.stack(alone).mean())


@pytest.mark.parametrize("world", [2, 4])
def test_sample_relations_do_not_depend_on_the_ranks(tmp_path, world):
    """And why the gather's backward must sum: without the other ranks' part, what is left is 1 / world too small."""
    path = tmp_path / "gradients.pt"
    on_ranks(world, gradients, path)
    summed, own = torch.load(path, weights_only=True)
    torch.testing.assert_close(summed, student_gradient(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(own, student_gradient() / world, atol=1e-6, rtol=1e-4)


def test_relation_weight_0_is_dmd2(tmp_path):
    flags = {"steps": 3, "student_every": 2, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    codmd.main(small_args(codmd, runs_dir=tmp_path, relation_weight=0.0, **flags))
    codmd.main(small_args(codmd, runs_dir=tmp_path / "both", sample_relation=1.0, **flags))
    assert same(student_weights(tmp_path, 3, codmd), student_weights(tmp_path, 3, dmd2))
    assert not same(student_weights(tmp_path / "both", 3, codmd), student_weights(tmp_path, 3, dmd2))


def test_two_ranks_match_one(tmp_path):
    """A whole run with sample relations; the part that they have in it is the yardstick."""
    flags = {"steps": 4, "student_every": 1, "frame_relation": 0.0, "relation_weight": 1.0, "gan_weight": 0.0}
    codmd.main(small_args(codmd, runs_dir=tmp_path / "one", batch_size=4, sample_relation=1.0, **flags))
    codmd.main(small_args(codmd, runs_dir=tmp_path / "none", batch_size=4, sample_relation=0.0, **flags))
    train_on_ranks(2, codmd, runs_dir=tmp_path / "two", batch_size=2, sample_relation=1.0, **flags)
    one, two, none = (student_weights(tmp_path / name, 4, codmd) for name in ("one", "two", "none"))
    assert distance(two, one) < 0.02 * distance(none, one)
