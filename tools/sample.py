"""Videos of your own prompts from a finished run: its student, and the teacher beside it.

    python tools/sample.py --checkpoint RUN --prompt "a red circle"
    python tools/sample.py --checkpoint RUN --prompts prompts.txt --seeds 4 --teacher --out samples/

RUN is a run folder (its newest checkpoint) or a checkpoint folder of any script. Sample s of prompt p begins with the
noise that it has in the run's previews; what it takes to get their very bits is in docs/sample.md.
"""

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from tqdm import tqdm

import common
import dmd2
from models.images import find_images
from models.latents import decode
from training.files import UserError, read_prompts
from training.finished import load_run, model_of, run_of, student_sampler, teacher_sampler
from training.flags import cli, one_line_errors
from training.media import contact_sheet, thumbnail, write_video

SHOWN = 12  # prompts on the sheet


@dataclass(kw_only=True)
class Args:
    checkpoint: str
    """Run folder (its newest checkpoint) or checkpoint folder of any script. RUN:raw samples the student itself where
    the export is its average."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What the video shows. Give it again for more."""
    prompts: str | None = None
    """Text file with one prompt per line instead."""
    image: Path | None = None
    """First frame for an image-to-video teacher: a file for all prompts, or a folder with that of prompt n as n.png
    (jpg, webp), counted from 1."""
    seeds: Annotated[int, Ge(1)] = 4
    """Samples of each prompt."""
    seed: Annotated[int, Ge(0)] = 0
    """The first of them; the others follow."""
    teacher: bool = False
    """Also the teacher's samples, of the same noise, with the run's guidance, shift and --teacher-steps."""
    teacher_folder: str | None = None
    """The run's teacher where it is now, a folder (FOLDER:i2v as for --teacher of a run) or a name."""
    frames: Annotated[int | None, Ge(1)] = None
    """Frames of the video instead of the run's; a causal student (--frame-block) can make more."""
    kept_frames: Annotated[int, Ge(0)] = 0
    """Latent frames before a block that a causal student reads, in whole blocks; 0 for all. For longer videos: those of
    training, less a block."""
    height: Annotated[int | None, Ge(1)] = None
    """Height in pixels instead of the run's."""
    width: Annotated[int | None, Ge(1)] = None
    """Width in pixels instead of the run's."""
    batch_size: Annotated[int | None, Ge(1)] = None
    """Samples in a forward instead of the run's."""
    out: Path | None = None
    """Folder for the files, new or empty. Else samples/ in the run's folder."""


@torch.no_grad()
def main(args):
    if bool(args.prompt) == bool(args.prompts) or "" in args.prompt:
        raise UserError("give --prompt TEXT or --prompts FILE, one of the two")
    prompts = read_prompts(args.prompts) if args.prompts else list(args.prompt)
    script, run_args, checkpoint = load_run(args.checkpoint)
    own = {name: getattr(args, name) or getattr(run_args, name) for name in ("frames", "height", "width", "batch_size")}
    run_args = replace(run_args, teacher=args.teacher_folder or run_args.teacher, **own)
    model = model_of(run_args)
    images, run = find_images(model, args.image, len(prompts)), run_of(checkpoint)
    out, cache = args.out or run / "samples", run.parent / "cache"
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: delete it, or give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)

    print(f"loading the student of {checkpoint}: minutes, if it is large")
    device = common.init_distributed()
    data, vae = common.encode_text(model, prompts, cache, device, images), model.load_vae(device, only_decodes=True)
    about = (model, device, script, run_args, checkpoint, args.checkpoint.endswith(":raw"), args.kept_frames)
    samplers = {"": lambda: student_sampler(*about)}
    if args.teacher:
        samplers["_teacher"] = lambda: teacher_sampler(model, device, run_args, cache, dmd2.sample_teacher)
    wanted = [(p, seed) for p in range(len(prompts)) for seed in range(args.seed, args.seed + args.seeds)]
    rows = defaultdict(list)  # {(prompt, suffix): clips}
    with tqdm(total=len(samplers) * len(wanted), unit="sample", dynamic_ncols=True) as bar:
        for suffix, load in samplers.items():  # one after the other, so that one of them is in memory
            sample = load()
            for first in range(0, len(wanted), run_args.batch_size):
                part = wanted[first : first + run_args.batch_size]
                numbers = [p * run_args.preview_seeds + seed for p, seed in part]  # a preview's
                rng = common.SampleRNG(run_args.seed, "preview", numbers, device)
                for (p, seed), x0 in zip(part, sample(rng, data.cond_of([p for p, _ in part])).split(1)):
                    clip = decode(vae, x0)[0].cpu()
                    write_video(out / f"{p:02d}_{seed}{suffix}", clip, model.fps)
                    if p < SHOWN:
                        rows[p, suffix].append(thumbnail(clip))
                    bar.update()
            del sample
    sheet = [(f"{p:02d}{suffix}: {prompts[p]}", rows[p, suffix]) for p, suffix in sorted(rows)]
    contact_sheet(out / "sheet.png", sheet)
    record = {"prompts": prompts, "checkpoint": checkpoint, "flags": asdict(args)}
    (out / "samples.json").write_text(json.dumps(record, indent=2, default=str))
    dist.destroy_process_group()
    print(f"{len(samplers) * len(wanted)} samples in {out}; sheet.png shows the first {SHOWN} prompts")


if __name__ == "__main__":
    with one_line_errors():
        main(cli(Args, description=__doc__))
