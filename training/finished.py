"""Finished runs: which script made them, with which flags, and how to sample their students and teachers."""

from functools import partial
from importlib import import_module
from pathlib import Path

import torch

import common
from training.checkpoints import latest_checkpoint, load_networks
from training.files import UserError, read_json

ROOT = Path(__file__).resolve().parents[1]


def load_run(folder):
    """(script module, its Args, checkpoint) of a run folder (its newest) or checkpoint folder, with or without :raw."""
    given = str(folder).removesuffix(":raw")
    folder, asked = Path(given).absolute(), "give runs/NAME or runs/NAME/checkpoints/step_N"
    if not given or not folder.is_dir():
        raise UserError(f"no such run {given!r}: {asked}")
    checkpoint = folder if (folder / "checkpoint.json").is_file() else latest_checkpoint(folder)
    if checkpoint is None or not (checkpoint / "args.json").is_file():
        started = (folder / "args.json").is_file()
        raise UserError(f"{folder} {'has no checkpoint yet' if started else 'is no run'}: {asked}")
    record = read_json(checkpoint / "args.json")  # what it was trained with
    name = record.pop("script", None)
    rooms = {path.stem: f"{room}." for room in ("tools", "experiments") for path in ROOT.glob(f"{room}/*.py")}
    rooms |= {path.stem: "" for path in ROOT.glob("*.py")}
    if name not in rooms:
        raise UserError(f'{checkpoint / "args.json"} is of no script that is here: its "script" is {name!r}')
    script = import_module(rooms[name] + name)
    try:
        args = script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
    except TypeError as error:
        raise UserError(f"{checkpoint / 'args.json'} does not fit today's {name}.py: {error}") from None
    return script, args, checkpoint


def run_of(checkpoint):
    """The folder of the run that a checkpoint is in; None for a checkpoint that was copied elsewhere."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None


def noise_levels(script, args):
    """Noise levels at which a script's sampler evaluates its students, a list of them per student.

    Found by sampling with networks that return zero; there are more of them than the sampler has use for.
    """
    students = [Recorder() for _ in range(100)]
    rng = common.SampleRNG(0, "noise levels", [0], torch.device("cpu"))
    script.sample_student(students, rng, {}, (1, 1, 1, 1), args)
    return [student.levels for student in students if student.levels]


class Recorder:
    """Stands in for a network: notes the noise levels that it is called at, and returns zero."""

    def __init__(self):
        self.levels = []

    def __call__(self, x_t, sigma, cond, blocks=()):
        self.levels.append(round(sigma[0].item(), 6))
        return torch.zeros_like(x_t), []

    def chunks(self, x_t):
        return [x_t]

    def update_cache(self, x0, cond):
        pass


def student_folders(script, args, checkpoint):
    """Folders of the students that a checkpoint exports, in their order: transformer, transformer_2, …"""
    folders = sorted(
        (checkpoint / "student").glob("transformer*"), key=lambda path: int(path.name.partition("_")[2] or 1)
    )
    needed = len(noise_levels(script, args))
    if len(folders) < needed:
        raise UserError(f"{checkpoint}: {len(folders)} of {needed} phases are trained; finish the run")
    return folders


def students_of(model, device, script, args, checkpoint, raw):
    """The networks that a checkpoint exports, a list for `script.sample_student`. LoRAs are merged in the export; here
    they are on one base, as in training: that takes less memory and has the bits of the previews.

    raw: the last is the student itself, not its average.
    """
    folders, students = student_folders(script, args, checkpoint), []
    groups = [[folder] for folder in folders] if hasattr(args, "phase_ends") else [folders]  # a network each
    block, last = getattr(args, "frame_block", 0), "student" if raw or not args.ema_decay else "ema"
    if last in args.adapters:
        names = [*(f"expert_{i}" for i in range(len(groups) - 1)), last]
        base = model.load_network("teacher", device, adapters={name: args.adapters[name] for name in names})
        networks = {name: model.load_network(name, device, base=base) for name in names}
        load_networks(checkpoint, networks)
        return list(networks.values())
    for group in groups[:-1] if raw else groups:
        students.append(model.load_network("teacher", device, block))
        for folder in group:
            own = folder.name if folder.name in model.family.parts else "transformer"
            common.put_weights(students[-1], folder, own)
    if raw:
        students.append(model.load_network("student", device, block))
        load_networks(checkpoint, {"student": students[-1]})
    return students


def student_sampler(model, device, script, args, checkpoint, raw, kept_frames=0):
    """A function (rng, cond) -> latents [b, c, f, h, w] of a finished run's student, by its script's own sampler.

    kept_frames: latent frames before a block that a causal student reads, 0 for all.
    """
    students = students_of(model, device, script, args, checkpoint, raw)
    students[0].kept_frames = kept_frames
    return partial(script.sample_student, students, shape=model.latent_shape, args=args)


def teacher_sampler(model, device, args, cache, solve_ode):
    """The same of a run's teacher, by a script's `solve_ode` with the run's guidance, shift and steps."""
    null_cond = common.encode_text(model, [model.negative_prompt], cache, device).cond_of([0])
    teacher = model.load_network("teacher", device)
    settings = (null_cond, args.guidance_scale, args.shift, args.teacher_steps)
    return lambda rng, cond: solve_ode(teacher, rng.normal(model.latent_shape), cond, *settings)
