"""Videos of your own prompts from a finished run: its student, and the teacher beside it.

    python tools/sample.py --checkpoint RUN --prompt "a red circle"
    python tools/sample.py --checkpoint RUN --prompts prompts.txt --seeds 4 --teacher --out samples/

RUN is a run folder (its newest checkpoint) or a checkpoint folder of any script. Sample s of prompt p begins with the
noise that it has in the run's previews; what it takes to get their very bits is in docs/sample.md.
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from annotated_types import Ge
from tqdm import tqdm

import common
import dmd2
from models.images import find_images, read_images
from models.presets import PRESETS
from training.checkpoints import check_checkpoint
from training.files import UserError, make_folder, read_prompts, written_aside
from training.finished import load_run, run_of, student_folders, student_sampler, teacher_sampler
from training.flags import check_flags, one_line_errors
from training.media import contact_sheet, moving_sheet, write_video

SHOWN, HIGH = 12, 128  # prompts on the sheets, pixels of their clips


@dataclass(kw_only=True)
class Args:
    checkpoint: str
    """Run folder (its newest checkpoint) or checkpoint folder of any script. RUN:raw samples the student itself where
    the export is its average."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What the video shows. Give it again for more."""
    prompts: str | None = None
    """Text file with one prompt per line instead."""
    image: str | None = None
    """First frame of all prompts, for an image-to-video teacher."""
    images: str | None = None
    """Folder of the first frames of --prompts: that of line n is named n (1.png, …)."""
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
    cache: Path | None = None
    """Folder for text embeddings. Else the one beside the run's folder."""


def check(args):
    """One line for what cannot be, before anything is loaded. Returns the prompts, and the run: script, its flags with
    those given here on top, checkpoint.
    """
    check_flags(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("tools/sample.py is one process: start it without torchrun")
    if bool(args.prompt) == bool(args.prompts):
        raise UserError("give --prompt TEXT or --prompts FILE, one of the two")
    prompts = read_prompts(args.prompts) if args.prompts else [prompt.strip() for prompt in args.prompt]
    if "" in prompts:
        raise UserError("--prompt is empty: say what the video is to show")
    if any("\udc80" <= c <= "\udcff" for c in "".join(prompts)):  # bytes that Python could not read
        raise UserError("--prompt is not UTF-8: see your terminal's encoding, or give --prompts FILE")
    if args.image and args.images:
        raise UserError("--image is the first frame of all prompts, --images has one for each: leave one of them out")
    if args.images and not args.prompts:
        raise UserError("--images goes with --prompts; --image FILE with --prompt")
    script, run_args, checkpoint = load_run(args.checkpoint)
    check_checkpoint(checkpoint)
    student_folders(script, run_args, checkpoint)  # one line unless all phases are trained
    if args.kept_frames and not getattr(run_args, "frame_block", 0):
        raise UserError("--kept-frames is for a causal student, a run with --frame-block")
    own = {name: getattr(args, name) for name in ("frames", "height", "width", "batch_size")}
    run_args = replace(run_args, **{name: value for name, value in own.items() if value is not None})
    run_args = replace(run_args, teacher=args.teacher_folder or run_args.teacher)
    if run_args.teacher not in PRESETS and not Path(run_args.teacher.removesuffix(":i2v")).is_dir():
        raise UserError(f"the teacher {run_args.teacher} is not there: say with --teacher-folder where it is")
    return prompts, script, run_args, checkpoint


def first_frames(args, model, count):
    """Paths of the images that `count` prompts begin with, none for text-to-video."""
    given = args.image or args.images
    if model.conditions and not given:
        raise UserError(f"{model.name} begins with an image: give --image FILE, or --prompts with --images FOLDER")
    if given and not model.conditions:
        raise UserError(f"{model.name} does text-to-video: leave out --image{'s' if args.images else ''}")
    images = find_images(args.images, count) if args.images else [args.image] * count
    images = [Path(image) for image in images if image]
    for image in dict.fromkeys(images):
        read_images([image], *model.size[1:])  # one line if it cannot be
    return images


def shrunk(clip, moves):
    """A clip [3, f, h, w] no higher than sheets show it, so that many fit in memory; of one that does not move the four
    frames that a contact sheet shows.
    """
    f, h, w = clip.shape[1:]
    scale = min(1, HIGH / h)
    frames = range(f) if moves else torch.linspace(0, f - 1, min(4, f)).round().int().tolist()
    return F.interpolate(clip[:, list(frames)], size=(round(h * scale), round(w * scale)), mode="area")


@torch.no_grad()
def main(args):
    prompts, script, run_args, checkpoint = check(args)
    model = common.Model(run_args.teacher, run_args.frames, run_args.height, run_args.width)
    model.network_class(getattr(run_args, "frame_block", 0))  # one line if these frames are not whole blocks
    images = first_frames(args, model, len(prompts))
    run = run_of(checkpoint)
    if not (run or (args.out and args.cache)):
        raise UserError(f"{checkpoint} is in no run's folder: say with --out and --cache where to write")
    out = args.out or run / "samples"
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: delete it, or give another folder with --out")
    cache = args.cache or run.parent / "cache"
    make_folder(out, hint="; see --out")
    make_folder(cache, hint="; see --cache")

    device = common.init_distributed()
    data, vae = common.encode_text(model, prompts, cache, device, images), model.load_vae(device)
    raw = str(args.checkpoint).endswith(":raw")
    student = lambda: student_sampler(model, device, script, run_args, checkpoint, raw, args.kept_frames)
    teacher = lambda: teacher_sampler(model, device, run_args, cache, dmd2.solve_ode)
    samplers = {"student": student} | ({"teacher": teacher} if args.teacher else {})
    wanted = [(p, seed) for p in range(len(prompts)) for seed in range(args.seed, args.seed + args.seeds)]
    shown = defaultdict(list)  # {(prompt, model): clips}
    with tqdm(total=len(samplers) * len(wanted), unit="sample", dynamic_ncols=True) as bar:
        for name, load in samplers.items():  # one after the other, so that one of them is in memory
            sample = load()
            for first in range(0, len(wanted), run_args.batch_size):
                part = wanted[first : first + run_args.batch_size]
                numbers = [p * run_args.preview_seeds + seed for p, seed in part]  # a preview's
                draws = common.SampleRNG(run_args.seed, "preview", numbers, device)
                latents = sample(draws, data.cond_of([p for p, _ in part]))
                for (p, seed), x0 in zip(part, latents.split(1)):
                    clip = common.decode(vae, x0)[0].cpu()
                    if not clip.isfinite().all():
                        raise UserError(f"the {name}'s sample of prompt {p}, seed {seed} is not finite", code=1)
                    write_video(out / f"{p:02d}_{seed}{'_teacher' if name == 'teacher' else ''}", clip, model.fps)
                    if p < SHOWN:
                        shown[p, name].append(shrunk(clip, moves=seed == args.seed))
                    bar.update()
            del sample

    rows = [(f"{p:02d} {name}: {prompts[p]}", shown[p, name]) for p in range(len(prompts[:SHOWN])) for name in samplers]
    contact_sheet(out / "sheet.png", rows)
    if model.size[0] > 1:
        moving_sheet(out / "clips.webp", [(label, clips[:1]) for label, clips in rows], model.fps)
    record = {"prompts": prompts, "checkpoint": checkpoint, "flags": asdict(args)}
    with written_aside(out / "samples.json") as aside:
        aside.write_text(json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    kind, moving = ("mp4", ", clips.webp (moving)") if model.size[0] > 1 else ("png", "")
    only = f", which show the first {SHOWN} prompts" if len(prompts) > SHOWN else ""
    print(f"{len(samplers) * len(wanted)} samples: {out}/<prompt>_<seed>.{kind}; sheet.png{moving}{only}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
