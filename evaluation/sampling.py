"""How the videos of an evaluation are sampled: from a run's student or a teacher, and all that decides their pixels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import common
import dmd2
from models.presets import name_of
from training.files import UserError
from training.finished import noise_levels, student_sampler, teacher_sampler
from training.flags import RunArgs
from training.media import h264_options


@dataclass
class Source:
    """What is sampled."""

    role: str
    """student or teacher."""
    script: ModuleType
    """Whose sampler the student has; for a teacher without a run dmd2.py."""
    args: RunArgs
    """The run's flags, with those of the evaluation on top."""
    checkpoint: Path | None
    raw: bool
    """The student itself, not its average."""
    kept_frames: int = 0
    """Latent frames before a block that a causal student reads, in whole blocks; 0 for all."""


class Noise:
    """What a sampler draws from: sample k's numbers come from a generator on the CPU with seed seeds[k]."""

    def __init__(self, seeds, device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __len__(self):
        return len(self.generators)

    def normal(self, shape):
        """Standard normal [b, *shape], float32, on the device."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


def contents_id(folder, contents=True):
    """Hash of a folder's files: names, sizes, configs and, with `contents`, every byte."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if contents or path.suffix == ".json":
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()


def configuration(source, model):
    """What decides a sample's pixels beside its prompt, seed and batch, as a dict for JSON."""
    args = source.args
    if source.role == "teacher":
        name, steps, shift = "dmd2.py", args.teacher_steps, args.shift
        weights = [contents_id(model.folder / part) for part in model.family.parts]
        u = [1 - i / steps for i in range(steps)]
        sigmas = [round(shift * x / (1 + (shift - 1) * x), 6) for x in u]
        evaluations = 2 * steps  # both halves of guidance
        how = {"guidance_scale": args.guidance_scale, "shift": shift, "negative_prompt": model.negative_prompt}
    else:
        name = source.script.__name__.rpartition(".")[2] + ".py"
        weights = [contents_id(source.checkpoint / ("state" if source.raw else "student"))]
        levels = noise_levels(source.script, args)
        sigmas = [sigma for own in levels for sigma in own]
        evaluations = len(sigmas)
        ends = [*(own[0] for own in levels[1:]), 0.0] if len(levels) > 1 else []
        how = {"averaged": not source.raw and args.ema_decay > 0, "phase_ends": ends}
        if block := getattr(args, "frame_block", 0):
            how |= {"frame_block": block, "kept_frames": source.kept_frames}
    return {
        "role": source.role, "script": name, **how,
        "teacher": name_of(args.teacher), "checkpoint": "+".join(weights),
        "text_encoder": contents_id(model.folder / "text_encoder", contents=False),
        "vae": contents_id(model.folder / "vae"), "sigmas": sigmas, "nfe": evaluations,
        "frames": args.frames, "height": args.height, "width": args.width, "fps": model.fps,
        "video": {"codec": "libx264", **h264_options(args.height, args.width)},
    }  # fmt: skip


def conditions(model, prompts, images, cache, device):
    """A function: rows -> the conditions of these prompts. images: paths of their first frames, for image-to-video; the
    tiny world has some of its own for its captions.
    """
    if not model.conditions or images:
        return common.encode_text(model, prompts, cache, device, images).cond_of
    if not model.world or not set(prompts) <= set(model.world.CAPTIONS):
        raise UserError(f"{model.name} begins with an image: give --images FOLDER")
    world = common.TinyWorld(model, cache, device, seed=0)
    return lambda rows: world.cond_of([world.prompts.index(prompts[row]) for row in rows])


def sampler(source, model, cache, device):
    """A function (rng, cond) -> latents [b, c, f, h, w]: the student's own sampler, or the teacher's guided ODE."""
    if source.role == "teacher":
        return teacher_sampler(model, device, source.args, cache, dmd2.solve_ode)
    return student_sampler(model, device, source.script, source.args, source.checkpoint, source.raw, source.kept_frames)
