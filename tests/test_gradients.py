"""experiments/gradients.py: its exact networks against numbers that are known, and what docs/how.md says of them."""

import re

import torch
from PIL import Image

import dmd2
from experiments import gradients
from experiments.gradients import Gaussian, Mixture, even, shares, video
from tests.conftest import ROOT


def test_the_mixtures_velocity_is_exact():
    """Against x0 given x_t by Bayes' rule over a million draws, and the density against torch.distributions."""
    torch.manual_seed(0)
    mixture = Mixture(torch.tensor([[-1.0], [0.5]]), 0.3)
    weights, sigma = torch.tensor([0.25, 0.75]), 0.4
    x0 = mixture.draw(1_000_000, weights)
    x_t = (1 - sigma) * x0 + sigma * torch.randn_like(x0)
    for at in (-0.8, 0.0, 0.7):
        near = ((x_t - at).abs() < 0.02).flatten()
        v = mixture(video(torch.tensor([[at]])), torch.tensor([sigma]), shares(weights, 1))
        predicted = dmd2.predict_x0(mixture, video(torch.tensor([[at]])), torch.tensor([sigma]), shares(weights, 1))
        assert abs(predicted.item() - x0[near].mean().item()) < 0.02
        assert abs(at - sigma * v.item() - predicted.item()) < 1e-6
    parts = torch.distributions.Normal(mixture.means[:, 0], 0.3)
    both = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
    x = torch.tensor([[-1.2], [0.1], [2.0]])
    torch.testing.assert_close(mixture.log_density(x, shares(weights, 3)), both.log_prob(x[:, 0]))


def test_the_affine_students_fake_score_is_that_of_a_mixture_of_one():
    torch.manual_seed(0)
    x_t, sigma = video(torch.randn(5, 2)), torch.rand(5)
    wanted = dmd2.predict_x0(Mixture(torch.tensor([[0.3, -0.2]]), 0.7), x_t, sigma, even(5, 1))
    torch.testing.assert_close(Gaussian([0.3, -0.2], 0.7).x0(x_t, sigma), wanted)


def test_all_pictures_and_the_numbers_of_the_page(tmp_path, capsys):
    gradients.main(gradients.Args(out=tmp_path))
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(printed) == [picture.__name__ for picture in gradients.PICTURES]
    page = (ROOT / "docs" / "how.md").read_text()
    shown = set(re.findall(r"\(how/(.*?)\)", page))
    assert shown == {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs/how").iterdir()}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture, Image.open(ROOT / "docs" / "how" / path.name) as kept:
            assert picture.size == kept.size and getattr(picture, "n_frames", 1) == getattr(kept, "n_frames", 1)
    for name, words in {
        "field": "1.18, 0.68, 0.01",
        "mode_seeking": "0.98: {'mean': [0.01, 0.0], 'spread': [1.25, 0.35], 'in the right half': 0.5}",
        "guidance": "4.0: {'mean': [0.0, 2.03], 'spread': [0.37, 0.75]}",
        "data_forcing": "'DFD, input noise': 0.07, 'DFD, input the clip, noised': 0.42",
        "anchors": "{'its target': 0.01, 'naive target': 0.05}",
    }.items():  # as the page has them; to a last digit, which another machine may round otherwise
        numbers = [[float(x) for x in re.findall(r"-?\d+\.?\d*", text)] for text in (words, printed[name])]
        assert any(
            all(abs(a - b) < 0.015 for a, b in zip(numbers[0], numbers[1][i:]))
            for i in range(len(numbers[1]) - len(numbers[0]) + 1)
        ), f"{name}: {printed[name]}, the page has {words}"
