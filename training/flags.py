"""The run's own flags, which every script's `Args` inherits, their bounds, and the command line."""

import argparse
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import field, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from models.presets import PRESETS, TINY_WORLD, name_of
from models.recipes import recipe
from training.checkpoints import find_checkpoint, find_init
from training.files import MISTAKES, UserError, one_line
from training.start import flags_of, handed_on


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
GROUPS = {"teacher": "data", "batch_size": "recipe", "seed": "run", "lora_rank": "compute"}  # of --help, by their first


@dataclass(kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))
class RunArgs:
    teacher: str = "tiny"
    """Whom to distill: a name (docs/teachers.md), or a local folder in the diffusers layout; FOLDER:i2v for the
    image-to-video of one that does both."""
    student: str | None = None
    """Whose weights student and fake score start with, a name or folder as for --teacher: a smaller model of the same
    latents and text. Else the teacher's."""
    negative_prompt: str | None = None
    """Prompt of guidance's other half, in place of the teacher's own (docs/dialects.md)."""
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
    """Let both learning rates fall in a straight line, to zero at --steps (of a resumed run, at its new --steps); else
    they stay level, as in the papers."""
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
    """Start student and fake score from a run or checkpoint of any of these scripts, not from the teacher; its size,
    and of a few-step student noise levels, shift, guidance and frame block, hold here too unless given. A script's name
    (dmd2) means its newest finished run on this teacher; students of others: docs/import.md."""
    init_strength: float = 1.0
    """What a LoRA at --init is multiplied with, beside its alpha / rank: a file that asks for less says so."""
    resume: str | None = None
    """Continue exactly: "latest", a run or a checkpoint folder. Its flags stand unless given; keep the global batch."""
    save_every: PositiveInt = 50
    """Steps between checkpoints. One is also written at the end and on SIGTERM, SIGINT, SIGHUP, SIGUSR1."""
    keep: NonNegativeInt = 3
    """Checkpoints to keep, newest first; 0 keeps all."""
    preview_every: NonNegativeInt = 50
    """Steps between previews (contact sheet, mp4s, scores); 0 for none at all."""
    preview_prompts: PositiveInt = 4
    """Prompts in a preview: the first ones of the data."""
    preview_seeds: PositiveInt = 4
    """Samples of each prompt in a preview; there are mp4s of the first four, and the sheet shows two."""
    teacher_steps: PositiveInt = 50
    """Euler steps of the teacher's samples: those that previews are compared with, and clips that it makes."""
    num_samples: PositiveInt = 1024
    """Samples that the teacher makes where a method needs pairs or clips and none are given."""
    track: bool = False
    """Log to Weights & Biases too, if it is installed."""
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

    @property
    def has_clips(self):
        """Whether there are clips without the teacher's making them: those of --data or of the tiny world."""
        return bool(self.data) or name_of(self.teacher) in TINY_WORLD and not self.prompts

    @property
    def size(self):
        return self.frames, self.height, self.width

    @property
    def subject(self):
        """What a run's folder is named by: the teacher, or who learns of it."""
        names = [Path(name).resolve().name for name in (self.student, self.teacher) if name]
        return "-of-".join(names) if self.student else self.teacher

    @property
    def compute(self):
        """Flags that change time and memory, as common.Model takes them."""
        names = ("gradient_checkpointing", "keep_attention", "compile", "attention", "shard_size")
        return {name: getattr(self, name) for name in names}

    @property
    def adapters(self):
        """{role: (rank, alpha)} of the networks that are a LoRA on the teacher."""
        flags = vars(self)
        if self.lora_rank and flags.get("frame_block"):
            raise UserError("--lora-rank goes without --frame-block: a causal student is no LoRA on this teacher")
        like_the_student = ["student", *(f"expert_{i}" for i in range(len(flags.get("phase_ends", ())) - 1))]
        like_the_student += ["ema"] if flags.get("ema_decay") else []
        ranks = dict.fromkeys(like_the_student, self.lora_rank) | {"fake_score": self.fake_lora_rank}
        return {role: (rank, self.lora_alpha) for role, rank in ranks.items() if rank}


def recipe_args(Args, **flags):
    """A script's Args for a teacher (models/recipes.py) with `flags` on top: what the command line does. Clips
    that the teacher made cannot correct it, so where there are no others a discriminator must be asked for.
    """
    script = Path(sys.modules[Args.__module__].__file__).stem.partition("-")[0]  # a variant's file is dmd2-NAME.py
    args = Args(**{**recipe(flags.get("teacher", Args.teacher), script, flags.get("student")), **flags})
    off = "gan_weight" in vars(args).keys() - flags.keys() and not args.has_clips
    return replace(args, gan_weight=0.0) if off else args


def parse_args(Args):
    """Command line -> Args. A flag beats what is taken from the run at --init, which beats the teacher's recipe, which
    beats the defaults of Args. For --resume, the args of that run stand in for all of these.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("teacher", "student", "seed", "runs-dir", "resume", "init", "data", "prompts"):
        scan.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    known, others = scan.parse_known_args()
    given = {name: value for name, value in vars(known).items() if value is not None}
    for before, word in pairwise(["", *others]):
        if word in PRESETS and not before.startswith("-"):
            raise UserError(f"did you mean --teacher {word}?")
        if re.fullmatch(r"[\d.]+(,[\d.]+)+", word):
            raise UserError(f"did you mean {word.replace(',', ' ')}?")
    if "resume" in given and "init" in given:
        raise UserError("--resume goes on in a run, --init starts one: give one of them")
    own = {name: given[name] for name in ("teacher", "student", "data", "prompts") if name in given}
    args = recipe_args(Args, **own)
    place, init = given.get("runs_dir", args.runs_dir), given.get("init", args.init)
    if "resume" in given:
        seed = given.get("seed", args.seed)
        run = find_checkpoint(place, Path(sys.argv[0]).stem, args.subject, seed, given["resume"]).parents[1]
        before = {key: value for key, value in flags_of(run).items() if key in vars(args)}
        args = replace(args, **{**before, "runs_dir": str(run.parent), "resume": None, "track": False})
    elif init not in (None, "None"):
        with suppress(UserError):  # of what is not there, which the run says
            start = Path(init)
            start = start if start.exists() else find_init(place, args.student or args.teacher, init, args.subject)
            before = flags_of(start)
            args = replace(args, **{name: before[name] for name in handed_on(before, vars(args))})
    about = f"{sys.modules[Args.__module__].__doc__}\n{Args.__doc__} The values below are for --teacher {args.teacher}."
    # tyro joins lines that begin with a letter
    wide = {"width": shutil.get_terminal_size().columns, "initial_indent": " ", "subsequent_indent": " "}
    parts = (part if part.startswith(" ") else textwrap.fill(part, **wide) for part in about.split("\n\n"))
    flags = vars(cli(grouped(args), description="\n\n".join(parts)))
    return Args(**{name: value for group in flags.values() for name, value in vars(group).items()})


def cli(kind, description):
    """tyro.cli, with what is wrong in one line in place of a box."""
    try:
        with redirect_stderr(io.StringIO()) as box:
            return tyro.cli(kind, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(" ".join(re.sub("^.*\n|[│─╭╮╰╯]", "", box.getvalue()).split())) from None  # without its frame


def grouped(args):
    """What tyro parses: a dataclass of a dataclass for each group of flags, the method's own first."""
    groups, group, lineage = {"method": []}, None, type(args).__mro__[:-1]
    for name, known in type(args).__pydantic_fields__.items():
        group = GROUPS.get(name, group) if name in RunArgs.__pydantic_fields__ else "method"
        texts = [cls.__pydantic_fields__[name].description for cls in lineage if name in cls.__pydantic_fields__]
        kind = Annotated[known.annotation, tyro.conf.arg(help=next(filter(None, texts), None))]
        groups.setdefault(group, []).append((name, kind, field(default=vars(args)[name])))
    parts = [(group, tyro.conf.OmitArgPrefixes[make_dataclass(group, flags)]) for group, flags in groups.items()]
    return make_dataclass("Flags", parts)


@contextmanager
def one_line_errors():
    """A user's mistake in this block, or a file that cannot be read or written, ends the program with one line on
    standard error; so does Ctrl-C, with none.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run catches it
    try:
        yield
    except MISTAKES as error:
        line = f"error: {one_line(error)}"
        if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            raise SystemExit(line) from None
        more = os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS")
        try:
            Path(file).parents[1].joinpath("told").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(2)  # torchrun ends all processes when one has ended: let the first to fail tell it
            raise SystemExit(1) from None
        shown = {"py_callstack": line, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": shown}}))
        raise SystemExit(line if more else 1) from None  # after its last attempt torchrun shows it below all else


def launch(main, Args):
    """Run a script's main as a program."""
    with one_line_errors():
        main(parse_args(Args))
