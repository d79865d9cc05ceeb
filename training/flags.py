"""The run's own flags, which every script's `Args` inherits, their bounds, and the command line."""

import argparse
import errno
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Ge, Gt, Lt
from tqdm import tqdm

from models.presets import PRESETS, most_like
from training.checkpoints import find_checkpoint
from training.files import UserError, read_json


@dataclass(kw_only=True)
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
    frames: Annotated[int, Ge(1)]
    """Frames of the video; 1 + a multiple of 4, 1 for images."""
    height: Annotated[int, Ge(1)]
    """Height of the video in pixels, a multiple of 16 (Wan 2.2 5B: 32)."""
    width: Annotated[int, Ge(1)]
    """Width of the video in pixels, a multiple of 16 (Wan 2.2 5B: 32)."""
    batch_size: Annotated[int, Ge(1)]
    """Samples per process and micro-batch."""
    grad_accum: Annotated[int, Ge(1)]
    """Micro-batches whose gradients are averaged into one update."""
    anneal_lr: bool = False
    """Let both learning rates fall in a straight line, to zero at --steps; else they stay level, as in the papers."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]]
    """AdamW betas of student and fake score."""
    weight_decay: Annotated[float, Ge(0)]
    """AdamW weight decay of student and fake score."""
    max_grad_norm: Annotated[float, Gt(0)]
    """Gradients longer than this are scaled down to it."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of all noise and data. The same seed and global batch give the same run at any number of processes."""
    runs_dir: str = "runs"
    """Where run folders, and the cache of text embeddings and teacher samples, are written."""
    init: str | None = None
    """Start student and fake score from a run or checkpoint of any of these scripts, not from the teacher. A script's
    name (dmd2) means its newest finished run on this teacher; students of others: docs/import.md."""
    resume: str | None = None
    """Continue exactly: "latest", a run or a checkpoint folder. Its flags stand unless given; keep the global batch."""
    save_every: Annotated[int, Ge(1)] = 500
    """Steps between checkpoints. One is also written at the end and on SIGTERM, SIGINT, SIGHUP, SIGUSR1."""
    keep: Annotated[int, Ge(0)] = 3
    """Checkpoints to keep, newest first; 0 keeps all."""
    preview_every: Annotated[int, Ge(0)] = 250
    """Steps between previews (contact sheet, mp4s, scores); 0 for none at all."""
    preview_prompts: Annotated[int, Ge(1)] = 4
    """Prompts in a preview: the first ones of the data."""
    preview_seeds: Annotated[int, Ge(1)] = 4
    """Samples of each prompt in a preview; contact sheet and mp4s show the first four."""
    teacher_steps: Annotated[int, Ge(1)] = 50
    """Euler steps of the teacher's samples: those that previews are compared with, and clips that it makes."""
    num_samples: Annotated[int, Ge(1)] = 1024
    """Samples that the teacher makes where a method needs pairs or clips and none are given."""
    max_hours: Annotated[float, Ge(0)] = 4.0
    """Make no samples of the teacher (pairs, or clips where --data is not given) that would take longer than this."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Rank of the student's LoRA on the teacher's attention and feed-forward layers; 0 trains a copy of all weights."""
    fake_lora_rank: Annotated[int, Ge(0)] = 0
    """The same of the fake score."""
    lora_alpha: Annotated[float, Ge(1e-6)] = 8.0
    """LoRA's alpha: its update is scaled by alpha / rank."""
    gradient_checkpointing: Annotated[int, Ge(0)] = 1
    """Recompute the activations of every n-th block in the backward pass: less memory for more compute. 0: of none."""
    compile: bool = False
    """Compile the transformers' blocks (torch.compile): the first steps take minutes, the others are faster."""
    attention: str | None = None
    """Attention backend of diffusers (native, flash, sage, …) instead of PyTorch's own choice."""
    shard_size: Annotated[int, Ge(0)] = 0
    """GPUs that share a copy of each network (HSDP), for several machines; 0: all of them share one."""
    track: bool = False
    """Log to Weights & Biases too, if it is installed."""

    @property
    def compute(self):
        """Flags that change time and memory, as common.Model takes them."""
        names = ("gradient_checkpointing", "compile", "attention", "shard_size")
        return {name: getattr(self, name) for name in names}

    @property
    def adapters(self):
        """{role: (rank, alpha)} of the networks that are a LoRA on the teacher."""
        if self.lora_rank and getattr(self, "frame_block", 0):
            raise UserError("--lora-rank goes without --frame-block: a causal student is no LoRA on this teacher")
        like_the_student = ("student", "ema", *(f"expert_{i}" for i in range(len(getattr(self, "phase_ends", ())) - 1)))
        ranks = dict.fromkeys(like_the_student, self.lora_rank) | {"fake_score": self.fake_lora_rank}
        return {role: (rank, self.lora_alpha) for role, rank in ranks.items() if rank}


def check_flags(args):
    """Raise one line for the first flag that is out of the bounds that its type is annotated with, or not finite."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
        bounds = {k: getattr(b, k) for b in getattr(hint, "__metadata__", ()) for k in words if hasattr(b, k)}
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not (
                math.isfinite(number)
                and bounds.get("ge", number) <= number <= bounds.get("le", number)
                and bounds.get("gt", -math.inf) < number < bounds.get("lt", math.inf)
            ):
                must = " and ".join(f"{words[k]} {b:g}" for k, b in bounds.items()) or "finite"
                raise UserError(f"--{name.replace('_', '-')} must be {must}, got {number}")

    low, high = getattr(args, "score_sigmas", (0, 1))
    if low >= high:
        raise UserError(f"--score-sigmas must rise, got {low} {high}")


def recipe_of(teacher, recipes):
    """The name of the row of `recipes` that holds for a teacher: its own, or that of the teacher most like it."""
    name = most_like(teacher)
    while name not in recipes:
        name = PRESETS[name].like
    return name


def with_recipe(Args, recipes, **flags):
    """Args of the teacher's recipe with `flags` on top: what the command line does, for tests and notebooks.

    recipes: {teacher: row of flags}; the first row is everybody's, and the teacher's own changes it. The video has the
    size that the teacher is made for.
    """
    teacher = flags.get("teacher", Args.teacher)
    everybody, name = next(iter(recipes.values())), recipe_of(teacher, recipes)
    size = dict(zip(("frames", "height", "width"), PRESETS[most_like(teacher)].size))
    return Args(**{**everybody, **size, **recipes[name], **flags})


def parse_args(Args, recipes):
    """Command line -> Args. A flag beats the teacher's row in `recipes`, which beats the defaults of Args. For
    --resume, the args of that run stand in for both.
    """
    if "--frame-block" in sys.argv and "frame_block" not in Args.__dataclass_fields__:
        raise UserError("--frame-block: no causal student here; dmd2.py, dfd.py and codmd.py have one")
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("teacher", "seed", "runs-dir", "resume"):
        scan.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    given = {name: value for name, value in vars(scan.parse_known_args()[0]).items() if value is not None}
    args = with_recipe(Args, recipes, teacher=given.get("teacher", Args.teacher))
    if "resume" in given:
        place, seed = given.get("runs_dir", args.runs_dir), given.get("seed", args.seed)
        run = find_checkpoint(place, Path(sys.argv[0]).stem, args.teacher, seed, given["resume"]).parents[1]
        before = read_json(run / "args.json") if (run / "args.json").is_file() else {}
        before = {k: tuple(v) if isinstance(v, list) else v for k, v in before.items() if k in vars(args)}
        for name, value in before.items():
            if isinstance(vars(args)[name], (int, float)) and not isinstance(value, (int, float)):
                raise UserError(f"{run / 'args.json'} is damaged: {name} is {value!r}")
        place = {"runs_dir": str(run.parent)} if before else {}  # it may have been moved
        args = replace(args, **{**before, **place, "resume": None, "track": False})
    row = recipe_of(args.teacher, recipes)
    whose = f"those of --teacher {args.teacher}" + ("" if row == args.teacher else f", the recipe of {row}")
    shown = f"The values below are {whose}; --teacher NAME --help shows another's."
    about = sys.modules[Args.__module__].__doc__
    return tyro.cli(Args, default=args, description=f"{about}\n{Args.__doc__}\n\n{shown}")


@contextmanager
def one_line_errors():
    """A user's mistake in this block, or a full disk, ends the program with one line on standard error; so does Ctrl-C,
    with none.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run catches it
    full = lambda error: isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    shown = threading.excepthook  # TensorBoard's thread meets a full disk too, and passes it on
    threading.excepthook = lambda hook: None if full(hook.exc_value) else shown(hook)
    try:
        try:
            yield
        except OSError as error:
            if not full(error):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise UserError(
                f"cannot write: {where}{error.strerror}; free some space, then go on", 1, alone=True
            ) from None
    except UserError as error:
        if error.alone or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, also under a progress bar
        raise SystemExit(error.code) from None


def launch(main, Args, recipes):
    """Run a script's main as a program."""
    with one_line_errors():
        main(parse_args(Args, recipes))
