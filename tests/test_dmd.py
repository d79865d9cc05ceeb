"""The mathematics of dmd.py, against answers that are known exactly."""

import math

import pytest
import torch

import dmd
from models.presets import PRESETS
from tests.exact import COND, Gaussian, Grid, ScaleShift, draws
from training.flags import recipe_args


def test_student_loss_has_the_gradient_it_is_given():
    x0 = torch.randn(3, 2, 2, 4, 4, requires_grad=True)
    grad = torch.randn_like(x0)
    dmd.student_loss(x0, grad).backward()
    torch.testing.assert_close(x0.grad, grad / x0.numel())


def test_dmd_gradient_by_hand():
    """Eq. 7 and 8 on numbers small enough to do on paper; the mean is over each sample alone."""
    x0 = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 2, 1, 1, 1)
    x0_teacher = torch.tensor([[0.0, 1.0], [4.0, 4.0]]).view(2, 2, 1, 1, 1)
    x0_fake = torch.tensor([[3.0, 1.0], [2.0, 4.0]]).view(2, 2, 1, 1, 1)
    expected = torch.tensor([[3 / 1.5, 0.0], [-2 / 4, 0.0]]).view(2, 2, 1, 1, 1)
    torch.testing.assert_close(dmd.dmd_gradient(x0, x0_teacher, x0_fake), expected)


def test_dmd_gradient_survives_a_perfect_sample():
    x0 = torch.ones(1, 1, 1, 1, 1)
    assert dmd.dmd_gradient(x0, x0, x0).item() == 0


def test_velocity_and_x0_are_one_prediction():
    x0, noise, sigma = torch.randn(4, 2, 1, 3, 3), torch.randn(4, 2, 1, 3, 3), torch.tensor([0.02, 0.3, 0.7, 1.0])
    x_t = dmd.add_noise(x0, noise, sigma)
    torch.testing.assert_close(x_t[3], noise[3])
    torch.testing.assert_close(dmd.predict_x0(lambda *_: (noise - x0, []), x_t, sigma, COND), x0)
    assert dmd.flow_loss(noise - x0, x0, noise).item() == 0


@pytest.mark.parametrize(("shift", "atom"), [(1.0, 0.02), (5.0, 0.0926), (8.0, 0.1404)])
def test_score_times(shift, atom):
    """The shift, and how much of it the clamp puts on .98: 1 - .98 / (s - .98 (s - 1))."""
    sigma = dmd.sample_sigma(Grid(100_000), shift)
    assert sigma.min() >= 0.02 and sigma.max() <= 0.98
    assert (sigma == 0.98).float().mean().item() == pytest.approx(atom, abs=1e-4)
    u = 0.25  # untouched by the clamp
    assert sigma[int(u * 100_000)].item() == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=1e-4)


def test_guidance():
    """uncond + g (cond - uncond), both halves in one forward, and g = 1 is the conditional prediction alone."""
    calls = []

    def model(x_t, sigma, cond):
        calls.append(len(x_t))
        return cond["text"].mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(x_t), []

    x_t, sigma = torch.zeros(2, 1, 1, 1, 1), torch.tensor([0.5, 1.0])
    cond, null = {"text": torch.full((2, 3, 1), 2.0)}, {"text": torch.full((1, 3, 1), 1.0)}
    x0 = dmd.guided_x0(model, x_t, sigma, cond, null, 4.0)
    assert calls == [4]
    torch.testing.assert_close(x0.flatten(), torch.tensor([-0.5 * (1 + 4 * 1), -1.0 * (1 + 4 * 1)]))
    alone = dmd.guided_x0(model, x_t, sigma, cond, null, 1.0)
    torch.testing.assert_close(alone, dmd.predict_x0(model, x_t, sigma, cond))

    # what is no prompt (the first frame of image-to-video) conditions both halves
    def sees_image(x_t, sigma, cond):
        return model(x_t, sigma, cond)[0] + cond["image"], []

    image = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1, 1)
    with_image = dmd.guided_x0(sees_image, x_t, sigma, cond | {"image": image}, null, 4.0)
    torch.testing.assert_close(with_image, x0 - sigma.view(2, 1, 1, 1, 1) * image)


def test_solver_maps_noise_to_the_gaussian():
    """The flow of N(m, s^2) takes z to m + s z exactly; Euler gets there at first order."""
    z = torch.linspace(-2, 2, 5).view(5, 1, 1, 1, 1)
    cond, exact = {"text": torch.zeros(5, 1, 1)}, 0.7 + 0.3 * z
    errors = [
        (dmd.solve_ode(Gaussian(0.7, 0.3), z, cond, COND, 1.0, 3.0, steps) - exact).abs().max().item()
        for steps in (50, 100)
    ]
    assert errors[1] < 0.03 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


def test_expected_gradient_is_that_of_the_reverse_kl():
    """1-D: E[(x0_fake - x0_teacher) d x0/d theta] = sigma^2 / a^2 * dKL(q_t || p_t)/d theta, at every sigma (eq. 7)."""
    n, (theta, mu), (mean, std) = 400_000, (0.6, -0.2), (0.5, 1.3)
    z = torch.randn(n, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    x0 = theta * z + mu
    for level in (0.2, 0.5, 0.9):
        a, sigma = 1 - level, torch.full((n,), level)
        x_t = dmd.add_noise(x0, noise, sigma)
        x0_fake = dmd.predict_x0(Gaussian(mu, theta), x_t, sigma, COND)
        x0_teacher = dmd.predict_x0(Gaussian(mean, std), x_t, sigma, COND)
        # undo eq. 8, which in one dimension is a weight of each sample
        grad = dmd.dmd_gradient(x0, x0_teacher, x0_fake) * (x0 - x0_teacher).abs()
        for_theta, for_mu = (grad * z).mean().item(), grad.mean().item()
        fake_var, real_var = (a * theta) ** 2 + level**2, (a * std) ** 2 + level**2
        kl_theta = a**2 * theta * (1 / real_var - 1 / fake_var)
        kl_mu = a**2 * (mu - mean) / real_var
        assert for_theta == pytest.approx(level**2 / a**2 * kl_theta, abs=0.01 * max(1, level**2 / a))
        assert for_mu == pytest.approx(level**2 / a**2 * kl_mu, abs=0.01 * max(1, level**2 / a))


def test_student_converges_to_the_teacher():
    """A scale-and-shift student with an exact fake score ends at the teacher's mean and standard deviation."""
    shape, (mean, std) = (16, 1, 2, 2), (0.5, 1.3)
    student = ScaleShift(0.4, -0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for step in range(500):
        rng = draws(f"student {step}", 32)
        x0 = dmd.rollout(student, rng, COND, shape)
        with torch.no_grad():
            sigma, noise = dmd.sample_sigma(rng, 3.0), rng.normal(shape)
            x_t = dmd.add_noise(x0, noise, sigma)
            x0_fake = dmd.predict_x0(Gaussian(student.mu, student.theta), x_t, sigma, COND)
            x0_teacher = dmd.predict_x0(Gaussian(mean, std), x_t, sigma, COND)
            grad = dmd.dmd_gradient(x0, x0_teacher, x0_fake)
        optimizer.zero_grad()
        dmd.student_loss(x0, grad).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 500)
    assert student.theta.item() == pytest.approx(std, abs=0.03)
    assert student.mu.item() == pytest.approx(mean, abs=0.03)


def test_fake_score_loss_is_least_at_the_exact_velocity():
    """The flow loss of the exact velocity equals its known minimum, and any other Gaussian's velocity does worse."""
    n, std = 200_000, 0.5
    x0 = std * torch.randn(n, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    sigma = torch.full((n,), 0.6)
    x_t = dmd.add_noise(x0, noise, sigma)
    loss = {s: dmd.flow_loss(Gaussian(0.0, s)(x_t, sigma, COND)[0], x0, noise).item() for s in (0.4, 0.5, 0.6)}
    # Var(noise - x0 | x_t) = std^2 / ((1 - sigma)^2 std^2 + sigma^2)
    assert loss[0.5] == pytest.approx(std**2 / (0.4**2 * std**2 + 0.6**2), rel=0.01)
    assert loss[0.5] < min(loss[0.4], loss[0.6])


def test_recipes_name_real_arguments():
    for teacher in PRESETS:
        args = recipe_args(dmd.Args, teacher=teacher, seed=7)
        assert args.teacher == teacher and args.seed == 7
    assert recipe_args(dmd.Args, teacher="tiny").frames == 9
    assert recipe_args(dmd.Args, teacher="tiny", frames=5).frames == 5
    assert math.isclose(recipe_args(dmd.Args, teacher="wan2.1-1.3b").lr, 2e-6)
