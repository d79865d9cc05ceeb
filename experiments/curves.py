"""Curves of docs/curves.md: of healthy runs of every method, and of runs that are broken on purpose.

python experiments/curves.py        # docs/curves/*.png and a table, of what experiments/evidence_runs.py has trained
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.evidence_runs import ROOT, finished

matplotlib.use("Agg")
SEEDS = (0, 1, 2)
# name: what was broken, and the healthy run to compare with; of healthy runs nothing. A broken run has seed 0 alone
RUNS = {
    "dmd": None, "dmd2": None, "codmd": None, "phased_dmd": None, "dfd": None,
    "lr_high": ("both learning rates x 10", "dmd2"),
    "fake_score_rare": ("one fake-score update per student update, for five", "dmd2"),
    "guidance_8": ("guidance 8", "dmd2"),
    "phased_naive": ("samples of a phase's end taken for videos", "phased_dmd"),
    "dfd_x10": ("DFD for ten times as long", "dfd"),
}  # fmt: skip
FIGURES = {
    "loss/student": "student's loss", "loss/fake_score": "fake score's loss", "grad_norm/student": "student's gradient",
    "preview/right": "right, %", "preview/looks": "looks", "preview/diversity": "diversity",
    "preview/saturation_mean": "saturation", "preview/brightness_mean": "brightness",
}  # fmt: skip


def logged(folder):
    """{figure: (steps, values)} of a run, the teacher's and the data's as preview_teacher/… and preview_data/…"""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: np.array([(e.step, e.value) for e in events.Scalars(tag)]).T for tag in events.Tags()["scalars"]}


def smooth(tag, values, count=15):
    """Losses jump from step to step: means over windows that end where the series does. Previews as they are."""
    if tag.startswith("preview"):
        return values
    return np.convolve(np.pad(values, (count - 1, 0), mode="edge"), np.ones(count) / count, mode="valid")


def draw(path, title, runs, beside=()):
    """One picture: a panel for each figure; the band over `runs` from the lowest to the highest, and lines `beside`."""
    figure, axes = plt.subplots(4, 2, figsize=(6.5, 8.5), layout="constrained")
    for axis, (tag, label) in zip(axes.flat, FIGURES.items()):
        steps, lines = runs[0][tag][0], np.stack([smooth(tag, run[tag][1]) for run in runs])
        axis.fill_between(steps, lines.min(0), lines.max(0), color="#0050a0", alpha=0.25, linewidth=0)
        axis.plot(steps, lines.mean(0), color="#0050a0", linewidth=1.2, label="healthy")
        for name, dash in (("teacher", "--"), ("data", ":")):
            if (fixed := tag.replace("preview/", f"preview_{name}/")) != tag:
                axis.axhline(runs[0][fixed][1][-1], color="#888888", linestyle=dash, linewidth=0.9, label=name)
        for run in beside:
            axis.plot(run[tag][0], smooth(tag, run[tag][1]), color="#c1272d", linewidth=1.2, label="this run")
        axis.set(title=label, xlabel="step")
        if tag.startswith(("loss", "grad")):
            axis.set_yscale("log")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-2))  # without guidance the first gradient is rounding
    figure.suptitle(title)
    figure.legend(*axes[-1, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def last(run, tag):
    """A figure at the end: of losses the mean of the last fifty steps."""
    values = run[tag][1]
    return values[-1] if tag.startswith("preview") else values[-50:].mean()


def main(runs_dir: Path = Path("runs/evidence"), out: Path = ROOT / "docs" / "curves"):
    out.mkdir(parents=True, exist_ok=True)
    runs = {}
    print(f"| | {' | '.join(FIGURES.values())} |\n|---|{'---:|' * len(FIGURES)}")
    for name, broken in RUNS.items():
        folders = [finished(runs_dir, name, seed) for seed in (SEEDS[:1] if broken else SEEDS)]
        own = runs[name] = [logged(folder) for folder in folders if folder]
        if not own:
            sys.exit(f"error: {name} is not trained: python experiments/evidence_runs.py --help")
        print(f"| {name} |", " | ".join(f"{np.mean([last(run, tag) for run in own]):.3g}" for tag in FIGURES), "|")
        if broken:
            draw(out / f"{name}.png", f"{broken[0]}, beside a healthy {broken[1]}.py", runs[broken[1]], own)
        else:
            draw(out / f"{name}.png", f"{name}.py, {len(own)} seed(s)", own)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
