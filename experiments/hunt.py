"""A bug hunt: seven bugs that people really made in such scripts, each a patch that you should not read yet.

    python experiments/hunt.py 3               # trains the script with bug 3, and the healthy one, and draws both
    python experiments/hunt.py 3 --answer      # shows the patch

The picture is runs/hunt/3.png, blue the healthy run and red the broken one; runs that are there are used again. Bugs 6
and 7 need two processes, with half the batch each, which alone should change nothing. docs/course.md has the questions.
"""

import subprocess
import sys
from typing import Literal

import tyro

from experiments import curves, variant

OUT = variant.ROOT / "runs" / "hunt"
FLAGS = (
    "--steps 40 --student-every 2 --gan-weight 0 --ema-decay 0 --save-every 1000 "
    "--preview-every 20 --preview-prompts 12 --preview-seeds 2 --teacher-steps 12"
)
MORE = {"codmd": "--sample-relation 1 --frame-relation 0 --relation-weight 10"}  # enough to be seen in 20 updates
RANKS = {6: 2, 7: 2}


def trained(name, file, ranks=1):
    """What a run of that name has logged; it is trained unless it has ended before."""
    base = name.partition("-")[0]
    if base == "dfd":
        trained("dmd2", ["dmd2.py"])  # its start
    last = f"{name}__*/checkpoints/step_{int(FLAGS.split()[1]):07d}"
    if not list(OUT.glob(last)):
        words = ["--runs-dir", str(OUT), "--batch-size", str(8 // ranks), *FLAGS.split(), *MORE.get(base, "").split()]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        if subprocess.call([sys.executable, *torchrun, *file, *words], cwd=variant.ROOT):
            sys.exit(f"{name} has not reached its end: there is no curve, but there is a message above")
    return curves.logged(max(OUT.glob(last)).parents[1])


def both(bug):
    """The healthy script's name, and what its run and the broken one have logged."""
    name = variant.load(f"hunt_{bug}").__name__
    base, ranks = name.partition("-")[0], RANKS.get(bug, 1)
    broken = trained(name, ["experiments/variant.py", f"hunt_{bug}"], ranks)
    return base, trained(base, [f"{base}.py"]), broken


def main(bug: tyro.conf.Positional[Literal[1, 2, 3, 4, 5, 6, 7]], answer: bool = False):
    if answer:
        return print(variant.PATCHES[f"hunt_{bug}"].read_text())
    base, healthy, broken = both(bug)
    title = f"bug {bug}, {RANKS.get(bug, 1)} process(es), beside a healthy {base}.py, one process"
    curves.draw(OUT / f"{bug}.png", title, [healthy], [broken])
    print(f"picture: {OUT / f'{bug}.png'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
