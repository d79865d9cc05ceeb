"""Train the tiny teachers: Wan-shaped video models of tiny/world.py, small enough for a laptop.

    python tiny/train.py                   # VAE, teachers, a smaller one: hours on two cores, no GPU
    python tiny/train.py --out runs/again/teacher --stages vae teacher

Four stages, each a function of tiny/training/. Each writes folders that stock diffusers loads, for example with
`WanPipeline.from_pretrained("runs/tiny/teacher")`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tiny.training.teacher import train_image_to_video, train_small, train_teacher
from tiny.training.vae import train_vae

STAGES = {"vae": train_vae, "teacher": train_teacher, "image-to-video": train_image_to_video, "small": train_small}


@dataclass
class Args:
    stages: tuple[Literal["vae", "teacher", "image-to-video", "small"], ...] = tuple(STAGES)
    """What to train, from what "vae" and "teacher" wrote. The image-to-video teacher is written into <out>_i2v, one of
    half the blocks into <out>_small."""
    out: Path = Path("runs/tiny/teacher")
    """Folder of the trained teacher, in the diffusers layout."""
    init: Path | None = None
    """A teacher that "teacher" trains on, in place of new weights on the VAE of <out>."""
    seed: int = 0
    """Seed of weights, clips and noise."""
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
    """Clips that the teachers train on, encoded once."""
    steps: int = 15000
    """Updates of the teacher."""
    i2v_steps: int = 3000
    """Updates of the image-to-video teacher, at half the learning rate."""
    small_steps: int = 1000
    """Updates of the smaller teacher, at half the learning rate."""
    batch: int = 32
    """Clips per teacher update."""
    lr: float = 2e-3
    """Learning rate of the teacher: warmed up, level, and down to zero over the last 60 % of the steps."""
    train_shift: float = 5.0
    """Shift of the noise levels in training: high noise decides the motion and is the hardest to learn."""
    dropout: float = 0.15
    """Share of captions replaced by the empty one, which guidance needs."""
    ema_decay: float = 0.999
    """Decay of the weight average that is written."""
    compile: bool = True
    """Compile the transformer for training; needs a C++ compiler."""


def main(args):
    written = {
        "vae": args.out / "vae",
        "teacher": args.out / "model_index.json",
        "image-to-video": args.out.with_name(args.out.name + "_i2v"),
        "small": args.out.with_name(args.out.name + "_small"),
    }
    for stage in args.stages:  # before hours of training
        if written[stage].exists():
            raise SystemExit(f"{written[stage]} is there already: give another --out")
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
