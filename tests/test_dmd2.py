"""dmd2.py: few steps with backward simulation, the discriminator, two time-scales, --init."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import common
import dmd
import dmd2
from tests.conftest import distance, only_run, same, small_args, state_of, stopped, student_weights, train_on_ranks
from tests.exact import COND, Gaussian, Whole, draws

SHAPE, SIGMAS = (2, 1, 3, 3), (1.0, 0.9, 0.5)


class Recorder(Whole):
    """Predicts x0 = theta everywhere and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.theta, self.calls = nn.Parameter(torch.tensor(0.7)), []

    def forward(self, x_t, sigma, cond, blocks=()):
        self.calls.append((x_t, sigma, torch.is_grad_enabled()))
        return (x_t - self.theta) / sigma.view(-1, 1, 1, 1, 1), []


def test_rollout_renoises_afresh_and_only_its_last_step_has_a_gradient():
    student, rng = Recorder(), draws("rollout", 4)
    x0 = dmd2.rollout(student, rng, COND, SHAPE, SIGMAS)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.7))
    assert [call[1].tolist() for call in student.calls] == [[pytest.approx(sigma)] * 4 for sigma in SIGMAS]
    assert [call[2] for call in student.calls] == [False, False, True]
    again = draws("rollout", 4)
    for (x_t, _, _), level in zip(student.calls, SIGMAS, strict=True):
        torch.testing.assert_close(x_t, (1 - level) * 0.7 + level * again.normal(SHAPE))
    x0.mean().backward()
    assert student.theta.grad.item() == pytest.approx(1)


def test_rollout_from_data_takes_one_step_from_the_noised_clips():
    student, clips = Recorder(), torch.randn(4, *SHAPE)
    dmd2.rollout(student, draws("rollout", 4), COND, SHAPE, SIGMAS, clips)
    ((x_t, sigma, grad),) = student.calls
    assert grad and sigma.tolist() == [0.5] * 4
    torch.testing.assert_close(x_t, 0.5 * clips + 0.5 * draws("rollout", 4).normal(SHAPE))


def test_backward_simulation_ends_where_sampling_does():
    """The exact denoiser of N(m, s^2), rolled out: mean m, variance by the recursion of its linear steps."""
    mean, std = 0.5, 1.3
    x0 = dmd2.rollout(Gaussian(mean, std), draws("gaussian", 20_000), COND, (4, 1, 1, 1), SIGMAS)
    var = 0.0
    for sigma in SIGMAS:  # x0 = m + k (x_t - a m) with x_t = a x0 + sigma z
        a = 1 - sigma
        k = a * std**2 / (a**2 * std**2 + sigma**2)
        var = k**2 * (a**2 * var + sigma**2)
    assert x0.mean().item() == pytest.approx(mean, abs=0.01)
    assert x0.var().item() == pytest.approx(var, rel=0.03)


def test_gan_losses():
    logits = torch.tensor([[0.0, 2.0]], requires_grad=True)
    assert dmd2.gan_student_loss(logits).item() == pytest.approx(F.softplus(-logits).mean().item())
    dmd2.gan_student_loss(logits).backward()
    torch.testing.assert_close(logits.grad, -torch.sigmoid(-logits.detach()) / 2)
    zero = torch.zeros(3, 5)
    assert dmd2.discriminator_loss(zero, zero).item() == pytest.approx(2 * torch.tensor(2.0).log().item())
    # the best discriminator of two Gaussians with equal spread has the logit of their likelihood ratio
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    fake, real = x - 0.5, x + 0.5
    losses = {k: dmd2.discriminator_loss(k * fake, k * real).item() for k in (0.7, 1.0, 1.3)}
    assert losses[1.0] < min(losses[0.7], losses[1.3])


def test_the_discriminator_reads_what_a_forward_returns_and_can_learn():
    device, model, read = common.init_distributed(), common.Model("tiny", 9, 32, 32), (3, 1)
    network = model.load_network("student", device)
    torch.manual_seed(0)
    network.heads = dmd2.Heads(network.width, read)
    sigma, cond = torch.tensor([0.3, 0.9]), {"text": torch.zeros(2, model.text_length, model.text_dim)}
    x_t = torch.randn(2, *model.latent_shape, requires_grad=True)
    v, features = network(x_t, sigma, cond, read)
    assert torch.equal(v, network(x_t, sigma, cond)[0]) and network(x_t, sigma, cond)[1] == []
    # the features are those blocks' outputs, in the order that was asked for
    kept, tokens = {}, 80
    for i in read:
        network.blocks[i].register_forward_hook(lambda block, args, out, i=i: kept.update({i: out}))
    network(x_t, sigma, cond)
    for i, x in zip(read, features, strict=True):
        assert torch.equal(x, kept[i]) and x.shape == (2, tokens, network.width)
    logits = network.heads(features)
    assert logits.shape == (2, tokens, 2)
    dmd2.gan_student_loss(logits).backward()
    assert x_t.grad.abs().sum() > 0 and network.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    assert network.blocks[3].attn1.to_q.weight.grad.abs().sum() > 0

    optimizer = torch.optim.Adam(network.heads.parameters(), lr=1e-2)
    real, fake = torch.randn(2, *model.latent_shape), torch.randn(2, *model.latent_shape) + 0.5
    losses = []
    for _ in range(30):
        logits_fake, logits_real = (network.heads(network(x, sigma, cond, read)[1]) for x in (fake, real))
        losses.append(dmd2.discriminator_loss(logits_fake, logits_real))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 < 1.2 < losses[0]


@pytest.mark.parametrize("gradient_checkpointing", [1, 2])
def test_features_carry_the_same_gradient_when_activations_are_recomputed(gradient_checkpointing):
    device, gradients = common.init_distributed(), []
    for every in (0, gradient_checkpointing):
        model = common.Model("tiny", 9, 32, 32, {"gradient_checkpointing": every})
        network = model.load_network("student", device).train()
        x_t = torch.ones(1, *model.latent_shape)
        cond = {"text": torch.ones(1, model.text_length, model.text_dim)}
        _, features = network(x_t, torch.tensor([0.5]), cond, blocks=(1, 3))
        assert not any(block._forward_hooks for block in network.blocks), "what is read once is not read for ever"
        sum(x.square().sum() for x in features).backward()
        gradients.append(network.blocks[0].attn1.to_q.weight.grad)
    assert torch.equal(*gradients)


def test_prompts_alone_are_enough(tmp_path):
    """The discriminator and --student-input data need clips: the teacher makes them, once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    flags = {"runs_dir": tmp_path / "runs", "prompts": str(prompts), "steps": 1, "num_samples": 3}
    dmd2.main(small_args(dmd2, gan_weight=0.0, **flags))
    cache = tmp_path / "runs" / "cache"
    assert not list(cache.glob("pairs_*")), "no clips are needed"
    state = only_run(tmp_path / "runs", dmd2) / "checkpoints" / "step_0000001" / "state"
    assert not any("heads" in key for path in state.glob("*.safetensors") for key in load_file(path))
    dmd2.main(small_args(dmd2, gan_weight=0.0, student_input="data", **flags))
    (folder,) = cache.glob("pairs_*")
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(made) == ["00000000.safetensors", "00000002.safetensors"]
    dmd2.main(small_args(dmd2, gan_weight=0.1, **flags))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made


def test_clips_that_take_too_long_are_refused(tmp_path, fails):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    flags = {"runs_dir": tmp_path, "prompts": str(prompts), "num_samples": 1000, "max_hours": 1e-6}
    fails(lambda: dmd2.main(small_args(dmd2, **flags)), "1000 samples", "hours", "--max-hours", "--data")
    assert not list(tmp_path.glob("dmd2__*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"betas": (0.5, 1.0)}, ["--betas", "at least 0 and below 1"]),
        ({"student_sigmas": (0.9, 0.5)}, ["--student-sigmas", "start at .99 to 1"]),
        ({"student_sigmas": (1.0, 0.5, 0.5)}, ["--student-sigmas", "fall"]),
        ({"student_sigmas": ()}, ["--student-sigmas"]),
        ({"gan_weight": -1.0}, ["--gan-weight", "at least 0"]),
        ({"discriminator_blocks": (1, 6)}, ["--discriminator-blocks", "0 to 5"]),
        ({"discriminator_blocks": (-1, 3)}, ["--discriminator-blocks", "from 0"]),
        ({"discriminator_blocks": ()}, ["--discriminator-blocks", "different numbers"]),
        ({"discriminator_blocks": (1, 1)}, ["--discriminator-blocks", "different numbers"]),
        ({"betas": (2.0, 3.0)}, ["--betas"]),
        ({"init": "nowhere"}, ["--init", "nowhere"]),
    ],
)
def test_bad_flags(tmp_path, fails, flags, words):
    fails(lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags)), *words)
    assert not any(tmp_path.iterdir())


def test_resume_is_exact(tmp_path, monkeypatch):
    flags = {"steps": 7, "student_every": 2, "anneal_lr": True}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "unbroken", **flags))
    broken = small_args(dmd2, runs_dir=tmp_path / "broken", **flags)
    stopped(monkeypatch, 4, lambda: dmd2.main(broken))
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "broken", resume="latest", **flags))
    weights = [student_weights(tmp_path / name, 7, dmd2) for name in ("unbroken", "broken")]
    assert same(*weights)


def test_two_ranks_match_one(tmp_path):
    """With the discriminator: its head is sharded apart, inside the fake score."""
    flags = {"steps": 4, "student_every": 2, "gan_weight": 0.1, "discriminator_weight": 1.0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "one", **flags))
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "none", steps=4, student_every=2, gan_weight=0.0))
    train_on_ranks(2, dmd2, runs_dir=tmp_path / "two", batch_size=1, **flags)
    one, two, none = (student_weights(tmp_path / name, 4, dmd2) for name in ("one", "two", "none"))
    # the GAN's part of the update is what must be right, so it is the yardstick
    assert distance(two, one) < 0.02 * distance(none, one)


# -------------------------------------------------------------------------------------------------------------- init


def part(state, name):
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("script", [dmd, dmd2])
def test_init_takes_student_fake_score_and_average_of_an_earlier_run(tmp_path, capsys, script):
    script.main(small_args(script, runs_dir=tmp_path / "first", steps=2))
    before = state_of(tmp_path / "first", 2, script)
    still = {"steps": 1, "lr": 0.0, "fake_score_lr": 0.0, "weight_decay": 0.0, "gan_weight": 0.0}
    run = str(only_run(tmp_path / "first", script))
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "second", init=run, **still))
    after = state_of(tmp_path / "second", 1, dmd2)
    for name in ("student", "fake_score"):
        wanted = {k: v for k, v in part(before, name).items() if "heads" not in k}
        assert same(part(after, name), wanted)
    out = capsys.readouterr().out
    assert "starting from ema, fake_score, student" in out and "noise levels" not in out


def test_init_from_a_student_alone(tmp_path, capsys):
    dmd.main(small_args(runs_dir=tmp_path / "first", steps=2))
    student = only_run(tmp_path / "first") / "checkpoints" / "step_0000002" / "student"
    still = {"steps": 1, "lr": 0.0, "fake_score_lr": 0.0, "weight_decay": 0.0, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "second", init=str(student), **still))
    assert same(student_weights(tmp_path / "second", 1, dmd2), student_weights(tmp_path / "first", 2))
    assert "no fake score" in capsys.readouterr().out


def test_init_from_a_folder_without_a_student(tmp_path, fails):
    (tmp_path / "empty").mkdir()
    fails(lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, init=str(tmp_path / "empty"))), "--init", "no student")
