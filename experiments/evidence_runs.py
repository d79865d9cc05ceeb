"""Train everything that docs/evidence.md compares, on the tiny teacher, then write its tables.

    python experiments/evidence_runs.py --jobs 2                     # hours on two cores; run it again and it goes on
    python experiments/evidence_runs.py --tables dfd --seeds 0       # one table, one seed
    python experiments/evidence_runs.py --seeds                      # the tables of experiments/evidence.csv, no run

--tables are names of TABLES. Unless given they are all but the last four: of other teachers, which want --teacher, and
`broken`, for docs/curves.md. What their runs start from is trained too. --jobs seeds are trained at a time. Every run
is one thread, keeps no average of its student, and writes to its own folder, runs/evidence/<name>/. A run that has its
last checkpoint is not trained again; one that was interrupted starts anew. Its figures, of 64 samples of each caption,
are a line of the CSV file --path, and the tables are made from that file alone.
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from experiments.evidence import TWICE, table_of

ROOT = Path(__file__).resolve().parents[1]
EVERY = (  # flags of all
    "--ema-decay 0 --save-every 1000000 --preview-every 50 --preview-prompts 12 --preview-seeds 8 --teacher-steps 25"
)
POST = "--lr 2e-4 --fake-score-lr 2e-4 --no-anneal-lr"  # the rates of DFD's recipe
OFTEN, SIMULATE = "--preview-every 5", "--student-input simulate"
I2V, CAUSAL, VARIANT = "--teacher tiny-i2v", "--frame-block 1", "experiments/variant.py"
DMD2, DFD, EIGHT = "dmd2.py --gan-weight 0", "dfd.py --init dmd2", "1 .955 .9 .833 .75 .643 .5 .3"
LAST, CELLS = f"{VARIANT} last_exit --gan-weight 0", f"{VARIANT} relations --pool 2"
GROUPS, SPACE = "--same-caption 4 --sample-relation 1", f"{VARIANT} dfd_space --init dmd2 --steps 50 --space"
# name: (row of a table, command; --init is the name of a run that stands before)
RUNS = {
    "dmd2": ("DMD2", f"{DMD2} --steps 500"),
    "untrained": ("DMD2, untrained", f"{DMD2} --steps 1 --lr 0 --weight-decay 0"),  # the student before it learns
    "dmd": ("DMD, 1 step", "dmd.py --steps 500 --shift 3"),  # budget and shift of the others, not its recipe
    "steps_1": ("DMD2, 1 step", f"{DMD2} --steps 500 --student-sigmas 1"),
    "steps_2": ("DMD2, 2 steps", f"{DMD2} --steps 500 --student-sigmas 1 .75"),
    "steps_8": ("DMD2, 8 steps", f"{DMD2} --steps 500 --student-sigmas {EIGHT}"),
    "last_exit_8": ("8 steps, no early exits", f"{LAST} --steps 500 --student-sigmas {EIGHT}"),
    "gan": ("DMD2 + GAN", "dmd2.py --steps 500"),
    "gan_x30": ("DMD2 + GAN x 30", "dmd2.py --steps 500 --gan-weight .1"),
    "guidance_1": ("DMD2, guidance 1", f"{DMD2} --steps 500 --guidance-scale 1"),
    "guidance_4": ("DMD2, guidance 4", f"{DMD2} --steps 500 --guidance-scale 4"),
    "guidance_6": ("DMD2, guidance 6", f"{DMD2} --steps 500 --guidance-scale 6"),
    "guidance_8": ("DMD2, guidance 8", f"{DMD2} --steps 500 --guidance-scale 8"),
    "dmd2_on": ("+ DMD2", f"{DFD} --steps 50 --data-prob 0 {SIMULATE} {OFTEN}"),  # p 0 is dmd2.py
    "regression": ("+ regression", f"{VARIANT} regression --init dmd2 --steps 50"),
    "dfd": ("+ DFD", f"{DFD} --steps 50 {OFTEN}"),
    "dfd_p1": ("+ DFD, p 1", f"{DFD} --steps 50 --data-prob 1"),
    "dfd_velocity": ("+ DFD, velocity", f"{SPACE} velocity"),
    "dfd_score": ("+ DFD, score", f"{SPACE} score"),
    "dfd_velocity_p1": ("+ DFD, velocity, p 1", f"{SPACE} velocity --data-prob 1"),
    "dfd_score_p1": ("+ DFD, score, p 1", f"{SPACE} score --data-prob 1"),
    "dfd_x10": ("+ DFD x 10", f"{DFD} --steps 500"),
    "codmd": ("CoDMD, frames", "codmd.py --steps 500"),
    "cells": ("CoDMD, cells", f"{CELLS} --steps 500"),
    "cells_w03": ("CoDMD, cells, weight .03", f"{CELLS} --steps 500 --relation-weight .03"),
    "cells_w3": ("CoDMD, cells, weight .3", f"{CELLS} --steps 500 --relation-weight .3"),
    "cells_samples": ("CoDMD, cells, samples alone", f"{CELLS} {GROUPS} --steps 500 --frame-relation 0"),
    "cells_both": ("CoDMD, cells, both", f"{CELLS} {GROUPS} --steps 500"),
    "cells_both_1": ("CoDMD, cells, both, 1 step", f"{CELLS} {GROUPS} --steps 500 --student-sigmas 1"),
    "euler": ("DMD2, Euler steps", f"{VARIANT} euler --gan-weight 0 --steps 500"),
    "experts": ("Euler steps, an expert per phase", f"{VARIANT} experts --steps 500"),
    "dpdmd": ("DP-DMD", f"{VARIANT} dpdmd --gan-weight 0 --anchor-step 8 --steps 500"),
    "ddmd": ("Decoupled DMD", f"{VARIANT} ddmd --gan-weight 0 --steps 500"),
    "last_exit": ("DMD2, no early exits", f"{LAST} --steps 500"),
    "late_exits": ("DMD2, last two exits", f"{VARIANT} late_exits --gan-weight 0 --steps 500"),
    "vanilla": ("gradient in all steps", f"{VARIANT} vanilla --gan-weight 0 --steps 500"),
    "phased_dmd": ("Phased DMD", "phased_dmd.py --steps 500"),
    "one_network": ("Phased DMD, one network", f"{VARIANT} one_network --steps 500"),
    "phased_naive": ("naive target", f"{VARIANT} naive_target --steps 500"),
    "phased_disjoint": ("disjoint score levels", f"{VARIANT} disjoint_sigmas --steps 500"),
    "fake_score_rare": ("fake score 1 : 1", f"{DMD2} --steps 100 --student-every 1 --preview-every 10"),
    "fake_score_often": ("fake score 1 : 10", f"{DMD2} --steps 1000 --student-every 10"),
    "lr_high": ("rates x 10", f"{DMD2} --steps 500 --lr 1e-2 --fake-score-lr 1e-2"),
    "i2v": ("DMD2", f"{DMD2} {I2V} --steps 500"),
    "i2v_dfd": ("+ DFD", f"dfd.py {I2V} --init i2v --steps 50 {OFTEN}"),
    "causal_start": ("causal, ODE start", f"tools/ode_init.py {CAUSAL} --steps 1500 --preview-every 250"),
    "causal": ("causal DMD2", f"{DMD2} {CAUSAL} --init causal_start --steps 500"),
    "causal_on": ("causal + DMD2", f"{DMD2} {CAUSAL} --init causal --steps 50 {POST}"),
    "causal_dfd": ("causal + DFD", f"dfd.py {CAUSAL} --init causal --steps 50 {OFTEN}"),
    "causal_dfd_simulate": ("causal + DFD, simulate", f"dfd.py {CAUSAL} --init causal --steps 50 {SIMULATE} {OFTEN}"),
}
# name: its runs
TABLES = {
    "dmd2": "dmd steps_1 steps_2 dmd2 steps_8 last_exit_8 gan codmd",
    "excess": "untrained dmd2 late_exits last_exit fake_score_rare fake_score_often guidance_1 guidance_8",
    "dfd": "dmd2 dmd2_on regression dfd dfd_p1 dfd_velocity dfd_velocity_p1 dfd_score dfd_score_p1",
    "phased_dmd": "dmd2 euler experts one_network phased_dmd phased_disjoint dpdmd ddmd vanilla",
    "i2v": "i2v i2v_dfd",
    "causal": "causal_start causal causal_on causal_dfd causal_dfd_simulate",
    # of other teachers, see evidence.md
    "rare": "untrained dmd2 steps_1 last_exit guidance_1 guidance_4 guidance_6 dmd2_on dfd dfd_score",
    "relations": "dmd2 codmd cells_w03 cells cells_w3 cells_samples cells_both steps_1 cells_both_1",
    "dull": "dmd2 gan gan_x30 dmd2_on regression dfd dfd_x10",
    "broken": "dmd2 fake_score_rare lr_high guidance_8 phased_naive dfd_x10",  # of curves.md
}
# name: its columns, of evidence.COLUMNS
FIGURES = dict.fromkeys(TABLES, "right looks brightness_mean distance") | {
    "dfd": "right looks diversity brightness_mean distance",
    "phased_dmd": "right looks position brightness_mean distance",
    "i2v": "right motions diversity brightness_mean",
    "causal": "right looks brighter stronger distance",
    "rare": "right looks fast shrink tied endpoints distance",
    "relations": "right looks frames samples information",
    "dull": "right speed_mean saturation_mean brightness_mean distance",
}


def words_of(name):
    """The words of a run's command, and the name of the run that it starts from or None."""
    words = RUNS[name][1].split()
    return words, words[words.index("--init") + 1] if "--init" in words else None


def finished(runs_dir, name, seed):
    """The run folder, if its last checkpoint is there."""
    words, _ = words_of(name)
    last = f"checkpoints/step_{int(words[words.index('--steps') + 1]):07d}/checkpoint.json"
    found = sorted((runs_dir / name).glob(f"*__{seed}__*/{last}"))
    return found[-1].parents[2] if found else None


def command(runs_dir, name, seed, teacher):
    words, parent = words_of(name)
    if parent:
        words[words.index("--init") + 1] = str(finished(runs_dir, parent, seed) or f"<the run of {parent}>")
    at, own = words.index("--steps"), ["--teacher", teacher] * (teacher != "tiny")  # what comes after --steps stands
    return [*words[:at], *own, *EVERY.split(), "--seed", str(seed), "--runs-dir", str(runs_dir / name), *words[at:]]


def train(runs_dir, name, seed, teacher):
    if finished(runs_dir, name, seed):
        return
    log = runs_dir / name / f"{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        words, env = [sys.executable, *command(runs_dir, name, seed, teacher)], os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.call(words, cwd=ROOT, env=env, stdout=file, stderr=file):
            sys.exit(f"error: {name}, seed {seed} failed: see {log}")
    print(f"{name}, seed {seed}: done", flush=True)


def table_in(path, table, teacher="tiny"):
    """A table in Markdown, made from the CSV file `path` alone: data and teacher, then the runs."""
    teacher, lines = "tiny-i2v" if table == "i2v" else teacher, csv.DictReader(open(path))
    labels = ["", *(RUNS[name][0] for name in TABLES[table].split())]
    labels += [f"DMD2, exit {steps}" for steps in (1, 2, 3)] * (table == "excess")
    rows = [(line["run"] and line["name"].removesuffix(TWICE), line) for line in lines if line["teacher"] == teacher]
    rows = [line for label in labels for own, line in rows if own == label]
    rows = [line for line in rows if table == "excess" or not line["name"].startswith("teacher, 4")]
    return table_of(rows, FIGURES[table].split())


def main(
    tables: tuple[str, ...] = tuple(TABLES)[:-4],
    seeds: tuple[int, ...] = (0, 1, 2),
    teacher: str = "tiny",
    jobs: int = 1,
    runs_dir: Path = Path("runs/evidence"),
    path: Path = ROOT / "experiments" / "evidence.csv",
):
    runs_dir = runs_dir.resolve()
    wanted = {name for table in tables for name in TABLES[table].split()}
    for name in reversed(RUNS):
        if name in wanted:
            wanted.add(words_of(name)[1])  # what it starts from
    names = [name for name in RUNS if name in wanted]
    with ThreadPoolExecutor(jobs) as pool:
        tuple(pool.map(lambda seed: [train(runs_dir, name, seed, teacher) for name in names], seeds))
    for table in tables:
        rows = [(finished(runs_dir, name, seed), RUNS[name][0]) for name in TABLES[table].split() for seed in seeds]
        if rows:
            folders, labels = zip(*rows)
            words = [*folders, "--names", *labels, "--csv", path, "--out", runs_dir / f"table_{table}"]
            words += ["--seeds", "64", "--teacher-steps", "25", "4"]
            words += {"causal": ["--long"], "excess": ["--exits"]}.get(table, [])
            subprocess.run([sys.executable, "experiments/evidence.py", *words], cwd=ROOT, check=True)
        print("\n".join(["", table, "", *table_in(path, table, teacher)]))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
