"""CoDMD: Copula-aware distribution matching distillation (arXiv 2606.21982).

DMD2 without a discriminator matches each sample on its own; CoDMD adds how frames, and samples of a batch, relate.

    python codmd.py                                        # the tiny teacher, minutes on two CPU cores
    torchrun --nproc_per_node=8 codmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/codmd.md. Read it as a diff: git diff --no-index dmd2.py codmd.py
"""

from collections import defaultdict
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

import common
from training.flags import Interval, Levels, RunArgs, Unit, launch
from training.preview import Preview
from training.run import Run
from training.samples import teacher_samples


@dataclass(kw_only=True)
class Args(RunArgs):
    """The defaults are for Wan2.1-1.3B on 8 GPUs; models/recipes.py has what other teachers change."""

    steps: PositiveInt = 10_000
    """Training steps; one step updates the fake score once."""
    grad_accum: PositiveInt = 8  # CoDMD: 64 videos per update
    """Micro-batches whose gradients are averaged into one update."""
    student_every: PositiveInt = 5  # DMD2, sec. 4.2
    """Fake-score updates per student update: the two time-scale rule."""
    lr: NonNegativeFloat = 2e-6  # CoDMD
    """Learning rate of the student."""
    fake_score_lr: NonNegativeFloat = 4e-7  # CoDMD
    """Learning rate of the fake score and the discriminator."""
    ema_decay: Unit = 0.99  # Self-Forcing; DMD2 and CoDMD have no average
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: NonNegativeFloat = 4.5  # CoDMD
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: Annotated[float, Field(ge=1)] = 8.0  # CoDMD
    """Shift s of noise levels, sigma = s u / (1 + (s - 1) u): of those that are scored and of the teacher's solver."""
    score_sigmas: Interval = (0.02, 0.98)  # CausVid, DMD2's .02 and .98 of 1,000 timesteps
    """Range of the noise levels that are scored: after the shift, draws beyond it are set to its ends."""
    student_sigmas: Levels = (1.0, 0.9, 0.757, 0.522)  # CoDMD
    """Noise levels at which the student predicts a video, the first .99 to 1."""
    frame_block: NonNegativeInt = 0
    """Latent frames that a causal student makes at a time, from those before (Self-Forcing: 3); 0: all at once."""
    student_input: Literal["simulate", "data"] = "simulate"  # DMD2, sec. 4.5
    """Training inputs below noise level 1: the student's own earlier steps, or clips with noise."""
    gan_weight: NonNegativeFloat = 0.0  # the paper has none
    """Weight of the student's GAN loss. 0, also the default without clips of --data, builds no discriminator."""
    discriminator_weight: NonNegativeFloat = 1e-2  # DMD2
    """Weight of the discriminator's loss beside the fake score's."""
    discriminator_blocks: tuple[int, ...] = (15, 22, 29)  # FastGen
    """Transformer blocks of the fake score whose outputs the discriminator reads."""
    relation_weight: NonNegativeFloat = 0.1  # CoDMD
    """Weight of the relation loss beside DMD's; 0 is DMD2."""
    sample_relation: NonNegativeFloat = 0.0  # CoDMD, 1.3B
    """Part of the relations between the samples of a micro-batch, over all ranks."""
    frame_relation: NonNegativeFloat = 1.0  # CoDMD, 1.3B
    """Part of the relations between the frames of each sample."""
    relation_temperature: PositiveFloat = 0.1  # CoDMD
    """Temperature of the softmax over each row of similarities (tau)."""


def noise_levels(args):
    """Noise levels at which the finished student predicts, a tuple for each network that a run exports."""
    return [args.student_sigmas]


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


def rollout(student, rng, cond, shape, sigmas, x0_data=None):
    """The student's video [b, *shape] from its own noise: predict x0 at each of the noise levels, renoise with fresh
    noise to the next. Only the last prediction carries gradient. x0_data: the input of that one is these clips, noised.
    """
    start, video = rng.normal(shape), []
    sigmas = torch.stack([start.new_full((len(rng),), sigma) for sigma in sigmas])
    if x0_data is not None:
        start, sigmas = add_noise(x0_data, start, sigmas[-1]), sigmas[-1:]
    for x_t in student.chunks(start):  # all frames at once, or block by block
        with torch.no_grad():
            for sigma, sigma_next in pairwise(sigmas):
                x_t = add_noise(predict_x0(student, x_t, sigma, cond), rng.normal(x_t.shape[1:]), sigma_next)
        video.append(predict_x0(student, x_t, sigmas[-1], cond))
        student.update_cache(video[-1], cond)
    return torch.cat(video, dim=2)


def sample_student(students, shape, args, rng, cond):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one."""
    return rollout(students[0], rng, cond, shape, args.student_sigmas)


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


def relation_matrix(features):
    """Cosine similarities [..., n, n] of the rows of features [..., n, c], the diagonal kept, float32."""
    z = F.normalize(features.float(), dim=-1)
    return z @ z.mT


def relation_kl(student, teacher, fake, temperature):
    """KL(P || Q), the mean over rows. All [..., n, c]. One row has no relations: 0."""
    s, t, f = (relation_matrix(features) for features in (student, teacher, fake))
    target = torch.softmax((s - (f - t)).detach() / temperature, dim=-1)  # P: the student's, moved from fake to teacher
    return F.kl_div(torch.log_softmax(s / temperature, dim=-1), target, reduction="none").sum(-1).mean()


def relation_loss(x0, x0_teacher, x0_fake, sample_relation, frame_relation, temperature):
    """Relations between samples, over all ranks, and between the frames of each. All [b, c, f, h, w]."""
    samples = [common.gather_rows(reduce(x, "b c f h w -> b c", "mean")) for x in (x0, x0_teacher, x0_fake)]
    frames = [reduce(x, "b c f h w -> b f c", "mean") for x in (x0, x0_teacher, x0_fake)]
    return sample_relation * relation_kl(*samples, temperature) + frame_relation * relation_kl(*frames, temperature)


def flow_loss(v, x0, noise):
    """The teacher's own training loss, for the fake score (DMD, eq. 6, in velocity form)."""
    return F.mse_loss(v, noise - x0)


# ---------------------------------------------------------------------------------------------------- main


def main(args):
    device = common.init_distributed()
    run = Run(__file__, args, device)
    model = common.Model(args.teacher, *args.size, args.compute, args.student, args.negative_prompt)
    shape = model.latent_shape
    from_data, blocks = args.student_input == "data", args.discriminator_blocks if args.gan_weight else ()
    model.check(args.frame_block, blocks)
    data = common.load_data(model, args.prompts, args.data, run.cache, device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, device).cond_of([0])

    teacher, base = model.load_teacher(device, args.adapters)
    student = model.load_network("student", device, args.frame_block, base=base)
    fake_score = model.load_network("fake_score", device, base=base)
    ema = model.load_network("ema", device, args.frame_block, base=base) if args.ema_decay else student
    if args.gan_weight:
        torch.manual_seed(args.seed)
        fake_score.heads = model.shard(Heads(fake_score.width, blocks).to(device), device)
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}

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

        # what changes the number of forwards must agree on all ranks: it is a function of the step
        shared = common.SharedRNG(args.seed, step)
        sigmas = args.student_sigmas[: 1 + int(shared.uniform("exit") * len(args.student_sigmas))]

        # student
        if step % args.student_every == 0:
            for rng, cond, load_x0 in data.micro_batches("student", step, args.batch_size, args.grad_accum):
                x0 = rollout(student, rng, cond, shape, sigmas, load_x0() if from_data else None)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                    noise = rng.normal(shape)
                    x_t = add_noise(x0, noise, sigma).requires_grad_(args.gan_weight > 0)
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
                parts = args.sample_relation, args.frame_relation
                relation = relation_loss(x0, x0_teacher, x0_fake, *parts, args.relation_temperature)
                log["loss/relation"] += relation.detach() / args.grad_accum
                loss = loss + args.relation_weight * relation
                if args.gan_weight:
                    loss = loss + (gan_grad * add_noise(x0, noise, sigma)).sum()
                (loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            common.ema_update(ema, student, args.ema_decay)

        # fake score: the same prompts and clips as the student, as sample numbers go by the step; noise of its own
        for rng, cond, load_x0 in data.micro_batches("fake_score", step, args.batch_size, args.grad_accum):
            with torch.no_grad():
                x0 = rollout(student, rng, cond, shape, sigmas, load_x0() if from_data else None)
                sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                noise = rng.normal(shape)
                x_t = add_noise(x0, noise, sigma)
            v, features = fake_score(x_t, sigma, cond, blocks)
            loss = flow_loss(v, x0, noise)
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
