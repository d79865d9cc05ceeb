"""experiments/gradients.py: its exact networks against numbers that are known, and what docs/how.md says of them."""

import re

import pytest
import torch
from PIL import Image

import dmd2
from experiments import gradients
from experiments.gradients import LEFT, TWO, Mixture, video
from tests.exact import column


def test_the_mixtures_velocity_is_exact():
    """Against x0 given x_t by Bayes' rule over a million draws, and the density against torch.distributions."""
    torch.manual_seed(0)
    mixture, weights, sigma = Mixture([[-1.0], [0.5]], 0.3), torch.tensor([0.25, 0.75]), torch.tensor([0.4])
    x0 = mixture.means[torch.multinomial(weights, 1_000_000, replacement=True)] + 0.3 * torch.randn(1_000_000, 1)
    x_t = 0.6 * x0 + 0.4 * torch.randn_like(x0)
    for at in (-0.8, 0.0, 0.7):
        near = ((x_t - at).abs() < 0.02).flatten()
        predicted = dmd2.predict_x0(mixture, video(torch.tensor([[at]])), sigma, {"weights": weights[None]})
        assert abs(predicted.item() - x0[near].mean().item()) < 0.02
    parts = torch.distributions.Normal(mixture.means[:, 0], 0.3)
    both = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
    x = torch.tensor([[-1.2], [0.1], [2.0]])
    got, _ = mixture.posterior(video(x), torch.zeros(3), {"weights": weights.expand(3, 2)})
    torch.testing.assert_close(got, both.log_prob(x[:, 0]))


def test_the_best_discriminators_gradient_is_the_score_difference():
    """softplus(-D) with D = log p_real - log p_fake has the gradient sigmoid(-D) (score_fake - score_real); that score
    difference is (1 - sigma) / sigma^2 times the difference of the predictions of x0 (docs/derivations.md).
    """
    x_t = video(1.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    sigma = torch.linspace(0.2, 0.9, 64)
    real, fake = (network.posterior(x_t, sigma, {})[0] for network in (TWO, LEFT))
    (grad,) = torch.autograd.grad(dmd2.gan_student_loss(real - fake) * 64, x_t, retain_graph=True)
    (scores,) = torch.autograd.grad((fake - real).sum(), x_t)
    x0_teacher, x0_fake = (dmd2.predict_x0(network, x_t, sigma, {}) for network in (TWO, LEFT))
    torch.testing.assert_close(column((1 - sigma) / sigma**2) * (x0_fake - x0_teacher), scores, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(column(torch.sigmoid(fake - real)) * scores, grad)


@pytest.mark.slow
def test_all_pictures_and_the_numbers_of_the_page(tmp_path, capsys):
    gradients.main(tmp_path)
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    page = (gradients.OUT.parent / "how.md").read_text()
    kept = {path.name for path in gradients.OUT.iterdir()}
    assert set(re.findall(r"\(how/(.*?)\)", page)) == {path.name for path in tmp_path.iterdir()} == kept
    for path in tmp_path.iterdir():
        with Image.open(path) as picture, Image.open(gradients.OUT / path.name) as old:
            assert (picture.size, picture.n_frames) == (old.size, old.n_frames)
    for name, words in {
        "field": "1.18 0.68 0.01",
        "mode_seeking": "0.98 0.01 0.0 1.24 0.35 0.5 0.4 -1.12 0.0 0.46 0.35 0.01",
        "guidance": "1.0 0.0 1.09 0.4 0.4 2.0 0.0 1.68 0.38 0.62 4.0 0.0 2.03 0.37 0.75",
        "data_forcing": "1.0 0.07 0.42",
        "anchors": "0.0 0.01 0.05",
    }.items():  # as the page has them; to a last digit, which another machine may round otherwise
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", printed[name])]
        assert numbers == pytest.approx([float(x) for x in words.split()], abs=0.015), name
