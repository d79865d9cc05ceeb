"""dmd2.py without DMD's normaliser (eq. 8): the gradient is the difference of the two predictions, whatever its size.

    python experiments/no_normaliser.py --gan-weight 0

The other flags are dmd2.py's. The run folder is like a script's, for experiments/evidence.py and curves.py.
"""

import dmd2
from dmd2 import RECIPES, Args, sample_student  # noqa: F401  (experiments/evidence.py samples with it)
from training.flags import launch


def main(args):
    dmd2.__file__ = __file__
    dmd2.dmd_gradient = lambda x0, x0_teacher, x0_fake: x0_fake - x0_teacher
    dmd2.main(args)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
