"""DMD: distribution matching distillation into one step (Yin et al. 2023, arXiv 2311.18828).

The student turns noise into a video in one step. Its gradient is the difference between two denoisers at the same
noised sample: the fake score, trained along on the student's own samples, and the frozen teacher. A regression on
noise-video pairs of the teacher's ODE keeps it from dropping modes.

    python dmd.py                                          # the tiny teacher, half an hour on a CPU core
    torchrun --nproc_per_node=8 dmd.py --teacher wan2.1-1.3b --prompts prompts.txt --pairs pairs/

Notes, healthy curves and results: docs/dmd.md. The base file: dmd2.py is a diff of it, the other scripts of dmd2.py.
"""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

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
    student_every: int = 1
    """Fake-score updates per student update. DMD: 1 : 1 (algorithm 1)."""
    batch_size: int = 1
    """Samples per process and micro-batch."""
    grad_accum: int = 8
    """Micro-batches whose gradients are averaged into one update. On 8 GPUs: 64 videos, as CoDMD on Wan2.1-1.3B."""
    lr: float = 2e-6
    """Learning rate of the student (CoDMD on Wan2.1-1.3B; so are betas, clipping, shift and guidance)."""
    fake_score_lr: float = 2e-6
    """Learning rate of the fake score. DMD updates both networks alike; DMD2 and CoDMD slow this one down."""
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
    regression_weight: float = 0.25
    """Weight of the regression on the teacher's pairs (paper, eq. 9)."""
    pairs: str | None = None
    """Folder of noise-video pairs from tools/make_pairs.py. None: solve --num-pairs now and cache them."""
    num_pairs: int = 1024
    """How many pairs to solve when --pairs is not given."""
    pair_steps: int = 50
    """Euler steps of the teacher for one pair."""

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
    "wan2.1-14b": {"shift": 5.0, "lr": 4e-6, "fake_score_lr": 4e-6, "grad_accum": 4},  # CoDMD's 14B config
    "tiny": {
        "frames": 9, "height": 32, "width": 32, "batch_size": 16, "grad_accum": 1,
        "steps": 2000, "lr": 1e-3, "fake_score_lr": 1e-3, "anneal_lr": True, "shift": 1.0,
        "betas": (0.0, 0.999), "guidance_scale": 2.0, "gradient_checkpointing": False,
        "num_pairs": 512, "pair_steps": 12, "regression_weight": 0.02,  # .25 blurs, see docs/dmd.md
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


def rollout(student, rng, cond, shape):
    """The student's video [b, *shape] from its own noise, one step."""
    x_t = rng.normal(shape)
    sigma = torch.ones(len(rng), device=x_t.device)
    return predict_x0(student, x_t, sigma, cond)


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


def regression_loss(x0, x0_pair):
    # the paper's eq. 9 is LPIPS on decoded images; on latents, as CausVid's ODE initialisation: no video LPIPS is
    # established, and decoding 81 frames with gradients costs more memory than the student
    return F.mse_loss(x0, x0_pair)


def flow_loss(v, x0, noise):
    """The teacher's own training loss, for the fake score (eq. 6 in velocity form)."""
    return F.mse_loss(v, noise - x0)


# ---------------------------------------------------------------------------------------------------- main


def solve_pairs(args, spec, teacher, data, null_cond, device, folder):
    """Solve --num-pairs noise-video pairs of the teacher into shards; those that the folder has are kept."""
    for numbers in common.shared_chunks(folder, args.num_pairs, args.batch_size):
        rng, cond = common.Draws(args.seed, "pairs", numbers, device), data.cond(numbers)
        noise = rng.normal(spec.latent_shape)
        latents = solve_ode(teacher, noise, cond, null_cond, args.guidance_scale, args.shift, args.pair_steps)
        common.write_pairs(folder, data, numbers, cond, noise, latents)
    return common.Shards(folder, spec, device, keys=("latents", "noise"), seed=args.seed)


def pairs_key(args, spec, data):
    """What pairs depend on: a cache of them is good while this is the same."""
    how = (args.guidance_scale, args.shift, args.pair_steps, args.num_pairs, args.batch_size, args.seed)
    return common.hashed(spec.weights_id(), spec.latent_shape, spec.negative_prompt, data.prompts, how)


def main(args):
    # setup
    common.check_ranges(asdict(args))
    _, _, device = common.init_distributed()
    spec = common.Teacher(args.teacher, args.frames, args.height, args.width, offline=args.dry_run)
    if args.dry_run:
        # fake score: rollout, fake; student: rollout and regression, fake, guided teacher
        forwards, backwards = 2 + 5 / args.student_every, 1 + 2 / args.student_every
        return common.dry_run(spec, asdict(args), forwards, backwards)
    run = common.Run(__file__, asdict(args), args.runs_dir, args.resume, args.keep, args.track)
    pairs = common.Shards(args.pairs, spec, device, ("latents", "noise"), args.seed) if args.pairs else None
    cache = f"{args.runs_dir}/cache"
    data = common.load_data(spec, args.prompts, args.data, cache, device, args.seed)
    null_cond = common.encode_text(spec, [spec.negative_prompt], cache, device).cond_of([0])

    teacher = spec.load_network(trained=False, device=device)
    student = spec.load_network(True, device, gradient_checkpointing=args.gradient_checkpointing)
    fake_score = spec.load_network(True, device, gradient_checkpointing=args.gradient_checkpointing)
    ema = spec.load_network(False, device, dtype=torch.float32) if args.ema_decay else student
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    networks = {"student": student, "fake_score": fake_score} | ({"ema": ema} if args.ema_decay else {})
    optimizers = {"student": student_optimizer, "fake_score": fake_score_optimizer}
    folder = f"{cache}/pairs_{pairs_key(args, spec, data):016x}"
    pairs = pairs or solve_pairs(args, spec, teacher, data, null_cond, device, folder)
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
                latents = [rollout(ema, rng, cond, spec.latent_shape) for rng, cond in preview.batches()]
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

        # student
        if step % args.student_every == 0:
            for micro in range(args.grad_accum):
                numbers = common.sample_numbers(step, micro, args.batch_size, args.grad_accum)
                rng, cond = common.Draws(args.seed, "student", numbers, device), data.cond(numbers)
                x0 = rollout(student, rng, cond, spec.latent_shape)
                with torch.no_grad():
                    sigma = sample_sigma(rng, args.shift)
                    noise = rng.normal(spec.latent_shape)
                    x_t = add_noise(x0, noise, sigma)
                    x0_fake = predict_x0(fake_score, x_t, sigma, cond)
                    x0_real = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)
                    grad = dmd_gradient(x0, x0_real, x0_fake)
                loss = student_loss(x0, grad)
                log["loss/student"] += loss.detach() / args.grad_accum
                (loss / args.grad_accum).backward()

                # a backward of its own, so that one graph is alive at a time
                x0_pair, noise, cond = pairs.latents(numbers), pairs.latents(numbers, "noise"), pairs.cond(numbers)
                loss = regression_loss(predict_x0(student, noise, torch.ones_like(sigma), cond), x0_pair)
                log["loss/regression"] += loss.detach() / args.grad_accum
                (args.regression_weight * loss / args.grad_accum).backward()
            log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
            student_optimizer.step()
            student_optimizer.zero_grad()
            common.ema_update(ema, student, args.ema_decay)

        # fake score
        for micro in range(args.grad_accum):
            numbers = common.sample_numbers(step, micro, args.batch_size, args.grad_accum)
            rng, cond = common.Draws(args.seed, "fake_score", numbers, device), data.cond(numbers)
            with torch.no_grad():
                x0 = rollout(student, rng, cond, spec.latent_shape)
                sigma = sample_sigma(rng, args.shift)
                noise = rng.normal(spec.latent_shape)
                x_t = add_noise(x0, noise, sigma)
            loss = flow_loss(fake_score(x_t, sigma, cond), x0, noise)
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
    main(common.parse_args(Args, RECIPES))
