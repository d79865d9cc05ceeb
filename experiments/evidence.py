"""Sample finished runs on the tiny teacher beside data and teacher, and write one table: mean ± spread over seeds.

    python experiments/evidence.py runs/dmd2__tiny__* runs/dfd__tiny__* --names DMD2 DMD2 DFD --out runs/evidence

Factors are read from the pixels of clean clips (tiny/measures.py). Every row has the same number of samples: --seeds
samples of each of the world's EXAMPLES for each training seed, from noise that no training saw.
"""

import csv
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from einops import reduce
from tqdm import tqdm

import codmd
import common
import dmd2
from models.latents import decode, encode
from models.presets import TINY_WORLD, name_of
from tiny import measures
from tiny import world as tiny
from tiny.samples import TinyWorld
from training.files import UserError, written_aside
from training.finished import load_run, students_of
from training.flags import cli, one_line_errors, recipe_args
from training.media import moving_sheet
from training.metrics import pairwise_rms, preview_metrics

COLUMNS = {
    "right": "right, %", "looks": "looks", "looks_present": "looks present, %", "motions": "motions",
    "diversity": "diversity", "diversity_shape": "diversity of a shape", "diversity_named": "diversity, all named",
    "position": "position spread, px",
    "saturation_mean": "saturation", "brightness_mean": "brightness", "clipped": "clipped pixels, %",
    "speed_mean": "speed, px/frame", "coherence": "coherence, px",
    "frames": "frame relations", "samples": "sample relations",
    "distance": "distance to data", "brighter": "brightness, last - first", "stronger": "saturation, last - first",
   }  # fmt: skip
TWICE = ", twice the length"
# figures of `make demo`, and what its DFD student had of them with seeds 0 and 1
CARD = {
    "right": "89 to 95", "looks": "0.62 to 0.7", "diversity": "0.1 to 0.12",
    "saturation_mean": "0.78 to 0.8", "brightness_mean": "0.67 to 0.75", "distance": "0.3 to 0.48",
}  # fmt: skip


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of any of the scripts; the newest checkpoint of each is sampled. FOLDER:raw samples the student
    itself where the export is its average."""
    names: tuple[str, ...] = ()
    """A row's name for each run folder, the same for the seeds of one row; else each folder is a row."""
    seeds: int = 24
    """Samples of each caption, for each training seed."""
    repeats: int = 3
    """Sampling seeds for data and teacher, which have no training seeds."""
    teacher_steps: tuple[int, ...] = (50, 4)
    """Euler steps of the teacher's rows at the training guidance; the first also without guidance. None: no such rows,
    and no relations, which are compared with the teacher's."""
    long: bool = False
    """Also videos of twice as many latent frames by causal students, each block reading as many frames as in training;
    the row's figures are those of the last frames."""
    exits: bool = False
    """Also videos after one, two, … of a student's steps, where training lets it stop too."""
    card: bool = False
    """A report card: few figures, each a row, a column per run, and last what is healthy after `make demo`."""
    out: Path = Path("runs/evidence")
    """Folder for table.md, figures.csv (a line for each run) and clips.webp (moving clips of two captions)."""
    csv: Path | None = None
    """The file for figures.csv. Lines of other runs stay in it."""


def by_caption(x):
    """[p * s, ...] -> [p, s, ...] for the p captions of EXAMPLES, on the CPU."""
    return x.cpu().unflatten(0, (len(tiny.EXAMPLES), -1))


def wasserstein(a, b):
    """W1 between two samples of numbers, by their quantiles."""
    q = (torch.arange(200) + 0.5) / 200
    return (torch.quantile(a, q) - torch.quantile(b, q)).abs().mean().item()


def relations(latents):
    """Mean relations in latents [p * s, c, f, h, w] of p captions: between frames [p, f, f], of each caption, and
    between captions [p, p]. Rows are softmaxed similarities of codmd.py's features, and sum to 1.
    """
    latents = by_caption(latents)
    frames = codmd.relation_matrix(reduce(latents, "p s c f h w -> p s f c", "mean"))
    samples = codmd.relation_matrix(reduce(latents, "p s c f h w -> s p c", "mean"))
    tau = codmd.Args.relation_temperature
    return torch.softmax(frames / tau, dim=-1).mean(1), torch.softmax(samples / tau, dim=-1).mean(0)


def kl(p, q):
    """KL(p || q) of rows that sum to 1, the mean over rows."""
    return (p * (p / q).log()).sum(-1).mean().item()


def measure(clips, reference):
    """Figures of clips [p, s, 3, f, h, w], a row for each of the world's EXAMPLES, as a dict of floats; see COLUMNS.

    looks and motions are entropies of the modes that a caption leaves open (see measures.summary), which fall when a
    student forgets some; position is the spread within a caption, averaged over captions.
    distance: W1 to the data over its standard deviation, averaged over the free factors; `reference` holds the data's
    factors. NaN without clean clips.
    """
    seeds, f = clips.shape[1], measures.read_factors(clips.flatten(0, 1))
    row = measures.summary(clips.flatten(0, 1), [caption for caption in tiny.EXAMPLES for _ in range(seeds)])
    pixels = preview_metrics(clips)
    row |= {"diversity": pixels["diversity"], "diversity_shape": pairwise_rms(clips[0])}
    named = [own for caption, own in zip(tiny.EXAMPLES, clips) if len(tiny.NAMED[caption]) == len(tiny.MODES)]
    row["diversity_named"] = sum(map(pairwise_rms, named)) / len(named)
    row |= {"clipped": 100 * pixels["clipped"], "distance": float("nan")}
    clean, x, y = (f[name].split(seeds) for name in ("clean", "x", "y"))
    spreads = [torch.hypot(a[c].std(), b[c].std()) for c, a, b in zip(clean, x, y) if c.sum() > 1]
    row["position"] = torch.tensor(spreads).mean().item()
    if (clean := f["clean"]).any():
        apart = [wasserstein(f[name][clean], reference[name]) / reference[name].std().item() for name in measures.FREE]
        row["distance"] = sum(apart) / len(apart)
    return row


def drift(clips):
    """What changes from the first frame of clips [p, s, 3, f, h, w] to the last, the mean over those that are clean in
    both: the error that accumulates when frames are made from frames. Shapes of the world do not change.
    """
    first, last = (measures.read_factors(clips[:, :, :, t].flatten(0, 1)) for t in (slice(1), slice(-1, None)))
    clean = first["clean"] & last["clean"]
    factors = {"brighter": "brightness", "stronger": "saturation"}
    return {name: (last[factor] - first[factor])[clean].mean().item() for name, factor in factors.items()}


def command_of(script, args):
    """The command of a run: its script and the flags that differ from the recipe; of --init the run's name."""
    base, _, variant = script.__name__.partition("-")
    usual = vars(recipe_args(type(args), teacher=args.teacher, runs_dir=args.runs_dir)) | {"teacher": "tiny"}
    own = {name.replace("_", "-"): value for name, value in vars(args).items() if value != usual[name]}
    words = [f"experiments/variant.py {variant}" if variant else f"{base.replace('.', '/')}.py"]
    words += [f"--{name} {value}" for name, value in own.items()]
    flags = re.sub(r"--(\S+) False", r"--no-\1", " ".join(["python", *words]))
    return re.sub(r"[(),]| True|(?<=--init )\S*/", "", flags)


def add_to(path, rows):
    """Write rows to a CSV file; in one that is there they replace those of the same teacher, name, seed and run."""
    before = csv.DictReader(open(path)) if path.exists() else ()
    table = {(row["teacher"], row["name"], str(row["seed"]), row["run"]): row for row in [*before, *rows]}
    with written_aside(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def table_of(rows, figures=tuple(COLUMNS), card=False):
    """Markdown lines of dicts of figures: mean ± spread of those that have one name."""
    table = [["", "runs", *(COLUMNS.get(figure, figure) for figure in figures)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        table.append([name, str(len(own))])
        for figure in figures:
            values = torch.tensor([float(row[figure]) for row in own])
            table[-1].append(f"{values.mean():.3g}" + (f"±{values.std():.2g}" if len(own) > 1 else ""))
    if card:
        table = zip(*table, ["healthy for DFD", "", *CARD.values()])
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|---|" + "---:|" * (lines[0].count("|") - 2), *lines[1:]]


@torch.no_grad()
def main(args):
    names = args.names or [Path(run).name for run in args.runs]
    runs = list(zip(names, args.runs, map(load_run, args.runs), strict=True))
    teachers = {run_args.teacher for *_, (_, run_args, _) in runs}
    if len(teachers) != 1 or name_of(*teachers) not in TINY_WORLD:
        raise UserError(f"one table has runs of one tiny teacher, got {', '.join(teachers) or 'none'}")
    first = runs[0][2][1]
    args.out.mkdir(parents=True, exist_ok=True)
    device = common.init_distributed()
    model = common.Model(first.teacher, first.frames, first.height, first.width)
    shape, cache = model.latent_shape, args.out / "cache"
    captions = TinyWorld(model, cache, device, seed=1)  # of an image-to-video teacher an image per caption
    null_cond = common.encode_text(model, [model.negative_prompt], cache, device).cond_of([0])
    vae, teacher = model.load_vae(device), model.load_network("teacher", device)
    reference = measures.read_factors(tiny.batch(1, range(10**9, 10**9 + 2048))[0])
    count, rows, shown = len(tiny.EXAMPLES) * args.seeds, [], {}

    def sample(sampler, seed):
        """Latents [p * s, c, f, h, w] of sampler(rng, cond), all captions."""
        parts = []
        for numbers in tqdm(torch.arange(count).split(48), "sampling", leave=False):
            rng = common.SampleRNG(seed, "evidence", numbers.tolist(), device)
            parts.append(sampler(rng, captions.cond_of((numbers // args.seeds).tolist())))
        return torch.cat(parts)

    def euler(steps, guidance):
        own = replace(first, guidance_scale=guidance, teacher_steps=steps)
        return partial(dmd2.sample_teacher, teacher, null_cond, shape, own)

    # relations are compared with the teacher's, of other noise than that of the rows
    plans = [(steps, first.guidance_scale) for steps in args.teacher_steps]
    taught = relations(sample(euler(*plans[0]), 10**6)) if plans and not args.card else ()
    here = {
        "teacher": first.teacher,
        "per_caption": args.seeds,
        "machine": re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1],
    }

    def add(name, run, seed, latents, clips=None, commit="", command=""):
        whole = by_caption(decode(vae, latents) if clips is None else clips)
        own, clips = relations(latents[:, :, -shape[1] :]), whole[:, :, :, -tiny.FRAMES :]
        related = dict(zip(("frames", "samples"), map(kl, taught, own) if taught else (float("nan"),) * 2))
        figures = measure(clips, reference) | related | drift(whole)
        about = {"name": name, "seed": seed, "run": run, "commit": commit, "command": command} | here
        rows.append(about | {key: f"{value:.6g}" for key, value in figures.items()})
        shown.setdefault(name, clips[:2, :6])
        print(f"{name}: done", flush=True)

    for seed in range(args.repeats):
        numbers = range(2 * 10**9 + count * seed, 2 * 10**9 + count * (seed + 1))
        clips = tiny.batch(2, numbers, [caption for caption in tiny.EXAMPLES for _ in range(args.seeds)])[0]
        if model.conditions:  # what else may follow these images
            images_of = enumerate(tiny.EXAMPLES, 10**9)
            clips = torch.cat([tiny.continuations(1, i, caption, args.seeds, seed) for i, caption in images_of])
        add("data", "", seed, torch.cat([encode(vae, part) for part in clips.split(48)]), clips)
    for steps, guidance in dict.fromkeys([*plans, *((steps, 1.0) for steps in args.teacher_steps[: not args.card])]):
        for seed in range(args.repeats):
            add(f"teacher, {steps} steps, guidance {guidance:g}", "", seed, sample(euler(steps, guidance), seed))
    for name, folder, (script, run_args, checkpoint) in runs:
        own = common.Model(run_args.teacher, *run_args.size, student=run_args.student)
        students = students_of(own, device, script, run_args, checkpoint, raw=folder.endswith(":raw"))
        sampler = partial(script.sample_student, students)
        revision, run, command = checkpoint.parents[1] / "revision.txt", Path(folder).name, command_of(script, run_args)
        about = {"commit": revision.read_text().strip() if revision.is_file() else "", "command": command}
        add(name, run, run_args.seed, sample(partial(sampler, shape, run_args), run_args.seed), **about)
        for steps in range(1, len(getattr(run_args, "student_sigmas", ())) if args.exits else 0):
            early = partial(sampler, shape, replace(run_args, student_sigmas=run_args.student_sigmas[:steps]))
            add(f"{name}, exit {steps}", run, run_args.seed, sample(early, run_args.seed), **about)
        if args.long and (block := getattr(run_args, "frame_block", 0)):
            students[0].kept_frames, longer = shape[1] - block, (shape[0], 2 * shape[1], *shape[2:])
            latents = sample(partial(sampler, longer, run_args), run_args.seed)
            add(name + TWICE, run, run_args.seed, latents, **about)

    lines = table_of(rows, CARD, card=True) if args.card else table_of(rows)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    add_to(args.csv or args.out / "figures.csv", rows)
    sheet = [(f"{tiny.EXAMPLES[i]}: {name}", own[i]) for i in (0, 1) for name, own in shown.items()]
    moving_sheet(args.out / "clips.webp", sheet, model.fps)
    print("\n".join(lines) + f"\n\nlook at {args.out / 'clips.webp'}; table.md and figures.csv are beside it")


if __name__ == "__main__":
    with one_line_errors():
        main(cli(Args, description=__doc__))
