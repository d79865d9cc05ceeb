"""Finished runs: which script made them, with which flags, and how to sample the students that they export."""

from importlib import import_module
from pathlib import Path

import torch

import common
from harness.checkpoints import latest_checkpoint, load_networks
from harness.files import Fatal, read_json

ROOT = Path(__file__).resolve().parents[1]


def load_run(folder):
    """(script module, its Args, checkpoint) of a run folder (its newest) or checkpoint folder, with or without :raw."""
    folder = Path(str(folder).removesuffix(":raw")).absolute()
    checkpoint = folder if (folder / "checkpoint.json").is_file() else latest_checkpoint(folder)
    if checkpoint is None or not (checkpoint / "args.json").is_file():
        raise Fatal(f"{folder} is not a run with a checkpoint")
    record = read_json(checkpoint / "args.json")  # what it was trained with
    name = record.pop("script", None)
    rooms = {path.stem: f"{room}." for room in ("tools", "experiments") for path in ROOT.glob(f"{room}/*.py")}
    rooms |= {path.stem: "" for path in ROOT.glob("*.py")}
    if name not in rooms:
        raise Fatal(f'{checkpoint / "args.json"} is of no script that is here: its "script" is {name!r}')
    script = import_module(rooms[name] + name)
    try:
        args = script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
    except TypeError as error:
        raise Fatal(f"{checkpoint / 'args.json'} does not fit today's {name}.py: {error}") from None
    return script, args, checkpoint


def noise_levels(script, args):
    """Noise levels at which a script's sampler evaluates its students, a list of them per student.

    Found by sampling with networks that return zero; there are more of them than the sampler has use for.
    """
    students = [Recorder() for _ in range(100)]
    rng = common.Draws(0, "noise levels", [0], torch.device("cpu"))
    script.sample_student(students, rng, {}, (1, 1, 1, 1), args)
    return [student.levels for student in students if student.levels]


class Recorder:
    """Stands in for a network: notes the noise levels that it is called at, and returns zero."""

    def __init__(self):
        self.levels = []

    def __call__(self, x_t, sigma, cond):
        self.levels.append(round(sigma[0].item(), 6))
        return torch.zeros_like(x_t)

    def in_turn(self, x_t):
        return [x_t]

    def remember(self, x0, cond):
        pass


def student_folders(script, args, checkpoint):
    """Folders of the students that a checkpoint exports, in their order: transformer, transformer_2, …"""
    folders = sorted(
        (checkpoint / "student").glob("transformer*"), key=lambda path: int(path.name.partition("_")[2] or 1)
    )
    needed = len(noise_levels(script, args))
    if len(folders) < needed:
        raise Fatal(f"{checkpoint}: {len(folders)} of {needed} phases are trained; finish the run")
    return folders


def students_of(model, device, script, args, checkpoint, raw):
    """The networks that a checkpoint exports, a list for `script.sample_student`.

    raw: the last is the student itself, not its average, with its LoRA if it has one, which an export has not.
    """
    folders, students = student_folders(script, args, checkpoint), []
    groups = [[folder] for folder in folders] if hasattr(args, "phase_ends") else [folders]  # a network each
    block = getattr(args, "frame_block", 0)
    for group in groups[:-1] if raw else groups:
        students.append(model.load_network("teacher", device, block))
        for folder in group:
            own = folder.name if folder.name in model.family.parts else "transformer"
            common.put_weights(students[-1], folder, own)
    if raw:
        base = model.load_network("teacher", device, block, adapters=args.adapters)
        students.append(model.load_network("student", device, block, base=base))
        load_networks(checkpoint, {"student": students[-1]})
    return students
