"""CoDMD: Copula-aware distribution matching distillation (arXiv 2606.21982).

DMD2 without a discriminator matches each sample on its own. CoDMD adds how frames, and samples of a batch, relate to
each other: the teacher's and the fake score's similarity matrices say in which direction the student's must move.

    python codmd.py                                        # the tiny teacher, minutes on two CPU cores
    torchrun --nproc_per_node=8 codmd.py --teacher wan2.1-1.3b --prompts prompts.txt

Notes, healthy curves and results: docs/codmd.md. A diff of dmd2.py: docs/diffs/dmd2-codmd.md.
"""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

import common


@dataclass
class Args:
    """Defaults are for Wan2.1-1.3B; the rows of RECIPES change them for other teachers, and a flag beats both."""

    teacher: str = "tiny"
    """Whom to distill: tiny, wan2.1-1.3b, wan2.1-14b, or a local folder in the diffusers layout."""
    prompts: str | None = None
    """Text file with one prompt a line. The tiny teacher needs none: it writes its own captions."""
    data: str | None = None
    """Folder of latent shards (see common.Shards) whose prompts and clips are used instead of --prompts."""
    frames: int = 81
    """Frames of the video; 1 + a multiple of 4 for Wan."""
    height: int = 480
    """Height of the video in pixels, a multiple of 16 for Wan."""
    width: int = 832
    """Width of the video in pixels, a multiple of 16 for Wan."""

    steps: int = 10_000
    """Training steps; one step updates the fake score once."""
    student_every: int = 5
    """Fake-score updates per student update: the two time-scale rule (sec. 4.2)."""
    batch_size: int = 1
    """Samples per process and micro-batch."""
    grad_accum: int = 8
    """Micro-batches whose gradients are averaged into one update. On 8 GPUs: 64 videos, as CoDMD on Wan2.1-1.3B."""
    lr: float = 2e-6
    """Learning rate of the student (CoDMD on Wan2.1-1.3B; so are betas, clipping, shift and guidance)."""
    fake_score_lr: float = 4e-7
    """Learning rate of the fake score and the discriminator (CoDMD on Wan2.1-1.3B)."""
    anneal_lr: bool = False
    """Let both learning rates fall in a straight line, to zero at --steps; else they stay level, as in the papers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas of student and fake score."""
    weight_decay: float = 0.01
    """AdamW weight decay of student and fake score (PyTorch's default)."""
    max_grad_norm: float = 10.0
    """Gradients longer than this are scaled down to it."""
    ema_decay: float = 0.99
    """Decay of the averaged student, which is what previews and exports show; 0 keeps no average."""

    guidance_scale: float = 4.5
    """Teacher's guidance, uncond + g * (cond - uncond). Where a paper has cond + w * (cond - uncond), g = w + 1."""
    shift: float = 8.0
    """Noise-level shift s, sigma = s u / (1 + (s - 1) u): of the score times and of the teacher's solver."""
    student_sigmas: tuple[float, ...] = (1.0, 0.9, 0.757, 0.522)
    """Noise levels at which the student predicts a video, the first 1 (CoDMD on Wan2.1-1.3B)."""
    student_input: Literal["simulate", "data"] = "simulate"
    """Training inputs below noise level 1: the student's own earlier steps (sec. 4.5), or clips with noise."""
    gan_weight: float = 0.0
    """Weight of the student's GAN loss; DMD2 has 1e-3 to 5e-3. 0 builds no discriminator and needs no clips."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the fake score's (DMD2)."""
    discriminator_blocks: tuple[int, ...] = (15, 22, 29)
    """Transformer blocks of the fake score whose outputs the discriminator reads (FastGen on Wan)."""
    relation_weight: float = 0.1
    """Weight of the relation loss beside DMD's; 0 is DMD2."""
    sample_relation: float = 0.0
    """Part of the relations between the samples of a micro-batch, over all ranks (released configs: 0; for 14B 1)."""
    frame_relation: float = 1.0
    """Part of the relations between the frames of each sample (released configs)."""
    relation_temperature: float = 0.1
    """Temperature of the softmax over each row of similarities (tau)."""
    init: str | None = None
    """Checkpoint of any of these scripts whose student and fake score to start from, instead of the teacher."""
    from_scratch: bool = True
    """Allow to start from the teacher. Methods that are known to fail so want --init."""

    seed: int = 0
    """Seed of all noise and data. The same seed and global batch give the same run at any number of processes."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less memory for a third more compute."""
    runs_dir: str = "runs"
    """Where run folders, and the cache of text embeddings and pairs, are written."""
    save_every: int = 500
    """Steps between checkpoints. One is also written at the end and on SIGTERM or SIGINT."""
    keep: int = 3
    """Checkpoints to keep, newest first; 0 keeps all."""
    resume: str | None = None
    """Continue exactly: "latest", a run or a checkpoint folder. Its flags stand unless given; keep the global batch."""
    preview_every: int = 250
    """Steps between previews (contact sheet, mp4s, scores); 0 for none at all."""
    preview_prompts: int = 4
    """Prompts in a preview: the first ones of the data."""
    preview_seeds: int = 4
    """Samples of each prompt in a preview; contact sheet and mp4s show the first four."""
    teacher_steps: int = 50
    """Euler steps of the teacher's samples that previews are compared with."""
    track: bool = False
    """Log to Weights & Biases too, if it is installed."""
    dry_run: bool = False
    """Print parameters, memory per GPU and FLOPs per step, and stop. Loads no weights."""
    gpus: int = 0
    """GPUs to plan for with --dry-run; 0 means this launch's."""


RECIPES = {
    "wan2.1-1.3b": {},
    "wan2.1-14b": {  # CoDMD's 14B config; the blocks in proportion
        "shift": 5.0, "lr": 4e-6, "fake_score_lr": 8e-7, "grad_accum": 4, "student_sigmas": (1.0, 0.937, 0.833, 0.624),
        "discriminator_blocks": (20, 29, 39), "sample_relation": 1.0,
    },
    "tiny": {
        "frames": 9, "height": 32, "width": 32, "batch_size": 16, "grad_accum": 1,
        "steps": 500, "lr": 1e-3, "fake_score_lr": 1e-3, "anneal_lr": True, "shift": 3.0,
        "betas": (0.0, 0.999), "guidance_scale": 2.0, "gradient_checkpointing": False,
        "student_sigmas": (1.0, 0.9, 0.75, 0.5), "discriminator_blocks": (1, 3),
        "save_every": 250, "preview_every": 250, "preview_prompts": 12,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------- schedule and sampler


def add_noise(x0, noise, sigma):
    sigma = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def sample_sigma(rng, shift):
    u = rng.uniform()
    sigma = shift * u / (1 + (shift - 1) * u)
    return sigma.clamp(0.02, 0.98)  # after the shift: an atom at .98 is meant


def predict_x0(model, x_t, sigma, cond):
    v = model(x_t, sigma, cond)
    return x_t - rearrange(sigma, "b -> b 1 1 1 1") * v


def guided_x0(model, x_t, sigma, cond, null_cond, guidance_scale):
    """Classifier-free guidance, both halves in one forward. null_cond is one row; what it lacks is the same in both."""
    both = {key: torch.cat([null_cond.get(key, x).expand_as(x), x]) for key, x in cond.items()}
    uncond, cond = predict_x0(model, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def rollout(student, rng, cond, shape, sigmas, x0_data=None):
    """The student's video [b, *shape] from its own noise: predict x0 at each of the noise levels, renoise with fresh
    noise to the next. Only the last prediction carries gradient. x0_data: the input of that one is these clips, noised.
    """
    x_t = rng.normal(shape)
    sigmas = torch.tensor(sigmas, device=x_t.device)[:, None].expand(-1, len(rng))
    if x0_data is not None:
        x_t, sigmas = add_noise(x0_data, x_t, sigmas[-1]), sigmas[-1:]
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            x_t = add_noise(predict_x0(student, x_t, sigma, cond), rng.normal(shape), sigma_next)
    return predict_x0(student, x_t, sigmas[-1], cond)


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


def dmd_gradient(x0, x0_real, x0_fake):
    """Distribution matching gradient with respect to x0. All [b, c, f, h, w], float32."""
    grad = x0_fake - x0_real  # eq. 7
    weight = reduce((x0 - x0_real).abs(), "b c f h w -> b 1 1 1 1", "mean")  # eq. 8
    return torch.nan_to_num(grad / weight)


def student_loss(x0, grad):
    """A loss whose gradient with respect to x0 is grad / numel."""
    return 0.5 * F.mse_loss(x0, (x0 - grad).detach())


class Discriminator(nn.Module):
    """Logits of being real: a small head over the outputs of some blocks of the fake score, kept by forward hooks.

    A part of the fake score, so it trains, is clipped and saved with it. Call it right after a forward of that.
    """

    def __init__(self, network, blocks):
        super().__init__()
        d = network.width
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1)) for _ in blocks
        )
        self.read, self.features = blocks, {}  # outputs [b, tokens, d] of the last forward
        for i in blocks:
            network.blocks[i].register_forward_hook(lambda block, args, out, i=i: self.features.update({i: out}))

    def forward(self):
        """One logit a token and block, [b, tokens, blocks], float32."""
        logits = [head(self.features.pop(i)) for i, head in zip(self.read, self.blocks, strict=True)]
        return torch.cat(logits, dim=-1).float()


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


def relation_loss(x0, x0_real, x0_fake, sample_relation, frame_relation, temperature):
    """Relations between samples, over all ranks, and between the frames of each. All [b, c, f, h, w]."""
    samples = [common.gather_rows(reduce(x, "b c f h w -> b c", "mean")) for x in (x0, x0_real, x0_fake)]
    frames = [reduce(x, "b c f h w -> b f c", "mean") for x in (x0, x0_real, x0_fake)]
    return sample_relation * relation_kl(*samples, temperature) + frame_relation * relation_kl(*frames, temperature)


def flow_loss(v, x0, noise):
    """The teacher's own training loss, for the fake score (eq. 6 in velocity form)."""
    return F.mse_loss(v, noise - x0)


# ---------------------------------------------------------------------------------------------------- main


def main(args):
    # setup
    common.check_ranges(asdict(args))
    _, _, device = common.init_distributed()
    spec = common.Teacher(args.teacher, args.frames, args.height, args.width, offline=args.dry_run)
    common.check_blocks(spec, asdict(args))
    if args.dry_run:
        gan, rolled = args.gan_weight > 0, 1 if args.student_input == "data" else (len(args.student_sigmas) + 1) / 2
        # fake score: rollout, fake (twice with a discriminator); student: rollout, fake (ditto), guided teacher
        forwards = 1 + rolled + gan + (3 + rolled + gan) / args.student_every
        backwards = (1 + gan) * (1 + 1 / args.student_every)
        return common.dry_run(spec, asdict(args), forwards, backwards, graphs=1 + gan)
    clips, from_data = common.needs_clips(asdict(args)), args.student_input == "data"
    run = common.Run(__file__, asdict(args), args.runs_dir, args.resume, args.keep, args.track)
    cache = f"{args.runs_dir}/cache"
    data = common.load_data(spec, args.prompts, args.data, cache, device, args.seed)
    null_cond = common.encode_text(spec, [spec.negative_prompt], cache, device).cond_of([0])

    teacher = spec.load_network(trained=False, device=device)
    student = spec.load_network(True, device, gradient_checkpointing=args.gradient_checkpointing)
    fake_score = spec.load_network(True, device, gradient_checkpointing=args.gradient_checkpointing)
    ema = spec.load_network(False, device, dtype=torch.float32) if args.ema_decay else student
    if args.gan_weight:
        torch.manual_seed(args.seed)
        fake_score.discriminator = common.shard(Discriminator(fake_score, args.discriminator_blocks).to(device), device)
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}
    if args.init and not args.resume:
        common.load_init(args.init, networks)
    run.begin(networks, optimizers)
    preview = common.Preview(
        run, spec, data, args.preview_prompts, args.preview_seeds, args.batch_size, args.seed, device
    )
    if args.preview_every:
        preview.write_data()
        noises = [(rng.normal(spec.latent_shape), cond) for rng, cond in preview.batches()]
        solver = (null_cond, args.guidance_scale, args.shift, args.teacher_steps)
        preview.write("teacher", [solve_ode(teacher, noise, cond, *solver) for noise, cond in noises])

    for step in range(run.step, args.steps + 1):
        done = step == args.steps
        started = time.perf_counter()
        log = defaultdict(float)

        # preview
        if args.preview_every and (done or step % args.preview_every == 0):
            with torch.no_grad():
                levels = args.student_sigmas
                latents = [rollout(ema, rng, cond, spec.latent_shape, levels) for rng, cond in preview.batches()]
            run.scalars(step, preview.write(f"step_{step:07d}", latents))

        # save
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, optimizers, export=ema)
        if done or stop:
            break

        # ------------------------------------------------------------------------------------ one training step

        left = 1 - step / args.steps if args.anneal_lr else 1
        student_optimizer.param_groups[0]["lr"] = args.lr * left
        fake_score_optimizer.param_groups[0]["lr"] = args.fake_score_lr * left

        # how far the student is rolled out in this step: what all ranks must agree on is a function of the step
        shared = common.SharedDraws(args.seed, step)
        sigmas = args.student_sigmas[: 1 + int(shared.uniform("exit") * len(args.student_sigmas))]

        # student
        if step % args.student_every == 0:
            for micro in range(args.grad_accum):
                numbers = common.sample_numbers(step, micro, args.batch_size, args.grad_accum)
                rng, cond = common.Draws(args.seed, "student", numbers, device), data.cond(numbers)
                x0_data = data.latents(numbers) if clips else None
                x0 = rollout(student, rng, cond, spec.latent_shape, sigmas, x0_data if from_data else None)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift)
                    noise = rng.normal(spec.latent_shape)
                    x_t = add_noise(x0, noise, sigma)
                    x0_fake = predict_x0(fake_score, x_t, sigma, cond)
                    x0_real = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_real, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                weights = (args.sample_relation, args.frame_relation, args.relation_temperature)
                relation = relation_loss(x0, x0_real, x0_fake, *weights)
                log["loss/relation"] += relation.detach() / args.grad_accum
                loss = loss + args.relation_weight * relation
                if args.gan_weight:
                    fake_score(add_noise(x0, noise, sigma), sigma, cond)
                    gan_loss = gan_student_loss(fake_score.discriminator())
                    log["loss/gan_student"] += gan_loss.detach() / args.grad_accum
                    loss = loss + args.gan_weight * gan_loss
                (loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            fake_score_optimizer.zero_grad()  # of what the student's GAN loss left in it
            common.ema_update(ema, student, args.ema_decay)

        # fake score
        for micro in range(args.grad_accum):
            numbers = common.sample_numbers(step, micro, args.batch_size, args.grad_accum)
            rng, cond = common.Draws(args.seed, "fake_score", numbers, device), data.cond(numbers)
            x0_data = data.latents(numbers) if args.gan_weight or from_data else None
            with torch.no_grad():
                x0 = rollout(student, rng, cond, spec.latent_shape, sigmas, x0_data if from_data else None)
                sigma = sample_sigma(rng, args.shift)
                noise = rng.normal(spec.latent_shape)
                x_t = add_noise(x0, noise, sigma)
            loss = flow_loss(fake_score(x_t, sigma, cond), x0, noise)
            log["loss/fake_score"] += loss.detach() / args.grad_accum
            if args.gan_weight:
                logits_fake = fake_score.discriminator()
                fake_score(add_noise(x0_data, noise, sigma), sigma, cond)
                gan_loss = discriminator_loss(logits_fake, fake_score.discriminator())
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
    main(common.parse_args(Args, RECIPES))
