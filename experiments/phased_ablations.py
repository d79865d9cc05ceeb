"""phased_dmd.py with one thing done otherwise: what the paper warns of, and its own form of the gradient.

    python experiments/phased_ablations.py --naive-target       # the fake score takes a phase's samples for videos
    python experiments/phased_ablations.py --disjoint-times     # score times up to the phase's start, not up to 1
    python experiments/phased_ablations.py --velocity-gradient  # eq. 10 in place of DMD's normalised gradient

The other flags are phased_dmd.py's. The run folder is like a script's, for experiments/evidence.py.
"""

from dataclasses import dataclass

from einops import rearrange

import phased_dmd
from phased_dmd import RECIPES, sample_student  # noqa: F401  (experiments/evidence.py samples with it)
from training.flags import launch

flow_loss, sample_sigma, rollout, student_loss = (
    getattr(phased_dmd, name) for name in ("flow_loss", "sample_sigma", "rollout", "student_loss")
)


@dataclass(kw_only=True)
class Args(phased_dmd.Args):
    """phased_dmd.py with one thing done otherwise. Numbers without a default stand in its RECIPES."""

    naive_target: bool = False
    """Train the fake score as if samples at a phase's end were clean videos."""
    disjoint_times: bool = False
    """Score times up to the phase's start only, instead of up to 1."""
    velocity_gradient: bool = False
    """Use the paper's gradient (eq. 10); it differs from DMD's by a positive factor per sample."""


def velocity_gradient(x0_teacher, x0_fake, sigma, s):
    """The paper's gradient with respect to x_s (eq. 10). All [b, c, f, h, w], float32."""
    t = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - t) ** 2 / ((1 - s) * t) * (x0_fake - x0_teacher) / t  # v_real - v_fake = (x0_fake - x0_teacher) / t


def sigma_below(rng, shift, s, top, lowest, highest):
    """phased_dmd.sample_sigma on (s, top) instead of (s, 1)."""
    low, high = (level / (shift - (shift - 1) * level) for level in (s, top))  # before the shift
    u = low + (high - low) * rng.uniform()
    return (shift * u / (1 + (shift - 1) * u)).clamp(max(s, lowest), highest)


def main(args):
    phased_dmd.__file__ = __file__  # the run is named after, and keeps the source of, this file
    starts, last = dict(zip(args.phase_ends, (1.0, *args.phase_ends))), {}

    def kept_rollout(*arguments):
        x_s, x0 = rollout(*arguments)
        last.update(x_s=x_s, end=arguments[4][-1])  # of its noise levels the last is the phase's end
        return x_s, x0

    def kept_sigma(rng, shift, floor, *score_sigmas):
        if args.disjoint_times:
            sigma = sigma_below(rng, shift, floor, starts[last["end"]], *score_sigmas)
        else:
            sigma = sample_sigma(rng, shift, floor, *score_sigmas)
        last["sigma"] = sigma
        return sigma

    phased_dmd.rollout, phased_dmd.sample_sigma = kept_rollout, kept_sigma
    if args.naive_target:
        phased_dmd.flow_loss = lambda v, x_s, noise, sigma, s: flow_loss(v, x_s, noise, sigma, 0)
    if args.velocity_gradient:
        phased_dmd.dmd_gradient = lambda x0, real, fake: velocity_gradient(real, fake, last["sigma"], last["end"])
        phased_dmd.student_loss = lambda x0, grad: student_loss(last["x_s"], grad)
    phased_dmd.main(args)


if __name__ == "__main__":
    launch(main, Args, RECIPES)
