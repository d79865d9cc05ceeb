"""Make of a run what other people's tools load: a folder for stock diffusers, or a LoRA, with a model card.

    python tools/export.py runs/dmd2__tiny__0__… exported          # DiffusionPipeline.from_pretrained("exported")
    python tools/export.py runs/dmd2__tiny__0__… exported_lora --lora   # pipe.load_lora_weights("exported_lora")
    hf upload USER/NAME exported

The averaged student is exported, with :raw after RUN the student itself. README.md in the folder is the card: it says
how to sample the student. docs/export.md says what can be exported how, and how exactly.
"""

import json
import os
import secrets
import shutil
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro
from annotated_types import Ge
from safetensors.torch import save_file

import common
from training.checkpoints import save_weights
from training.files import UserError, make_folder, readable_by_all
from training.finished import run_of, students_of
from training.flags import check_flags, one_line_errors


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """A run (its newest checkpoint) or a checkpoint folder; with :raw after it the student itself, not its average."""
    out: tyro.conf.Positional[Path]
    """Folder for the export. It must not exist, or be empty."""
    lora: bool = False
    """Write a LoRA on the teacher in place of a whole model: of a LoRA run the trained one, else the nearest one."""
    rank: Annotated[int | None, Ge(1)] = None
    """Rank of the LoRA of a run that trained all weights. None: 64, or the highest there is."""
    transformer_only: bool = False
    """Leave out the teacher's other parts."""
    copy: bool = False
    """Copy the teacher's other parts. Else each of their files is a link to the teacher's."""
    teacher: str | None = None
    """Where the teacher is, if its folder moved since the training."""
    license: str | None = None
    """The license in the card. None: the one in the teacher's own README.md, else "other"."""


def main(args):
    check_flags(args)
    out = args.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{args.out} is there already: give a new or an empty folder")
    if args.lora and (args.transformer_only or args.copy):
        raise UserError("--lora goes without --transformer-only and --copy: it holds none of the teacher's parts")
    if args.rank and not args.lora:
        raise UserError("--rank is that of a LoRA: give --lora")
    from tools.hub.card import license_of, model_card
    from tools.hub.levels import nearest_scheduler
    from tools.hub.student import load_student

    student = load_student(args.run, args.teacher)
    if args.lora and student.why_not_stock:
        raise UserError(f"--lora: {args.run} is for no pipeline that loads one: {student.why_not_stock}")
    if args.rank and student.args.lora_rank:
        raise UserError(
            f"--rank: {args.run} trained a LoRA of rank {student.args.lora_rank}, which is exported as it is"
        )
    # Qwen-Image's pipeline takes the levels themselves, and the scheduler as it is
    taken = [1.0] if student.pipeline == "QwenImagePipeline" else student.sigmas
    scheduler = nearest_scheduler(taken, renoise=student.sampler == "renoise")
    stock = not (student.why_not_stock or args.transformer_only)
    note = (run_of(student.checkpoint) or student.checkpoint) / "revision.txt"
    about = {"license": args.license or license_of(student), "stock": stock}
    about["revision"] = note.read_text().strip() if note.is_file() else "unknown"

    with folder_written_aside(out) as aside:
        if args.lora:
            about |= write_loras(student, aside, args.rank)
        else:
            for folder in weights_of(student, aside):
                if folder.parent != aside:
                    shutil.copytree(folder, aside / folder.name)
        if stock:
            scheduler.save_pretrained(aside / "scheduler")
        if stock and not args.lora:
            write_pipeline(student, aside, args.copy)
        (aside / "README.md").write_text(model_card(student, scheduler, out.name, **about))
        for path in aside.rglob("*.safetensors"):
            if not path.is_symlink():
                readable_by_all(path)
    for line in about.get("told", ()):
        print(line)
    if student.why_not_stock:
        print(f"no stock pipeline samples this student, as {student.why_not_stock}: its transformers alone are there")
    print(f"exported to {args.out}" + f"; {args.out / 'README.md'} says how to sample it" * stock)


@contextmanager
def folder_written_aside(folder):
    """Yield a hidden folder beside `folder`; rename it when the block succeeds, remove it when it does not."""
    aside = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    make_folder(folder.parent, hint="")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C must not leave gigabytes behind
    try:
        aside.mkdir()
        yield aside
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {str(error).splitlines()[-1]}", code=1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        signal.signal(signal.SIGINT, before)


def weights_of(student, place):
    """Folders of the transformers of the average, or of the student itself, which are written below `place`."""
    if not student.raw:
        return student.folders
    device = common.init_distributed()
    about = (student.model, device, student.script, student.args, student.checkpoint)
    network = students_of(*about, raw=True)[-1]
    done = student.folders[:-1] if student.sampler == "euler" else []  # phases before the last are finished
    for folder in student.folders[len(done) :]:
        save_weights(network, folder.name if folder.name in network.parts else "transformer", place / folder.name)
    dist.destroy_process_group()
    return [*done, *(place / folder.name for folder in student.folders[len(done) :])]


def write_pipeline(student, out, copy):
    """model_index.json, and the teacher's other parts: a folder each, whose files are links or copies."""
    from tools.hub.student import SERVED_BY

    index = {**student.model.index, "_class_name": student.pipeline}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    if len(student.folders) > 1:
        index |= {"transformer_2": index["transformer"], "boundary_ratio": student.boundary}
    if student.pipeline in SERVED_BY:  # what vllm-omni reads, see docs/export.md
        index["dmd2_config"] = {
            "num_inference_steps": len(student.sigmas),
            "denoising_timesteps": [round(1000 * sigma) for sigma in student.sigmas],
            "solver": "sde" if student.sampler == "renoise" else "ode",
            "guidance_scale": 1.0,
        }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part, found in index.items():
        source = student.model.folder / part
        if not (isinstance(found, list) and found[0] and source.is_dir()) or (out / part).exists():
            continue
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            place = out / part / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(path, place)
            else:  # of each file: `hf upload` follows no links to folders
                place.symlink_to(path.resolve())


def write_loras(student, out, rank):
    """A file for each transformer. Returns their names and what is to be told of them, for the card."""
    from tools.hub.lora import key_names, linear_layers, of_change, of_run

    names, told, trained = [], [], student.args.lora_rank
    for number, folder in enumerate(student.folders if trained else weights_of(student, out / "whole")):
        if trained:
            layers = of_run(student, number)
        else:
            rank = rank or min(64, max(linear_layers(student.model).values()))
            layers, line = of_change(student.source(folder), folder, student.model, rank)
            told.append(f"{folder.name}: {line}.")
        state = {}
        for layer, pair in layers.items():
            state |= dict(zip(key_names(student.model.family, layer), (x.contiguous() for x in pair), strict=True))
        names.append(f"pytorch_lora_weights{folder.name.removeprefix('transformer')}.safetensors")
        save_file(state, out / names[-1], metadata={"format": "pt"})
    shutil.rmtree(out / "whole", ignore_errors=True)
    return {"lora": names, "told": told}


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
