"""Phased DMD (arXiv 2510.27684): a few steps by a few experts, each trained on a part of the noise range.

DMD2 draws a video at every step and noises it again. Here an expert carries samples from one noise level to the next by
Euler steps, and the distributions are matched there: scores and fake score work above that level, on samples renoised
from it. Finished experts are frozen, and the next one begins at the teacher. No clips and no discriminator are needed.

    python phased_dmd.py                                   # the tiny teacher, minutes on two CPU cores
    torchrun --nproc_per_node=8 phased_dmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/phased_dmd.md. Read it as a diff: git diff --no-index dmd2.py phased_dmd.py
"""

from collections import defaultdict
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

import common
from training.files import UserError
from training.flags import Interval, Levels, RunArgs, Unit, launch
from training.preview import Preview
from training.run import Run
from training.samples import teacher_samples


@dataclass(kw_only=True)
class Args(RunArgs):
    """The defaults are for Wan2.1-1.3B on 8 GPUs; models/recipes.py has what other teachers change."""

    steps: PositiveInt = 10_000
    """Training steps, divided evenly among the phases; one step updates the fake score once."""
    grad_accum: PositiveInt = 8  # the paper's 64 videos per update
    """Micro-batches whose gradients are averaged into one update."""
    student_every: PositiveInt = 5  # DMD2, sec. 4.2
    """Fake-score updates per student update: the two time-scale rule."""
    lr: NonNegativeFloat = 5e-5  # the paper's, of a LoRA
    """Learning rate of the student."""
    fake_score_lr: NonNegativeFloat = 4e-7  # the paper's
    """Learning rate of the fake score and the discriminator."""
    ema_decay: Unit = 0.99  # Self-Forcing; DMD2 and CoDMD have no average
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: NonNegativeFloat = 4.5  # CoDMD
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: Annotated[float, Field(ge=1)] = 5.0  # the paper's
    """Shift s of noise levels, sigma = s u / (1 + (s - 1) u): of those that are scored and of the teacher's solver."""
    score_sigmas: Interval = (0.02, 0.98)  # CausVid, DMD2's .02 and .98 of 1,000 timesteps
    """Range of the noise levels that are scored: after the shift, draws beyond it are set to its ends."""
    student_sigmas: Levels = (1.0, 0.938, 0.833, 0.625)  # the paper's
    """Noise levels at which the student's Euler steps begin, the first .99 to 1."""
    phase_ends: tuple[float, ...] = (0.833, 0.0)  # the paper's
    """Noise level to which each phase carries samples: some of --student-sigmas, falling, then 0."""
    score_ends: tuple[float, ...] = ()
    """Lowest noise level that is scored in each phase; () are --phase-ends."""
    student_input: Literal["simulate", "data"] = "simulate"  # DMD2, sec. 4.5
    """Training inputs below noise level 1: the student's own earlier steps, or clips with noise."""
    gan_weight: NonNegativeFloat = 0.0  # the paper has none
    """Weight of the student's GAN loss. 0, also the default without clips of --data, builds no discriminator."""
    discriminator_weight: NonNegativeFloat = 1e-2  # DMD2
    """Weight of the discriminator's loss beside the fake score's."""
    discriminator_blocks: tuple[int, ...] = (15, 22, 29)  # FastGen
    """Transformer blocks of the fake score whose outputs the discriminator reads."""
    betas: tuple[Unit, Unit] = (0.0, 0.999)  # the paper's
    lora_rank: NonNegativeInt = 64  # the paper's


def check_phases(args, model):
    sigmas, ends, floors, highest = args.student_sigmas, args.phase_ends, args.score_ends, args.score_sigmas[1]
    if ends[-1:] != (0,) or list(ends[:-1]) != [sigma for sigma in sigmas[1:] if sigma in ends]:
        raise UserError(f"--phase-ends must be some of --student-sigmas below 1, falling, then 0, got {ends}")
    if floors and (len(floors) != len(ends) or not all(end <= low < highest for end, low in zip(ends, floors))):
        raise UserError(f"--score-ends must be a number per phase, from its end to below {highest}, got {floors}")
    meet = len(model.family.parts) > 1 and model.index.get("boundary_ratio")  # two experts, a phase for each
    if meet and (len(ends) != 2 or any((sigma >= meet) != (sigma > ends[0]) for sigma in sigmas)):
        raise UserError(f"this teacher's experts meet at {meet}: --phase-ends must part --student-sigmas there")


def noise_levels(args):
    """Noise levels at which the finished student predicts, a tuple for each network that a run exports."""
    ends = pairwise((1.0, *args.phase_ends))
    return [tuple(sigma for sigma in args.student_sigmas if start >= sigma > end) for start, end in ends]


def phase_of(step, args):
    """The phase that a step trains, the noise level to which it carries samples, and those at which it predicts."""
    phase = step * len(args.phase_ends) // args.steps
    return phase, args.phase_ends[phase], noise_levels(args)[phase]


# ------------------------------------------------------------------------------------- schedule and sampler


def add_noise(x0, noise, sigma):
    """x_t of rectified flow. x0, noise [b, c, f, h, w]; sigma [b] in [0, 1]: 0 is the clean video, 1 noise."""
    sigma = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def bridge(sigma, s):
    """a and b [b, 1, 1, 1, 1] of x_t = a x_s + b noise, which takes samples at noise level s up to sigma [b]."""
    t = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - t) / (1 - s), torch.sqrt((t - s) * (t + s - 2 * t * s)) / (1 - s)


def renoise(x_s, noise, sigma, s):
    """x_t at sigma [b] from samples x_s [b, c, f, h, w] at noise level s, a float."""
    a, b = bridge(sigma, s)
    return a * x_s + b * noise


def sample_sigma(rng, shift, s, low=0.02, high=0.98):
    """Noise levels [b] above s at which samples are scored: uniform u after the shift, within [low, high]."""
    u = s / (shift - (shift - 1) * s)  # before the shift
    u = u + (1 - u) * rng.uniform()
    sigma = shift * u / (1 + (shift - 1) * u)
    return sigma.clamp(max(s, low), high)


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


def rollout(experts, rng, cond, shape, sigmas, x0_data=None):
    """Carry the student's own noise to noise level sigmas[-1] by Euler steps, each by the expert of its level. Returns
    the sample there and the video x0 that the last step aimed at, [b, *shape]. Only that step carries gradient.
    experts: {end of phase: network}, ends falling. x0_data: the input of the last step is these clips, noised.
    """
    x_t = rng.normal(shape)
    networks = [next(network for end, network in experts.items() if sigma > end) for sigma in sigmas[:-1]]
    sigmas = torch.stack([x_t.new_full((), sigma) for sigma in sigmas])
    if x0_data is not None:
        x_t, sigmas, networks = add_noise(x0_data, x_t, sigmas[-2].expand(len(rng))), sigmas[-2:], networks[-1:]
    with torch.no_grad():
        for network, sigma, sigma_next in zip(networks, sigmas[:-2], sigmas[1:-1]):
            x0 = predict_x0(network, x_t, sigma.expand(len(rng)), cond)
            x_t = x0 + sigma_next / sigma * (x_t - x0)
    x0 = predict_x0(networks[-1], x_t, sigmas[-2].expand(len(rng)), cond)
    return x0 + sigmas[-1] / sigmas[-2] * (x_t - x0), x0


def sample_student(students, shape, args, rng, cond):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one per phase."""
    return rollout(dict(zip(args.phase_ends, students)), rng, cond, shape, (*args.student_sigmas, 0.0))[0]


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
    device = common.init_distributed()
    run = Run(__file__, args, device)
    model = common.Model(args.teacher, *args.size, args.compute, args.student, args.negative_prompt)
    shape = model.latent_shape
    from_data, blocks = args.student_input == "data", args.discriminator_blocks if args.gan_weight else ()
    model.check(0, blocks)
    check_phases(args, model)
    data = common.load_data(model, args.prompts, args.data, run.cache, device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, device).cond_of([0])

    teacher, base = model.load_teacher(device, args.adapters)
    student = model.load_network("student", device, base=base)
    fake_score = model.load_network("fake_score", device, base=base)
    ema = model.load_network("ema", device, base=base) if args.ema_decay else student
    if args.gan_weight:
        torch.manual_seed(args.seed)
        fake_score.heads = model.shard(Heads(fake_score.width, blocks).to(device), device)
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}
    finished = phase_of(max(run.step - 1, 0), args)[0]  # phases, in the checkpoint to resume from
    experts = [model.load_network(f"expert_{i}", device, base=base) for i in range(finished)]
    networks |= {f"expert_{i}": expert for i, expert in enumerate(experts)}

    if (args.gan_weight or from_data) and not data.has_clips:
        data = teacher_samples(run, data, partial(sample_teacher, teacher, null_cond, shape, args), args)
    run.load(networks, optimizers)
    run.open()
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    if args.preview_every:
        preview.write_data()
        preview.write("teacher", partial(sample_teacher, teacher, null_cond, shape, args))

    for step in range(run.step, args.steps + 1):
        done = step == args.steps
        if args.preview_every and (done or step % args.preview_every == 0):
            students = [*experts, *[ema] * len(args.phase_ends)]  # in place of the experts to come
            preview.write(step, partial(sample_student, students, shape, args))
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, optimizers, students=[*experts, ema])
        if done or stop:
            break

        # next phase: freeze the expert; student and fake score begin at the teacher again
        phase, end, own_sigmas = phase_of(step, args)
        if phase > len(experts):
            experts.append(model.load_network(f"expert_{phase - 1}", device, base=base))
            common.ema_update(experts[-1], ema, decay=0)
            networks[f"expert_{phase - 1}"] = experts[-1]
            for network in (student, fake_score, ema):
                model.reset(network)
            student_optimizer.state.clear()
            fake_score_optimizer.state.clear()

        # ------------------------------------------------------------------------------------ one training step
        log = defaultdict(float)
        lr_scale = 1 - step * len(args.phase_ends) / args.steps % 1 if args.anneal_lr else 1
        student_optimizer.param_groups[0]["lr"] = args.lr * lr_scale
        fake_score_optimizer.param_groups[0]["lr"] = args.fake_score_lr * lr_scale

        # what changes the number of forwards must agree on all ranks: it is a function of the step
        shared = common.SharedRNG(args.seed, step)
        earlier = tuple(sigma for sigma in args.student_sigmas if sigma > own_sigmas[0])
        sigmas = (*earlier, *own_sigmas[: 1 + int(shared.uniform("exit") * len(own_sigmas))], end)
        floor = (args.score_ends or args.phase_ends)[phase]
        students = dict(zip(args.phase_ends, [*experts, student]))

        # student
        if step % args.student_every == 0:
            for rng, cond, load_x0 in data.micro_batches("student", step, args.batch_size, args.grad_accum):
                x_s, x0 = rollout(students, rng, cond, shape, sigmas, load_x0() if from_data else None)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift, floor, *args.score_sigmas)
                    noise = rng.normal(shape)
                    x_t = renoise(x_s, noise, sigma, end).requires_grad_(args.gan_weight > 0)
                with torch.set_grad_enabled(args.gan_weight > 0):
                    v, features = fake_score(x_t, sigma, cond, blocks)
                if args.gan_weight:  # its gradient in x_t alone: nothing of the fake score learns here
                    gan_loss = gan_student_loss(fake_score.heads(features))
                    log["loss/gan_student"] += gan_loss.detach() / args.grad_accum
                    (gan_grad,) = torch.autograd.grad(args.gan_weight * gan_loss, x_t)
                with torch.no_grad():
                    x0_fake = x_t - rearrange(sigma, "b -> b 1 1 1 1") * v
                    x0_teacher = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_teacher, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                if args.gan_weight:
                    loss = loss + (gan_grad * renoise(x_s, noise, sigma, end)).sum()
                (loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            common.ema_update(ema, student, args.ema_decay)

        # fake score: the same prompts and clips as the student, as sample numbers go by the step; noise of its own
        for rng, cond, load_x0 in data.micro_batches("fake_score", step, args.batch_size, args.grad_accum):
            with torch.no_grad():
                x_s, _ = rollout(students, rng, cond, shape, sigmas, load_x0() if from_data else None)
                sigma = sample_sigma(rng, args.shift, floor, *args.score_sigmas)
                noise = rng.normal(shape)
                x_t = renoise(x_s, noise, sigma, end)
            v, features = fake_score(x_t, sigma, cond, blocks)
            loss = flow_loss(v, x_s, noise, sigma, end)
            log["loss/fake_score"] += loss.detach() / args.grad_accum
            if args.gan_weight:
                logits_fake = fake_score.heads(features)
                _, features = fake_score(add_noise(load_x0(), noise, sigma), sigma, cond, blocks)
                gan_loss = discriminator_loss(logits_fake, fake_score.heads(features))
                log["loss/discriminator"] += gan_loss.detach() / args.grad_accum
                loss = loss + args.discriminator_weight * gan_loss
            (loss / args.grad_accum).backward()
        log["grad_norm/fake_score"] = common.clip_grad_norm(fake_score, args.max_grad_norm)
        fake_score_optimizer.step()
        fake_score_optimizer.zero_grad()

        run.log(step, log)

    run.finish(preview, stop)


if __name__ == "__main__":
    launch(main, Args)
