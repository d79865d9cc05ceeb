"""A scheduler of stock diffusers that takes a student's steps.

No scheduler of diffusers holds a list of noise levels in its config, and WanPipeline passes none: it makes them of the
number of steps. FlowMatchEulerDiscreteScheduler does that with two numbers, shift and shift_terminal, so it has one
level or two exactly, and more if they lie on a curve of its kind, as shift * u / (1 + (shift - 1) * u) of evenly spaced
u does. To others it comes close. The first level is always 1.
"""

import math

from diffusers import FlowMatchEulerDiscreteScheduler

EXACT = 1e-6  # levels are float32 there


def made_by(scheduler, steps):
    """The noise levels of a scheduler's own schedule."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1].tolist()


def distance(scheduler, levels):
    """By how much the worst of the scheduler's own levels misses the student's."""
    return max(abs(a - b) for a, b in zip(made_by(scheduler, len(levels)), levels, strict=True))


def nearest_scheduler(levels, renoise):
    """FlowMatchEulerDiscreteScheduler whose own schedule of len(levels) steps is nearest to the levels.

    renoise: fresh noise in every step, as dmd2.py does; else Euler steps, as phased_dmd.py does.
    """
    end = levels[-1] if len(levels) > 1 else None
    make = lambda log_shift: FlowMatchEulerDiscreteScheduler(
        shift=math.exp(log_shift), shift_terminal=end, stochastic_sampling=renoise
    )
    low, high = -7.0, 3.45  # there every level between rises with shift, so that the worst has one minimum
    for _ in range(80 if len(levels) > 2 else 0):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if distance(make(a), levels) <= distance(make(b), levels) else (a, high)
    return make((low + high) / 2 if len(levels) > 2 else 0.0)
