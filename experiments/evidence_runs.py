"""Train everything that docs/evidence.md compares, on the tiny teacher, then write its tables.

    python experiments/evidence_runs.py --jobs 2                     # hours on two cores; run it again and it goes on
    python experiments/evidence_runs.py --only dmd2 dfd --seeds 0    # some rows, one seed
    python experiments/evidence_runs.py --list                       # the commands, without running them

Every run is one thread, keeps no average of its student, and writes to its own folder, runs/evidence/<name>/. A run
that has its last checkpoint is not trained again; one that was interrupted starts anew.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python experiments/evidence_runs.py` finds the harness

from harness.flags import check_flags, one_line_errors  # noqa: E402

from harness.files import Fatal  # noqa: E402

POST = "--lr 2e-4 --fake-score-lr 2e-4 --no-anneal-lr"  # the rates of DFD's recipe
# name: (script, flags, name of the run to start from); each is a row of a table
RUNS = {
    "dmd": ("dmd.py", "--steps 500 --shift 3", None),  # budget and shift of the others, not its recipe
    "dmd2": ("dmd2.py", "--steps 500 --gan-weight 0", None),
    "dmd2_gan": ("dmd2.py", "--steps 500", None),
    "dmd2_gan_x10": ("dmd2.py", "--steps 500 --gan-weight .03", None),
    "dmd2_gan_x100": ("dmd2.py", "--steps 500 --gan-weight .3", None),
    "dmd2_x4": ("dmd2.py", "--steps 2000 --gan-weight 0 --preview-every 100 --preview-seeds 16", None),
    "dmd2_g1": ("dmd2.py", "--steps 500 --gan-weight 0 --guidance-scale 1", None),
    "dmd2_g4": ("dmd2.py", "--steps 500 --gan-weight 0 --guidance-scale 4", None),
    "dmd2_on": ("dfd.py", "--steps 50 --data-prob 0 --student-input simulate", "dmd2"),  # data_prob 0 is dmd2.py
    "finetune": ("experiments/finetune.py", "--steps 50", "dmd2"),
    "dfd": ("dfd.py", "--steps 50", "dmd2"),
    "dfd_x3": ("dfd.py", "--steps 150", "dmd2"),
    "dfd_x10": ("dfd.py", "--steps 500", "dmd2"),
    "dfd_p1": ("dfd.py", "--steps 50 --data-prob 1", "dmd2"),
    "dfd_simulate": ("dfd.py", "--steps 50 --student-input simulate", "dmd2"),
    "codmd": ("codmd.py", "--steps 500", None),
    "codmd_w1": ("codmd.py", "--steps 500 --relation-weight 1", None),
    "codmd_samples": ("codmd.py", "--steps 500 --frame-relation 0 --sample-relation 1", None),
    "codmd_both": ("codmd.py", "--steps 500 --sample-relation 1", None),
    "codmd_both_w1": ("codmd.py", "--steps 500 --sample-relation 1 --relation-weight 1", None),
    "codmd_on": ("codmd.py", f"--steps 150 --sample-relation 1 {POST}", "dmd2"),
    "codmd_on_w1": ("codmd.py", f"--steps 150 --sample-relation 1 --relation-weight 1 {POST}", "dmd2"),
    "dmd2_on_x3": ("dfd.py", "--steps 150 --data-prob 0 --student-input simulate", "dmd2"),
    "phased": ("phased_dmd.py", "--steps 500", None),
    "phased_4": ("phased_dmd.py", "--steps 500 --phase-ends .9 .75 .5 0", None),
    "vanilla": ("experiments/vanilla.py", "--steps 500 --gan-weight 0", None),
    "phased_naive": ("experiments/phased_ablations.py", "--steps 500 --naive-target", None),
}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(RUNS)
    """Names of the runs, see RUNS; those that they start from are trained too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    jobs: Annotated[int, Ge(1)] = 1
    """Runs at a time, one thread each."""
    runs_dir: Path = Path("runs/evidence")
    """Where runs, table and sheet are written."""
    list: bool = False
    """Print the commands and stop."""


def finished(runs_dir, name, seed):
    """The run folder, if its last checkpoint is there."""
    script, flags, _ = RUNS[name]
    words = flags.split()
    last = f"checkpoints/step_{int(words[words.index('--steps') + 1]):07d}/checkpoint.json"
    found = sorted((runs_dir / name).glob(f"{Path(script).stem}__tiny__{seed}__*/{last}"))
    return found[-1].parents[2] if found else None


def command(runs_dir, name, seed):
    script, flags, parent = RUNS[name]
    init = ["--init", str(finished(runs_dir, parent, seed) or f"<the run of {parent}>")] if parent else []
    quiet = ["--ema-decay", "0", "--preview-every", "0", "--save-every", "1000000", "--runs-dir", str(runs_dir / name)]
    return [script, *quiet, *flags.split(), *init, "--seed", str(seed)]


def train(runs_dir, name, seed):
    folder = runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{seed}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another call of this may be at the same run: wait for it
        if finished(runs_dir, name, seed):
            return
        for leftover in folder.glob(f"*__tiny__{seed}__*"):
            shutil.rmtree(leftover)
        words, env = [sys.executable, *command(runs_dir, name, seed)], {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(folder / f"{seed}.log", "w") as log:  # the run holds the lock too, should this process be killed
            code = subprocess.call(words, cwd=ROOT, env=env, stdout=log, stderr=log, pass_fds=[lock.fileno()])
    print(f"{name}, seed {seed}: {'done' if code == 0 else f'failed, see {folder}/{seed}.log'}", flush=True)


def main(args):
    check_flags(args)
    unknown = [name for name in args.only if name not in RUNS]
    if unknown:
        raise Fatal(f"unknown run {unknown[0]!r}; known: {', '.join(RUNS)}")
    runs_dir = args.runs_dir.resolve()
    names = [name for name in RUNS if name in args.only or name in {RUNS[other][2] for other in args.only}]
    if args.list:
        for name in names:
            for seed in args.seeds:
                print(" ".join(["python", *command(runs_dir, name, seed)]))
        return
    for has_parent in (False, True):  # those that start from others come second
        jobs = [(name, seed) for seed in args.seeds for name in names if bool(RUNS[name][2]) == has_parent]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(runs_dir, *job), jobs))
    missing = [(name, seed) for name in names for seed in args.seeds if not finished(runs_dir, name, seed)]
    if missing:
        sys.exit(1)
    folders = [str(finished(runs_dir, name, seed)) for name in names for seed in args.seeds]
    sys.exit(subprocess.call([sys.executable, "experiments/evidence.py", *folders, "--out", str(runs_dir)], cwd=ROOT))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
