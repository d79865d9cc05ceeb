"""Sample finished runs on the tiny teacher beside data and teacher, and write one table: mean ± spread over seeds.

    python tools/evidence.py runs/dmd2__tiny__* runs/dfd__tiny__* --out runs/evidence

Runs that differ in nothing but --seed (and where they started and were written) are one row; its label is the flags
that are not the script's recipe. Factors are read from the pixels of clean clips (tiny/data.py). Every row has the same
number of samples: --seeds samples of each of the 12 captions for each training seed, from noise that no training saw.
"""

import importlib
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from einops import rearrange, reduce

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/evidence.py` finds the scripts

import codmd  # noqa: E402
import common  # noqa: E402
import dmd2  # noqa: E402
from tiny import data as tiny  # noqa: E402
from tools import metrics  # noqa: E402

# script: its module
SCRIPTS = {name: name for name in ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")}
SCRIPTS |= {name: f"tools.{name}" for name in ("finetune", "vanilla", "codmd_cells")}
# flags that say where and how long to look, not what was trained
ASIDE = {"seed", "init", "runs_dir", "resume", "keep", "track", "save_every", "dry_run", "gpus", "from_scratch"}
ASIDE |= {"preview_every", "preview_prompts", "preview_seeds", "teacher_steps"}
COLUMNS = {
    "right": "right, %", "diversity": "diversity", "vendi": "Vendi", "direction": "direction entropy",
    "position": "position spread, px", "saturation": "saturation", "brightness": "brightness",
    "background": "background", "clipped": "clipped pixels, %", "speed": "speed, px/frame",
    "coherence": "coherence, px", "residual": "residual", "frames": "frame relations", "samples": "sample relations",
    "distance": "distance to data",
}  # fmt: skip


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of any of the scripts; the newest checkpoint of each is sampled. FOLDER:raw samples the student
    itself where the export is its average."""
    seeds: int = 8
    """Samples of each caption, for each training seed."""
    repeats: int = 3
    """Sampling seeds for data and teacher, which have no training seeds."""
    teacher_steps: tuple[int, ...] = (50, 4)
    """Euler steps of the teacher's rows at the training guidance; the first also without guidance."""
    transpose: bool = False
    """One column a run and one row a figure: easier to read for a few runs."""
    out: Path = Path("runs/evidence")
    """Folder for table.md, sheet.png and runs.json (the runs compared)."""


def factors_of(clips):
    """Factors of clips [p, s, 3, f, h, w], a dict of [p, s] tensors."""
    read = tiny.read_factors(clips.flatten(0, 1))
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
    """Figures of clips [p, s, 3, f, h, w], one row a caption, as a dict of floats; see COLUMNS.

    residual: what one shape of one size and colour leaves unexplained in the worst frame, median over samples.
    direction and position are within a caption, averaged over captions: what collapses when a student forgets a mode.
    distance: W1 to the data over its standard deviation, averaged over the free factors; `reference` holds the data's
    factors. Needs two clean clips; NaN if there are fewer.
    """
    f = factors_of(clips)
    clean = f["clean"]
    wanted = torch.arange(len(clips))[:, None]
    right = clean & (f["color"] * len(tiny.KINDS) + f["kind"] == wanted)
    preview, row = metrics.preview_metrics(clips), {"right": 100 * right.float().mean().item()}
    row |= {"diversity": preview["diversity"], "vendi": preview["vendi"], "clipped": 100 * preview["clipped"]}
    entropies, spreads = [], []
    for p in range(len(clips)):
        if clean[p].sum() > 1:
            bins = torch.round(f["direction"][p][clean[p]] / (torch.pi / 4)).long() % 8
            share = torch.bincount(bins, minlength=8).float() / len(bins)
            entropies.append(torch.special.entr(share).sum() / torch.tensor(8.0).log())
            spreads.append(torch.hypot(*(f[axis][p][clean[p]].std() for axis in ("x", "y"))))
    row["direction"] = torch.tensor(entropies).mean().item()
    row["position"] = torch.tensor(spreads).mean().item()
    for name in ("saturation", "brightness", "background", "speed", "coherence"):
        row[name] = f[name][clean].mean().item()
    row["residual"] = f["residual"].median().item()
    row["distance"] = float("nan")
    if clean.any():
        apart = [wasserstein(f[name][clean], reference[name]) / reference[name].std().item() for name in tiny.FREE]
        row["distance"] = sum(apart) / len(apart)
    return row


def load_run(folder):
    """(script module, its Args, checkpoint) of a run folder (its newest) or checkpoint folder, with or without :raw."""
    folder = Path(str(folder).removesuffix(":raw")).absolute()
    checkpoint = folder if (folder / "checkpoint.json").is_file() else common.latest_checkpoint(folder)
    run = folder.parent.parent if checkpoint == folder else folder
    name = run.name.split("__")[0]
    if checkpoint is None or not (run / "args.json").is_file() or name not in SCRIPTS:
        raise common.Fatal(f"{folder} is not a run with a checkpoint")
    record = common.read_json(run / "args.json")
    script = importlib.import_module(SCRIPTS[name])
    try:
        args = script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
    except TypeError as error:
        raise common.Fatal(f"{run / 'args.json'} does not fit today's {name}.py: {error}") from None
    return script, args, checkpoint


def label(script, args, step):
    """The script, its steps, and the flags that are not its recipe's."""
    recipe = vars(common.with_recipe(script.Args, script.RECIPES, teacher=args.teacher))
    changed = [f"{k} {v}" for k, v in vars(args).items() if k not in ASIDE | {"steps"} and v != recipe[k]]
    name = f"{script.__name__.removeprefix('tools.')}.py, {step} steps"
    return name + "".join(f", {flag}" for flag in sorted(changed)) + started_from(getattr(args, "init", None))


def started_from(init):
    """Where a run started is part of what it is: ", from (that run's label)". Its seed and time are not."""
    if not init:
        return ""
    folders = [folder for folder in (Path(init), *Path(init).parents) if (folder / "args.json").is_file()]
    if not folders:  # a student alone, or a run that is gone
        return f", from {Path(init).name}"
    script, args, checkpoint = load_run(folders[0])
    here = [part for part in Path(init).parts if part.startswith("step_")]
    step = int(here[0].removeprefix("step_")) if here else common.read_json(checkpoint / "checkpoint.json")["step"]
    return f", from ({label(script, args, step)})"


def sampler(spec, device, script, args, checkpoint, raw):
    """A function (rng, cond) -> latents of a run's exported student (raw: not its average), by its script's rollout."""
    networks = []
    # transformer, transformer_2, …
    for folder in sorted((checkpoint / "student").iterdir(), key=lambda path: int(path.name.partition("_")[2] or 1)):
        networks.append(spec.load_network(False, device))
        common.put_weights(networks[-1], folder, torch.float32)
    if raw:  # with its LoRA, if it has one, which an export has not
        lora = {name: getattr(args, name) for name in ("lora_rank", "lora_alpha") if hasattr(args, name)}
        networks[-1] = spec.load_network(False, device, **lora)
        common.load_networks(checkpoint, {"student": networks[-1]})
    shape, levels = spec.latent_shape, getattr(args, "student_sigmas", None)
    if hasattr(args, "phase_ends"):
        if len(networks) < len(args.phase_ends):
            raise common.Fatal(
                f"{checkpoint}: {len(networks)} of {len(args.phase_ends)} phases are trained; finish the run"
            )
        experts = dict(zip(args.phase_ends, networks, strict=True))
        return lambda rng, cond: script.rollout(experts, rng, cond, shape, (*levels, 0.0))[0]
    return lambda rng, cond: script.rollout(networks[0], rng, cond, shape, *([levels] if levels else []))


@torch.no_grad()
def main(args):
    if not args.runs:
        raise common.Fatal("name at least one run folder")
    if min(args.seeds, args.repeats, *(args.teacher_steps or (0,))) < 1:
        raise common.Fatal("--seeds, --repeats and --teacher-steps must be at least 1")
    loaded = [load_run(folder) for folder in args.runs]
    for folder, (_, run_args, _) in zip(args.runs, loaded, strict=True):
        if common.recipe_name(run_args.teacher) != "tiny":
            raise common.Fatal(f"{folder}: only runs on the tiny teacher have factors to read")
        first = loaded[0][1]
        if common.teacher_folder(run_args.teacher).resolve() != common.teacher_folder(first.teacher).resolve():
            raise common.Fatal(f"{folder} and {args.runs[0]} have different teachers: one table, one teacher")
    common.make_folder(args.out, hint="; see --out")
    labels, seen = [], {}
    for folder, (script, run_args, checkpoint) in zip(args.runs, loaded, strict=True):
        labels.append(label(script, run_args, common.read_json(checkpoint / "checkpoint.json")["step"]))
        labels[-1] += ", not averaged" if folder.endswith(":raw") else ""
        other = seen.setdefault((labels[-1], run_args.seed), folder)
        if other != folder:
            raise common.Fatal(f"{folder} and {other} are the same run twice (seed {run_args.seed}): name one of them")
    _, _, device = common.init_distributed()
    spec = common.Teacher(first.teacher, first.frames, first.height, first.width)
    cache = loaded[0][2].parents[2] / "cache"  # beside the run, which may have been moved
    captions = common.encode_text(spec, tiny.CAPTIONS, cache, device)
    null_cond = common.encode_text(spec, [spec.negative_prompt], cache, device).cond_of([0])
    vae = spec.family.load_vae(spec.folder, device)
    # numbers that no training reaches
    reference = tiny.read_factors(tiny.batch(1, range(10**9, 10**9 + 2048))[0])
    count = len(tiny.CAPTIONS) * args.seeds

    def sample(sampler, seed):
        """Latents [p * s, c, f, h, w] of sampler(rng, cond), all captions."""
        parts = []
        for first in range(0, count, 48):
            numbers = range(first, min(first + 48, count))
            rng = common.Draws(seed, "evidence", numbers, device)
            parts.append(sampler(rng, captions.cond_of([n // args.seeds for n in numbers])))
        return torch.cat(parts)

    rows, shown, taught = defaultdict(list), {}, None

    def add(name, latents, clips=None):
        if clips is None:
            clips = torch.cat([spec.family.decode(vae, part).cpu() for part in latents.split(48)])
        clips, latents = (rearrange(x, "(p s) ... -> p s ...", s=args.seeds) for x in (clips, latents))
        row, own = measure(clips, reference), relations(latents.cpu())
        rows[name].append(row | dict(zip(("frames", "samples"), map(kl, taught, own))))
        shown.setdefault(name, clips)
        print(f"{name}: {', '.join(f'{k} {v:.3g}' for k, v in rows[name][-1].items())}", flush=True)

    def euler(steps, guidance):
        return lambda rng, cond: dmd2.solve_ode(
            network, rng.normal(spec.latent_shape), cond, null_cond, guidance, first.shift, steps
        )

    network = spec.load_network(False, device)
    # relations are compared with the teacher's, of other noise than that of the rows
    solver = euler(args.teacher_steps[0], first.guidance_scale)
    parts = [
        relations(rearrange(sample(solver, 10**6 + i).cpu(), "(p s) ... -> p s ...", s=args.seeds)) for i in range(2)
    ]
    taught = [torch.stack(matrices).mean(0) for matrices in zip(*parts)]
    for seed in range(args.repeats):
        numbers = range(2 * 10**9 + count * seed, 2 * 10**9 + count * (seed + 1))
        clips = tiny.batch(2, numbers, [caption for caption in tiny.CAPTIONS for _ in range(args.seeds)])[0]
        add("data", torch.cat([spec.family.encode(vae, part) for part in clips.split(48)]), clips)
    plans = [(steps, first.guidance_scale) for steps in args.teacher_steps]
    for steps, guidance in dict.fromkeys([*plans[:1], (args.teacher_steps[0], 1.0), *plans[1:]]):
        for seed in range(args.repeats):
            add(f"teacher, {steps} steps, guidance {guidance:g}", sample(euler(steps, guidance), seed))
    for folder, name, (run_script, run_args, checkpoint) in zip(args.runs, labels, loaded, strict=True):
        raw = folder.endswith(":raw")
        add(name, sample(sampler(spec, device, run_script, run_args, checkpoint, raw), run_args.seed))

    table = [["", "seeds", *COLUMNS.values()]]
    for name, figures in rows.items():
        table.append([name, str(len(figures))])
        for column in COLUMNS:
            values = torch.tensor([row[column] for row in figures])
            spread = f" ± {values.std():.2g}" if len(values) > 1 else ""
            table[-1].append(f"{values.mean():.3g}{spread}")
    table = [list(column) for column in zip(*table)] if args.transpose else table
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    picked = [(f"{name}: {tiny.CAPTIONS[p]}", clips[p, :4]) for p in (0, 4, 11) for name, clips in shown.items()]
    metrics.contact_sheet(args.out / "sheet.png", picked)
    (args.out / "runs.json").write_text(json.dumps(list(args.runs), indent=2) + "\n")
    print("\n".join(lines) + f"\n\n{args.out / 'table.md'} and sheet.png beside it")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
