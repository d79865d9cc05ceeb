"""A control for phased_dmd.py: few-step DMD whose gradient goes back through all steps ("vanilla few-step DMD").

    python experiments/vanilla.py --gan-weight 0

dmd2.py draws an exit step and gives the gradient to that step alone. Here every rollout takes all steps and all of them
carry it, which costs the memory of all. The rest is dmd2.py, its flags too. The run folder is like a script's, for
experiments/evidence.py.
"""

from itertools import pairwise

import torch

import dmd2
from dmd2 import RECIPES, Args, sample_student  # noqa: F401  (experiments/evidence.py samples with it)
from training.files import UserError
from training.flags import launch


def rollout(student, rng, cond, shape, sigmas):
    """dmd2.rollout with gradient through every prediction. Video [b, *shape] from pure noise."""
    x_t = rng.normal(shape)
    sigmas = torch.tensor(sigmas, device=x_t.device)[:, None].expand(-1, len(rng))
    for sigma, sigma_next in pairwise(sigmas):
        x_t = dmd2.add_noise(dmd2.predict_x0(student, x_t, sigma, cond), rng.normal(shape), sigma_next)
    return dmd2.predict_x0(student, x_t, sigmas[-1], cond)


def main(args):
    if args.student_input == "data":
        raise UserError("--student-input data takes one step, so there is nothing to go back through: leave it out")
    if args.frame_block:
        raise UserError("--frame-block: the gradient through all steps is here for all frames at once: leave it out")
    dmd2.__file__ = __file__  # the run is named after, and keeps the source of, this file
    # whatever the exit step, all noise levels
    dmd2.rollout = lambda student, rng, cond, shape, *_: rollout(student, rng, cond, shape, args.student_sigmas)
    dmd2.main(args)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
