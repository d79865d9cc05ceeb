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
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass

import common
import dmd
from dmd2 import add_noise, noise_levels, predict_x0, sample_student, sample_teacher  # noqa: F401
from training.files import UserError
from training.flags import Levels, launch
from training.preview import Preview
from training.run import Run
from training.samples import solver_settings, teacher_samples


@dataclass(kw_only=True)
class Args(dmd.Args):
    """dmd.py's flags at dmd2.py's noise levels, and what makes the student causal. Only tiny's numbers were tried."""

    steps: PositiveInt = 3000
    lr: NonNegativeFloat = 5e-6
    frame_block: PositiveInt = 3  # Self-Forcing
    """Latent frames that the student makes at a time."""
    student_sigmas: Levels = (1.0, 0.9, 0.757, 0.522)  # CoDMD
    """Noise levels at which it predicts a video, the first 1."""


def regression_loss(student, x_t, sigma, cond, x0):
    """Mean squared error of the predictions of x0 [b, c, f, h, w], each block with the clean ones before it as past."""
    parts = []
    for x, target in zip(student.chunks(x_t), x0.split(student.frame_block, dim=2), strict=True):
        parts.append(predict_x0(student, x, sigma, cond))
        student.update_cache(target, cond)
    return F.mse_loss(torch.cat(parts, dim=2), x0)


def main(args):
    if args.lora_rank or args.fake_lora_rank:
        raise UserError("this student is trained in full: leave out --lora-rank and --fake-lora-rank")
    device = common.init_distributed()
    run = Run(__file__, args, device)
    model = common.Model(args.teacher, *args.size, args.compute, args.student, args.negative_prompt)
    shape = model.latent_shape
    model.check(args.frame_block, ())
    data = common.load_data(model, args.prompts, args.data, run.cache, device, args.seed, args.images)
    null_cond = common.encode_text(model, [model.negative_prompt], run.cache, device).cond_of([0])
    teacher = model.load_network("teacher", device)
    student = model.load_network("student", device, args.frame_block)
    ema = model.load_network("ema", device, args.frame_block) if args.ema_decay else student
    adamw = {"betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    networks = {"student": student} | ({"ema": ema} if args.ema_decay else {})

    pair_args = replace(args, teacher_steps=args.pair_steps)
    if args.pairs:
        pairs = common.Shards(args.pairs, model, device, args.seed, ("latents", "noise"), solver_settings(pair_args))
    else:
        pairs = teacher_samples(run, data, partial(sample_teacher, teacher, null_cond, shape, pair_args), pair_args)
    run.load(networks, {"student": optimizer})
    run.open()
    preview = Preview(run, model, data, args.preview_prompts, args.preview_seeds, args.batch_size)
    levels = torch.tensor(args.student_sigmas, device=device)

    for step in range(run.step, args.steps + 1):
        done = step == args.steps
        if args.preview_every and (done or step % args.preview_every == 0):
            preview.write(step, partial(sample_student, [ema], shape, args))
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
        run.log(step, log)

    run.finish(preview, stop)


if __name__ == "__main__":
    launch(main, Args)
