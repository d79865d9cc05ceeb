"""The mathematics of dmd.py, against answers that are known exactly."""

from types import SimpleNamespace

import pytest
import torch

import dmd
from tests.exact import COND, Gaussian, Grid, column, draws


def test_dmd_gradient_and_its_loss_by_hand():
    """Eq. 7 and 8 on numbers small enough to do on paper; the mean is over each sample alone, 0 / 0 is 0."""
    x0, x0_teacher, x0_fake = (
        torch.tensor(rows).view(3, 2, 1, 1, 1)
        for rows in ([[1.0, 3], [0, 0], [5, 5]], [[0.0, 1], [4, 4], [5, 5]], [[3.0, 1], [2, 4], [5, 5]])
    )
    grad = dmd.dmd_gradient(x0.requires_grad_(), x0_teacher, x0_fake)
    torch.testing.assert_close(grad.flatten(), torch.tensor([3 / 1.5, 0, -2 / 4, 0, 0, 0]))
    assert dmd.dmd_gradient(x0, x0_teacher, x0_fake * torch.nan).isnan().any(), "any other NaN must show"
    dmd.student_loss(x0, grad.detach()).backward()
    torch.testing.assert_close(x0.grad, grad / 6)


@pytest.mark.parametrize(("shift", "atom"), [(1.0, 0.02), (8.0, 0.1404)])
def test_score_sigmas(shift, atom):
    """The shift, and how much of it the clamp puts on .98: 1 - .98 / (s - .98 (s - 1))."""
    sigma = dmd.sample_sigma(Grid(100_000), shift)
    assert sigma.min() >= 0.02 and sigma.max() <= 0.98
    assert (sigma == 0.98).float().mean().item() == pytest.approx(atom, abs=1e-4)
    u = 0.25  # untouched by the clamp
    assert sigma[int(u * 100_000)].item() == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=1e-4)


def test_guidance():
    """uncond + g (cond - uncond), in one forward, also of conditions that both halves share; g = 1 is cond alone."""
    calls = []

    def network(x_t, sigma, cond):
        calls.append(len(x_t))
        return (column(cond["text"].mean((1, 2))) + cond["image"]).expand_as(x_t), []

    x_t, sigma, image = torch.zeros(2, 1, 1, 1, 1), torch.tensor([0.5, 1.0]), column(torch.tensor([10.0, 20.0]))
    cond, null = {"text": torch.full((2, 3, 1), 2.0), "image": image}, {"text": torch.full((1, 3, 1), 1.0)}
    for scale, velocity in ((4.0, 1 + 4 * 1), (1.0, 2)):
        x0 = dmd.guided_x0(network, x_t, sigma, cond, null, scale)
        torch.testing.assert_close(x0.flatten(), torch.tensor([-0.5 * (velocity + 10), -1.0 * (velocity + 20)]))
    assert calls == [4, 2]


def test_the_teachers_solver_maps_noise_to_the_gaussian():
    """The flow of N(m, s^2) takes z to m + s z exactly; Euler gets there at first order."""
    errors = []
    for steps in (50, 100):
        args = SimpleNamespace(guidance_scale=1.0, shift=3.0, teacher_steps=steps)
        got = dmd.sample_teacher(Gaussian(0.7, 0.3), COND, (1, 1, 1, 1), args, draws("z", 9), COND)
        errors.append((got - 0.7 - 0.3 * draws("z", 9).normal((1, 1, 1, 1))).abs().max().item())
    assert errors[1] < 0.03 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


def test_expected_gradient_is_that_of_the_reverse_kl():
    """1-D: E[(x0_fake - x0_teacher) d x0/d theta] = sigma^2 / a^2 * dKL(q_t || p_t)/d theta, at every sigma (eq. 7)."""
    n, (theta, mu), (mean, std) = 400_000, (0.6, -0.2), (0.5, 1.3)
    z, noise = torch.randn(2, n, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x0 = theta * z + mu
    for level in (0.2, 0.5, 0.9):
        a, sigma = 1 - level, torch.full((n,), level)
        x_t = dmd.add_noise(x0, noise, sigma)
        x0_fake = dmd.predict_x0(Gaussian(mu, theta), x_t, sigma, COND)
        x0_teacher = dmd.predict_x0(Gaussian(mean, std), x_t, sigma, COND)
        # undo eq. 8, which in one dimension is a weight of each sample
        grad = dmd.dmd_gradient(x0, x0_teacher, x0_fake) * (x0 - x0_teacher).abs()
        fake_var, real_var = (a * theta) ** 2 + level**2, (a * std) ** 2 + level**2
        kl_theta, kl_mu = a**2 * theta * (1 / real_var - 1 / fake_var), a**2 * (mu - mean) / real_var
        bound = 0.01 * max(1, level**2 / a)
        assert (grad * z).mean().item() == pytest.approx(level**2 / a**2 * kl_theta, abs=bound)
        assert grad.mean().item() == pytest.approx(level**2 / a**2 * kl_mu, abs=bound)
