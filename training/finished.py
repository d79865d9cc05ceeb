"""Finished runs: which script made them, with which flags, and how to sample their students and teachers."""

from functools import partial
from importlib import import_module
from pathlib import Path

import torch

import common
from training.checkpoints import checkpoint_in, load_networks
from training.files import UserError, read_json


def load_run(folder):
    """(script module, its Args, checkpoint) of a run folder (its newest) or checkpoint folder, with or without :raw."""
    checkpoint = checkpoint_in(str(folder).removesuffix(":raw"))
    record = read_json(checkpoint / "args.json")  # what it was trained with
    script = load_script(record.pop("script"))
    known = script.Args.__pydantic_fields__  # older runs have flags that are gone
    return script, script.Args(**{name: value for name, value in record.items() if name in known}), checkpoint


def model_of(args):
    """The Model of a run with these flags, but for those that change time and memory alone."""
    return common.Model(args.teacher, *args.size, student=args.student, negative_prompt=args.negative_prompt)


def load_script(name):
    """The module of a script of this repository, or of a variant of one."""
    name, _, variant = name.partition("-")
    if variant:
        return import_module("experiments.variant").load(variant)
    ours = (Path(__file__).parents[1] / f"{name}.py").is_file()  # of a stranger's run no other module
    return import_module(name if ours else f"tools.{name}")


def run_of(checkpoint):
    """The folder of the run that a checkpoint is in, or of a checkpoint that was copied elsewhere its own."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


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
    student_folders(script, args, checkpoint)  # all phases are trained
    model, flags, last = model.student or model, vars(args), "student" if raw or not args.ema_decay else "ema"
    names = [*(f"expert_{i}" for i in range(len(flags.get("phase_ends", ())) - 1)), last]
    adapters = {name: args.adapters[name] for name in names if name in args.adapters}
    base = model.load_network("teacher", device, adapters=adapters) if adapters else None
    dtype, block = torch.bfloat16 if device.type == "cuda" else torch.float32, flags.get("frame_block", 0)
    networks = {name: model.load_network(name, device, block, dtype, base) for name in names}
    load_networks(checkpoint, networks)
    return list(networks.values())


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
