"""What losses and preview figures look like: of healthy runs of every method, and of runs that are broken on purpose.

    python experiments/curves.py train --jobs 2      # 23 runs on the tiny teacher, about an hour on two cores
    python experiments/curves.py plot                # docs/curves/*.png of what they logged, and a table

Every run is one thread and writes to runs/curves/NAME/. A run that has its last checkpoint is not trained again. The
pictures are committed, the runs are not.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import tyro
from annotated_types import Ge
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python experiments/curves.py` finds the harness

from harness.flags import check_flags, one_line_errors  # noqa: E402

from harness.files import Fatal, make_folder, written_aside  # noqa: E402

matplotlib.use("Agg")
STEPS = 300
PLAIN = "--gan-weight 0 --ema-decay 0 --preview-every 25"
PREVIEW = "--preview-prompts 12 --preview-seeds 4 --teacher-steps 25"
DMD2 = f"dmd2.py --steps {STEPS} {PLAIN}"
# name: (script and flags, seeds, name of the run to start from)
HEALTHY = {
    "dmd": (f"dmd.py --steps {STEPS} --shift 3 --ema-decay 0 --preview-every 25", 3, None),
    "dmd2": (DMD2, 3, None),
    "codmd": (f"codmd.py --steps {STEPS} {PLAIN}", 3, None),
    "phased_dmd": (f"phased_dmd.py --steps {STEPS} {PLAIN}", 3, None),
    "dfd": ("dfd.py --steps 50 --ema-decay 0 --preview-every 5", 3, "dmd2"),
}
# name: (script and flags, seeds, start), what was broken, the healthy run to compare with
BROKEN = {
    "fake_score_slow": ((f"{DMD2} --fake-score-lr 1e-5", 1, None), "fake score's learning rate / 100", "dmd2"),
    "lr_high": ((f"{DMD2} --lr 1e-2 --fake-score-lr 1e-2", 1, None), "both learning rates x 10", "dmd2"),
    "guidance_1": ((f"{DMD2} --guidance-scale 1", 1, None), "guidance 1", "dmd2"),
    "guidance_8": ((f"{DMD2} --guidance-scale 8", 1, None), "guidance 8", "dmd2"),
    "no_normaliser": (
        (f"experiments/no_normaliser.py --steps {STEPS} {PLAIN}", 1, None), "gradient without its normaliser", "dmd2",
    ),
    "phased_naive": (
        (f"experiments/phased_ablations.py --naive-target --steps {STEPS} {PLAIN}", 1, None),
        "samples of a phase's end taken for videos", "phased_dmd",
    ),
    "dfd_long": (
        ("dfd.py --steps 500 --ema-decay 0 --preview-every 25", 1, "dmd2"), "DFD for ten times as long", "dfd",
    ),
    "shift_1": ((f"{DMD2} --shift 1", 1, None), "score times without a shift", "dmd2"),
}  # fmt: skip
RUNS = HEALTHY | {name: run for name, (run, _, _) in BROKEN.items()}
FIGURES = {
    "loss/student": "student's loss", "loss/fake_score": "fake score's loss", "grad_norm/student": "student's gradient",
    "preview/right": "right, %", "preview/diversity": "diversity", "preview/saturation": "saturation",
    "preview/brightness_mean": "brightness", "preview/motion": "motion",
}  # fmt: skip


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["train", "plot"]]
    """Train what is not trained yet, or plot what is."""
    only: tuple[str, ...] = tuple(RUNS)
    """Names of the runs."""
    jobs: Annotated[int, Ge(1)] = 1
    """Runs at a time, one thread each."""
    runs_dir: Path = Path("runs/curves")
    """Where the runs are."""
    out: Path = ROOT / "docs" / "curves"
    """Where the pictures go."""


def finished(args, name, seed):
    """The run's folder, if its last checkpoint is there."""
    words = RUNS[name][0].split()
    last = f"checkpoints/step_{int(words[words.index('--steps') + 1]):07d}/checkpoint.json"
    found = sorted((args.runs_dir / name).glob(f"*__tiny__{seed}__*/{last}"))
    return found[-1].parents[2] if found else None


def train(args, name, seed):
    if finished(args, name, seed):
        return
    flags, _, start = RUNS[name]
    folder = args.runs_dir.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*__tiny__{seed}__*"):
        shutil.rmtree(leftover)
    words = [sys.executable, *flags.split(), "--seed", str(seed), "--runs-dir", str(folder), "--save-every", "100000"]
    words += PREVIEW.split()
    words += ["--init", str(finished(args, start, seed).resolve())] if start else []
    with open(folder / f"{seed}.log", "w") as log:
        code = subprocess.call(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(
        f"{name}, seed {seed}: {'done' if code == 0 else f'ended with code {code}, see {folder}/{seed}.log'}",
        flush=True,
    )


def logged(folder):
    """{figure: (steps, values)} of a run, the teacher's and the data's as preview_teacher/… and preview_data/…"""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    series = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: (np.array([e.step for e in s]), np.array([e.value for e in s])) for tag, s in series.items()}


def smooth(values, count=15):
    """Means over windows that end where the series does; losses jump from step to step."""
    return np.convolve(np.pad(values, (count - 1, 0), mode="edge"), np.ones(count) / count, mode="valid")


def draw(path, title, runs, beside=()):
    """One picture: a panel for each figure; the band over `runs` from the lowest to the highest, and lines `beside`."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2), layout="constrained")
    for axis, (tag, label) in zip(axes.flat, FIGURES.items()):
        calm = (lambda values: values) if tag.startswith("preview") else smooth
        if runs and tag in runs[0]:
            steps, lines = runs[0][tag][0], np.stack([calm(run[tag][1]) for run in runs])
            axis.fill_between(steps, lines.min(0), lines.max(0), color="#0050a0", alpha=0.25, linewidth=0)
            axis.plot(steps, lines.mean(0), color="#0050a0", linewidth=1.2)
            for name, dash in (("teacher", "--"), ("data", ":")):
                fixed = runs[0].get(tag.replace("preview/", f"preview_{name}/"))
                if fixed and fixed is not runs[0][tag]:
                    axis.axhline(fixed[1][-1], color="#888888", linestyle=dash, linewidth=0.9)
        for run in beside:
            if tag in run:
                axis.plot(run[tag][0], calm(run[tag][1]), color="#c1272d", linewidth=1.2)
        axis.set_title(label, fontsize=9)
        if tag.startswith(("loss", "grad")):
            axis.set_yscale("log")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-2))  # at guidance 1 the first gradient is rounding
    figure.suptitle(title, fontsize=10)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=75, format="png")
    plt.close(figure)


def last(run, tag):
    """A figure at the end: of losses the mean of the last fifty steps."""
    values = run[tag][1]
    return values[-1] if tag.startswith("preview") else values[-50:].mean()


def plot(args):
    make_folder(args.out, hint="; see --out")
    runs = {}
    for name in args.only:
        folders = [finished(args, name, seed) for seed in range(RUNS[name][1])]
        if not all(folders):
            raise Fatal(f"{name} is not trained: python experiments/curves.py train --only {name}")
        runs[name] = [logged(folder) for folder in folders]
    print(f"| | {' | '.join(FIGURES.values())} |\n|---|{'---:|' * len(FIGURES)}")
    for name, own in runs.items():
        cells = [f"{np.mean([last(run, tag) for run in own if tag in run] or [np.nan]):.3g}" for tag in FIGURES]
        print(f"| {name} | {' | '.join(cells)} |")
        if name in HEALTHY:
            draw(
                args.out / f"{name}.png",
                f"{name}.py, {len(own)} seeds (line: mean, band: all; teacher --, data ..)",
                own,
            )
        else:
            _, what, healthy = BROKEN[name]
            draw(args.out / f"{name}.png", f"red: {what}; blue: healthy {healthy}.py", runs.get(healthy), own)


def main(args):
    check_flags(args)
    if unknown := [name for name in args.only if name not in RUNS]:
        raise Fatal(f"unknown run {unknown[0]!r}; known: {', '.join(RUNS)}")
    if args.what == "plot":
        return plot(args)
    names = [name for name in RUNS if name in args.only or name in {RUNS[other][2] for other in args.only}]
    for has_start in (False, True):  # those that start from others come second
        jobs = [(name, seed) for name in names if bool(RUNS[name][2]) == has_start for seed in range(RUNS[name][1])]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(args, *job), jobs))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
