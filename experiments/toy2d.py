"""A trainer for a lecture: the five methods on eight Gaussians in two dimensions, and a picture that moves.

    python experiments/toy2d.py dfd     # runs/toy2d/dfd.webp, and a line: modes kept, spread, seconds of one core

Losses and samplers are the scripts' own. A sample is a "video" [b, 2, 1, 1, 1]; teacher, fake score and student are
MLPs. There are no prompts, so no guidance, and no discriminator. DFD goes on from a student of DMD2.
"""

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from matplotlib.animation import PillowWriter
from torch import nn
from torch.optim import AdamW

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from experiments.gradients import Mixture, panels, plane, video
from models.wan import Wan

OUT = Path("runs/toy2d")
SCRIPTS = {script.__name__: script for script in (dmd, dmd2, dfd, codmd, phased_dmd)}
STEPS, TEACHER_STEPS, BATCH, SHAPE, SIGMAS = 1500, 1500, 256, (2, 1, 1, 1), (1.0, 0.6)
LR, FAKE_SCORE_LR, TITLE = 1e-3, 2e-3, "{}\n{} of 8 modes, spread {:.2f}"
DATA = Mixture(2 * torch.view_as_real(torch.exp(0.25j * torch.pi * torch.arange(8))), 0.3)


class Draws(tuple):  # in place of common.SampleRNG, which has a generator for every sample
    uniform = lambda self: torch.rand(len(self))
    normal = lambda self, shape: torch.randn(len(self), *shape)


class MLP(nn.Sequential):  # a velocity network, called as the scripts do
    chunks, update_cache = Wan.chunks, Wan.update_cache

    def forward(self, x_t, sigma, cond):
        angles = sigma[:, None] * 2.0 ** torch.arange(4)
        return super().forward(torch.cat([x_t.flatten(1), angles.cos(), angles.sin()], dim=1)).view_as(x_t), []


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def rollout(script, experts, rng, sigmas, end, clips):
    """Samples x_s at noise level `end`, their videos x0, and x_t: x_s noised further, to levels that are scored."""
    if script is phased_dmd:
        x_s, x0 = script.rollout(experts, rng, {}, SHAPE, (*sigmas, end))
    else:
        more = {dmd: (), dfd: (sigmas, clips)}.get(script, (sigmas,))
        x_s = x0 = script.rollout(experts[end], rng, {}, SHAPE, *more)
    # where `end` is 0, these two functions are the other scripts'
    sigma, noise = phased_dmd.sample_sigma(rng, 1, end, *script.Args.score_sigmas), rng.normal(SHAPE)
    return x_s, x0, sigma, noise, phased_dmd.renoise(x_s, noise, sigma, end)


def measure(x):
    """Modes that have a quarter of their share or more, and the samples' distance to their modes over the data's."""
    distance, mode = torch.cdist(x.flatten(1), DATA.means).min(1)
    kept = torch.bincount(mode[distance < 2 * DATA.spread], minlength=8) >= len(x) / 32
    return int(kept.sum()), float((distance.square().mean() / 2).sqrt() / DATA.spread)


def main(method: Literal[tuple(SCRIPTS)], /, seed: int = 0):
    began = time.process_time()
    torch.set_num_threads(1), torch.manual_seed(seed), common.init_distributed(), OUT.mkdir(parents=True, exist_ok=True)
    teacher = MLP(*(layer for n in (10, 64, 64) for layer in (nn.Linear(n, 64), nn.SiLU())), nn.Linear(64, 2))
    optimizer = AdamW(teacher.parameters(), fused=True)
    for step in range(TEACHER_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / TEACHER_STEPS)
        x0, noise, sigma = video(DATA.draw(BATCH)), torch.randn(BATCH, *SHAPE), torch.rand(BATCH)
        v, _ = teacher(dmd.add_noise(x0, noise, sigma), sigma, {})
        update(optimizer, dmd.flow_loss(v, x0, noise))
    solver, pair_noise = SimpleNamespace(teacher_steps=50, shift=1, guidance_scale=1), torch.randn(2048, *SHAPE)
    pairs = dmd.sample_teacher(teacher, {}, SHAPE, solver, SimpleNamespace(normal=lambda shape: pair_noise), {})
    (figure, axes), writer = panels(3, 3, 3.3), PillowWriter(fps=10)
    plane(axes[0], "data", DATA, DATA.draw(1000))
    plane(axes[1], TITLE.format("teacher", *measure(pairs)), DATA, pairs[:1000].flatten(1))
    writer.setup(figure, OUT / f"{method}.webp", dpi=90)
    student, fake_score, rng, history = teacher, teacher, Draws(range(BATCH)), []
    for script in (dmd2, dfd) if method == "dfd" else (SCRIPTS[method],):
        args, start, experts, total = script.Args, (student, fake_score), {}, STEPS // 10 if script is dfd else STEPS
        phase_ends = (0.6, 0.0) if script is phased_dmd else (0.0,)
        levels = SimpleNamespace(steps=total, phase_ends=phase_ends, student_sigmas=SIGMAS)
        for step in range(total + 1):
            if step % (total // 20) == 0:
                students = [*experts.values(), student, student]
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(0)  # the same noise in every frame
                    x = script.sample_student(students, SHAPE, levels, Draws(range(1000)), {})
                history.append(measure(x))
                axes[2].clear()
                plane(axes[2], TITLE.format(f"{script.__name__}, {step} steps", *history[-1]), DATA, x.flatten(1))
                writer.grab_frame()
            if step == total:
                break
            _, end, own_sigmas = phased_dmd.phase_of(step, levels)
            if end not in experts:  # a phase begins
                student, fake_score = map(copy.deepcopy, start)
                experts[end] = student
                student_optimizer = AdamW(student.parameters(), LR, weight_decay=0, fused=True)
                fake_score_optimizer = AdamW(fake_score.parameters(), FAKE_SCORE_LR, weight_decay=0, fused=True)
            last = own_sigmas[int(torch.rand(()) * len(own_sigmas))]
            sigmas = SIGMAS[: SIGMAS.index(last) + 1]
            clips = video(DATA.draw(BATCH))

            # student
            if step % args.student_every == 0:
                _, x0, sigma, noise, x_t = rollout(script, experts, rng, sigmas, end, clips)
                with torch.no_grad():
                    x0_fake = script.predict_x0(fake_score, x_t, sigma, {})
                    if script is dfd and torch.rand(()) < args.data_prob:
                        x_t = dfd.add_noise(clips, noise, sigma)
                    x0_teacher = script.predict_x0(teacher, x_t, sigma, {})
                    grad = script.dmd_gradient(x0, x0_teacher, x0_fake)
                loss = script.student_loss(x0, grad)
                if script is dmd:
                    rows = torch.randint(len(pairs), (BATCH,))
                    x0 = dmd.predict_x0(student, pair_noise[rows], torch.ones(BATCH), {})
                    loss = loss + args.regression_weight * dmd.regression_loss(x0, pairs[rows])
                if script is codmd:  # a point has one frame, so its relations are those between samples
                    relation = codmd.relation_loss(x0, x0_teacher, x0_fake, 1.0, 0.0, args.relation_temperature)
                    loss = loss + args.relation_weight * relation
                update(student_optimizer, loss)

            # fake score
            with torch.no_grad():
                x_s, _, sigma, noise, x_t = rollout(script, experts, rng, sigmas, end, clips)
            v, _ = fake_score(x_t, sigma, {})
            update(fake_score_optimizer, phased_dmd.flow_loss(v, x_s, noise, sigma, end))
    writer.finish()
    modes, spread = history[-1]
    print(f"{method}: {modes} of 8 modes, spread {spread:.2f}, {time.process_time() - began:.0f} s of one core")
    return history


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
