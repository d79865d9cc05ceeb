"""Finished runs: which script made them, with which flags, and how to sample their students and teachers."""

from functools import partial
from importlib import import_module
from pathlib import Path

import common
from training.checkpoints import latest_checkpoint, load_networks
from training.files import UserError, read_json

ROOT = Path(__file__).resolve().parents[1]


def load_run(folder):
    """(script module, its Args, checkpoint) of a run folder (its newest) or checkpoint folder, with or without :raw."""
    folder = Path(str(folder).removesuffix(":raw")).absolute()
    checkpoint = folder if (folder / "checkpoint.json").is_file() else latest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} is no run with a checkpoint: give runs/NAME or runs/NAME/checkpoints/step_N")
    record = read_json(checkpoint / "args.json")  # what it was trained with
    script = load_script(record.pop("script"))
    return script, script.Args(**record), checkpoint


def load_script(name):
    """The module of a script of this repository, or of a variant of one."""
    for room in ("", "tools/", "experiments/"):
        if (ROOT / f"{room}{name}.py").is_file():
            return import_module(f"{room}{name}".replace("/", "."))
    return import_module("experiments.variant").load(name.partition("-")[2])


def run_of(checkpoint):
    """The folder of the run that a checkpoint is in; None for a checkpoint that was copied elsewhere."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None


def student_folders(script, args, checkpoint):
    """Folders of the students that a checkpoint exports, in their order: transformer, transformer_2, …"""
    folders = sorted((checkpoint / "student").glob("transformer*"))
    needed = len(script.noise_levels(args))
    if len(folders) < needed:
        raise UserError(f"{checkpoint}: {len(folders)} of {needed} phases are trained; finish the run")
    return folders


def students_of(model, device, script, args, checkpoint, raw):
    """The networks that a checkpoint exports, a list for `script.sample_student`. LoRAs are merged in the export; here
    they are on one base, as in training: that takes less memory and has the bits of the previews.

    raw: the last is the student itself, not its average.
    """
    folders, students, model = student_folders(script, args, checkpoint), [], model.student or model
    groups = [[folder] for folder in folders] if "phase_ends" in vars(args) else [folders]  # a network each
    block, last = vars(args).get("frame_block", 0), "student" if raw or not args.ema_decay else "ema"
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
    return partial(script.sample_student, students, model.latent_shape, args)


def teacher_sampler(model, device, args, cache, sample_teacher):
    """The same of a run's teacher, by a script's `sample_teacher` with the run's guidance, shift and steps."""
    null_cond = common.encode_text(model, [model.negative_prompt], cache, device).cond_of([0])
    return partial(sample_teacher, model.load_network("teacher", device), null_cond, model.latent_shape, args)
