"""codmd.py with features that know where things are: means over 4 x 4 cells of a frame, not over all of it.

    python experiments/codmd_cells.py --relation-weight 1

The paper's features of a frame are the means of its latents over h and w, 8 numbers on the tiny teacher, and a shape
that moves does not change them. Everything else is codmd.py, its flags too. The run folder is like a script's, for
experiments/evidence.py.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python experiments/…` finds the scripts

from harness.flags import launch  # noqa: E402

import codmd  # noqa: E402
from codmd import RECIPES, Args, sample_student  # noqa: E402, F401  (experiments/evidence.py samples with it)


def cells(x):
    """Latents [b, c, f, h, w] with the cells of each frame as channels, [b, 16 c, f, 1, 1]."""
    return rearrange(F.adaptive_avg_pool3d(x, (x.shape[2], 4, 4)), "b c f i j -> b (c i j) f 1 1")


def relation_loss(x0, x0_real, x0_fake, *weights, whole=codmd.relation_loss):
    """codmd.relation_loss of cells."""
    return whole(cells(x0), cells(x0_real), cells(x0_fake), *weights)


def main(args):
    codmd.__file__ = __file__  # the run is named after, and keeps the source of, this file
    codmd.relation_loss = relation_loss
    codmd.main(args)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
