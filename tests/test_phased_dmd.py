"""phased_dmd.py: the velocity target from an anchor, phases and their experts, LoRA."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import common
import dmd2
import phased_dmd
from tests.conftest import only_run, same, small_args, student_weights
from tests.exact import COND, Gaussian, Grid, ScaleShift, column

SHAPE = (1, 1, 1, 1)


# --------------------------------------------------------------------------------------------------- the maths


def regression(x, y):
    """Mean of y in 60 bins of x that hold equally many."""
    return y[x.argsort()].view(60, -1).mean(1)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.5, 0.6), (0.833, 0.95)])
def test_the_targets_regression_is_the_true_velocity_and_the_naive_ones_is_not(s, t):
    """On a two-sided 1-D mixture, whose velocity at x_t is known."""
    torch.manual_seed(0)
    n, means, std, var = 1_200_000, torch.tensor([-1.0, 0.5]), 0.2, (1 - t) ** 2 * 0.2**2 + t**2
    x0 = means[(torch.rand(n) < 0.4).long()] + std * torch.randn(n)
    x_s, noise, sigma = (1 - s) * x0 + s * torch.randn(n), torch.randn(n), torch.full((n,), t)
    x_t = phased_dmd.renoise(column(x_s), column(noise), sigma, s).flatten()
    off = x_t[:, None] - (1 - t) * means
    of_each = torch.softmax(torch.tensor([0.6, 0.4]).log() - off**2 / (2 * var), dim=1)
    mean = means + (1 - t) * std**2 / var * off
    true = regression(x_t, (x_t - (of_each * mean).sum(1)) / t)
    # the loss is quadratic in v: its gradients at 0 and 1 give each sample's minimiser, which is the target
    v = torch.tensor([0.0, 1.0])[:, None].repeat(1, n).requires_grad_()
    for row in v:
        phased_dmd.flow_loss(column(row), column(x_s), column(noise), sigma, s).backward()
    targets = -v.grad[0] / (v.grad[1] - v.grad[0]), noise - x_s
    error, naive = (((regression(x_t, y) - true).square().mean() / true.square().mean()).sqrt() for y in targets)
    assert error < 0.08, "of sampling alone"
    assert naive > 0.15 or s == 0, "the naive target should be far off"


def test_from_a_clean_video_it_is_dmd2s_bit_for_bit():
    v, x0, noise = torch.randn(3, 4, 2, 1, 2, 2)
    assert torch.equal(phased_dmd.flow_loss(v, x0, noise, torch.rand(4), 0.0), dmd2.flow_loss(v, x0, noise))
    assert torch.equal(phased_dmd.sample_sigma(Grid(99), 5.0, 0.0), dmd2.sample_sigma(Grid(99), 5.0))


class PerLevel(nn.Module):
    """A fake score that is affine in x_t at each of a few noise levels: enough for Gaussians."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.table = levels, nn.Parameter(torch.zeros(len(levels), 2))

    def forward(self, x_t, sigma, cond):
        scale, shift = self.table[torch.searchsorted(self.levels, sigma)].unbind(1)
        return column(scale) * x_t + column(shift), []


def test_a_phase_in_one_dimension():
    """Phase 1 of a scale-and-shift student that learns by eq. 10 ends at the samples' mean and standard deviation at
    s = .75, (1 - s) m and sqrt((1 - s)^2 std^2 + s^2).
    """
    s, mean, std, n = 0.75, 1.0, 0.4, 1024
    torch.manual_seed(0)
    levels = torch.tensor([0.8, 0.86, 0.92, 0.98])
    student, fake, rng = ScaleShift(0.5), PerLevel(levels), Grid(n)
    optimizers = torch.optim.Adam(student.parameters(), 0.03), torch.optim.Adam(fake.parameters(), 0.1)
    sigma, t = levels.repeat(n // len(levels)), column(levels.repeat(n // len(levels)))
    for step in range(2000):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9975
            optimizer.zero_grad()
        x_s, x0 = phased_dmd.rollout({s: student}, rng, COND, SHAPE, [1.0, s])
        noise = rng.normal(SHAPE)
        x_t = phased_dmd.renoise(x_s, noise, sigma, s).detach()
        if step % 5 == 0:
            with torch.no_grad():
                x0_fake, x0_teacher = (phased_dmd.predict_x0(m, x_t, sigma, COND) for m in (fake, Gaussian(mean, std)))
                grad = (1 - t) ** 2 / ((1 - s) * t) * (x0_fake - x0_teacher) / t  # eq. 10
            phased_dmd.student_loss(x_s, grad).backward()
            optimizers[0].step()
        (v, _), x_s = fake(x_t, sigma, COND), x_s.detach()
        phased_dmd.flow_loss(v, x_s, noise, sigma, s).backward()
        optimizers[1].step()
    theta = (math.sqrt((1 - s) ** 2 * std**2 + s**2) - s) / (1 - s)  # as x_s = s z + (1 - s) (theta z + mu)
    assert abs(student.theta.item() - theta) < 0.1 and abs(student.mu.item() - mean) < 0.1


# ------------------------------------------------------------------------------------------------------- runs


def experts_of(runs_dir, step):
    folder = only_run(runs_dir, phased_dmd) / "checkpoints" / f"step_{step:07d}" / "student"
    return [load_file(path) for path in sorted(folder.glob("transformer*/*.safetensors"))]


def test_a_run_with_phases_is_no_student(tmp_path, fails):
    """--init must name the expert, whose weights it then has; phases cannot move on --resume."""
    flags = {"runs_dir": tmp_path, "steps": 2, "student_every": 1, "lr": 1e-3, "ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, **flags))
    run = only_run(tmp_path, phased_dmd)
    student = run / "checkpoints" / "step_0000002" / "student"
    again = {"runs_dir": tmp_path / "again", "steps": 1, "lr": 0.0, "gan_weight": 0.0, "ema_decay": 0.0}
    for folder in (run, student):
        fails(lambda f=folder: dmd2.main(small_args(dmd2, init=str(f), **again)), "--init", "transformer_2")
    dmd2.main(small_args(dmd2, init=str(student / "transformer_2"), **again))
    assert same(student_weights(tmp_path / "again", 1, dmd2), experts_of(tmp_path, 2)[1])
    for name, value in {"steps": 8, "phase_ends": (0.0,)}.items():
        moved = small_args(phased_dmd, **{**flags, name: value, "resume": "latest"})
        fails(lambda args=moved: phased_dmd.main(args), f"--{name.replace('_', '-')}")


def test_a_lora_starts_as_wide_as_a_linear_layer():
    """nn.Linear draws its weights evenly from +-1 / sqrt(inputs), and so does the LoRA's first half."""
    model, device = common.Model("tiny", 9, 32, 32), torch.device("cpu")
    base = model.load_network("teacher", device, adapters={"student": (16, 8.0)})
    weights = dict(model.load_network("student", device, base=base).named_parameters())
    down = [v.detach() * v.shape[1] ** 0.5 for k, v in weights.items() if "lora_A" in k]
    assert down and all(0.98 < v.abs().max() <= 1 and v.std() == pytest.approx(3**-0.5, rel=0.05) for v in down)


@pytest.mark.parametrize(
    "flags",
    [
        {"phase_ends": (0.7, 0.0)}, {"phase_ends": (0.75,)}, {"phase_ends": (0.5, 0.75, 0.0)},
        {"score_ends": (0.8,)}, {"score_ends": (0.7, 0.0)},
    ],
)  # fmt: skip
def test_bad_flags(tmp_path, fails, flags):
    (name,) = flags
    fails(lambda: phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, **flags)), f"--{name.replace('_', '-')}")
    assert not list(tmp_path.glob("phased_dmd__*"))
