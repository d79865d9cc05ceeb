"""dmd2.py: the discriminator, where its clips come from, and ranks. All else of it: test_mains.py."""

import torch
from safetensors.torch import load_file

import common
import dmd2
from tests.conftest import small_args
from training.run import Run


def test_gan_losses():
    logits = torch.tensor([[0.0, 2.0]], requires_grad=True)
    dmd2.gan_student_loss(logits).backward()
    torch.testing.assert_close(logits.grad, -torch.sigmoid(-logits.detach()) / 2)
    # the best discriminator of two Gaussians with equal spread has the logit of their likelihood ratio
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    losses = {k: dmd2.discriminator_loss(k * (x - 0.5), k * (x + 0.5)).item() for k in (0.7, 1.0, 1.3)}
    assert losses[1.0] < min(losses[0.7], losses[1.3])


def test_the_gan_reaches_the_student_through_x_t_alone(tmp_path, monkeypatch):
    """The fake score is called once, for prediction and features, and what reaches x0 is, bit for bit, what a second
    forward of the noised x0 and a backward through all of it would give. That it keeps no gradient: test_mains.py.
    """
    fake_score, calls, noised, got, wanted = [], [], [], [], []
    load, add_noise, student_loss = Run.load, dmd2.add_noise, dmd2.student_loss

    def watched_load(run, networks, optimizers):
        load(run, networks, optimizers)
        fake_score.append(networks["fake_score"])
        fake_score.append(fake_score[0].forward)
        fake_score[0].forward = lambda *args: calls.append(args) or fake_score[1](*args)

    def watched_loss(x0, grad):
        ((_, sigma, cond, blocks),) = calls
        calls.clear()
        own = x0.detach().requires_grad_()
        _, features = fake_score[1](add_noise(own, noised[-1][1], sigma), sigma, cond, blocks)
        loss = student_loss(own, grad) + 0.3 * dmd2.gan_student_loss(fake_score[0].heads(features))
        wanted.append(torch.autograd.grad(loss / 2, own)[0])
        x0.register_hook(got.append)
        return student_loss(x0, grad)

    monkeypatch.setattr(Run, "load", watched_load)
    monkeypatch.setattr(dmd2, "add_noise", lambda *args: noised.append(args) or add_noise(*args))
    monkeypatch.setattr(dmd2, "student_loss", watched_loss)
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, grad_accum=2, gan_weight=0.3))
    assert len(got) == 2 and all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_prompts_alone_are_enough(tmp_path):
    """No discriminator unless it is asked for; it and --student-input data need clips, which the teacher makes once."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    flags = {"runs_dir": tmp_path / "runs", "prompts": str(tmp_path / "prompts.txt"), "steps": 1, "num_samples": 3}
    flags["seed"] = 5
    dmd2.main(small_args(dmd2, **flags))
    cache = tmp_path / "runs" / "cache"
    assert not list(cache.glob("pairs_*")), "no clips are needed"
    dmd2.main(small_args(dmd2, gan_weight=0.0, student_input="data", **flags))
    (folder,) = cache.glob("pairs_*")
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(made) == ["00000000.safetensors", "00000002.safetensors"]
    noise = load_file(folder / "00000002.safetensors")["0.noise"]
    assert torch.equal(noise, common.SampleRNG(5, "pairs", [2], noise.device).normal(noise.shape)[0])
    dmd2.main(small_args(dmd2, gan_weight=0.1, **flags))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
