"""phased_dmd.py: the velocity target from an anchor, phases and their experts, LoRA, the export that diffusers runs."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, WanPipeline, WanTransformer3DModel
from experiments.phased_ablations import velocity_gradient
from safetensors.torch import load_file
from torch import nn

import common
import dmd2
import phased_dmd
from models.presets import PRESETS
from models.wan import Wan
from tests.conftest import distance, only_run, same, small_args, stopped, student_weights, train_on_ranks
from tests.exact import COND, Gaussian, Grid, ScaleShift, draws
from training.finished import load_run, students_of

SHAPE, TINY = (1, 1, 1, 1), PRESETS["tiny"].source


def column(x):
    return x.view(-1, 1, 1, 1, 1)


# --------------------------------------------------------------------------------------------------- the maths


def anchored(s, t, n=400_000):
    """x_s of a two-sided 1-D mixture with noise, x_t renoised from it, the noise and the true velocity at x_t."""
    means, std = torch.tensor([-1.0, 0.5]), 0.2
    x0 = means[(torch.rand(n) < 0.4).long()] + std * torch.randn(n)
    x_s, noise, sigma = (1 - s) * x0 + s * torch.randn(n), torch.randn(n), torch.full((n,), t)
    x_t = phased_dmd.renoise(column(x_s), column(noise), sigma, s).flatten()
    var = (1 - t) ** 2 * std**2 + t**2
    responsibility = torch.softmax(
        torch.tensor([0.6, 0.4]).log() - (x_t[:, None] - (1 - t) * means) ** 2 / (2 * var), dim=1
    )
    mean = means + (1 - t) * std**2 / var * (x_t[:, None] - (1 - t) * means)
    return x_s, noise, x_t, (x_t - (responsibility * mean).sum(1)) / t


def regression(x, y):
    """Mean of y in 60 bins of x that hold equally many."""
    order = x.argsort()
    return y[order].view(60, -1).mean(1)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.5, 0.6), (0.5, 0.9), (0.75, 0.8), (0.833, 0.95)])
def test_the_targets_regression_is_the_true_velocity_and_the_naive_ones_is_not(s, t):
    torch.manual_seed(0)
    x_s, noise, x_t, velocity = anchored(s, t, 1_200_000)
    # the loss is quadratic in v: its gradients at 0 and 1 give each sample's minimiser, which is the target
    v = torch.tensor([0.0, 1.0])[:, None].repeat(1, len(x_s)).requires_grad_()
    for row in v:
        phased_dmd.flow_loss(column(row), column(x_s), column(noise), torch.full_like(x_s, t), s).backward()
    target = -v.grad[0] / (v.grad[1] - v.grad[0])
    true = regression(x_t, velocity)
    error, naive = (
        ((regression(x_t, y) - true).square().mean() / true.square().mean()).sqrt() for y in (target, noise - x_s)
    )
    assert error < 0.08, "of sampling alone"
    assert naive > 0.15 or s == 0, "the naive target should be far off"


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.5, 0.6), (0.75, 0.95)])
def test_renoising_keeps_the_path(s, t):
    """Noise to s and on to t is noise to t: the same mean and variance given x0."""
    a, b = (float(x) for x in phased_dmd.bridge(torch.tensor([t], dtype=torch.float64), s))
    assert a * (1 - s) == pytest.approx(1 - t)
    assert a**2 * s**2 + b**2 == pytest.approx(t**2)


def test_the_loss_is_the_weighted_one():
    """min(1, 10 b^2) |v - target|^2, computed without dividing by b; finite where sigma is s itself."""
    s, sigma = 0.5, torch.tensor([0.51, 0.6, 0.9])
    v, x_s, noise = torch.randn(3, 3, 2, 1, 2, 2, dtype=torch.float64)
    t = column(sigma.double())
    _, b = phased_dmd.bridge(sigma.double(), s)
    target = (t - 2 * t * s + s**2) / ((1 - s) ** 2 * b) * noise - x_s / (1 - s)
    wanted = ((10 * b**2).clamp(max=1) * (v - target) ** 2).mean()
    torch.testing.assert_close(phased_dmd.flow_loss(v, x_s, noise, sigma.double(), s), wanted)
    assert phased_dmd.flow_loss(v, x_s, noise, torch.full((3,), s), s).isfinite()


def test_from_a_clean_video_it_is_dmd2s_loss_bit_for_bit():
    v, x0, noise = torch.randn(3, 4, 2, 1, 2, 2)
    assert torch.equal(phased_dmd.flow_loss(v, x0, noise, torch.rand(4), 0.0), dmd2.flow_loss(v, x0, noise))
    assert torch.equal(phased_dmd.sample_sigma(Grid(99), 5.0, 0.0), dmd2.sample_sigma(Grid(99), 5.0))


def test_score_times_are_nested():
    """From the phase's end up to the clamp, with the density that the whole range has there."""
    for s in (0.938, 0.833, 0.5):
        sigma = phased_dmd.sample_sigma(Grid(100_000), 5.0, s)
        assert sigma.min() >= torch.tensor(s) and sigma.max().item() == pytest.approx(0.98)
        whole = dmd2.sample_sigma(Grid(100_000), 5.0)
        torch.testing.assert_close(sigma.median(), whole[whole > s].median(), atol=2e-3, rtol=0)


class PerLevel(nn.Module):
    """A fake score that is affine in x_t at each of a few noise levels: enough for Gaussians."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.table = levels, nn.Parameter(torch.zeros(len(levels), 2))

    def forward(self, x_t, sigma, cond, blocks=()):
        scale, shift = self.table[torch.searchsorted(self.levels, sigma)].unbind(1)
        return column(scale) * x_t + column(shift), []


class Noise:
    """Stands in for common.SampleRNG where speed matters and reproducibility comes from the global seed."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def normal(self, shape):
        return torch.randn(self.n, *shape)


def trained_phase(naive):
    """W1 between the samples at s = .75 and those of the data there, after phase 1 of a scale-and-shift student."""
    s, mean, std = 0.75, 1.0, 0.4
    torch.manual_seed(0)
    levels = torch.tensor([0.8, 0.86, 0.92, 0.98])
    student, fake, n = ScaleShift(0.5, 0.0), PerLevel(levels), 1024
    optimizers = torch.optim.Adam(student.parameters(), 0.03), torch.optim.Adam(fake.parameters(), 0.1)
    sigma, rng = levels.repeat(n // len(levels)), Noise(n)
    for step in range(2000):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9975
        x_s, x0 = phased_dmd.rollout({s: student}, rng, COND, SHAPE, [1.0, s])
        noise = rng.normal(SHAPE)
        x_t = phased_dmd.renoise(x_s, noise, sigma, s)
        if step % 5 == 0:
            with torch.no_grad():
                x0_fake, x0_teacher = (phased_dmd.predict_x0(m, x_t, sigma, COND) for m in (fake, Gaussian(mean, std)))
                grad = velocity_gradient(x0_teacher, x0_fake, sigma, s)
            optimizers[0].zero_grad()
            phased_dmd.student_loss(x_s, grad).backward()
            optimizers[0].step()
        (v, _), x_s = fake(x_t.detach(), sigma, COND), x_s.detach()
        loss = F.mse_loss(v, noise - x_s) if naive else phased_dmd.flow_loss(v, x_s, noise, sigma, s)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    with torch.no_grad():
        x_s, _ = phased_dmd.rollout({s: student}, draws("end", 20_000), COND, SHAPE, [1.0, s])
    q = (torch.arange(2000) + 0.5) / 2000
    wanted = (1 - s) * mean + math.sqrt((1 - s) ** 2 * std**2 + s**2) * torch.special.ndtri(q)
    return (torch.quantile(x_s.flatten(), q) - wanted).abs().mean().item()


def test_a_phase_in_one_dimension():
    assert trained_phase(naive=False) < 0.05
    assert trained_phase(naive=True) > 0.15


def test_eq_10_in_numbers():
    """s = .5, t = .8: (.2)^2 / (.5 * .8) = .1, times v_real - v_fake = (3 - 1) / .8."""
    x0_teacher, x0_fake = column(torch.tensor([1.0, 0.0])), column(torch.tensor([3.0, -1.0]))
    got = velocity_gradient(x0_teacher, x0_fake, torch.tensor([0.8, 0.8]), 0.5).flatten()
    torch.testing.assert_close(got, torch.tensor([0.25, -0.125]))


def test_eq_10_is_a_positive_factor_of_dmds_gradient():
    x0, x0_teacher, x0_fake = torch.randn(3, 5, 2, 1, 2, 2)
    ratio = velocity_gradient(x0_teacher, x0_fake, torch.linspace(0.6, 0.9, 5), 0.5) / phased_dmd.dmd_gradient(
        x0, x0_teacher, x0_fake
    )
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1, :1].expand_as(ratio))
    assert (ratio > 0).all()


class Recorder(nn.Module):
    """Predicts x0 = value everywhere and remembers what it was asked."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = nn.Parameter(torch.tensor(value)), []

    def forward(self, x_t, sigma, cond, blocks=()):
        self.calls.append((sigma[0].item(), torch.is_grad_enabled()))
        return (x_t - self.value) / column(sigma), []


def test_rollout_goes_by_euler_steps_through_the_experts():
    first, second, rng = Recorder(0.3), Recorder(0.7), draws("rollout", 4)
    x_s, x0 = phased_dmd.rollout({0.5: first, 0.0: second}, rng, COND, SHAPE, [1.0, 0.8, 0.5, 0.25, 0.0])
    assert [call[0] for call in first.calls] == pytest.approx([1.0, 0.8])
    assert [call[0] for call in second.calls] == pytest.approx([0.5, 0.25])
    assert [call[1] for call in first.calls + second.calls] == [False, False, False, True]
    torch.testing.assert_close(x_s, torch.full_like(x_s, 0.7))
    x_s, x0 = phased_dmd.rollout({0.5: first}, draws("rollout", 4), COND, SHAPE, [1.0, 0.8, 0.5])
    torch.testing.assert_close(x_s, 0.5 * 0.3 + 0.5 * draws("rollout", 4).normal(SHAPE))  # straight from noise to x0
    torch.testing.assert_close(x0, torch.full_like(x0, 0.3))


# ------------------------------------------------------------------------------------------------------- runs


def test_one_phase_of_one_step_is_dmd2s_update(tmp_path):
    flags = {"steps": 4, "student_every": 1, "student_sigmas": (1.0,), "gan_weight": 0.0, "ema_decay": 0.99}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, phase_ends=(0.0,), **flags))
    a, b = student_weights(tmp_path, 4, dmd2), student_weights(tmp_path, 4, phased_dmd)
    start = load_file(Path(TINY) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert distance(a, b) < 1e-3 * distance(a, start)


def experts(runs_dir, step):
    folder = only_run(runs_dir, phased_dmd) / "checkpoints" / f"step_{step:07d}" / "student"
    return [load_file(path) for path in sorted(folder.glob("transformer*/*.safetensors"))]


def test_a_run_with_phases_is_no_student(tmp_path, fails):
    """--init must name the expert, and a LoRA must be merged; then the weights are the expert's."""
    flags = {"steps": 2, "student_every": 1, "lr": 1e-3, "lora_rank": 2, "ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, **flags))
    run = only_run(tmp_path, phased_dmd)
    student = run / "checkpoints" / "step_0000002" / "student"
    again = {"runs_dir": tmp_path / "again", "steps": 1, "lr": 0.0, "gan_weight": 0.0, "ema_decay": 0.0}
    for folder in (run, student):
        fails(
            lambda f=folder: dmd2.main(small_args(dmd2, init=str(f), **again)), "one expert per phase", "transformer_2"
        )
    dmd2.main(small_args(dmd2, init=str(student / "transformer_2"), **again))
    assert same(student_weights(tmp_path / "again", 1, dmd2), experts(tmp_path, 2)[1])


def test_a_lora_is_not_taken_for_a_student(tmp_path, fails):
    flags = {"steps": 1, "student_every": 1, "lr": 1e-3, "phase_ends": (0.0,), "ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path / "lora", lora_rank=2, **flags))
    run, again = str(only_run(tmp_path / "lora", phased_dmd)), {"runs_dir": tmp_path / "again", "gan_weight": 0.0}
    fails(lambda: dmd2.main(small_args(dmd2, init=run, **again)), "LoRA", "student/transformer")
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path / "whole", **flags))
    run = str(only_run(tmp_path / "whole", phased_dmd))
    fails(lambda: phased_dmd.main(small_args(phased_dmd, init=run, lora_rank=2, **again, **flags)), "LoRA")


def test_raw_samples_the_lora_itself(tmp_path):
    """Not the export, which is the average with the LoRA merged."""
    flags = {"steps": 2, "student_every": 1, "lr": 1e-2, "phase_ends": (0.0,), "ema_decay": 0.99, "lora_rank": 2}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, **flags))
    script, args, checkpoint = load_run(only_run(tmp_path, phased_dmd))
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    cond = common.encode_text(model, ["a red circle"], tmp_path, device).cond_of([0])
    state = {k: v for path in (checkpoint / "state").glob("*.safetensors") for k, v in load_file(path).items()}
    with torch.no_grad():
        raw, averaged = (
            script.sample_student(students, draws("raw", 1), cond, model.latent_shape, args)
            for students in (students_of(model, device, script, args, checkpoint, raw) for raw in (True, False))
        )
        base = model.load_network("teacher", device, adapters=args.adapters)
        lora = model.load_network("student", device, base=base)
        own = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
        lora.load_state_dict(own)
        wanted, _ = phased_dmd.rollout(
            {0.0: lora}, draws("raw", 1), cond, model.latent_shape, (*args.student_sigmas, 0)
        )
    torch.testing.assert_close(raw, wanted)
    assert (averaged - wanted).abs().max() > 0.01


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resume_is_exact_and_trains_no_finished_phase_again(tmp_path, monkeypatch, stop, lora_rank):
    """Stopped in the first phase, at its end, and in the second."""
    flags = {"steps": 8, "student_every": 2, "lora_rank": lora_rank, "lr": 1e-3, "save_every": 4, "anneal_lr": True}
    flags |= {"ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path / "unbroken", **flags))
    broken = small_args(phased_dmd, runs_dir=tmp_path / "broken", **flags)
    stopped(monkeypatch, stop, lambda: phased_dmd.main(broken))
    assert len(experts(tmp_path / "broken", stop)) == 1 + (stop > 4)
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path / "broken", resume="latest", **flags))
    for a, b in zip(experts(tmp_path / "unbroken", 8), experts(tmp_path / "broken", 8), strict=True):
        assert same(a, b)


def test_phases_cannot_move_on_resume(tmp_path, fails):
    flags = {"runs_dir": tmp_path, "steps": 4}
    phased_dmd.main(small_args(phased_dmd, **flags))
    for changed in ({"steps": 8}, {"phase_ends": (0.0,)}):
        (name,) = changed
        again = small_args(phased_dmd, **{**flags, **changed}, resume="latest")
        fails(lambda args=again: phased_dmd.main(args), f"--{name.replace('_', '-')} cannot change")


def test_diffusers_runs_the_two_experts(tmp_path):
    """WanPipeline with transformer, transformer_2 and boundary_ratio gives the latents of our rollout, up to the
    rounding of its timesteps to integers."""
    args = small_args(phased_dmd, runs_dir=tmp_path, steps=4, student_every=1, lr=1e-3, ema_decay=0.0)
    phased_dmd.main(args)
    student = only_run(tmp_path, phased_dmd) / "checkpoints" / "step_0000004" / "student"
    first, second = (WanTransformer3DModel.from_pretrained(student / name) for name in ("transformer", "transformer_2"))
    pipe = WanPipeline.from_pretrained(
        TINY, transformer=first, transformer_2=second, boundary_ratio=0.8,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.shift, solver_order=1
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    device = common.init_distributed()
    model = common.Model("tiny", 9, 32, 32)
    rng = draws("pipeline", 2)
    noise = rng.normal(model.latent_shape)
    cond = common.encode_text(model, ["a red circle", "a blue square"], tmp_path, device).cond_of([0, 1])
    got = pipe(
        ["a red circle", "a blue square"], height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=16, latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    students = dict(zip(args.phase_ends, (Wan(first), Wan(second)), strict=True))
    levels = pipe.scheduler.sigmas.tolist()
    assert levels == pytest.approx([*args.student_sigmas, 0.0], abs=2e-3)
    with torch.no_grad():
        wanted, _ = phased_dmd.rollout(students, draws("pipeline", 2), cond, model.latent_shape, levels)
        other = dict.fromkeys(args.phase_ends, students[args.phase_ends[0]])
        one, _ = phased_dmd.rollout(other, draws("pipeline", 2), cond, model.latent_shape, levels)
    error = (got - wanted).norm() / (one - wanted).norm()
    assert error < 0.05


def test_lora_trains_a_few_matrices_and_is_merged_for_export(tmp_path):
    flags = {"steps": 2, "student_every": 1, "phase_ends": (0.0,), "lr": 1e-2, "ema_decay": 0.0}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, lora_rank=2, lora_alpha=4.0, **flags))
    checkpoint = only_run(tmp_path, phased_dmd) / "checkpoints" / "step_0000002"
    state = {k: v for path in (checkpoint / "state").glob("*.safetensors") for k, v in load_file(path).items()}
    (student,) = experts(tmp_path, 2)
    teacher = load_file(Path(TINY) / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {key for key in teacher if not torch.equal(teacher[key], student[key])}
    assert student.keys() == teacher.keys()
    assert changed == {k for k in teacher if k.endswith("weight") and any(f".{n}." in k for n in Wan.lora_layers)}
    key = "blocks.1.attn1.to_q"
    down, up = (state[f"student.lora.transformer/{key.replace('.', '/')}/lora_{half}"] for half in "AB")
    assert down.shape == (2, 96) and up.shape == (96, 2)
    torch.testing.assert_close(student[f"{key}.weight"], teacher[f"{key}.weight"] + 4.0 / 2 * up @ down)
    trained = {k.split(".exp_avg")[0] for k in state if k.startswith("student_optimizer.") and "exp_avg_sq" in k}
    assert trained and all("/lora_" in k for k in trained)


def test_a_lora_starts_as_no_change_and_as_wide_as_a_linear_layer():
    """nn.Linear draws its weights evenly from +-1 / sqrt(inputs), and so does the LoRA's first half."""
    model, device = common.Model("tiny", 9, 32, 32), torch.device("cpu")
    base = model.load_network("teacher", device, adapters={"student": (16, 8.0)})
    weights = dict(model.load_network("student", device, base=base).named_parameters())
    down = {k: v for k, v in weights.items() if "lora_A" in k}
    assert down and all(0.98 < v.detach().abs().max() * v.shape[1] ** 0.5 <= 1 for v in down.values())
    assert all(v.detach().std() * v.shape[1] ** 0.5 == pytest.approx(3**-0.5, rel=0.05) for v in down.values())
    assert all((v == 0).all() for k, v in weights.items() if "lora_B" in k)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_ranks_match_one(tmp_path, lora_rank):
    flags = {"steps": 4, "student_every": 1, "lora_rank": lora_rank, "lr": 1e-3, "ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path / "one", **flags))
    train_on_ranks(2, phased_dmd, runs_dir=tmp_path / "two", batch_size=1, **flags)
    start = load_file(Path(TINY) / "transformer" / "diffusion_pytorch_model.safetensors")
    for one, other in zip(experts(tmp_path / "one", 4), experts(tmp_path / "two", 4), strict=True):
        assert distance(one, other) < 0.01 * distance(one, start)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"phase_ends": (0.7, 0.0)}, ["--phase-ends", "--student-sigmas"]),
        ({"phase_ends": (0.75,)}, ["--phase-ends", "then 0"]),
        ({"phase_ends": (0.5, 0.75, 0.0)}, ["--phase-ends", "falling"]),
        ({"phase_ends": (1.0, 0.0)}, ["--phase-ends", "below 1"]),
        ({"phase_ends": ()}, ["--phase-ends"]),
        ({"student_sigmas": (1.0, 0.99, 0.5), "phase_ends": (0.99, 0.0)}, ["--score-ends", "below 0.98"]),
        ({"steps": 5}, ["--steps", "multiple of the 2 phases"]),
        ({"lora_rank": -1}, ["--lora-rank", "at least 0"]),
    ],
)
def test_bad_flags(tmp_path, fails, flags, words):
    fails(lambda: phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, **{"steps": 4, **flags})), *words)
    assert not list(tmp_path.glob("phased_dmd__*"))
