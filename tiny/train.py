"""Train the tiny teacher: a Wan-shaped text-to-video model of tiny/world.py, small enough for a laptop.

    python tiny/train.py                   # vae, teacher, report: hours on two cores (see tiny/README.md), no GPU
    python tiny/train.py --stage report --out tiny/teacher    # only table and contact sheet, of the shipped weights

It writes a folder that stock diffusers loads, `WanPipeline.from_pretrained("runs/tiny/teacher")`. Every stage is
interruptible: run the same command again and it goes on from the last snapshot in --work. Clips, noise and dropout are
functions of (seed, step), so a run that was interrupted and one that was not are the same run. The stages themselves
are in tiny/training/.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import WanPipeline

from tiny.training.image_to_video import train_image_to_video
from tiny.training.report import report
from tiny.training.teacher import train_teacher
from tiny.training.vae import vae_stage

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    stage: Literal["all", "vae", "teacher", "report", "image-to-video"] = "all"
    """What to run: `all` is `vae`, `teacher` and `report`, each of which needs those before it.
    `report` writes samples.png beside the folder `out`.
    `image-to-video`: the teacher of `out` trained on with the first frame given, into <out>_i2v."""
    out: Path = HERE.parent / "runs" / "tiny" / "teacher"
    """Folder of the trained teacher, in the diffusers layout. The shipped one is tiny/teacher."""
    work: Path = HERE.parent / "runs" / "tiny"
    """Folder for snapshots and cached latents; may be deleted afterwards."""
    seed: int = 0
    """Seed of weights, clips and noise."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    vae_steps: int = 1400
    """Updates of encoder and decoder together."""
    decoder_steps: int = 2400
    """Updates of the decoder alone after that, at half the learning rate."""
    vae_batch: int = 8
    """Clips per VAE update; every clip is fresh."""
    vae_lr: float = 2e-3
    """Peak learning rate of the VAE, after a warm-up and before a cosine to zero."""
    kl_weight: float = 3e-3
    """Weight of the mean KL per latent value against the mean absolute error per pixel."""
    clips: int = 16384
    """Clips that the teacher trains on, encoded once."""
    steps: int = 15000
    """Teacher updates."""
    i2v_steps: int = 3000
    """Updates of the image-to-video teacher, at half the learning rate."""
    batch: int = 32
    """Clips per teacher update."""
    lr: float = 2e-3
    """Learning rate of the teacher: warmed up, level, and down to zero over the last 60 % of the steps."""
    train_shift: float = 5.0
    """Shift of the noise levels in training: high noise decides the motion and is the hardest to learn."""
    shift: float = 3.0
    """Shift of the scheduler that is shipped."""
    dropout: float = 0.15
    """Share of captions replaced by the empty one, which guidance needs."""
    ema_decay: float = 0.999
    """Decay of the weight average that is shipped."""
    compile: bool = True
    """Compile the transformer for training; needs a C++ compiler."""
    save_every: int = 250
    """Updates between two snapshots, in every stage."""
    guidance_scale: float = 2.0
    """Guidance in the last column of the report, and the one recommended to trainers."""
    samples: int = 240
    """Samples per column and level of detail of the report."""


def check(args):
    """Exit with one line on arguments that cannot work."""
    problem = None
    counts = ("vae_steps", "decoder_steps", "vae_batch", "steps", "i2v_steps", "batch", "save_every", "samples")
    for name in (*counts, "vae_lr", "lr", "shift", "train_shift"):
        if getattr(args, name) <= 0:
            problem = f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}"
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"--{name.replace('_', '-')} must be finite, not {value}"
    if args.clips % 2048 or args.clips <= 0:
        problem = f"--clips must be a multiple of 2048, not {args.clips}"
    if args.threads < 0 or args.seed < 0:
        problem = "--threads and --seed must not be negative"
    if not 0 <= args.dropout <= 1 or not 0 <= args.ema_decay < 1:
        problem = "--dropout must be in [0, 1] and --ema-decay in [0, 1)"
    if args.stage == "teacher" and not (args.work / "vae" / "config.json").exists():
        problem = f"no VAE in {args.work / 'vae'}: run --stage vae first"
    if args.stage in ("report", "image-to-video") and not (args.out / "model_index.json").exists():
        problem = f"no teacher in {args.out}: run --stage all first"
    i2v = args.stage == "image-to-video"
    out = args.out.with_name(f"{args.out.name}_i2v") if i2v else args.out  # which a stage writes anew as a whole
    if args.stage in ("all", "teacher", "image-to-video"):
        if out.exists() and not (out / "model_index.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
            problem = f"--out: {out} is there and no teacher, and would be replaced: give another folder"
        if args.work.resolve().is_relative_to(out.resolve()):
            problem = f"--out: {out} would be replaced with --work in it: give another folder"
    try:  # before hours of training, not at the first snapshot
        for folder in (args.work, args.out.parent) if args.stage != "report" and not problem else ():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot write --{'work' if folder == args.work else 'out'} {folder}: {error.strerror}"
    if not problem and args.stage in ("report", "image-to-video"):
        try:
            WanPipeline.from_pretrained(args.out)
        except Exception as error:  # of a damaged folder each of its libraries raises its own
            problem = f"cannot read the teacher in {args.out}: {str(error).strip().splitlines()[0]}"
    if problem:
        print(f"tiny/train.py: {problem}", file=sys.stderr)
        sys.exit(2)


def main(args):
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage in ("all", "vae"):
        vae_stage(args)
    if args.stage in ("all", "teacher"):
        train_teacher(args)
    if args.stage in ("all", "report"):
        report(args)
    if args.stage == "image-to-video":
        train_image_to_video(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
