"""A control for dfd.py: train a student on clips alone, by regression at its own noise levels. No teacher, no scores.

    python tools/finetune.py --init runs/dmd2__tiny__0__… --steps 100

What DFD gains over this is not a matter of having seen the clips. The flags are dfd.py's; the student is updated at
the steps where dfd.py would update it, on the same clips. The run folder is like a script's, for tools/evidence.py.
One checkpoint at the end and no previews: --save-every and --preview-every do nothing here, nor do the flags of what is
not here: scores, discriminator, --data-prob, --student-input, --anneal-lr.
"""

import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/finetune.py` finds the scripts

import common  # noqa: E402
from dfd import RECIPES, Args, rollout  # noqa: E402


def main(args):
    if not (args.init or args.resume):
        raise common.Fatal("--init CHECKPOINT is missing: the student to train on, a run of dmd2.py as a rule")
    if args.dry_run:
        raise common.Fatal("--dry-run counts for dfd.py, which has more networks: use it there")
    common.check_ranges(asdict(args))
    common.needs_clips({**asdict(args), "student_input": "data"})
    _, _, device = common.init_distributed()
    spec = common.Teacher(args.teacher, args.frames, args.height, args.width)
    run = common.Run(__file__, asdict(args), args.runs_dir, args.resume, args.keep, args.track)
    cache = f"{args.runs_dir}/cache"
    data = common.load_data(spec, args.prompts, args.data, cache, device, args.seed)
    student = spec.load_network(True, device, gradient_checkpointing=args.gradient_checkpointing)
    ema = spec.load_network(False, device, dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    networks, optimizers = {"student": student, "ema": ema}, {"student": optimizer}
    if args.init and not args.resume:
        common.load_init(args.init, networks)
    run.begin(networks, optimizers)
    stop = 0
    for step in range(run.step, args.steps):
        if step % args.student_every:
            continue
        stop = run.stop_signal()
        if stop:
            break
        shared, log = common.SharedDraws(args.seed, step), defaultdict(float)
        sigmas = args.student_sigmas[: 1 + int(shared.uniform("exit") * len(args.student_sigmas))]
        for micro in range(args.grad_accum):
            numbers = common.sample_numbers(step, micro, args.batch_size, args.grad_accum)
            rng, cond = common.Draws(args.seed, "student", numbers, device), data.cond(numbers)
            x0_data = data.latents(numbers)
            loss = F.mse_loss(rollout(student, rng, cond, spec.latent_shape, sigmas, x0_data), x0_data)
            log["loss/regression"] += loss.detach() / args.grad_accum
            (loss / args.grad_accum).backward()
        log["grad_norm/student"] = common.clip_grad_norm(student, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(ema, student, args.ema_decay)
        run.log(step, log, total=args.steps)
    else:
        step = args.steps
    run.save(step, networks, optimizers, export=ema)
    run.close()
    if run.rank == 0:
        print(f"run folder: {run.folder}")
    if stop:
        raise SystemExit(128 + stop)


if __name__ == "__main__":
    main(common.parse_args(Args, RECIPES))
