"""Solve noise-video pairs of a teacher once, for the regression of dmd.py.

    torchrun --nproc_per_node=8 tools/make_pairs.py --pairs pairs/ --teacher wan2.1-1.3b --prompts prompts.txt
    torchrun --nproc_per_node=8 dmd.py --pairs pairs/ --teacher wan2.1-1.3b --prompts prompts.txt

A pair is the noise and what the guided teacher makes of it by deterministic Euler steps. The flags are dmd.py's; those
that matter are --num-samples, --pair-steps, --guidance-scale, --shift, --batch-size (pairs solved at once), --seed and
the video's shape; --max-hours does not stop it. Run it again after an interruption: it goes on.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

import common
import dmd
from training.files import UserError
from training.flags import launch
from training.samples import samples_key, teacher_samples


def main(args):
    if not args.pairs:
        raise UserError("say with --pairs in which folder the pairs go")
    out, cache = Path(args.pairs), Path(args.runs_dir) / "cache"
    device = common.init_distributed()
    model = common.Model(args.teacher, *args.size, negative_prompt=args.negative_prompt)
    data = common.load_data(model, args.prompts, args.data, cache, device, args.seed, args.images)
    args = replace(args, teacher_steps=args.pair_steps)

    # the folder says what its pairs are, so that others are not added to them
    key, note = str(samples_key(data, args)), out / "key.txt"
    out.mkdir(parents=True, exist_ok=True)
    before = [note.read_text() if note.is_file() else "" if any(out.glob("*.safetensors")) else key]
    dist.broadcast_object_list(before)
    if before[0] != key:
        raise UserError(f"{out} holds shards of other settings (teacher, prompts or flags): give another folder")
    if dist.get_rank() == 0:
        note.write_text(key)

    null_cond = common.encode_text(model, [model.negative_prompt], cache, device).cond_of([0])
    teacher = model.load_network("teacher", device)
    sample = partial(dmd.sample_teacher, teacher, null_cond, model.latent_shape, args)
    run = SimpleNamespace(device=device, cache=cache, max_hours=math.inf)
    pairs = teacher_samples(run, data, sample, args, folder=out)
    if dist.get_rank() == 0:
        print(f"{len(pairs)} pairs in {out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, dmd.Args)
