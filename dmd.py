"""DMD: distribution matching distillation into one step (Yin et al. 2023, arXiv 2311.18828).

The student turns noise into a video in one step. Its gradient is the difference between two denoisers at the same
noised sample: the fake score, trained along on the student's own samples, and the frozen teacher. A regression on
noise-video pairs of the teacher's ODE keeps it from dropping modes.

    python dmd.py                                          # the tiny teacher, half an hour on a CPU core
    torchrun --nproc_per_node=8 dmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/dmd.md. The base file: dmd2.py is a diff of it, the other scripts of dmd2.py.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from einops import rearrange, reduce

import common
from training.flags import RunArgs, launch
from training.preview import Preview
from training.run import Run
from training.samples import teacher_samples


@dataclass(kw_only=True)
class Args(RunArgs):
    """Numbers without a default stand in RECIPES, a row per teacher. A flag beats both."""

    steps: Annotated[int, Ge(1)]
    """Training steps; one step updates the fake score once."""
    student_every: Annotated[int, Ge(1)]
    """Fake-score updates per student update."""
    lr: Annotated[float, Ge(0)]
    """Learning rate of the student."""
    fake_score_lr: Annotated[float, Ge(0)]
    """Learning rate of the fake score."""
    ema_decay: Annotated[float, Ge(0), Le(1)]
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: Annotated[float, Ge(0)]
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: Annotated[float, Ge(1)]
    """Noise-level shift s, sigma = s u / (1 + (s - 1) u): of the score times and of the teacher's solver."""
    score_sigmas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.02, 0.98)
    """Range of score times: after the shift, draws beyond it are set to its ends. See docs/dialects.md."""
    regression_weight: Annotated[float, Ge(0)]
    """Weight of the regression on the teacher's pairs (eq. 9)."""
    pairs: str | None = None
    """Folder of noise-video pairs from tools/make_pairs.py. None: solve --num-samples now and cache them."""
    pair_steps: Annotated[int, Ge(1)]
    """Euler steps of the teacher for one pair."""


RECIPES = {  # the first row is everybody's; the others change it
    "wan2.1-1.3b": {  # CoDMD on Wan2.1-1.3B, 64 videos per update on 8 GPUs; both networks learn alike (algorithm 1)
        "batch_size": 1, "grad_accum": 8, "steps": 10_000, "student_every": 1, "lr": 2e-6, "fake_score_lr": 2e-6,
        "betas": (0.9, 0.999), "weight_decay": 0.01, "max_grad_norm": 10.0, "ema_decay": 0.99,
        "guidance_scale": 4.5, "shift": 8.0,
        "regression_weight": 0.25, "pair_steps": 50,  # the paper's weight is for LPIPS
    },
    "wan2.1-14b": {"shift": 5.0, "lr": 4e-6, "fake_score_lr": 4e-6, "grad_accum": 4},  # CoDMD's 14B config
    "tiny": {
        "batch_size": 16, "grad_accum": 1, "steps": 2000, "lr": 1e-3, "fake_score_lr": 1e-3, "anneal_lr": True,
        "betas": (0.0, 0.999), "guidance_scale": 2.0, "shift": 1.0, "gradient_checkpointing": 0,
        "regression_weight": 0.02, "num_samples": 512, "pair_steps": 12,  # .25 blurs, see docs/dmd.md
        "save_every": 250, "preview_every": 250, "preview_prompts": 12,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------- schedule and sampler


def add_noise(x0, noise, sigma):
    sigma = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def sample_sigma(rng, shift, low=0.02, high=0.98):
    u = rng.uniform()
    return (shift * u / (1 + (shift - 1) * u)).clamp(low, high)


def predict_x0(network, x_t, sigma, cond):
    v, _ = network(x_t, sigma, cond)
    return x_t - rearrange(sigma, "b -> b 1 1 1 1") * v


def guided_x0(network, x_t, sigma, cond, null_cond, guidance_scale):
    """Classifier-free guidance, both halves in one forward. null_cond is one row; what it lacks is the same in both."""
    both = {key: torch.cat([null_cond.get(key, x).expand_as(x), x]) for key, x in cond.items()}
    uncond, cond = predict_x0(network, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def rollout(student, rng, cond, shape):
    """The student's video [b, *shape] from its own noise, one step."""
    x_t = rng.normal(shape)
    sigma = torch.ones(len(rng), device=x_t.device)
    return predict_x0(student, x_t, sigma, cond)


def sample_student(students, rng, cond, shape, args):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one."""
    return rollout(students[0], rng, cond, shape)


@torch.no_grad()
def solve_ode(teacher, x_t, cond, null_cond, guidance_scale, shift, steps):
    """The guided teacher's video from noise x_t [b, *shape]: Euler steps from sigma 1 to 0."""
    u = torch.linspace(1, 0, steps + 1, device=x_t.device)
    sigmas = shift * u / (1 + (shift - 1) * u)
    for sigma, sigma_next in pairwise(sigmas):
        x0 = guided_x0(teacher, x_t, sigma.expand(len(x_t)), cond, null_cond, guidance_scale)
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
    # the paper's eq. 9 is LPIPS on decoded images; on latents, as CausVid's ODE initialisation: no video LPIPS is
    # established, and decoding 81 frames with gradients costs more memory than the student
    return F.mse_loss(x0, x0_pair)


def flow_loss(v, x0, noise):
    """The teacher's own training loss, for the fake score (DMD, eq. 6, in velocity form)."""
    return F.mse_loss(v, noise - x0)


# ---------------------------------------------------------------------------------------------------- main


def main(args):
    # setup
    run = Run(__file__, args)
    model = common.Model(args.teacher, args.frames, args.height, args.width, args.compute)
    shape = model.latent_shape
    data = common.load_data(model, args.prompts, args.data, run.cache, run.device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, run.device).cond_of([0])

    teacher = model.load_network("teacher", run.device, adapters=args.adapters)
    student = model.load_network("student", run.device, base=teacher)
    fake_score = model.load_network("fake_score", run.device, base=teacher)
    ema = model.load_network("ema", run.device, base=teacher) if args.ema_decay else student
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}

    settings = (args.guidance_scale, args.shift, args.pair_steps)
    solve = lambda noise, cond: solve_ode(teacher, noise, cond, null_cond, *settings)
    if args.pairs:
        pairs = common.Shards(args.pairs, model, run.device, args.seed, ("latents", "noise"), settings)
    else:
        pairs = teacher_samples(run, data, solve, args.num_samples, args.batch_size, settings)
    run.restore(networks, optimizers)
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    if args.preview_every:
        preview.write_data()
        solver = (null_cond, args.guidance_scale, args.shift, args.teacher_steps)
        preview.write("teacher", lambda rng, cond: solve_ode(teacher, rng.normal(shape), cond, *solver))

    for step in range(run.step, args.steps + 1):
        done = step == args.steps

        # preview
        if args.preview_every and (done or step % args.preview_every == 0):
            preview.write(step, lambda rng, cond: sample_student([ema], rng, cond, shape, args))

        # save
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, optimizers, students=[ema])
        if done or stop:
            break

        # ------------------------------------------------------------------------------------ one training step

        started, log = time.perf_counter(), defaultdict(float)
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

        # fake score
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

        # log
        log["time/step"] = time.perf_counter() - started
        run.log(step, log, total=args.steps)

    run.finish(preview, stop)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
