"""Train everything that docs/evidence.md compares, on the tiny teacher, then write its tables.

    python experiments/evidence_runs.py --jobs 2                     # hours on two cores; run it again and it goes on
    python experiments/evidence_runs.py --tables dfd --seeds 0       # one table, one seed
    python experiments/evidence_runs.py --list                       # the commands, without running them

Every run is one thread, keeps no average of its student, and writes to its own folder, runs/evidence/<name>/. A run
that has its last checkpoint is not trained again; one that was interrupted starts anew. Tables and sheets go to
runs/evidence/table_<name>/.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from training.files import UserError
from training.flags import check_flags, one_line_errors

ROOT = Path(__file__).resolve().parents[1]

POST = "--lr 2e-4 --fake-score-lr 2e-4 --no-anneal-lr"  # the rates of DFD's recipe
PREVIEWS, OFTEN = "--preview-every 50 --preview-prompts 12 --preview-seeds 8 --teacher-steps 25", "--preview-every 5"
I2V, CAUSAL = "--teacher tiny-i2v", "--frame-block 1"
# name: (script, flags, name of the run to start from); each is a row of a table
RUNS = {
    "dmd2": ("dmd2.py", "--steps 500 --gan-weight 0", None),
    "untrained": ("dmd2.py", "--steps 1 --gan-weight 0 --lr 0 --weight-decay 0", None),  # the student before it learns
    "dmd": ("dmd.py", "--steps 500 --shift 3", None),  # budget and shift of the others, not its recipe
    "dmd_regression": ("dmd.py", "--steps 500 --shift 3 --regression-weight .25", None),  # the paper's weight
    "dmd_shift_1": ("dmd.py", "--steps 500", None),  # the recipe's shift
    "gan": ("dmd2.py", "--steps 500", None),
    "gan_x30": ("dmd2.py", "--steps 500 --gan-weight .1", None),
    "x2": ("dmd2.py", "--steps 1000 --gan-weight 0", None),
    "x6": ("dmd2.py", "--steps 3000 --gan-weight 0", None),
    "guidance_1": ("dmd2.py", "--steps 500 --gan-weight 0 --guidance-scale 1", None),
    "guidance_4": ("dmd2.py", "--steps 500 --gan-weight 0 --guidance-scale 4", None),
    "dfd": ("dfd.py", f"--steps 50 {OFTEN}", "dmd2"),
    "dmd2_on": ("dfd.py", f"--steps 50 --data-prob 0 --student-input simulate {OFTEN}", "dmd2"),  # p 0 is dmd2.py
    "finetune": ("experiments/finetune.py", "--steps 50", "dmd2"),
    "dfd_x3": ("dfd.py", "--steps 150", "dmd2"),
    "dfd_x10": ("dfd.py", "--steps 500", "dmd2"),
    "dfd_p1": ("dfd.py", "--steps 50 --data-prob 1", "dmd2"),
    "dfd_simulate": ("dfd.py", "--steps 50 --student-input simulate", "dmd2"),
    "codmd": ("codmd.py", "--steps 500", None),
    "codmd_both": ("codmd.py", "--steps 500 --sample-relation 1", None),
    "codmd_both_w1": ("codmd.py", "--steps 500 --sample-relation 1 --relation-weight 1", None),
    "dmd2_on_x3": ("dfd.py", "--steps 150 --data-prob 0 --student-input simulate", "dmd2"),
    "codmd_on": ("codmd.py", f"--steps 150 --sample-relation 1 {POST}", "dmd2"),
    "codmd_on_w1": ("codmd.py", f"--steps 150 --sample-relation 1 --relation-weight 1 {POST}", "dmd2"),
    "phased_dmd": ("phased_dmd.py", "--steps 500", None),
    "phased_4": ("phased_dmd.py", "--steps 500 --phase-ends .9 .75 .5 0", None),
    "phased_naive": ("experiments/phased_ablations.py", "--steps 500 --naive-target", None),
    "vanilla": ("experiments/vanilla.py", "--steps 500 --gan-weight 0", None),
    "fake_score_rare": ("dmd2.py", "--steps 100 --gan-weight 0 --student-every 1 --preview-every 10", None),
    "lr_high": ("dmd2.py", "--steps 500 --gan-weight 0 --lr 1e-2 --fake-score-lr 1e-2", None),
    "guidance_8": ("dmd2.py", "--steps 500 --gan-weight 0 --guidance-scale 8", None),
    "no_normaliser": ("experiments/no_normaliser.py", "--steps 500 --gan-weight 0", None),
    "shift_1": ("dmd2.py", "--steps 500 --gan-weight 0 --shift 1", None),
    "i2v": ("dmd2.py", f"{I2V} --steps 500 --gan-weight 0", None),
    "i2v_dfd": ("dfd.py", f"{I2V} --steps 50 {OFTEN}", "i2v"),
    "causal_start": ("tools/ode_init.py", f"{CAUSAL} --steps 1500 --preview-every 250", None),
    "causal": ("dmd2.py", f"{CAUSAL} --steps 500 --gan-weight 0", "causal_start"),
    "causal_on": ("dmd2.py", f"{CAUSAL} --steps 50 --gan-weight 0 {POST}", "causal"),
    "causal_dfd": ("dfd.py", f"{CAUSAL} --steps 50 {OFTEN}", "causal"),
    "causal_dfd_simulate": ("dfd.py", f"{CAUSAL} --steps 50 --student-input simulate {OFTEN}", "causal"),
}
TABLES = {  # rows beside data and teacher, and what they are called
    "dmd2": {
        "untrained": "DMD2, untrained", "dmd": "DMD, 1 step", "dmd_regression": "DMD, regression .25",
        "dmd_shift_1": "DMD, shift 1", "dmd2": "DMD2",
        "gan": "DMD2 + GAN", "gan_x30": "DMD2 + GAN x 30", "x2": "DMD2, twice as long", "x6": "DMD2, six times as long",
        "guidance_1": "DMD2, guidance 1", "guidance_4": "DMD2, guidance 4", "guidance_8": "DMD2, guidance 8",
    },
    "dfd": {
        "dmd2": "DMD2", "dmd2_on": "+ DMD2", "finetune": "+ regression", "dfd": "+ DFD", "dfd_p1": "+ DFD, p 1",
        "dfd_simulate": "+ DFD, simulate", "dfd_x3": "+ DFD x 3", "dfd_x10": "+ DFD x 10",
    },
    "codmd": {
        "dmd2": "DMD2", "codmd": "CoDMD, frames", "codmd_both": "CoDMD, both", "codmd_both_w1": "CoDMD, both, weight 1",
        "dmd2_on_x3": "+ DMD2 x 3", "codmd_on": "+ CoDMD x 3", "codmd_on_w1": "+ CoDMD x 3, weight 1",
    },
    "phased_dmd": {
        "dmd2": "DMD2", "vanilla": "gradient in all steps", "phased_dmd": "Phased DMD", "phased_4": "4 phases",
        "phased_naive": "naive target",
    },
    "i2v": {"i2v": "DMD2", "i2v_dfd": "+ DFD"},
    "broken": {
        "dmd2": "DMD2", "fake_score_rare": "fake score 1 : 1", "lr_high": "rates x 10", "guidance_1": "guidance 1",
        "guidance_8": "guidance 8", "no_normaliser": "no normaliser", "shift_1": "shift 1",
    },
    "causal": {
        "dmd2": "DMD2, all frames at once", "causal_start": "ODE start", "causal": "DMD2", "causal_on": "+ DMD2",
        "causal_dfd": "+ DFD", "causal_dfd_simulate": "+ DFD, simulate",
    },
}  # fmt: skip


@dataclass
class Args:
    tables: tuple[str, ...] = tuple(name for name in TABLES if name != "broken")
    """Names of the tables, see TABLES; what their runs start from is trained too. `broken` is for curves.md."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    jobs: Annotated[int, Ge(1)] = 1
    """Runs at a time, one thread each."""
    runs_dir: Path = Path("runs/evidence")
    """Where runs, tables and sheets are written."""
    train: bool = True
    """--no-train: tables of those runs that are there."""
    list: bool = False
    """Print the commands and stop."""


def flag(words, name, default):
    return words[words.index(name) + 1] if name in words else default


def finished(runs_dir, name, seed):
    """The run folder, if its last checkpoint is there."""
    words = RUNS[name][1].split()
    last = f"checkpoints/step_{int(flag(words, '--steps', None)):07d}/checkpoint.json"
    found = sorted((runs_dir / name).glob(f"*__{flag(words, '--teacher', 'tiny')}__{seed}__*/{last}"))
    return found[-1].parents[2] if found else None


def command(runs_dir, name, seed):
    script, flags, parent = RUNS[name]
    init = ["--init", str(finished(runs_dir, parent, seed) or f"<the run of {parent}>")] if parent else []
    common = ["--ema-decay", "0", "--save-every", "1000000", *PREVIEWS.split(), "--runs-dir", str(runs_dir / name)]
    return [script, *common, *flags.split(), *init, "--seed", str(seed)]


def train(runs_dir, name, seed):
    folder = runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{seed}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another call of this may be at the same run: wait for it
        if finished(runs_dir, name, seed):
            return
        for leftover in folder.glob(f"*__{seed}__*"):
            shutil.rmtree(leftover)
        words, env = [sys.executable, *command(runs_dir, name, seed)], {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(folder / f"{seed}.log", "w") as log:  # the run holds the lock too, should this process be killed
            code = subprocess.call(words, cwd=ROOT, env=env, stdout=log, stderr=log, pass_fds=[lock.fileno()])
    print(f"{name}, seed {seed}: {'done' if code == 0 else f'failed, see {folder}/{seed}.log'}", flush=True)


def main(args):
    check_flags(args)
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        raise UserError(f"unknown table {unknown[0]!r}; known: {', '.join(TABLES)}")
    runs_dir = args.runs_dir.resolve()
    generations = [[name for table in args.tables for name in TABLES[table]]]
    while parents := [RUNS[name][2] for name in generations[0] if RUNS[name][2]]:
        generations.insert(0, parents)
    first = dict.fromkeys(name for generation in generations for name in generation)  # parents before their children
    if args.list:
        for name in first:
            for seed in args.seeds:
                print(" ".join(["python", *command(runs_dir, name, seed)]))
        return
    while first and args.train:
        now = [name for name in first if RUNS[name][2] not in first]
        jobs = [(name, seed) for seed in args.seeds for name in now]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(runs_dir, *job), jobs))
        first = [name for name in first if name not in now]
        if missing := [name for name in now for seed in args.seeds if not finished(runs_dir, name, seed)]:
            raise UserError(f"{missing[0]} has no last checkpoint: see its log in {runs_dir / missing[0]}", code=1)
    for table in args.tables:
        rows = [(finished(runs_dir, name, seed), label) for name, label in TABLES[table].items() for seed in args.seeds]
        rows = [(str(run), label) for run, label in rows if run]
        if not rows:
            raise UserError(f"no run of the table {table} is in {runs_dir}: leave out --no-train")
        folders, names = zip(*rows)
        look = "--seeds 16 --teacher-steps 25 4".split() + (["--long"] if table == "causal" else [])
        words = [*folders, "--names", *names, "--out", str(runs_dir / f"table_{table}"), *look]
        code = subprocess.call([sys.executable, "experiments/evidence.py", *words], cwd=ROOT)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
