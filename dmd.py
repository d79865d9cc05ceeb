"""DMD: distribution matching distillation into one step (Yin et al. 2023, arXiv 2311.18828).

The student turns noise into a video in one step. Its gradient is the difference between two denoisers at the same
noised sample: the fake score, trained along on the student's own samples, and the frozen teacher. A regression on
noise-video pairs of the teacher's ODE keeps it from dropping modes.

    python dmd.py                                          # the tiny teacher, half an hour on a CPU core
    torchrun --nproc_per_node=8 dmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/dmd.md. dmd2.py is a diff of this file, the others of dmd2.py.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass

import common
from training.flags import Interval, RunArgs, Unit, launch
from training.preview import Preview
from training.run import Run
from training.samples import solver_settings, teacher_samples


@dataclass(kw_only=True)
class Args(RunArgs):
    """The defaults are for Wan2.1-1.3B on 8 GPUs; models/recipes.py has what other teachers change."""

    steps: PositiveInt = 10_000
    """Training steps; one step updates the fake score once."""
    grad_accum: PositiveInt = 8  # CoDMD: 64 videos per update
    """Micro-batches whose gradients are averaged into one update."""
    student_every: PositiveInt = 1  # algorithm 1
    """Fake-score updates per student update."""
    lr: NonNegativeFloat = 2e-6  # CoDMD
    """Learning rate of the student."""
    fake_score_lr: NonNegativeFloat = 2e-6  # the student's, as in algorithm 1
    """Learning rate of the fake score."""
    ema_decay: Unit = 0.99  # Self-Forcing; DMD2 and CoDMD have no average
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: NonNegativeFloat = 4.5  # CoDMD
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: Annotated[float, Field(ge=1)] = 8.0  # CoDMD
    """Shift s of noise levels, sigma = s u / (1 + (s - 1) u): of those that are scored and of the teacher's solver."""
    score_sigmas: Interval = (0.02, 0.98)  # CausVid, DMD2's .02 and .98 of 1,000 timesteps
    """Range of the noise levels that are scored: after the shift, draws beyond it are set to its ends."""
    regression_weight: NonNegativeFloat = 0.25  # the paper's, for LPIPS
    """Weight of the regression on the teacher's pairs (eq. 9)."""
    pairs: str | None = None
    """Folder of noise-video pairs, such as another run's cache/pairs_…; None: solve --num-samples of them first."""
    pair_steps: PositiveInt = 50
    """Euler steps of the teacher for one pair."""


def noise_levels(args):
    """Noise levels at which the finished student predicts, a tuple for each network that a run exports."""
    return [(1.0,)]


# ------------------------------------------------------------------------------------- schedule and sampler


def add_noise(x0, noise, sigma):
    """x_t of rectified flow. x0, noise [b, c, f, h, w]; sigma [b] in [0, 1]: 0 is the clean video, 1 noise."""
    sigma = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def sample_sigma(rng, shift, low=0.02, high=0.98):
    """Noise levels [b] at which samples are scored: uniform u after the shift, within [low, high]."""
    u = rng.uniform()
    return (shift * u / (1 + (shift - 1) * u)).clamp(low, high)


def predict_x0(network, x_t, sigma, cond):
    """The clean video [b, c, f, h, w], float32, that a network predicts from x_t at sigma [b]."""
    v, _ = network(x_t, sigma, cond)
    return x_t - rearrange(sigma, "b -> b 1 1 1 1") * v


def guided_x0(network, x_t, sigma, cond, null_cond, guidance_scale):
    """Classifier-free guidance, both halves in one forward. null_cond is one row; what it lacks is the same in both."""
    if guidance_scale == 1:
        return predict_x0(network, x_t, sigma, cond)
    both = {key: torch.cat([null_cond.get(key, x).expand_as(x), x]) for key, x in cond.items()}
    x0_uncond, x0_cond = predict_x0(network, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
    return x0_uncond + guidance_scale * (x0_cond - x0_uncond)


def rollout(student, rng, cond, shape):
    """The student's video [b, *shape] from its own noise, one step."""
    x_t = rng.normal(shape)
    sigma = torch.ones(len(rng), device=x_t.device)
    return predict_x0(student, x_t, sigma, cond)


def sample_student(students, shape, args, rng, cond):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one."""
    return rollout(students[0], rng, cond, shape)


@torch.no_grad()
def sample_teacher(teacher, null_cond, shape, args, rng, cond):
    """The guided teacher's video [b, *shape] from its own noise: Euler steps from sigma 1 to 0."""
    x_t = rng.normal(shape)
    u = torch.linspace(1, 0, args.teacher_steps + 1, device=x_t.device)
    sigmas = args.shift * u / (1 + (args.shift - 1) * u)
    for sigma, sigma_next in pairwise(sigmas):
        x0 = guided_x0(teacher, x_t, sigma.expand(len(x_t)), cond, null_cond, args.guidance_scale)
        x_t = x0 + sigma_next / sigma * (x_t - x0)  # = x_t + (sigma_next - sigma) * v
    return x_t


# --------------------------------------------------------------------------------------------------- losses


def dmd_gradient(x0, x0_teacher, x0_fake):
    """Distribution matching gradient with respect to x0. All [b, c, f, h, w], float32."""
    grad = x0_fake - x0_teacher  # DMD, eq. 7
    weight = reduce((x0 - x0_teacher).abs(), "b c f h w -> b 1 1 1 1", "mean")  # DMD, eq. 8
    return (grad / weight).masked_fill(weight == 0, 0)  # x0 = x0_teacher: 0 / 0. Any other NaN must show


def student_loss(x0, grad):
    """A loss whose gradient with respect to x0 is grad / numel."""
    return 0.5 * F.mse_loss(x0, (x0 - grad).detach())


def regression_loss(x0, x0_pair):
    # as CausVid's ODE initialisation; the paper's eq. 9 is LPIPS on decoded images, which for video nobody has settled
    return F.mse_loss(x0, x0_pair)


def flow_loss(v, x0, noise):
    """The teacher's own training loss, for the fake score (DMD, eq. 6, in velocity form)."""
    return F.mse_loss(v, noise - x0)


# ---------------------------------------------------------------------------------------------------- main


def main(args):
    device = common.init_distributed()
    run = Run(__file__, args, device)
    model = common.Model(args.teacher, *args.size, args.compute, args.student, args.negative_prompt)
    shape = model.latent_shape
    data = common.load_data(model, args.prompts, args.data, run.cache, device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, device).cond_of([0])

    teacher, base = model.load_teacher(device, args.adapters)
    student = model.load_network("student", device, base=base)
    fake_score = model.load_network("fake_score", device, base=base)
    ema = model.load_network("ema", device, base=base) if args.ema_decay else student
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}

    pair_args = replace(args, teacher_steps=args.pair_steps)
    if args.pairs:
        pairs = common.Shards(args.pairs, model, device, args.seed, ("latents", "noise"), solver_settings(pair_args))
    else:
        pairs = teacher_samples(run, data, partial(sample_teacher, teacher, null_cond, shape, pair_args), pair_args)
    run.load(networks, optimizers)
    run.open()
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    if args.preview_every:
        preview.write_data()
        preview.write("teacher", partial(sample_teacher, teacher, null_cond, shape, args))

    for step in range(run.step, args.steps + 1):
        done = step == args.steps
        if args.preview_every and (done or step % args.preview_every == 0):
            preview.write(step, partial(sample_student, [ema], shape, args))
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, optimizers, students=[ema])
        if done or stop:
            break

        # ------------------------------------------------------------------------------------ one training step
        log = defaultdict(float)
        lr_scale = 1 - step / args.steps if args.anneal_lr else 1
        student_optimizer.param_groups[0]["lr"] = args.lr * lr_scale
        fake_score_optimizer.param_groups[0]["lr"] = args.fake_score_lr * lr_scale

        # student
        if step % args.student_every == 0:
            for rng, cond, _ in data.micro_batches("student", step, args.batch_size, args.grad_accum):
                x0 = rollout(student, rng, cond, shape)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                    noise = rng.normal(shape)
                    x_t = add_noise(x0, noise, sigma)
                    x0_fake = predict_x0(fake_score, x_t, sigma, cond)
                    x0_teacher = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_teacher, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                (loss / args.grad_accum).backward()

                # a backward of its own, so that one graph is alive at a time
                noise, x0_pair = pairs.latents(rng.numbers, "noise"), pairs.latents(rng.numbers)
                x0 = predict_x0(student, noise, torch.ones_like(sigma), pairs.cond(rng.numbers))
                loss = regression_loss(x0, x0_pair)
                log["loss/regression"] += loss.detach() / args.grad_accum
                (args.regression_weight * loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            common.ema_update(ema, student, args.ema_decay)

        # fake score: the same prompts as the student, as sample numbers go by the step; noise of its own
        for rng, cond, _ in data.micro_batches("fake_score", step, args.batch_size, args.grad_accum):
            with torch.no_grad():
                x0 = rollout(student, rng, cond, shape)
                sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                noise = rng.normal(shape)
                x_t = add_noise(x0, noise, sigma)
            v, _ = fake_score(x_t, sigma, cond)
            loss = flow_loss(v, x0, noise)
            log["loss/fake_score"] += loss.detach() / args.grad_accum
            (loss / args.grad_accum).backward()
        log["grad_norm/fake_score"] = common.clip_grad_norm(fake_score, args.max_grad_norm)
        fake_score_optimizer.step()
        fake_score_optimizer.zero_grad()

        run.log(step, log)

    run.finish(preview, stop)


if __name__ == "__main__":
    launch(main, Args)
