"""Make of a run what other people's tools load: a folder for stock diffusers, or a LoRA, with a model card.

    python tools/export.py runs/dmd2__tiny__0__… exported          # DiffusionPipeline.from_pretrained("exported")
    python tools/export.py runs/dmd2__tiny__0__… exported --comfyui  # of Wan: exported.safetensors for ComfyUI
    python tools/export.py runs/dmd2__tiny__0__… exported_lora --lora   # pipe.load_lora_weights("exported_lora")
    hf upload USER/NAME exported

The averaged student is exported, or the student itself if the run keeps no average. README.md in the folder is the
card: it says how to sample the student. docs/export.md says what can be exported how, and how exactly.
"""

import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file

import common
from models.presets import PRESETS, TINY_WORLD
from models.wan import Wan
from training.files import UserError, opened, read_json, written_aside
from training.finished import load_run, run_of, student_folders
from training.flags import cli, one_line_errors
from training.published import wan_name

SAMPLERS = {
    "renoise": "a video at each noise level, renoised to the next with fresh noise",
    "euler": "Euler steps from each noise level to the next, then to 0",
    "causal": "block by block of latent frames; in each a video at each noise level, renoised to the next",
}


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """A run (its newest checkpoint) or a checkpoint folder."""
    out: tyro.conf.Positional[Path]
    """Folder for the export. It must not exist, or be empty."""
    lora: bool = False
    """Of a run with --lora-rank: write the LoRA in place of a whole model."""
    comfyui: bool = False
    """Of a student of Wan: write one file of weights by Wan's own names, which ComfyUI loads."""
    teacher: str | None = None
    """Where the teacher is, or of a run with --student that one, if its folder moved since the training."""


def read_student(run, teacher):
    """What an export says of a run's student, a namespace. folders: of its transformers, transformer_2, …; sigmas: its
    noise levels; boundary: those of it and above are the first transformer's; hub: (repository, revision) of what it
    began as, empty for a folder; why_not_stock: why no stock pipeline samples it, empty if one does.
    """
    script, args, checkpoint = load_run(run)
    model = common.Model(teacher or args.student or args.teacher, *args.size)
    folders, levels = student_folders(script, args, checkpoint), script.noise_levels(args)  # levels of each network
    print(f"reading {checkpoint}: minutes, if it is large")
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        opened(path)  # is whole
    sigmas, name, why = [sigma for own in levels for sigma in own], model.index["_class_name"], ""
    block, phased = getattr(args, "frame_block", 0), hasattr(args, "phase_ends")
    sampler = "causal" if block else "euler" if phased else "renoise"
    pipeline = "WanImageToVideoPipeline" if name == "WanPipeline" and model.conditions else name
    if block:
        why = f"it makes its latent frames in blocks of {block}, one after the other"
    elif len(folders) > (2 if pipeline.startswith("Wan") else 1):
        why = f"it has {len(folders)} transformers, one per phase, and {pipeline} takes fewer"
    elif sampler == "renoise" and sigmas[1:] and model.conditions and "Cosmos" in pipeline:
        why = "it renoises, and Cosmos' pipeline keeps the first frame only in Euler steps"
    between = len(levels) > 1 and round((levels[0][-1] + levels[1][0]) / 2, 4)  # of the first two phases
    source = PRESETS[model.name].source if model.name in PRESETS.keys() - TINY_WORLD else ""
    return SimpleNamespace(
        script=script, args=args, checkpoint=checkpoint, model=model, folders=folders, sigmas=sigmas, sampler=sampler,
        pipeline=pipeline, is_wan=model.family.transformer_class is Wan.transformer_class, why_not_stock=why,
        boundary=between or model.index.get("boundary_ratio"), hub=source.partition("@")[::2],
    )  # fmt: skip


def main(args):
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} is there already: give a new or an empty folder")
    student = read_student(args.run, args.teacher)
    if args.lora and (student.why_not_stock or not student.args.lora_rank):
        raise UserError(f"--lora: {student.why_not_stock or 'this run trained all weights'}")
    if args.comfyui and (args.lora or student.why_not_stock or not student.is_wan):
        why = student.why_not_stock or "it is for whole students of Wan; a LoRA loads as it is"
        raise UserError(f"--comfyui: {why}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".export") as aside:
        aside = Path(aside) / args.out.name  # renamed when all of it is there
        aside.mkdir()
        if args.lora:
            for number, folder in enumerate(student.folders):
                with written_aside(aside / file_name(folder)) as path:
                    save_file(lora_of(student, number), path, metadata={"format": "pt"})
        elif args.comfyui:
            for folder in student.folders:
                with written_aside(aside / file_name(folder, args.out.name)) as path:
                    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
                    weights = {wan_name(key): value for own in files for key, value in own.items()}
                    save_file(weights, path, metadata={"format": "pt"})
        else:
            for folder in student.folders:
                shutil.copytree(folder, aside / folder.name)
            if not student.why_not_stock:
                write_pipeline(student, aside)
        (aside / "README.md").write_text(model_card(student, args.out.resolve(), args.lora, args.comfyui))
        os.replace(aside, args.out)
    print(f"exported to {args.out}; {args.out / 'README.md'} says how to sample it")
    if student.why_not_stock:
        print(f"no stock pipeline samples this student, as {student.why_not_stock}: its transformers alone are there")


def write_pipeline(student, out):
    """model_index.json, a scheduler, and the teacher's other parts: a folder each, with a link to every file."""
    index = {**student.model.index, "_class_name": student.pipeline}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    if len(student.folders) > 1:
        index |= {"transformer_2": index["transformer"], "boundary_ratio": student.boundary}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # no config holds a list of noise levels: this one has the last, and even steps to it
    last = student.sigmas[-1] if student.sigmas[1:] else None
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=last, stochastic_sampling=student.sampler == "renoise")
    scheduler.save_pretrained(out / "scheduler")
    for part, found in index.items():
        if not isinstance(found, list) or not found[0] or (out / part).exists():
            continue
        for path in (student.model.folder / part).rglob("*"):
            if path.is_file():  # links to files: `hf upload` follows none to a folder
                place = out / part / path.relative_to(student.model.folder / part)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path.resolve())


def file_name(folder, name="pytorch_lora_weights"):
    """The file of a transformer's weights: NAME.safetensors, NAME_2.safetensors, …"""
    return f"{folder.name.replace('transformer', name)}.safetensors"


def lora_of(student, number):
    """{key: tensor} of the LoRA of transformer `number` as it was trained, with alpha / rank multiplied into B.

    For Wan the keys are those of Wan's own code below "diffusion_model.", which ComfyUI reads (comfy/lora.py,
    model_lora_keys_unet) and diffusers translates; for others diffusers' names below "transformer.".
    """
    reader = dcp.HuggingFaceStorageReader(str(student.checkpoint / "state"))
    role, part = "ema" if student.args.ema_decay else "student", student.folders[number].name
    part = part if part in student.model.family.parts else "transformer"
    if student.sampler == "euler" and number < len(student.folders) - 1:
        role = f"expert_{number}"
    prefix, wan = f"{role}.lora.{part}/", student.is_wan
    found = reader.read_metadata().state_dict_metadata.items()
    state = {key: torch.empty(x.size, dtype=x.properties.dtype) for key, x in found if key.startswith(prefix)}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(state, storage_reader=reader, no_dist=True)
    named = {}
    for key, value in state.items():
        name = key.removeprefix(prefix).replace("/", ".")
        name = wan_name(name) if wan else name
        scale = student.args.lora_alpha / student.args.lora_rank if name.endswith("lora_B") else 1
        named[f"{'diffusion_model' if wan else 'transformer'}.{name}.weight"] = scale * value
    return named


# ------------------------------------------------------------------------------------------------- the model card


def model_card(student, out, lora, comfyui):
    """The text of README.md: what the Hub reads in its head, and what a reader needs to sample the student."""
    args, model, script = student.args, student.model, student.script.__name__.rpartition(".")[2]
    averaged = f"average of decay {args.ema_decay}" if args.ema_decay else "the student itself"
    step = read_json(student.checkpoint / "checkpoint.json")["step"]
    note = run_of(student.checkpoint) / "revision.txt"
    data = ModelCardData(
        base_model=student.hub[0] or None,
        base_model_relation=("adapter" if lora else "finetune") if student.hub[0] else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if args.frames == 1 else "image-to-video" if model.conditions else "text-to-video",
        tags=["distillation", "few-step", script, *["lora"] * lora],
    )
    rows = {
        "method": student.script.__doc__.splitlines()[0],
        "teacher": not args.student and student.hub[0] or Path(args.teacher).name,
        "trained by": f"{script}.py, {step} steps, commit {note.read_text().strip() if note.is_file() else 'unknown'}",
        "weights": averaged + ", as a LoRA" * lora,
        "sampler": SAMPLERS[student.sampler],
        "noise levels": ", ".join(map(str, student.sigmas)),
        "guidance": "1: one evaluation of the network per level",
        "size": f"{args.frames} frames, {args.height} x {args.width} pixels, {model.fps} frames per second",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    text = ["---", data.to_yaml(), "---", "", f"# {out.name}", "", *table, "", "## Use", ""]
    if comfyui:
        text += ["For `models/diffusion_models` of ComfyUI. Sample it at cfg 1 and at the noise levels above."]
    elif student.why_not_stock:
        text += [f"No stock pipeline samples it: {student.why_not_stock}. Here are its transformers."]
    else:
        text += ["```python", *snippet(student, out, lora), "```", "", *(f"- {line}" for line in notes(student))]
    text += ["", "The teacher's license holds for its student: put it into the head of this file."]
    return "\n".join(text) + "\n"


def snippet(student, out, lora):
    """Lines of Python that sample the export, to be run in the folder that it is in."""
    args, model, qwen = student.args, student.model, student.pipeline == "QwenImagePipeline"
    repository, revision = student.hub
    lines, more = ["from functools import partial", "", "import diffusers", "import torch", ""], ""
    if lora:
        base = json.dumps(repository or os.path.relpath(model.folder, out.parent))
        more += f', revision="{revision}"' if revision else ""
        if len(student.folders) > len(model.family.parts):  # a LoRA of each phase on the same weights
            kind = model.family.transformer_class.__name__
            lines += [f'second = diffusers.{kind}.from_pretrained({base}, subfolder="transformer"{more})']
            more += ", transformer_2=second"
        more += f", boundary_ratio={student.boundary}" if len(student.folders) > 1 else ""
        lines += [f"pipe = diffusers.{student.pipeline}.from_pretrained({base}{more})"]
        for folder, more in zip(student.folders, ("", ", load_into_transformer_2=True")):
            lines += [f'pipe.load_lora_weights("{out.name}", weight_name="{file_name(folder)}"{more})']
    else:
        lines += [f'pipe = diffusers.DiffusionPipeline.from_pretrained("{out.name}")']
    stochastic = "stochastic_sampling=True" if student.sampler == "renoise" else ""
    lines += [f"pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler({stochastic})"]
    if not qwen:
        lines += [f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas={student.sigmas})"]
    lines += [
        "torch.manual_seed(0)  # not generator=, which does not reach the noise of the later steps",
        "out = pipe(",
    ]
    words = ['image=diffusers.utils.load_image("first_frame.png")'] if model.conditions else []
    words += ['prompt="a prompt"', f"height={args.height}", f"width={args.width}"]
    words += [f"num_inference_steps={len(student.sigmas)}"]
    words += ["true_cfg_scale=1.0", f"sigmas={student.sigmas}"] if qwen else ["guidance_scale=1.0"]
    words += [] if qwen else [f"num_frames={args.frames}"]
    words += [f"max_sequence_length={model.text_length}"] if student.pipeline.startswith("Wan") else []
    save = f'diffusers.utils.export_to_video(out.frames[0], "student.mp4", fps={model.fps})'
    return [*lines, *(f"    {word}," for word in words), ")", 'out.images[0].save("student.png")' if qwen else save]


def notes(student):
    """What a user of the stock pipeline should know, a list of sentences."""
    found = ["It is trained for these noise levels, set above, and for guidance 1. The config alone has others."]
    if student.model.conditions:
        found += [f"Give an image of {student.args.width} x {student.args.height}: the pipeline stretches any other."]
    if len(student.folders) > 1:
        found += [f"Noise levels of {student.boundary} and above are `transformer`'s, those below `transformer_2`'s."]
    if "Cosmos" in student.pipeline:
        found += ["The pipeline wants NVIDIA's safety checker: `pip install cosmos_guardrail`."]
    return found


if __name__ == "__main__":
    with one_line_errors():
        main(cli(Args, description=__doc__))
