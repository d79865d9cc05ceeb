"""The start of a causal student: regression on the teacher's noise-video pairs, block by block (ODE initialisation, as
in CausVid, arXiv 2412.07772, and Self-Forcing, arXiv 2506.08009).

    python tools/ode_init.py --frame-block 1                     # the tiny teacher, minutes on two CPU cores
    python dmd2.py --frame-block 1 --init ode_init --gan-weight 0

    torchrun --nproc_per_node=8 tools/ode_init.py --teacher wan2.1-1.3b --frame-block 3

The teacher's weights know nothing of a past that is all they see. Here each block of frames, at one of the student's
noise levels, is to become the pair's, with the pair's blocks before it as its past. What stands between noise and video
is their straight line, not the teacher's curved path, of which a pair has the ends alone. No scores: the flags are
dmd.py's, and those of what is not here do nothing (--fake-score-lr, --student-every, --score-sigmas,
--regression-weight). No LoRA: the student is trained in full. The run folder is like a script's.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge

import common
import dmd
import dmd2
from dmd2 import add_noise, predict_x0, sample_student  # noqa: F401  (evidence.py and eval_vbench.py sample with it)
from training.files import UserError
from training.flags import launch
from training.preview import Preview
from training.run import Run
from training.samples import teacher_samples


@dataclass(kw_only=True)
class Args(dmd.Args):
    """dmd.py's flags and their numbers, and what makes the student causal."""

    frame_block: Annotated[int, Ge(1)]
    """Latent frames that the student makes at a time (Self-Forcing: 3)."""
    student_sigmas: tuple[float, ...]
    """Noise levels at which it predicts a video, the first 1."""


RECIPES = {  # those of dmd.py at dmd2.py's noise levels; steps and rate are ours, and only tiny's were tried
    name: dmd.RECIPES.get(name, {})
    | {key: row[key] for key in ("student_sigmas", "shift", "guidance_scale") if key in row}
    | ({"frame_block": 3, "steps": 3000, "lr": 5e-6} if name == "wan2.1-1.3b" else {})
    | ({"frame_block": 1, "steps": 1500, "num_samples": 1024} if name == "tiny" else {})
    for name, row in dmd2.RECIPES.items()
}


def regression_loss(student, x_t, sigma, cond, x0):
    """Mean squared error of the predictions of x0 [b, c, f, h, w], each block with the clean ones before it as past."""
    parts = []
    for x, target in zip(student.chunks(x_t), x0.split(student.frame_block, dim=2), strict=True):
        parts.append(predict_x0(student, x, sigma, cond))
        student.update_cache(target, cond)
    return F.mse_loss(torch.cat(parts, dim=2), x0)


def main(args):
    # setup
    if args.lora_rank or args.fake_lora_rank:
        raise UserError("this student is trained in full: leave out --lora-rank and --fake-lora-rank")
    run = Run(__file__, args)
    model = common.Model(args.teacher, args.frames, args.height, args.width, args.compute)
    shape = model.latent_shape
    dmd2.check(SimpleNamespace(**vars(args), gan_weight=0.0, discriminator_blocks=()), model)  # no discriminator here
    data = common.load_data(model, args.prompts, args.data, run.cache, run.device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, run.device).cond_of([0])
    teacher = model.load_network("teacher", run.device)
    student = model.load_network("student", run.device, args.frame_block)
    ema = model.load_network("ema", run.device, args.frame_block) if args.ema_decay else student
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    networks = {"student": student} | ({"ema": ema} if args.ema_decay else {})

    settings = (args.guidance_scale, args.shift, args.pair_steps)
    solve = lambda noise, cond: dmd2.solve_ode(teacher, noise, cond, null_cond, *settings)
    if args.pairs:
        pairs = common.Shards(args.pairs, model, run.device, args.seed, ("latents", "noise"), settings)
    else:
        pairs = teacher_samples(run, data, solve, args.num_samples, args.batch_size, settings)
    run.restore(networks, {"student": optimizer})
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    levels = torch.tensor(args.student_sigmas, device=run.device)

    for step in range(run.step, args.steps + 1):
        done = step == args.steps
        if args.preview_every and (done or step % args.preview_every == 0):
            preview.write(step, lambda rng, cond: sample_student([ema], rng, cond, shape, args))
        stop = run.stop_signal()
        if step > run.step and (done or stop or step % args.save_every == 0):
            run.save(step, networks, {"student": optimizer}, students=[ema])
        if done or stop:
            break

        log = defaultdict(float)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps if args.anneal_lr else 1)
        for rng, _, _ in data.micro_batches("student", step, args.batch_size, args.grad_accum):
            noise, x0 = pairs.latents(rng.numbers, "noise"), pairs.latents(rng.numbers)
            sigma = levels[(rng.uniform() * len(levels)).long()]
            x_t = add_noise(x0, noise, sigma)
            loss = regression_loss(student, x_t, sigma, pairs.cond(rng.numbers), x0)
            log["loss/regression"] += loss.detach() / args.grad_accum
            (loss / args.grad_accum).backward()
        log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(ema, student, args.ema_decay)
        run.log(step, log, total=args.steps)

    run.finish(preview, stop)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
