"""Sample finished runs on the tiny teacher beside data and teacher, and write one table: mean ± spread over seeds.

    python experiments/evidence.py runs/dmd2__tiny__* runs/dfd__tiny__* --out runs/evidence

Runs that differ in nothing but --seed (and where they started and were written) are one row. It is named by method and
sampling steps, and by what tells it from other rows of that name; below the table stand each row's training steps and
all flags that are not its script's recipe. Factors are read from the pixels of clean clips (tiny/measures.py). Every
row has the same number of samples: --seeds samples of each of the world's EXAMPLES for each training seed, from noise
that no training saw.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from annotated_types import Ge
from einops import rearrange, reduce

import codmd
import common
import dmd2
from models.presets import TINY_WORLD, name_of
from tiny import measures
from tiny import world as tiny
from training.files import UserError, make_folder, read_json
from training.finished import load_run, noise_levels, run_of, students_of
from training.flags import check_flags, one_line_errors, with_recipe
from training.media import contact_sheet, moving_sheet
from training.metrics import preview_metrics

# flags that say where and how long to look, not what was trained
ASIDE = {"seed", "init", "runs_dir", "resume", "keep", "track", "save_every", "max_hours"}
ASIDE |= {"preview_every", "preview_prompts", "preview_seeds", "teacher_steps"}
METHODS = {"dmd": "DMD", "dmd2": "DMD2", "dfd": "DFD", "codmd": "CoDMD", "phased_dmd": "Phased DMD"}
SHOWN = (0, 1, 2)  # captions on the sheet
COLUMNS = {
    "right": "right, %", "looks": "looks", "looks_present": "looks present, %", "motions": "motions",
    "motions_present": "motions present, %", "diversity": "diversity",
    "position": "position spread, px", "saturation": "saturation", "brightness": "brightness",
    "background": "background", "clipped": "clipped pixels, %", "speed": "speed, px/frame",
    "coherence": "coherence, px", "residual": "residual", "frames": "frame relations", "samples": "sample relations",
    "distance": "distance to data", "brighter": "brightness, last - first", "stronger": "saturation, last - first",
    "first": "first frame, error",
}  # fmt: skip


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of any of the scripts; the newest checkpoint of each is sampled. FOLDER:raw samples the student
    itself where the export is its average."""
    seeds: Annotated[int, Ge(1)] = 24
    """Samples of each caption, for each training seed."""
    repeats: Annotated[int, Ge(1)] = 3
    """Sampling seeds for data and teacher, which have no training seeds."""
    teacher_steps: tuple[Annotated[int, Ge(1)], ...] = (50, 4)
    """Euler steps of the teacher's rows at the training guidance; the first also without guidance."""
    names: tuple[str, ...] = ()
    """What to call the rows, a name for each run folder; else what tells them apart is their name."""
    long: bool = False
    """Also videos of twice as many latent frames by causal students, each block reading as many frames as in training;
    the row's figures are those of the last frames."""
    transpose: bool = False
    """One column per run and one row per figure: easier to read for a few runs."""
    out: Path = Path("runs/evidence")
    """Folder for table.md, sheet.png, clips.webp (six clips each of "a shape" and "a circle", moving) and runs.json
    (the runs compared)."""


@cache
def data_factors():
    """Factors of 2,048 clips of the data, whose numbers no training reaches."""
    return measures.read_factors(tiny.batch(1, range(10**9, 10**9 + 2048))[0])


def factors_of(clips):
    """Factors of clips [p, s, 3, f, h, w], a dict of [p, s] tensors."""
    read = measures.read_factors(clips.flatten(0, 1))
    return {name: value.view(clips.shape[:2]) for name, value in read.items()}


def wasserstein(a, b):
    """W1 between two samples of numbers, by their quantiles."""
    q = (torch.arange(200) + 0.5) / 200
    return (torch.quantile(a, q) - torch.quantile(b, q)).abs().mean().item()


def relations(latents):
    """Mean relations in latents [p, s, c, f, h, w]: between frames [p, f, f], of each caption, and between captions
    [p, p]. Rows are softmaxed similarities of codmd.py's features, and sum to 1.
    """
    frames = codmd.relation_matrix(reduce(latents, "p s c f h w -> p s f c", "mean"))
    samples = codmd.relation_matrix(reduce(latents, "p s c f h w -> s p c", "mean"))
    tau = codmd.Args.relation_temperature
    return torch.softmax(frames / tau, dim=-1).mean(1), torch.softmax(samples / tau, dim=-1).mean(0)


def kl(p, q):
    """KL(p || q) of rows that sum to 1, the mean over rows."""
    return (p * (p / q).log()).sum(-1).mean().item()


def measure(clips, reference):
    """Figures of clips [p, s, 3, f, h, w], a row for each of the world's EXAMPLES, as a dict of floats; see COLUMNS.

    residual: what one shape of one size and colour leaves unexplained in the worst frame, median over samples.
    looks and motions are entropies of the modes that a caption leaves open (see measures.summary), which fall when a
    student forgets some; position is the spread within a caption, averaged over captions.
    distance: W1 to the data over its standard deviation, averaged over the free factors; `reference` holds the data's
    factors. Needs two clean clips; NaN if there are fewer.
    """
    f = factors_of(clips)
    clean = f["clean"]
    preview = preview_metrics(clips)
    row = measures.summary(clips.flatten(0, 1), [caption for caption in tiny.EXAMPLES for _ in range(clips.shape[1])])
    row |= {"diversity": preview["diversity"], "clipped": 100 * preview["clipped"]}
    several = [p for p in range(len(clips)) if clean[p].sum() > 1]
    spreads = [torch.hypot(*(f[axis][p][clean[p]].std() for axis in ("x", "y"))) for p in several]
    row["position"] = torch.tensor(spreads).mean().item()
    for name in ("saturation", "brightness", "background", "speed", "coherence"):
        row[name] = f[name][clean].mean().item()
    row["residual"] = f["residual"].median().item()
    row["distance"] = float("nan")
    if clean.any():
        apart = [wasserstein(f[name][clean], reference[name]) / reference[name].std().item() for name in measures.FREE]
        row["distance"] = sum(apart) / len(apart)
    return row


def drift(clips):
    """What changes from the first frame of clips [p, s, 3, f, h, w] to the last, the mean over those that are clean in
    both: the error that accumulates when frames are made from frames. Shapes of the world do not change.
    """
    first, last = factors_of(clips[:, :, :, :1]), factors_of(clips[:, :, :, -1:])
    clean = first["clean"] & last["clean"]
    factors = {"brighter": "brightness", "stronger": "saturation"}
    return {name: (last[factor] - first[factor])[clean].mean().item() for name, factor in factors.items()}


def counted(steps):
    return f"{steps} step" + ("s" if steps > 1 else "")


def description(script, args, step):
    """What a row is, a list of words: method and sampling steps, script, training steps, the flags that are not its
    recipe's, and where it started.
    """
    recipe = vars(with_recipe(script.Args, script.RECIPES, teacher=args.teacher))
    changed = [f"{k} {v}" for k, v in vars(args).items() if k not in ASIDE | {"steps"} and v != recipe[k]]
    file = script.__name__.rpartition(".")[2]
    sampled = counted(sum(map(len, noise_levels(script, args))))
    name = f"{'+ ' if args.init else ''}{METHODS.get(file, f'{file}.py')}, {sampled}"
    return [name, f"{file}.py", f"{step} training steps", *sorted(changed), *started_from(args.init)]


def started_from(init):
    """Where a run started is part of what it is: ["from (that run's description)"]. Its seed and time are not."""
    if not init:
        return []
    folders = [folder for folder in (Path(init), *Path(init).parents) if (folder / "args.json").is_file()]
    if not folders:  # a student alone, or a run that is gone
        return [f"from {Path(init).name}"]
    script, args, checkpoint = load_run(folders[0])
    here = [part for part in Path(init).parts if part.startswith("step_")]
    step = int(here[0].removeprefix("step_")) if here else read_json(checkpoint / "checkpoint.json")["step"]
    return [f"from ({', '.join(description(script, args, step)[1:])})"]


def labels(descriptions):
    """{description: label} of tuples of words: the first word, and those that tell it from others of the same first."""
    named = {}
    for words in descriptions:
        shared = set.intersection(*(set(other) for other in descriptions if other[0] == words[0]))
        named[words] = ", ".join([words[0], *(word for word in words if word not in shared)])
    return named


def load_all(folders):
    """[(description, script, args, checkpoint)] of run folders; one line unless they fit into one table."""
    if not folders:
        raise UserError("name at least one run folder")
    loaded, seen = [load_run(folder) for folder in folders], {}
    for folder, (_, args, _) in zip(folders, loaded):
        if name_of(args.teacher) not in TINY_WORLD:
            raise UserError(f"{folder}: only runs on the tiny teacher have factors to read")
        if common.teacher_folder(args.teacher).resolve() != common.teacher_folder(loaded[0][1].teacher).resolve():
            raise UserError(f"{folder} and {folders[0]} have different teachers: one table, one teacher")
    rows = []
    for folder, (script, args, checkpoint) in zip(folders, loaded):
        words = description(script, args, read_json(checkpoint / "checkpoint.json")["step"])
        words = (*words, "not averaged") if folder.endswith(":raw") else tuple(words)
        other = seen.setdefault((words, args.seed), folder)
        if other != folder:
            raise UserError(f"{folder} and {other} are the same run twice (seed {args.seed}): name one of them")
        rows.append((words, script, args, checkpoint))
    return rows


def table_of(rows, transpose):
    """Markdown lines of {label: a list of figures, one dict per seed}: mean ± spread."""
    columns = [column for column in COLUMNS if all(column in row for figures in rows.values() for row in figures)]
    table = [["", "seeds", *(COLUMNS[column] for column in columns)]]
    for name, figures in rows.items():
        table.append([name, str(len(figures))])
        for column in columns:
            values = torch.tensor([row[column] for row in figures])
            spread = f" ± {values.std():.2g}" if len(values) > 1 else ""
            table[-1].append(f"{values.mean():.3g}{spread}")
    table = [list(column) for column in zip(*table)] if transpose else table
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|---|" + "---:|" * (len(table[0]) - 1), *lines[1:]]


@torch.no_grad()
def main(args):
    check_flags(args)
    if not args.teacher_steps:
        raise UserError("--teacher-steps must be at least one number")
    if args.names and len(args.names) != len(args.runs):
        raise UserError(f"--names must be as many as run folders, got {len(args.names)} for {len(args.runs)}")
    runs = load_all(args.runs)
    names = dict(zip((words for words, *_ in runs), args.names)) or labels([words for words, *_ in runs])
    make_folder(args.out, hint="; see --out")
    _, _, first, checkpoint = runs[0]
    device = common.init_distributed()
    model = common.Model(first.teacher, first.frames, first.height, first.width)
    run = run_of(checkpoint)  # which may have been moved
    shape, cache = model.latent_shape, run.parent / "cache" if run else args.out / "cache"
    captions = common.TinyWorld(model, cache, device, seed=1)  # of an image-to-video teacher an image per caption
    images = tiny.batch(1, range(10**9, 10**9 + len(tiny.EXAMPLES)), tiny.EXAMPLES)[0][:, None, :, 0]
    null_cond = common.encode_text(model, [model.negative_prompt], cache, device).cond_of([0])
    vae, teacher = model.load_vae(device), model.load_network("teacher", device)
    reference = data_factors()
    count = len(tiny.EXAMPLES) * args.seeds

    def by_caption(x):
        return rearrange(x, "(p s) ... -> p s ...", s=args.seeds)

    def sample(sampler, seed):
        """Latents [p * s, c, f, h, w] of sampler(rng, cond), all captions."""
        parts = []
        for start in range(0, count, 48):
            numbers = range(start, min(start + 48, count))
            rng = common.SampleRNG(seed, "evidence", numbers, device)
            parts.append(sampler(rng, captions.cond_of([n // args.seeds for n in numbers])))
        return torch.cat(parts)

    def euler(steps, guidance):
        """The teacher's sampler."""
        settings = (null_cond, guidance, first.shift, steps)
        return lambda rng, cond: dmd2.solve_ode(teacher, rng.normal(shape), cond, *settings)

    # relations are compared with the teacher's, of other noise than that of the rows
    solver = euler(args.teacher_steps[0], first.guidance_scale)
    parts = [relations(by_caption(sample(solver, 10**6 + i).cpu())) for i in range(min(2, args.repeats))]
    taught = [torch.stack(matrices).mean(0) for matrices in zip(*parts)]
    rows, shown = defaultdict(list), {}

    def add(name, latents, clips=None):
        whole = by_caption(common.decode(vae, latents).cpu() if clips is None else clips)
        own, clips = relations(by_caption(latents[:, :, -shape[1] :].cpu())), whole[:, :, :, -tiny.FRAMES :]
        figures = measure(clips, reference) | dict(zip(("frames", "samples"), map(kl, taught, own))) | drift(whole)
        if model.conditions:
            figures["first"] = (clips[:, :, :, 0] - images).abs().mean().item()
        rows[name].append(figures)
        shown.setdefault(name, clips)
        print(f"{name}: {', '.join(f'{k} {v:.3g}' for k, v in rows[name][-1].items())}", flush=True)

    for seed in range(args.repeats):
        numbers = range(2 * 10**9 + count * seed, 2 * 10**9 + count * (seed + 1))
        clips = tiny.batch(2, numbers, [caption for caption in tiny.EXAMPLES for _ in range(args.seeds)])[0]
        if model.conditions:  # what else may follow these images
            images_of = enumerate(tiny.EXAMPLES, 10**9)
            clips = torch.cat([tiny.continuations(1, i, caption, args.seeds, seed) for i, caption in images_of])
        add("data", torch.cat([common.encode(vae, part) for part in clips.split(48)]), clips)
    plans = [(steps, first.guidance_scale) for steps in args.teacher_steps]
    for steps, guidance in dict.fromkeys([*plans[:1], (args.teacher_steps[0], 1.0), *plans[1:]]):
        for seed in range(args.repeats):
            add(f"teacher, {counted(steps)}, guidance {guidance:g}", sample(euler(steps, guidance), seed))
    for folder, (words, script, run_args, checkpoint) in zip(args.runs, runs):
        students = students_of(model, device, script, run_args, checkpoint, raw=folder.endswith(":raw"))
        add(names[words], sample(partial(script.sample_student, students, shape=shape, args=run_args), run_args.seed))
        if args.long and (block := getattr(run_args, "frame_block", 0)):
            students[0].kept_frames, longer = shape[1] - block, (shape[0], 2 * shape[1], *shape[2:])
            sampler = partial(script.sample_student, students, shape=longer, args=run_args)
            add(f"{names[words]}, last {tiny.FRAMES} frames of twice the length", sample(sampler, run_args.seed))

    below = [f'- "{name}": {", ".join(words[1:])}' for words, name in names.items()]
    lines = [*table_of(rows, args.transpose), "", *below]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    picked = [(f"{name}: {tiny.EXAMPLES[p]}", clips[p, :4]) for p in SHOWN for name, clips in shown.items()]
    contact_sheet(args.out / "sheet.png", picked)
    moving = [(name, clips[:2, :6].flatten(0, 1)) for name, clips in shown.items()]  # "a shape" and "a circle"
    moving_sheet(args.out / "clips.webp", moving, model.fps)
    (args.out / "runs.json").write_text(json.dumps(list(args.runs), indent=2) + "\n")
    print("\n".join(lines) + f"\n\n{args.out / 'table.md'}; sheet.png and clips.webp (moving) beside it")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
