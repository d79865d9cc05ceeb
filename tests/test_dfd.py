"""dfd.py: the fixed points that docs/dfd.md derives, and that data_prob 0 is dmd2.py."""

import pytest
import torch

import common
import dfd
import dmd2
from tests.conftest import same, small_args, state_of
from tests.exact import COND, Gaussian, Grid, ScaleShift, column

GROWS = 100.0  # stands for a spread without bound
# what DFD subtracts, in units of x0: x0 itself, -sigma v, or sigma^2 / (1 - sigma) score, all of them x0 - c x_t
SPACES = {"x0": lambda sigma: 0, "velocity": lambda sigma: 1, "score": lambda sigma: 1 / (1 - sigma)}


class Scale(ScaleShift):
    """x0 = theta * x_t / std(x_t), for inputs (1 - sigma) x0_data + sigma noise of standard normal data."""

    def x0(self, x_t, s):
        return self.theta * x_t / torch.sqrt((1 - s) ** 2 + s**2)


def slope(theta, data_prob, space, shift=1, student_sigma=1.0, low=0.02, high=0.98):
    """d loss / d theta: data N(0, 1), exact fake score, no normaliser. All that is normal takes -1 and 1 in every
    combination: the same second moments, so the mean is exact.
    """
    student, rng = Scale(theta), Grid(2000)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).T.view(3, 1, 8, 1, 1, 1)
    x0_data, noise, rng_noise = signs.expand(3, len(rng), 8, 1, 1, 1)
    rng.normal = lambda shape: rng_noise
    x0 = dfd.rollout(student, rng, COND, (8, 1, 1, 1), (student_sigma,), x0_data if student_sigma < 1 else None)
    sigma = dfd.sample_sigma(rng, shift, low, high)

    def score(std, video):
        x_t = dfd.add_noise(video, noise, sigma)
        return dfd.predict_x0(Gaussian(0.0, std), x_t, sigma, COND) - SPACES[space](column(sigma)) * x_t

    with torch.no_grad():
        score_teacher = data_prob * score(1.0, x0_data) + (1 - data_prob) * score(1.0, x0)
        grad = score(theta, x0) - score_teacher
    return torch.autograd.grad(dfd.student_loss(x0, grad), student.theta)[0].item()


@pytest.mark.parametrize(
    ("space", "shift", "student_sigma", "half", "one"),
    [
        # the student's noise knows nothing of the clip
        ("x0", 1, 1.0, 0.28, 0.0), ("velocity", 1, 1.0, 1.0, 1.0), ("score", 1, 1.0, 3.56, GROWS),
        ("x0", 3, 1.0, 0.37, 0.0), ("velocity", 3, 1.0, 1.13, 1.28), ("score", 3, 1.0, 5.83, GROWS),
        ("x0", 5, 1.0, 0.41, 0.0), ("velocity", 5, 1.0, 1.21, 1.44), ("score", 5, 1.0, 7.92, GROWS),
        # the student reads the noised clip
        ("x0", 1, 0.937, 0.37, 0.18), ("x0", 1, 0.833, 0.49, 0.34), ("x0", 1, 0.624, 0.72, 0.64),
    ],
)  # fmt: skip
def test_fixed_points(space, shift, student_sigma, half, one):
    """Where theta ends with data_prob 0, .5 and 1 (docs/dfd.md): it rises below, and falls above."""
    for data_prob, theta in ((0.0, 1.0), (0.5, half), (1.0, one)):
        below, above = (slope(theta + d, data_prob, space, shift, student_sigma) for d in (-0.01, 0.01))
        assert below < 0 and (above < 0 if theta == GROWS else above > 0), (data_prob, below, above)


@pytest.mark.parametrize(("sigma", "bias"), [(0.3, 1.207), (0.6, 0.769), (0.9, 0.122)])
def test_the_teachers_discrepancy_widens_a_perfect_student(sigma, bias):
    """At theta 1 DMD's gradient is 0. The discrepancy has mean 0, its product with d x0 / d theta has not."""
    push = -slope(1.0, 1.0, "score", low=sigma, high=sigma) * (1 - sigma) / sigma**2
    assert push == pytest.approx(bias, abs=1e-3)


def test_data_prob_0_is_dmd2_bit_for_bit(tmp_path):
    flags = {"steps": 2, "student_every": 1, "gan_weight": 0.01, "student_input": "data", "ema_decay": 0.99}
    flags |= {"anneal_lr": False, "lr": 2e-4, "fake_score_lr": 2e-4}  # where the recipes differ
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    dfd.main(small_args(dfd, runs_dir=tmp_path, data_prob=0.0, **flags))
    assert same(state_of(tmp_path, 2, dfd), state_of(tmp_path, 2, dmd2))


def test_the_coin_is_fair_and_tells_nothing_of_the_exit_step():
    draws = [common.SharedRNG(0, step) for step in range(4000)]
    both = torch.tensor([[draw.uniform(stream) for draw in draws] for stream in ("coin", "exit")])
    assert (both < 0.25).float().mean(1).tolist() == pytest.approx([0.25, 0.25], abs=0.02)
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05
