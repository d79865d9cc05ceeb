"""experiments/gradients.py: its exact networks against numbers that are known, and what docs/how.md says of them."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import codmd
import dmd2
from experiments import gradients, toy2d
from experiments.gradients import ANY, LEFT, PLACES, THREE, TWO, UPPER, Mixture, video
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
    }.items():  # as the page has them; to a last digit, which another machine may round otherwise
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", printed[name])]
        assert numbers == pytest.approx([float(x) for x in words.split()], abs=0.015), name


PAGE = """
const p = require("./docs/site/play.js"), [two, three, six] = Object.values(p.SCENES), { PLACES, begin } = p;
const near = PLACES.map((x) => Math.hypot(x[0] + 1.2, x[1]) < 0.5);
const pull = (t) => p.field(two, begin(two.start), PLACES, t).filter((_, i) => near[i]).map((x) => Math.hypot(...x));
const train = (scene, start, guidance, steps) => {
  const student = begin(start), random = p.generator(0);
  for (let i = 0; i < steps; i++) p.dmdStep(scene, student, random, [0.02, 0.98], guidance, 0);
  return [...student.means[0], ...student.spread];
};
const relations = [six.six, ...p.predictions(six, begin(six.start), six.six, 0.5)];
console.log(JSON.stringify({
  guided: PLACES.map((x) => p.guided(three, x, 0.6, 3)),
  forced: p.field(three, begin(two.start), PLACES, 0.6, 1, 1),
  pulls: [0.9, 0.6, 0.3].map((t) => pull(t).reduce((a, b) => a + b) / pull(t).length),
  relations, push: p.relations(...relations, 0.5).push,
  trained: [train(two, [-0.6, 1, 0.4, 0.4], 1, 241), train(three, three.start, 2, 400)],
}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_page_to_play_with_has_the_same_numbers():
    root, count = gradients.OUT.parents[1], len(PLACES)
    run = subprocess.run(["node", "-e", PAGE], cwd=root, capture_output=True, text=True, check=True)
    page = {name: torch.tensor(value) for name, value in json.loads(run.stdout).items()}
    x_t, sigma, cond = video(PLACES), torch.full((count,), 0.6), {"weights": UPPER["weights"].expand(count, 3)}
    x0, x0_teacher, x0_fake = map(video, page["relations"])
    loss = codmd.relation_loss(x0.requires_grad_(), x0_teacher, x0_fake, 1.0, 0.0, 0.5)
    for name, value, error in (
        ("guided", dmd2.guided_x0(THREE, x_t, sigma, cond, ANY, 3).flatten(1), 1e-5),
        # DFD's line alone: from the fake score's prediction, linear in the noise, to the data's mean
        ("forced", THREE.means[2] - dmd2.predict_x0(LEFT, 0.4 * x_t, sigma, {}).flatten(1), 2e-3),
        ("push", -torch.autograd.grad(loss, x0)[0].flatten(1), 1e-5),
        ("pulls", torch.tensor([1.18, 0.68, 0.01]), 0.015),  # from here on of docs/how.md
        ("trained", torch.tensor([[0.01, 0.0, 1.24, 0.35], [0.0, 1.68, 0.38, 0.62]]), 0.05),
    ):
        torch.testing.assert_close(page[name], value, atol=error, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", toy2d.SCRIPTS)
def test_a_student_in_two_dimensions_moves_to_the_data(method, tmp_path, monkeypatch):
    for name, value in {"OUT": tmp_path, "STEPS": 400, "TEACHER_STEPS": 800}.items():
        monkeypatch.setattr(toy2d, name, value)
    first, *later = (spread for _, spread in toy2d.main(method))
    assert min(later) < 0.85 * first and (tmp_path / f"{method}.webp").exists()  # a lagging fake score overshoots
