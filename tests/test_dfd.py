"""dfd.py: the fixed points that docs/dfd.md derives, data_prob 0 is dmd2.py, and the ask for --init."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common
import dfd
import dmd2
from tests.conftest import distance, only_run, same, small_args, student_weights, train_on_ranks
from tests.exact import COND, Gaussian, Whole, draws
from training.checkpoints import find_init

SCORE_SIGMAS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])


class Scale(Whole):
    """x0 = theta * x_t / std(x_t), for inputs (1 - sigma) x0_data + sigma noise of standard normal data."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x_t, sigma, cond, blocks=()):
        s = sigma.view(-1, 1, 1, 1, 1)
        return (x_t - self.theta * x_t / torch.sqrt((1 - s) ** 2 + s**2)) / s, []


def fixed_point(data_prob, student_sigma, paired, steps=800):
    """Where theta ends: data N(0, 1), exact fake score, docs/dfd.md's score sigmas, eq. 8's normaliser undone."""
    n, shape = 40, (32, 1, 1, 1)
    student = Scale(0.6)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    path = []
    for step in range(steps):
        rng, shared = draws(f"dfd {step}", n), common.SharedRNG(0, step)
        x0_data = rng.normal(shape)
        x0 = dfd.rollout(student, rng, COND, shape, (student_sigma,), x0_data if paired else None)
        with torch.no_grad():
            sigma, noise = SCORE_SIGMAS[torch.arange(n) % 5], rng.normal(shape)
            x_t = dfd.add_noise(x0, noise, sigma)
            x0_fake = dfd.predict_x0(Gaussian(0.0, student.theta), x_t, sigma, COND)
            x_t = dfd.add_noise(x0_data if shared.uniform("coin") < data_prob else x0, noise, sigma)
            x0_teacher = dfd.predict_x0(Gaussian(0.0, 1.0), x_t, sigma, COND)
            weight = (x0 - x0_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
            grad = dfd.dmd_gradient(x0, x0_teacher, x0_fake) * weight
        optimizer.zero_grad()
        dfd.student_loss(x0, grad).backward()
        optimizer.step()
        path.append(student.theta.item())
    return sum(path[-500:]) / 500


@pytest.mark.parametrize(("data_prob", "theta"), [(0.0, 1.0), (0.5, 0.28), (1.0, 0.0)])
def test_fixed_point_with_independent_data(data_prob, theta):
    """The student's noise knows nothing of the clip: the more often the teacher reads data, the less spread is left."""
    assert fixed_point(data_prob, 1.0, paired=False) == pytest.approx(theta, abs=0.05)


@pytest.mark.parametrize(
    ("data_prob", "student_sigma", "theta"),
    [
        (0.5, 0.937, 0.37), (0.5, 0.833, 0.49), (0.5, 0.624, 0.72),
        (1.0, 0.937, 0.18), (1.0, 0.833, 0.34), (1.0, 0.624, 0.64),
    ],
)  # fmt: skip
def test_fixed_point_with_the_student_reading_the_noised_clip(data_prob, student_sigma, theta):
    assert fixed_point(data_prob, student_sigma, paired=True) == pytest.approx(theta, abs=0.05)


def test_the_identity_behind_it():
    """x0_fake(x_t) - x0_teacher(x_t_data) = (x0 - x0_data) + sigma^2 / (1 - sigma) * (score_fake - score_real)."""
    x0, x0_data, noise = torch.randn(3, 5, 1, 1, 1, 1, dtype=torch.float64)
    sigma, std = torch.full((5,), 0.4, dtype=torch.float64), 0.6
    x_t, x_t_data = dfd.add_noise(x0, noise, sigma), dfd.add_noise(x0_data, noise, sigma)
    left = dfd.predict_x0(Gaussian(0.0, std), x_t, sigma, COND) - dfd.predict_x0(
        Gaussian(0.0, 1.0), x_t_data, sigma, COND
    )
    score_fake, score_real = -x_t / (0.36 * std**2 + 0.16), -x_t_data / (0.36 + 0.16)
    torch.testing.assert_close(left, (x0 - x0_data) + 0.16 / 0.6 * (score_fake - score_real))


def losses(runs_dir, script):
    events = EventAccumulator(str(only_run(runs_dir, script))).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("loss/", "grad_norm/"))]
    return {name: [event.value for event in events.Scalars(name)] for name in sorted(names)}


@pytest.mark.parametrize("student_input", ["simulate", "data"])
def test_data_prob_0_is_dmd2_bit_for_bit(tmp_path, student_input):
    flags = {"steps": 6, "student_every": 2, "gan_weight": 0.01, "student_input": student_input}
    flags |= {"ema_decay": 0.99, "anneal_lr": False, "lr": 2e-4, "fake_score_lr": 2e-4}  # where the recipes differ
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    runs = {}
    for data_prob in (0.0, 1.0):
        folder = tmp_path / str(data_prob)
        dfd.main(small_args(dfd, runs_dir=folder, data_prob=data_prob, **flags))
        runs[data_prob] = losses(folder, dfd), student_weights(folder, 6, dfd)
    assert runs[0.0][0] == losses(tmp_path, dmd2)
    assert same(runs[0.0][1], student_weights(tmp_path, 6, dmd2))
    assert runs[1.0][0]["loss/student"][0] != runs[0.0][0]["loss/student"][0]
    assert runs[1.0][0]["grad_norm/student"][0] != runs[0.0][0]["grad_norm/student"][0]


def test_the_coin_is_a_function_of_the_step_and_fair():
    shared = [common.SharedRNG(0, step) for step in range(4000)]
    coins = [draw.uniform("coin") < 0.25 for draw in shared]
    assert coins == [draw.uniform("coin") < 0.25 for draw in shared]
    assert sum(coins) / len(coins) == pytest.approx(0.25, abs=0.02)
    exits = [draw.uniform("exit") for draw in shared]
    both = torch.tensor([[draw.uniform("coin") for draw in shared], exits])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


def test_it_starts_from_the_newest_finished_dmd2_run(tmp_path, fails, capsys):
    flags = {"runs_dir": tmp_path, "init": "dmd2", "steps": 1}
    fails(
        lambda: dfd.main(small_args(dfd, **flags)),
        "no finished run of dmd2.py",
        "(dmd2.py --teacher tiny --shift 3 ",
        "--init None",
    )
    assert not list(tmp_path.iterdir())
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=2, gan_weight=0.0))
    run = only_run(tmp_path, dmd2)
    dfd.main(small_args(dfd, lr=0.0, weight_decay=0.0, **flags))
    assert f"of {run}/checkpoints/step_0000002" in capsys.readouterr().out
    assert json.loads((only_run(tmp_path, dfd) / "args.json").read_text())["init"] == str(run)
    raw = [load_state(path, "student") for path in (run, only_run(tmp_path, dfd))]
    assert same(*raw)
    # of two the newer one
    shutil.copytree(run, newer := run.with_name(run.name[:-1] + "x"))
    for old, last in ((run, newer), (newer, run)):
        for time, folder in enumerate((old, last)):
            os.utime(folder / "checkpoints" / "step_0000002", (time, time))
        assert find_init(tmp_path, "tiny", "dmd2") == last
    shutil.rmtree(newer)
    # what did not finish, or is of another teacher, is not meant
    (run / "checkpoints" / "step_0000002").rename(run / "checkpoints" / "step_0000001")
    fails(lambda: dfd.main(small_args(dfd, **flags)), "no finished run")


def load_state(run, name):
    """One network's weights in the newest checkpoint of a run."""
    (folder,) = (run / "checkpoints").glob("step_*/state")
    every = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    return {k: v for k, v in every.items() if k.startswith(f"{name}.")}


def test_two_ranks_toss_one_coin(tmp_path):
    flags = {"steps": 6, "student_every": 1, "gan_weight": 0.0, "data_prob": 0.5}
    dfd.main(small_args(dfd, runs_dir=tmp_path / "one", **flags))
    dfd.main(small_args(dfd, runs_dir=tmp_path / "none", **{**flags, "data_prob": 0.0}))
    train_on_ranks(2, dfd, runs_dir=tmp_path / "two", batch_size=1, **flags)
    one, two, none = (student_weights(tmp_path / name, 6, dfd) for name in ("one", "two", "none"))
    assert distance(two, one) < 0.02 * distance(none, one)
