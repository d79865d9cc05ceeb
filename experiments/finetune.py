"""A control for dfd.py: train a student on clips alone, by regression at its own noise levels. No teacher, no scores.

    python experiments/finetune.py --init runs/dmd2__tiny__0__… --steps 100

What DFD gains over this is not a matter of having seen the clips. The flags are dfd.py's; the student is updated at
the steps where dfd.py would update it, on the same clips. One checkpoint is written at the end and no previews:
--save-every and --preview-every do nothing here, nor do the flags of what is not here: scores, discriminator,
--data-prob, --student-input, --anneal-lr. The run folder is like a script's, for experiments/evidence.py.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F

import common
from dfd import RECIPES, Args, check, rollout, sample_student  # noqa: F401  (evidence.py samples with the last)
from training.files import UserError
from training.flags import launch
from training.run import Run


def main(args):
    # setup
    if not (args.init or args.resume):
        raise UserError("--init CHECKPOINT is missing: the student to train on, a run of dmd2.py as a rule")
    if args.lora_rank or args.fake_lora_rank:
        raise UserError("this student is trained in full: leave out --lora-rank and --fake-lora-rank")
    run = Run(__file__, args)
    model = common.Model(args.teacher, args.frames, args.height, args.width, args.compute)
    check(args, model)
    data = common.load_data(model, args.prompts, args.data, run.cache, run.device, args.seed, args.images)
    if not data.has_clips:
        raise UserError("this trains on clips, and prompts are not: pass --data FOLDER (latent shards)")
    student = model.load_network("student", run.device, args.frame_block)
    ema = model.load_network("ema", run.device, args.frame_block)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    networks, optimizers = {"student": student, "ema": ema}, {"student": optimizer}
    run.restore(networks, optimizers)

    stop = 0
    for step in range(run.step, args.steps):
        if step % args.student_every:
            continue
        stop = run.stop_signal()
        if stop:
            break
        shared, log = common.SharedRNG(args.seed, step), defaultdict(float)
        sigmas = args.student_sigmas[: 1 + int(shared.uniform("exit") * len(args.student_sigmas))]
        for rng, cond, x0_data in data.micro_batches("student", step, args.batch_size, args.grad_accum):
            loss = F.mse_loss(rollout(student, rng, cond, model.latent_shape, sigmas, x0_data()), x0_data())
            log["loss/regression"] += loss.detach() / args.grad_accum
            (loss / args.grad_accum).backward()
        log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(ema, student, args.ema_decay)
        run.log(step, log, total=args.steps)
    else:
        step = args.steps
    run.save(step, networks, optimizers, students=[ema])
    run.close()
    if run.rank == 0:
        print(f"run folder: {run.folder}")
    if stop:
        raise SystemExit(128 + stop)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
