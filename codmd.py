"""CoDMD: Copula-aware distribution matching distillation (arXiv 2606.21982).

DMD2 without a discriminator matches each sample on its own; CoDMD adds how frames, and samples of a batch, relate.

    python codmd.py                                        # the tiny teacher, minutes on two CPU cores
    torchrun --nproc_per_node=8 codmd.py --teacher wan2.1-1.3b

Notes, healthy curves and results: docs/codmd.md. A diff of dmd2.py: docs/diffs/dmd2-codmd.md.
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
    """Training steps; one step updates the fake score once."""
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
    """Noise levels at which the student predicts a video, the first .99 to 1."""
    frame_block: Annotated[int, Ge(0)] = 0
    """Latent frames that a causal student makes at a time, from those before (Self-Forcing: 3); 0: all at once."""
    student_input: Literal["simulate", "data"]
    """Training inputs below noise level 1: the student's own earlier steps (DMD2, sec. 4.5), or clips with noise."""
    gan_weight: Annotated[float, Ge(0)]
    """Weight of the student's GAN loss. 0 builds no discriminator."""
    discriminator_weight: Annotated[float, Ge(0)]
    """Weight of the discriminator's loss beside the fake score's."""
    discriminator_blocks: tuple[int, ...]
    """Transformer blocks of the fake score whose outputs the discriminator reads."""
    relation_weight: Annotated[float, Ge(0)] = 0.1
    """Weight of the relation loss beside DMD's; 0 is DMD2."""
    sample_relation: Annotated[float, Ge(0)]
    """Part of the relations between the samples of a micro-batch, over all ranks."""
    frame_relation: Annotated[float, Ge(0)]
    """Part of the relations between the frames of each sample."""
    relation_temperature: Annotated[float, Ge(1e-6)] = 0.1
    """Temperature of the softmax over each row of similarities (tau)."""


RECIPES = {  # the first row is everybody's; the others change it
    "wan2.1-1.3b": {  # CoDMD on Wan2.1-1.3B, 64 videos per update on 8 GPUs
        "batch_size": 1, "grad_accum": 8, "steps": 10_000, "student_every": 5, "lr": 2e-6, "fake_score_lr": 4e-7,
        "betas": (0.9, 0.999), "weight_decay": 0.01, "max_grad_norm": 10.0, "ema_decay": 0.99,
        "guidance_scale": 4.5, "shift": 8.0, "student_sigmas": (1.0, 0.9, 0.757, 0.522), "student_input": "simulate",
        "gan_weight": 0.0, "discriminator_weight": 1e-2, "sample_relation": 0.0, "frame_relation": 1.0,
        "discriminator_blocks": (15, 22, 29),  # FastGen on Wan
    },
    "wan2.1-14b": {  # CoDMD's 14B config, which relates 32 samples of 32 GPUs, here 8 of 8; the blocks in proportion
        "shift": 5.0, "lr": 4e-6, "fake_score_lr": 8e-7, "grad_accum": 4, "student_sigmas": (1.0, 0.937, 0.833, 0.624),
        "discriminator_blocks": (20, 29, 39), "sample_relation": 1.0,
    },
    "tiny": {
        "batch_size": 16, "grad_accum": 1, "steps": 500, "lr": 1e-3, "fake_score_lr": 1e-3, "anneal_lr": True,
        "betas": (0.0, 0.999), "guidance_scale": 2.0, "shift": 3.0, "gradient_checkpointing": 0,
        "student_sigmas": (1.0, 0.9, 0.75, 0.5), "discriminator_blocks": (1, 3, 5),
        "save_every": 250, "preview_every": 250, "preview_prompts": 12,
    },
}  # fmt: skip


def check(args, model):
    """Raise one line for noise levels or blocks that cannot be."""
    sigmas, blocks, last = args.student_sigmas, args.discriminator_blocks, model.config["num_layers"] - 1
    model.network_class(args.frame_block)
    if not (sigmas and 0.99 <= sigmas[0] <= 1) or not all(high > low > 0 for high, low in pairwise(sigmas)):
        raise UserError(f"--student-sigmas must start at .99 to 1 and fall, above 0, got {' '.join(map(str, sigmas))}")
    if args.gan_weight and not 0 < len(blocks) == len(set(blocks) & set(range(last + 1))):
        raise UserError(f"--discriminator-blocks must be different numbers from 0 to {last}, got {blocks}")


def needs_clips(args):
    return args.gan_weight > 0 or args.student_input == "data"


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


def rollout(student, rng, cond, shape, sigmas, x0_data=None):
    """The student's video [b, *shape] from its own noise: predict x0 at each of the noise levels, renoise with fresh
    noise to the next. Only the last prediction carries gradient. x0_data: the input of that one is these clips, noised.
    """
    start, video = rng.normal(shape), []
    sigmas = torch.tensor(sigmas, device=start.device)[:, None].expand(-1, len(rng))
    if x0_data is not None:
        start, sigmas = add_noise(x0_data, start, sigmas[-1]), sigmas[-1:]
    for x_t in student.chunks(start):  # all frames at once, or block by block
        with torch.no_grad():
            for sigma, sigma_next in pairwise(sigmas):
                x_t = add_noise(predict_x0(student, x_t, sigma, cond), rng.normal(x_t.shape[1:]), sigma_next)
        video.append(predict_x0(student, x_t, sigmas[-1], cond))
        student.update_cache(video[-1], cond)
    return torch.cat(video, dim=2)


def sample_student(students, rng, cond, shape, args):
    """The finished student's video [b, *shape]. students: the networks that a run exports, here one."""
    return rollout(students[0], rng, cond, shape, args.student_sigmas)


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


def relation_matrix(features):
    """Cosine similarities [..., n, n] of the rows of features [..., n, c], the diagonal kept, float32."""
    z = F.normalize(features.float(), dim=-1)
    return z @ z.mT


def relation_kl(student, real, fake, temperature):
    """KL(P || Q), the mean over rows. All [..., n, c]. One row has no relations: 0."""
    s, r, f = (relation_matrix(features) for features in (student, real, fake))
    target = torch.softmax((s - (f - r)).detach() / temperature, dim=-1)  # P: the student's, moved from fake to real
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
    # setup
    run = Run(__file__, args)
    model = common.Model(args.teacher, args.frames, args.height, args.width, args.compute)
    shape = model.latent_shape
    check(args, model)
    data = common.load_data(model, args.prompts, args.data, run.cache, run.device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, run.device).cond_of([0])

    teacher = model.load_network("teacher", run.device, adapters=args.adapters)
    student = model.load_network("student", run.device, args.frame_block, base=teacher)
    fake_score = model.load_network("fake_score", run.device, base=teacher)
    ema = model.load_network("ema", run.device, args.frame_block, base=teacher) if args.ema_decay else student
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

        # how far the student is rolled out in this step: what all ranks must agree on is a function of the step
        shared = common.SharedRNG(args.seed, step)
        sigmas = args.student_sigmas[: 1 + int(shared.uniform("exit") * len(args.student_sigmas))]

        # student
        if step % args.student_every == 0:
            for rng, cond, x0_data in data.micro_batches("student", step, args.batch_size, args.grad_accum):
                x0 = rollout(student, rng, cond, shape, sigmas, x0_data() if from_data else None)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                    noise = rng.normal(shape)
                    x_t = add_noise(x0, noise, sigma)
                    x0_fake = predict_x0(fake_score, x_t, sigma, cond)
                    x0_teacher = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_teacher, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                weights = (args.sample_relation, args.frame_relation, args.relation_temperature)
                relation = relation_loss(x0, x0_teacher, x0_fake, *weights)
                log["loss/relation"] += relation.detach() / args.grad_accum
                loss = loss + args.relation_weight * relation
                if args.gan_weight:
                    _, features = fake_score(add_noise(x0, noise, sigma), sigma, cond, read)
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
                x0 = rollout(student, rng, cond, shape, sigmas, x0_data() if from_data else None)
                sigma = sample_sigma(rng, args.shift, *args.score_sigmas)
                noise = rng.normal(shape)
                x_t = add_noise(x0, noise, sigma)
            v, features = fake_score(x_t, sigma, cond, read)
            loss = flow_loss(v, x0, noise)
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
