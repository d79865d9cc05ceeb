"""What losses and preview figures look like: of healthy runs of every method, and of runs that are broken on purpose.

    python experiments/evidence_runs.py --jobs 2                              # the runs of docs/evidence.md, and
    python experiments/evidence_runs.py --jobs 2 --tables broken --seeds 0    # some more
    python experiments/curves.py                     # docs/curves/*.png of what they logged, and a table

The pictures are committed, the runs are not.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.evidence_runs import finished
from training.files import UserError, make_folder, written_aside
from training.flags import check_flags, one_line_errors

ROOT = Path(__file__).resolve().parents[1]

matplotlib.use("Agg")
SEEDS = (0, 1, 2)
HEALTHY = ("dmd", "dmd2", "codmd", "phased_dmd", "dfd")
# name, of seed 0 alone: what was broken, the healthy run to compare with
BROKEN = {
    "lr_high": ("both learning rates x 10", "dmd2"),
    "fake_score_rare": ("one fake-score update per student update, for five", "dmd2"),
    "guidance_1": ("guidance 1", "dmd2"),
    "guidance_8": ("guidance 8", "dmd2"),
    "no_normaliser": ("gradient without its normaliser", "dmd2"),
    "shift_1": ("score times without a shift", "dmd2"),
    "phased_naive": ("samples of a phase's end taken for videos", "phased_dmd"),
    "dfd_x10": ("DFD for ten times as long", "dfd"),
    "x6": ("DMD2 for six times as long", "dmd2"),
}
FIGURES = {
    "loss/student": "student's loss", "loss/fake_score": "fake score's loss", "grad_norm/student": "student's gradient",
    "preview/right": "right, %", "preview/looks": "looks", "preview/diversity": "diversity",
    "preview/saturation_mean": "saturation", "preview/brightness_mean": "brightness",
}  # fmt: skip


@dataclass
class Args:
    only: tuple[str, ...] = (*HEALTHY, *BROKEN)
    """Names of the runs."""
    runs_dir: Path = Path("runs/evidence")
    """Where the runs are."""
    out: Path = ROOT / "docs" / "curves"
    """Where the pictures go."""


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


def main(args):
    check_flags(args)
    if unknown := [name for name in args.only if name not in (*HEALTHY, *BROKEN)]:
        raise UserError(f"unknown run {unknown[0]!r}; known: {', '.join((*HEALTHY, *BROKEN))}")
    runs = {}
    for name in args.only:
        seeds = SEEDS if name in HEALTHY else SEEDS[:1]
        folders = [folder for seed in seeds if (folder := finished(args.runs_dir, name, seed))]
        if not folders:
            raise UserError(f"{name} is not trained: python experiments/evidence_runs.py; see --help")
        runs[name] = [logged(folder) for folder in folders]
    make_folder(args.out, hint="; see --out")
    print(f"| | {' | '.join(FIGURES.values())} |\n|---|{'---:|' * len(FIGURES)}")
    for name, own in runs.items():
        cells = [f"{np.mean([last(run, tag) for run in own if tag in run] or [np.nan]):.3g}" for tag in FIGURES]
        print(f"| {name} | {' | '.join(cells)} |")
        path = args.out / f"{name}.png"
        if name in HEALTHY:
            draw(path, f"{name}.py, {len(own)} seed(s) (line: mean, band: all; teacher --, data ..)", own)
        else:
            what, healthy = BROKEN[name]
            draw(path, f"red: {what}; blue: healthy {healthy}.py", runs.get(healthy), own)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
