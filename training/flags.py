"""The run's own flags, which every script's `Args` inherits, their bounds, and the command line."""

import argparse
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from models.recipes import recipe
from training.checkpoints import find_checkpoint
from training.files import UserError, read_json


def rising(interval):
    if interval[0] >= interval[1]:
        raise ValueError("must rise")
    return interval


def falling(sigmas):
    if not sigmas or not 0.99 <= sigmas[0] <= 1 or any(high <= low for high, low in zip(sigmas, (*sigmas[1:], 0))):
        raise ValueError("must start at .99 to 1 and fall, above 0")
    return sigmas


Unit = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Unit, Unit], AfterValidator(rising)]
Levels = Annotated[tuple[float, ...], AfterValidator(falling)]


@dataclass(kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RunArgs:
    teacher: str = "tiny"
    """Whom to distill: a name (docs/teachers.md), or a local folder in the diffusers layout; FOLDER:i2v for the
    image-to-video of one that does both."""
    prompts: str | None = None
    """Text file with one prompt per line. Else the tiny teacher writes its own captions, others get prompts/."""
    images: str | None = None
    """Folder of the first frames of --prompts for an image-to-video teacher: that of line n is named n (1.png, …)."""
    data: str | None = None
    """Folder of latent shards (see common.Shards) whose prompts and clips are used instead of --prompts."""
    frames: PositiveInt = 81
    """Frames of the video; 1 + a multiple of 4, 1 for images."""
    height: PositiveInt = 480
    """Height of the video in pixels, a multiple of 16 (Wan 2.2 5B: 32)."""
    width: PositiveInt = 832
    """Width of the video in pixels, a multiple of 16 (Wan 2.2 5B: 32)."""
    batch_size: PositiveInt = 1
    """Samples per process and micro-batch."""
    anneal_lr: bool = False
    """Let both learning rates fall in a straight line, to zero at --steps; else they stay level, as in the papers."""
    betas: tuple[Unit, Unit] = (0.9, 0.999)  # CoDMD
    """AdamW betas of student and fake score."""
    weight_decay: NonNegativeFloat = 0.01  # CoDMD
    """AdamW weight decay of student and fake score."""
    max_grad_norm: PositiveFloat = 10.0  # CoDMD
    """Gradients longer than this are scaled down to it."""

    seed: NonNegativeInt = 0
    """Seed of all noise and data. The same seed and global batch give the same run at any number of processes."""
    runs_dir: str = "runs"
    """Where run folders, and the cache of text embeddings and teacher samples, are written."""
    init: str | None = None
    """Start student and fake score from a run or checkpoint of any of these scripts, not from the teacher. A script's
    name (dmd2) means its newest finished run on this teacher; students of others: docs/import.md."""
    resume: str | None = None
    """Continue exactly: "latest", a run or a checkpoint folder. Its flags stand unless given; keep the global batch."""
    save_every: PositiveInt = 500
    """Steps between checkpoints. One is also written at the end and on SIGTERM, SIGINT, SIGHUP, SIGUSR1."""
    keep: NonNegativeInt = 3
    """Checkpoints to keep, newest first; 0 keeps all."""
    preview_every: NonNegativeInt = 250
    """Steps between previews (contact sheet, mp4s, scores); 0 for none at all."""
    preview_prompts: PositiveInt = 4
    """Prompts in a preview: the first ones of the data."""
    preview_seeds: PositiveInt = 4
    """Samples of each prompt in a preview; contact sheet and mp4s show the first four."""
    teacher_steps: PositiveInt = 50
    """Euler steps of the teacher's samples: those that previews are compared with, and clips that it makes."""
    num_samples: PositiveInt = 1024
    """Samples that the teacher makes where a method needs pairs or clips and none are given."""
    max_hours: NonNegativeFloat = 4.0
    """Make no samples of the teacher (pairs, or clips where --data is not given) that would take longer than this."""
    lora_rank: NonNegativeInt = 0
    """Rank of the student's LoRA on the teacher's attention and feed-forward layers; 0 trains a copy of all weights."""
    fake_lora_rank: NonNegativeInt = 0
    """The same of the fake score."""
    lora_alpha: PositiveFloat = 8.0
    """LoRA's alpha: its update is scaled by alpha / rank."""
    gradient_checkpointing: NonNegativeInt = 1
    """Recompute the activations of every n-th block in the backward pass: less memory for more compute. 0: of none."""
    keep_attention: bool = False
    """Recompute all of these blocks but self-attention: its output is kept. Faster, for more memory."""
    compile: bool = False
    """Compile the transformers' blocks (torch.compile): the first steps take minutes, the others are faster."""
    attention: str | None = None
    """Attention backend of diffusers (_native_cudnn, _flash_3_hub: docs/hardware.md), else PyTorch chooses."""
    shard_size: NonNegativeInt = 0
    """GPUs that share a copy of each network (HSDP), for several machines; 0: all of them share one."""
    cpu: bool = False
    """Train a real teacher on the CPU, in float32, where no GPU is visible; else such a run ends at once."""
    track: bool = False
    """Log to Weights & Biases too, if it is installed."""

    @model_validator(mode="wrap")
    @classmethod
    def within_bounds(cls, values, check):
        """The first flag that is out of its type's bounds ends in one line."""
        try:
            return check(values)
        except ValidationError as error:
            flag, got = str(error.errors()[0]["loc"][0]).replace("_", "-"), error.errors()[0]["input"]
            raise UserError(f"--{flag}: {error.errors()[0]['msg'].lower()}, got {got}") from None

    @property
    def compute(self):
        """Flags that change time and memory, as common.Model takes them."""
        names = ("gradient_checkpointing", "keep_attention", "compile", "attention", "shard_size")
        return {name: getattr(self, name) for name in names}

    @property
    def adapters(self):
        """{role: (rank, alpha)} of the networks that are a LoRA on the teacher."""
        if self.lora_rank and getattr(self, "frame_block", 0):
            raise UserError("--lora-rank goes without --frame-block: a causal student is no LoRA on this teacher")
        like_the_student = ("student", "ema", *(f"expert_{i}" for i in range(len(getattr(self, "phase_ends", ())) - 1)))
        ranks = dict.fromkeys(like_the_student, self.lora_rank) | {"fake_score": self.fake_lora_rank}
        return {role: (rank, self.lora_alpha) for role, rank in ranks.items() if rank}


def recipe_args(Args, **flags):
    """A script's Args for a teacher (models/recipes.py) with `flags` on top: what the command line does."""
    script = Path(sys.modules[Args.__module__].__file__).stem.partition("-")[0]  # a variant's file is dmd2-NAME.py
    return Args(**{**recipe(flags.get("teacher", Args.teacher), script), **flags})


def parse_args(Args):
    """Command line -> Args. A flag beats the teacher's recipe, which beats the defaults of Args. For --resume, the args
    of that run stand in for both.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("teacher", "seed", "runs-dir", "resume"):
        scan.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    given = {name: value for name, value in vars(scan.parse_known_args()[0]).items() if value is not None}
    args = recipe_args(Args, teacher=given.get("teacher", Args.teacher))
    if "resume" in given:
        place, seed = given.get("runs_dir", args.runs_dir), given.get("seed", args.seed)
        run = find_checkpoint(place, Path(sys.argv[0]).stem, args.teacher, seed, given["resume"]).parents[1]
        before = read_json(run / "args.json")
        before = {key: value for key, value in before.items() if key in vars(args)}
        args = replace(args, **{**before, "runs_dir": str(run.parent), "resume": None, "track": False})
    about = (
        f"{sys.modules[Args.__module__].__doc__}\n{Args.__doc__}\n\nThe values below are for --teacher {args.teacher}."
    )
    return tyro.cli(Args, default=args, description=about)


@contextmanager
def one_line_errors():
    """A user's mistake in this block, or a file that cannot be read or written, ends the program with one line on
    standard error; so does Ctrl-C, with none.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run catches it
    try:
        yield
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}" if first_to_fail() else 1) from None


def first_to_fail():
    """Whether no other process of this machine has printed its error: torchrun ends all when the first one fails."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return True
    try:  # in torchrun's own folder of this attempt
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1].joinpath("printed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def launch(main, Args):
    """Run a script's main as a program."""
    with one_line_errors():
        main(parse_args(Args))
