"""Phased DMD (arXiv 2510.27684): a few steps by a few experts, each trained on a part of the noise range.

DMD2 draws a video at every step and noises it again. Here an expert carries samples from one noise level to the next by
Euler steps, and the distributions are matched there: scores and fake score work above that level, on samples renoised
from it. Finished experts are frozen, and the next one begins at the teacher. No clips and no discriminator are needed.

    python phased_dmd.py                                   # the tiny teacher, minutes on two CPU cores
    torchrun --nproc_per_node=8 phased_dmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/phased_dmd.md. A diff of dmd2.py: docs/diffs/dmd2-phased_dmd.md.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from einops import rearrange, reduce
from torch import nn

import common
from training.files import UserError
from training.flags import RunArgs, launch
from training.preview import Preview
from training.run import Run
from training.samples import teacher_samples


@dataclass(kw_only=True)
class Args(RunArgs):
    """Numbers without a default stand in RECIPES, a row per teacher. A flag beats both."""

    steps: Annotated[int, Ge(1)]
    """Training steps, divided evenly among the phases; one step updates the fake score once."""
    student_every: Annotated[int, Ge(1)]
    """Fake-score updates per student update: the two time-scale rule (DMD2, sec. 4.2)."""
    lr: Annotated[float, Ge(0)]
    """Learning rate of the student."""
    fake_score_lr: Annotated[float, Ge(0)]
    """Learning rate of the fake score and the discriminator."""
    ema_decay: Annotated[float, Ge(0), Le(1)]
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: Annotated[float, Ge(0)]
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: Annotated[float, Ge(1)]
    """Noise-level shift s, sigma = s u / (1 + (s - 1) u): of the score times and of the teacher's solver."""
    score_sigmas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.02, 0.98)
    """Range of score times: after the shift, draws beyond it are set to its ends. See docs/dialects.md."""
    student_sigmas: tuple[float, ...]
    """Noise levels at which the student's Euler steps begin, the first .99 to 1."""
    phase_ends: tuple[float, ...]
    """Noise level to which each phase carries samples: some of --student-sigmas, falling, then 0."""
    score_ends: tuple[float, ...] = ()
    """Lowest score time of each phase; () are --phase-ends."""
    student_input: Literal["simulate", "data"]
    """Training inputs below noise level 1: the student's own earlier steps (DMD2, sec. 4.5), or clips with noise."""
    gan_weight: Annotated[float, Ge(0)]
    """Weight of the student's GAN loss. 0 builds no discriminator."""
    discriminator_weight: Annotated[float, Ge(0)]
    """Weight of the discriminator's loss beside the fake score's."""
    discriminator_blocks: tuple[int, ...]
    """Transformer blocks of the fake score whose outputs the discriminator reads."""


RECIPES = {  # the first row is everybody's; the others change it
    "wan2.1-1.3b": {  # the paper's for LoRA: rank, rates, betas, levels, phases, 64 videos per update on 8 GPUs
        "batch_size": 1, "grad_accum": 8, "steps": 10_000, "student_every": 5, "lr": 5e-5, "fake_score_lr": 4e-7,
        "betas": (0.0, 0.999), "weight_decay": 0.01, "max_grad_norm": 10.0, "ema_decay": 0.99, "lora_rank": 64,
        "guidance_scale": 4.5, "shift": 5.0, "student_sigmas": (1.0, 0.938, 0.833, 0.625), "student_input": "simulate",
        "phase_ends": (0.833, 0.0), "gan_weight": 0.0, "discriminator_weight": 1e-2,
        "discriminator_blocks": (15, 22, 29),  # FastGen on Wan
    },
    "wan2.1-14b": {"discriminator_blocks": (20, 29, 39)},
    # the paper's: phase 1 is scored by the experts of high noise alone (its score times are clamped, ours drawn there)
    "wan2.2-a14b": {"score_ends": (0.875, 0.0), "discriminator_blocks": (20, 29, 39)},
    "wan2.2-i2v-a14b": {"score_ends": (0.9, 0.0), "discriminator_blocks": (20, 29, 39)},
    "qwen-image": {"shift": 3.0, "student_sigmas": (1.0, 0.9, 0.75, 0.5), "phase_ends": (0.75, 0.0)},  # the paper's
    "tiny": {
        "batch_size": 16, "grad_accum": 1, "steps": 500, "lr": 1e-3, "fake_score_lr": 1e-3, "anneal_lr": True,
        "betas": (0.0, 0.999), "guidance_scale": 2.0, "shift": 3.0, "gradient_checkpointing": 0,
        "student_sigmas": (1.0, 0.9, 0.75, 0.5), "phase_ends": (0.75, 0.0), "discriminator_blocks": (1, 3, 5),
        "lora_rank": 0, "ema_decay": 0.0, "save_every": 250, "preview_every": 250, "preview_prompts": 12,
    },
}  # fmt: skip


def check(args, model):
    """Raise one line for noise levels, phases or blocks that cannot be."""
    sigmas, blocks, last = args.student_sigmas, args.discriminator_blocks, model.config["num_layers"] - 1
    if not (sigmas and 0.99 <= sigmas[0] <= 1) or not all(high > low > 0 for high, low in pairwise(sigmas)):
        raise UserError(f"--student-sigmas must start at .99 to 1 and fall, above 0, got {' '.join(map(str, sigmas))}")
    ends, floors, highest = args.phase_ends, args.score_ends or args.phase_ends, args.score_sigmas[1]
    if ends[-1:] != (0,) or list(ends[:-1]) != [sigma for sigma in sigmas[1:] if sigma in ends]:
        raise UserError(f"--phase-ends must be some of --student-sigmas below 1, falling, then 0, got {ends}")
    if len(floors) != len(ends) or not all(end <= floor < highest for end, floor in zip(ends, floors)):
        raise UserError(f"--score-ends must be a number per phase, from its end to below {highest}, got {floors}")
    meet = len(model.family.parts) > 1 and model.index.get("boundary_ratio")  # two experts, a phase for each
    if meet and (len(ends) != 2 or any((sigma >= meet) != (sigma > ends[0]) for sigma in sigmas)):
        raise UserError(
            f"this teacher's experts meet at {meet}: there --phase-ends must part --student-sigmas, got {ends}"
        )
    if args.steps % len(ends):
        raise UserError(f"--steps must be a multiple of the {len(ends)} phases, got {args.steps}")
    if args.gan_weight and not 0 < len(blocks) == len(set(blocks) & set(range(last + 1))):
        raise UserError(f"--discriminator-blocks must be different numbers from 0 to {last}, got {blocks}")


def needs_clips(args):
    return args.gan_weight > 0 or args.student_input == "data"


# ------------------------------------------------------------------------------------- schedule and sampler


def add_noise(x0, noise, sigma):
    sigma = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def bridge(sigma, s):
    """a and b [b, 1, 1, 1, 1] of x_t = a x_s + b noise, which takes samples at noise level s up to sigma [b]."""
    t = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - t) / (1 - s), torch.sqrt((t - s) * (t + s - 2 * t * s)) / (1 - s)


def renoise(x_s, noise, sigma, s):
    a, b = bridge(sigma, s)
    return a * x_s + b * noise


def sample_sigma(rng, shift, s, low=0.02, high=0.98):
    u = s / (shift - (shift - 1) * s)  # before the shift
    u = u + (1 - u) * rng.uniform()
    sigma = shift * u / (1 + (shift - 1) * u)
    return sigma.clamp(max(s, low), high)


def predict_x0(network, x_t, sigma, cond):
    v, _ = network(x_t, sigma, cond)
    return x_t - rearrange(sigma, "b -> b 1 1 1 1") * v


def guided_x0(network, x_t, sigma, cond, null_cond, guidance_scale):
    """Classifier-free guidance, both halves in one forward. null_cond is one row; what it lacks is the same in both."""
    both = {key: torch.cat([null_cond.get(key, x).expand_as(x), x]) for key, x in cond.items()}
    uncond, cond = predict_x0(network, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def rollout(experts, rng, cond, shape, sigmas, x0_data=None):
    """Carry the student's own noise to noise level sigmas[-1] by Euler steps, each by the expert of its level. Returns
    the sample there and the video x0 that the last step aimed at, [b, *shape]. Only that step carries gradient.
    experts: {end of phase: network}, ends falling. x0_data: the input of the last step is these clips, noised.
    """
    x_t = rng.normal(shape)
    networks = [next(network for end, network in experts.items() if sigma > end) for sigma in sigmas[:-1]]
    sigmas = torch.tensor(sigmas, device=x_t.device)
    if x0_data is not None:
        x_t, sigmas, networks = add_noise(x0_data, x_t, sigmas[-2].expand(len(rng))), sigmas[-2:], networks[-1:]
    with torch.no_grad():
        for network, sigma, sigma_next in zip(networks, sigmas[:-2], sigmas[1:-1]):
            x0 = predict_x0(network, x_t, sigma.expand(len(rng)), cond)
            x_t = x0 + sigma_next / sigma * (x_t - x0)
    x0 = predict_x0(networks[-1], x_t, sigmas[-2].expand(len(rng)), cond)
    return x0 + sigmas[-1] / sigmas[-2] * (x_t - x0), x0


def sample_student(students, rng, cond, shape, args):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one per phase."""
    return rollout(dict(zip(args.phase_ends, students)), rng, cond, shape, (*args.student_sigmas, 0.0))[0]


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


class Heads(nn.Module):
    """The discriminator: a head for each block of the fake score that it reads; trained and saved as a part of that."""

    def __init__(self, width, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) for _ in blocks
        )

    def forward(self, features):
        """Outputs of the blocks, [b, tokens, width] each -> one logit per token and block, [b, tokens, blocks]."""
        return torch.cat([head(x) for head, x in zip(self.blocks, features, strict=True)], dim=-1).float()


def gan_student_loss(logits_fake):
    return F.softplus(-logits_fake).mean()


def discriminator_loss(logits_fake, logits_real):
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


def flow_loss(v, x_s, noise, sigma, s):
    """The teacher's own training loss, for the fake score, where only samples x_s at level s are known (eq. 13)."""
    if s == 0:
        return F.mse_loss(v, noise - x_s)
    t = rearrange(sigma, "b -> b 1 1 1 1")
    _, b = bridge(sigma, s)
    target_b = (t - 2 * t * s + s**2) / (1 - s) ** 2 * noise - b / (1 - s) * x_s  # b times the velocity at x_t
    return ((1 / b**2).clamp(max=10) * (b * v - target_b) ** 2).mean()


# ---------------------------------------------------------------------------------------------------- main


def main(args):
    # setup
    run = Run(__file__, args)
    model = common.Model(args.teacher, args.frames, args.height, args.width, args.compute)
    shape = model.latent_shape
    check(args, model)
    data = common.load_data(model, args.prompts, args.data, run.cache, run.device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, run.device).cond_of([0])

    teacher = model.load_network("teacher", run.device, adapters=args.adapters)
    student = model.load_network("student", run.device, base=teacher)
    fake_score = model.load_network("fake_score", run.device, base=teacher)
    ema = model.load_network("ema", run.device, base=teacher) if args.ema_decay else student
    from_data = args.student_input == "data"
    read = args.discriminator_blocks if args.gan_weight else ()
    if args.gan_weight:
        torch.manual_seed(args.seed)
        fake_score.heads = model.shard(Heads(fake_score.width, read).to(run.device), run.device)
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}
    phases = len(args.phase_ends)
    finished = max(run.step - 1, 0) * phases // args.steps  # by the checkpoint to resume from
    experts = [model.load_network(f"expert_{i}", run.device, base=teacher) for i in range(finished)]
    networks |= {f"expert_{i}": expert for i, expert in enumerate(experts)}

    settings = (args.guidance_scale, args.shift, args.teacher_steps)
    solve = lambda noise, cond: solve_ode(teacher, noise, cond, null_cond, *settings)
    if needs_clips(args) and not data.has_clips:
        data = teacher_samples(run, data, solve, args.num_samples, args.batch_size, settings)
    run.restore(networks, optimizers)
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    if args.preview_every:
        preview.write_data()
        preview.write("teacher", lambda rng, cond: solve(rng.normal(shape), cond))

    for step in range(run.step, args.steps + 1):
        done = step == args.steps

        # preview
        if args.preview_every and (done or step % args.preview_every == 0):
            # ema also in place of the experts to come
            preview.write(step, lambda rng, cond: sample_student([*experts, *[ema] * phases], rng, cond, shape, args))

        # save
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, optimizers, students=[*experts, ema])
        if done or stop:
            break

        # next phase: freeze the expert; student and fake score begin at the teacher again
        phase = step * phases // args.steps
        if phase > len(experts):
            experts.append(model.load_network(f"expert_{phase - 1}", run.device, base=teacher))
            common.ema_update(experts[-1], ema, decay=0)
            networks[f"expert_{phase - 1}"] = experts[-1]
            for network in (student, fake_score, ema):
                model.reset(network)
            student_optimizer.state.clear()
            fake_score_optimizer.state.clear()

        # ------------------------------------------------------------------------------------ one training step

        started, log = time.perf_counter(), defaultdict(float)
        lr_scale = 1 - step * phases / args.steps % 1 if args.anneal_lr else 1
        student_optimizer.param_groups[0]["lr"] = args.lr * lr_scale
        fake_score_optimizer.param_groups[0]["lr"] = args.fake_score_lr * lr_scale

        # how far the student is rolled out in this step: what all ranks must agree on is a function of the step
        shared = common.SharedRNG(args.seed, step)
        start, end = (1.0, *args.phase_ends)[phase : phase + 2]
        floor = (args.score_ends or args.phase_ends)[phase]
        sigmas = [sigma for sigma in args.student_sigmas if sigma > start]
        own = [sigma for sigma in args.student_sigmas if start >= sigma > end]
        sigmas += own[: 1 + int(shared.uniform("exit") * len(own))] + [end]
        students = dict(zip(args.phase_ends, [*experts, student]))

        # student
        if step % args.student_every == 0:
            for rng, cond, x0_data in data.micro_batches("student", step, args.batch_size, args.grad_accum):
                x_s, x0 = rollout(students, rng, cond, shape, sigmas, x0_data() if from_data else None)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift, floor, *args.score_sigmas)
                    noise = rng.normal(shape)
                    x_t = renoise(x_s, noise, sigma, end)
                    x0_fake = predict_x0(fake_score, x_t, sigma, cond)
                    x0_teacher = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_teacher, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                if args.gan_weight:
                    _, features = fake_score(renoise(x_s, noise, sigma, end), sigma, cond, read)
                    gan_loss = gan_student_loss(fake_score.heads(features))
                    log["loss/gan_student"] += gan_loss.detach() / args.grad_accum
                    loss = loss + args.gan_weight * gan_loss
                (loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            fake_score_optimizer.zero_grad()  # of what the student's GAN loss left in it
            common.ema_update(ema, student, args.ema_decay)

        # fake score
        for rng, cond, x0_data in data.micro_batches("fake_score", step, args.batch_size, args.grad_accum):
            with torch.no_grad():
                x_s, _ = rollout(students, rng, cond, shape, sigmas, x0_data() if from_data else None)
                sigma = sample_sigma(rng, args.shift, floor, *args.score_sigmas)
                noise = rng.normal(shape)
                x_t = renoise(x_s, noise, sigma, end)
            v, features = fake_score(x_t, sigma, cond, read)
            loss = flow_loss(v, x_s, noise, sigma, end)
            log["loss/fake_score"] += loss.detach() / args.grad_accum
            if args.gan_weight:
                logits_fake = fake_score.heads(features)
                _, features = fake_score(add_noise(x0_data(), noise, sigma), sigma, cond, read)
                gan_loss = discriminator_loss(logits_fake, fake_score.heads(features))
                log["loss/discriminator"] += gan_loss.detach() / args.grad_accum
                loss = loss + args.discriminator_weight * gan_loss
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
