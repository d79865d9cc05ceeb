"""The model card of an export: what the Hub reads in its head, and what a reader needs to sample the student."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from models.presets import TINY_WORLD
from tools.hub.levels import EXACT, distance, made_by
from tools.hub.student import SERVED_BY

NAMES = {
    "renoise": "a video at each noise level, renoised to the next with fresh noise",
    "euler": "Euler steps from each noise level to the next, then to 0",
    "causal": "block by block of latent frames; in each a video at each noise level, renoised to the next",
}
CAUSAL = """It makes its latent frames in blocks of {block}. Each block reads the clean ones before it (a cache of keys
and values: causal between blocks, full within one), and is denoised at all of the levels above before the next one
begins. Its weights are those of a stock transformer, but no stock pipeline samples it: `WanPipeline` loads it and makes
all frames at once, for which it was not trained. In the repository that trained it, `eval_vbench.py` samples it, and
`models/wan_causal.py` is the network."""

WHERE = "this folder, seen from its parent, or its name on the Hub"
TRANSFORMERS_ALONE = """Here are its transformers alone. The other parts are the teacher's: give its pipeline these, as
`from_pretrained(TEACHER, transformer=…)`, the noise levels above and guidance 1."""


def head(student, lora, license):
    """The YAML between two rules."""
    model, image = student.model, student.model.latent_shape[1] == 1 and student.args.frames == 1
    task = "text-to-image" if image else "image-to-video" if model.conditions else "text-to-video"
    data = ModelCardData(
        base_model=student.base,
        base_model_relation=("adapter" if lora else "finetune") if student.base else None,
        library_name="diffusers",
        license=license,
        pipeline_tag=task,
        tags=["distillation", "few-step", script_name(student), *(["lora"] if lora else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def script_name(student):
    return student.script.__name__.rpartition(".")[2]


def license_of(student):
    """The license in the teacher's own card, where its folder has one; else "other"."""
    if student.args.teacher in TINY_WORLD:
        return "apache-2.0"  # this repository's
    card = student.model.folder / "README.md"
    lines = card.read_text(errors="replace").split("\n---")[0].splitlines() if card.is_file() else []
    return next((line[8:].strip().strip("\"'") for line in lines if line.startswith("license:")), "other")


def levels_line(levels):
    return ", ".join(str(sigma) for sigma in levels)


def call(student):
    """The lines that call the pipeline, with what this student needs."""
    args, pipeline, steps = student.args, student.pipeline, len(student.sigmas)
    words = [f"height={args.height}", f"width={args.width}"]
    words += [] if pipeline == "QwenImagePipeline" else [f"num_frames={args.frames}"]
    words += [f"num_inference_steps={steps}"]
    if pipeline == "QwenImagePipeline":
        words += ["true_cfg_scale=1.0", f"sigmas={student.sigmas}"]
    else:
        words += ["guidance_scale=1.0"]
    if pipeline.startswith("Wan") and student.model.text_length != 512:
        words += [f"max_sequence_length={student.model.text_length}"]
    words = [
        *(['image=load_image("first_frame.png")'] if student.model.conditions else []),
        f'prompt="{"a red circle" if student.model.world else "a prompt"}"',
        *words,
    ]
    fresh = "  # also of the fresh noise in every step, which generator= would not reach"
    lines = ["torch.manual_seed(0)" + fresh * (student.sampler == "renoise" and steps > 1)]
    lines += ["out = pipe(", *(f"    {word}," for word in words), ")"]
    if pipeline == "QwenImagePipeline":
        return [*lines, 'out.images[0].save("student.png")']
    return [*lines, f'export_to_video(out.frames[0], "student.mp4", fps={student.model.fps})']


def exact_levels(student):
    """Lines that give the pipeline the student's own levels, where its scheduler only comes close to them."""
    stochastic = "stochastic_sampling=True" if student.sampler == "renoise" else ""
    return [
        f"pipe.scheduler = FlowMatchEulerDiscreteScheduler({stochastic})",
        f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas={student.sigmas})",
    ]


def snippet(student, scheduler, name, lora):
    """Python that samples the export."""
    near = student.pipeline != "QwenImagePipeline" and distance(scheduler, student.sigmas) > EXACT
    two, names = len(student.folders) > 1, [student.pipeline if lora else "DiffusionPipeline"]
    if lora and two and len(student.model.family.parts) == 1:
        names += [student.model.family.transformer_class.__name__]
    names += ["FlowMatchEulerDiscreteScheduler"] if near or lora else []
    utils = [] if student.pipeline == "QwenImagePipeline" else ["export_to_video"]
    utils += ["load_image"] if student.model.conditions else []
    lines = ["from functools import partial", ""] if near else []
    lines += ["import torch"] + [f"from diffusers import {', '.join(sorted(names))}"]
    lines += [f"from diffusers.utils import {', '.join(utils)}", ""] if utils else [""]
    if lora:
        tiny = student.model.folder.name if student.args.teacher in TINY_WORLD else None
        base, revision = student.base or (f"tiny/{tiny}" if tiny else "FOLDER_OF_THE_TEACHER"), student.revision
        more = f', revision="{revision}"' if revision else ""
        if two and len(student.model.family.parts) == 1:  # a LoRA of each phase on the same weights
            lines += [f'second = {names[1]}.from_pretrained("{base}", subfolder="transformer")']
            more += f", transformer_2=second, boundary_ratio={student.boundary}"
        elif two and student.sampler == "euler":
            more += f", boundary_ratio={student.boundary}"
        yours = "" if student.base else "  # in the repository" if tiny else "  # put in where the teacher is"
        lines += [f'pipe = {names[0]}.from_pretrained("{base}"{more}){yours}']
        lines += [f"pipe.load_lora_weights({json.dumps(name)}, weight_name={json.dumps(lora[0])})  # {WHERE}"]
        if two:
            lines += [
                f'pipe.load_lora_weights({json.dumps(name)}, weight_name="{lora[1]}", load_into_transformer_2=True)'
            ]
        if not near:
            own = f'FlowMatchEulerDiscreteScheduler.from_pretrained({json.dumps(name)}, subfolder="scheduler")'
            lines += [f"pipe.scheduler = {own}"]
    else:
        lines += [f"pipe = DiffusionPipeline.from_pretrained({json.dumps(name)})  # {WHERE}"]
    lines += exact_levels(student) if near else []
    return "\n".join(["```python", *lines, *call(student), "```"])


def notes(student, scheduler, lora):
    """What a user of the stock pipeline should know, a list of sentences."""
    found, own = [], made_by(scheduler, len(student.sigmas))
    if student.pipeline != "QwenImagePipeline" and distance(scheduler, student.sigmas) > EXACT:
        found += [
            "The scheduler's config cannot hold these noise levels exactly. Left as it is, it goes by "
            f"{levels_line(round(sigma, 4) for sigma in own)}; the lines above give it the student's."
        ]
    if student.pipeline != "QwenImagePipeline":
        found += [
            "Needs diffusers and transformers as new as this repository's, and `imageio imageio-ffmpeg` for H.264."
        ]
    found += ["It is trained for these levels and guidance 1: other numbers of steps are not what it learnt."]
    if student.model.conditions:
        found += [
            f"Give an image of {student.args.width} x {student.args.height} pixels: of another aspect, the pipeline "
            "stretches it, and training cut it in the middle."
        ]
    if "Cosmos" in student.pipeline:
        found += ["The pipeline wants NVIDIA's safety checker: `pip install cosmos_guardrail`."]
    if len(student.folders) > 1 and not lora:
        found += [f"Noise levels of {student.boundary} and above are `transformer`'s, those below `transformer_2`'s."]
    if lora and not student.pipeline.startswith("Cosmos"):
        found += [
            "ComfyUI is to read the same file: its key names are those in ComfyUI's code, and it was not run there."
        ]
    if student.pipeline in SERVED_BY and not lora:
        found += [
            "`dmd2_config` in model_index.json is for vllm-omni (`vllm serve … --omni --model-class-name "
            f"{SERVED_BY[student.pipeline]}`, not run); diffusers says that it ignores it."
        ]
    return found


def model_card(student, scheduler, name, license, revision, stock, lora=(), told=()):
    """The text of README.md. lora: names of its files; told: lines about them; stock: there is a pipeline folder."""
    args = student.args
    averaged = "the student itself" if student.raw or not args.ema_decay else f"average of decay {args.ema_decay}"
    rows = {
        "method": student.script.__doc__.splitlines()[0],
        "teacher": student.base or Path(args.teacher).name,
        "trained by": f"{script_name(student)}.py, {student.step} steps, commit {revision}",
        "weights": averaged + (f", as a LoRA: {', '.join(lora)}" if lora else ""),
        "sampler": NAMES[student.sampler],
        "noise levels": levels_line(student.sigmas),
        "guidance": "1: one evaluation of the network per level",
        "size": f"{args.frames} frames, {args.height} x {args.width} pixels, {student.model.fps} frames per second",
    }
    steps = f"{len(student.sigmas)}-step" if student.sampler != "causal" else "autoregressive few-step"
    about = f"A student of {rows['teacher']}, {steps}, distilled with {script_name(student)}.py."
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    text = [head(student, lora, license), "", f"# {name}", "", about, "", *table, ""]
    if student.sampler == "causal":
        text += ["## Use", "", CAUSAL.format(block=args.frame_block)]
    elif student.why_not_stock:
        text += ["## Use", "", f"No stock pipeline samples it: {student.why_not_stock}. Here are its transformers."]
    elif not stock:
        text += ["## Use", "", TRANSFORMERS_ALONE]
    else:
        text += ["## Use", "", snippet(student, scheduler, name, lora), ""]
        text += [f"- {line}" for line in [*notes(student, scheduler, lora), *told]]
    if license == "other":
        text += ["", "The teacher's license holds for its student: put its name into the head of this file."]
    return "\n".join(text) + "\n"
