"""dfd.py: the fixed points that docs/dfd.md derives, and that data_prob 0 is dmd2.py."""

import pytest
import torch

import common
import dfd
import dmd2
from tests.conftest import distance, same, small_args, state_of, student_weights, train_on_ranks
from tests.exact import COND, Gaussian, Grid, ScaleShift

SCORE_SIGMAS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])


class Scale(ScaleShift):
    """x0 = theta * x_t / std(x_t), for inputs (1 - sigma) x0_data + sigma noise of standard normal data."""

    def x0(self, x_t, s):
        return self.theta * x_t / torch.sqrt((1 - s) ** 2 + s**2)


@pytest.mark.parametrize(
    ("data_prob", "student_sigma", "theta"),
    [
        # the student's noise knows nothing of the clip: the more often the teacher reads it, the less spread is left
        (0.0, None, 1.0), (0.5, None, 0.28), (1.0, None, 0.0),
        # the student reads the noised clip
        (0.5, 0.937, 0.37), (0.5, 0.833, 0.49), (0.5, 0.624, 0.72), (1.0, 0.937, 0.18), (1.0, 0.624, 0.64),
    ],
)  # fmt: skip
def test_fixed_points(data_prob, student_sigma, theta):
    """Where theta ends: data N(0, 1), exact fake score, docs/dfd.md's score sigmas, eq. 8's normaliser undone."""
    n, shape, student, path = 40, (32, 1, 1, 1), Scale(0.6), []
    optimizer, rng = torch.optim.SGD(student.parameters(), lr=0.05), Grid(n)
    torch.manual_seed(0)
    for step in range(800):
        x0_data, sigma, noise = rng.normal(shape), SCORE_SIGMAS[torch.arange(n) % 5], rng.normal(shape)
        x0 = dfd.rollout(student, rng, COND, shape, (student_sigma or 1.0,), x0_data if student_sigma else None)
        with torch.no_grad():
            x_t = dfd.add_noise(x0, noise, sigma)
            x0_fake = dfd.predict_x0(Gaussian(0.0, student.theta), x_t, sigma, COND)
            coin = common.SharedRNG(0, step).uniform("coin")
            x_t = dfd.add_noise(x0_data if coin < data_prob else x0, noise, sigma)
            x0_teacher = dfd.predict_x0(Gaussian(0.0, 1.0), x_t, sigma, COND)
            weight = (x0 - x0_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
            grad = dfd.dmd_gradient(x0, x0_teacher, x0_fake) * weight
        optimizer.zero_grad()
        dfd.student_loss(x0, grad).backward()
        optimizer.step()
        path.append(student.theta.item())
    assert sum(path[-500:]) / 500 == pytest.approx(theta, abs=0.05)


def test_data_prob_0_is_dmd2_bit_for_bit(tmp_path):
    flags = {"steps": 3, "student_every": 2, "gan_weight": 0.01, "student_input": "data", "ema_decay": 0.99}
    flags |= {"anneal_lr": False, "lr": 2e-4, "fake_score_lr": 2e-4}  # where the recipes differ
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    dfd.main(small_args(dfd, runs_dir=tmp_path, data_prob=0.0, **flags))
    assert same(state_of(tmp_path, 3, dfd), state_of(tmp_path, 3, dmd2))


def test_the_coin_is_fair_and_tells_nothing_of_the_exit_step():
    draws = [common.SharedRNG(0, step) for step in range(4000)]
    both = torch.tensor([[draw.uniform(stream) for draw in draws] for stream in ("coin", "exit")])
    assert (both < 0.25).float().mean(1).tolist() == pytest.approx([0.25, 0.25], abs=0.02)
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


@pytest.mark.slow
def test_two_ranks_toss_one_coin(tmp_path):
    flags = {"steps": 6, "student_every": 1, "gan_weight": 0.0, "data_prob": 0.5}
    dfd.main(small_args(dfd, runs_dir=tmp_path / "one", **flags))
    dfd.main(small_args(dfd, runs_dir=tmp_path / "none", **{**flags, "data_prob": 0.0}))
    train_on_ranks(2, dfd, runs_dir=tmp_path / "two", batch_size=1, **flags)
    one, two, none = (student_weights(tmp_path / name, 6, dfd) for name in ("one", "two", "none"))
    assert distance(two, one) < 0.02 * distance(none, one)
