"""Every script's `main` against a second, plain writing of its paper's equations.

A real run of `main` on the tiny teacher is watched: the gradients that reach each optimizer, the weights before and
after, the logged figures, the previews, the export. Student, fake score and average are made different first, so that
no network can stand in for another, and every weight counts. The second writing below calls no function of a script: it
has the equations, stock diffusers networks, and the draws of common.py, which are tested on their own.
"""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from experiments import phased_ablations
from models.presets import PRESETS
from tests.conftest import only_run, small_args
from training.files import write_shard
from training.preview import Preview
from training.run import Run

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
# small, but with everything on: micro-batches, guidance, both time scales, an average, annealing, AdamW's own numbers
FLAGS = {
    "steps": 8, "student_every": 2, "batch_size": 2, "grad_accum": 2, "guidance_scale": 2.5, "shift": 3.0,
    "lr": 2e-3, "fake_score_lr": 1e-3, "anneal_lr": True, "betas": (0.3, 0.9), "weight_decay": 0.1,
    "max_grad_norm": 0.4, "ema_decay": 0.8, "preview_every": 4, "preview_prompts": 2, "preview_seeds": 2,
    "teacher_steps": 3,
}  # fmt: skip
FEW_STEPS = {"student_sigmas": (1.0, 0.8, 0.4), "gan_weight": 0.7, "discriminator_weight": 0.3, "seed": 3}


# -------------------------------------------------------------------------------------------------- watching a run


@dataclass
class Update:
    """One optimizer step: whose, all networks' weights before it, the gradients it was given, the weights after it."""

    name: str
    before: dict
    gradients: dict
    after: dict


class Watch:
    """What happens in a run of `main`, from the moment its networks are filled."""

    def __init__(self, monkeypatch):
        self.updates, self.figures, self.previews, self.resets, self.networks = [], [], {}, [], {}
        restore, log, write, reset = Run.restore, Run.log, Preview.write, common.Model.reset
        adamw = torch.optim.AdamW.step

        def watched_restore(run, networks, optimizers):
            restore(run, networks, optimizers)
            self.networks, self.optimizers = networks, optimizers
            for name, network in networks.items():
                perturb(network, name)
            self.start = self.states()

        def watched_step(optimizer):
            (name,) = [name for name, other in self.optimizers.items() if other is optimizer]
            before, network = self.states(), self.networks[name]
            gradients = {stock_key(k): p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
            adamw(optimizer)
            self.updates.append(Update(name, before, gradients, state(network)))

        def watched_log(run, step, values, total):
            self.figures.append({name: float(value) for name, value in values.items()})
            log(run, step, values, total)

        def watched_write(preview, name, sample):
            latents = []
            write(preview, name, lambda rng, cond: latents.append(sample(rng, cond)) or latents[-1])
            self.previews[name] = torch.cat(latents), self.states()

        def watched_reset(model, network):
            reset(model, network)
            for name, other in self.networks.items():
                if other is network:  # for the next phase, in which it must be told apart again
                    self.resets.append((name, len(self.updates), state(network)))
                    perturb(network, name + "'")

        monkeypatch.setattr(Run, "restore", watched_restore)
        monkeypatch.setattr(Run, "log", watched_log)
        monkeypatch.setattr(Preview, "write", watched_write)
        monkeypatch.setattr(common.Model, "reset", watched_reset)
        monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)

    def states(self):
        return {name: state(network) for name, network in self.networks.items()}


def state(network):
    return {stock_key(key): value.clone() for key, value in network.state_dict().items()}


def stock_key(key):
    """What a stock transformer, with one LoRA on it or none, calls this parameter of a run's network."""
    key = key.removeprefix("transformer.")
    return f"{key.removeprefix('lora.transformer/').replace('/', '.')}.default.weight" if "lora_" in key else key


@torch.no_grad()
def perturb(network, name):
    g = torch.Generator().manual_seed(sum(name.encode()))
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))


# ------------------------------------------------------------------------------------------------ the second writing


def column(x):
    return x.view(-1, 1, 1, 1, 1)


def noised(x0, noise, sigma):
    return (1 - column(sigma)) * x0 + column(sigma) * noise


def score_time(u, shift, end=0.0, top=1.0, ends=(0.02, 0.98)):
    """u uniform between those of the two levels, shifted, clamped: docs/phased_dmd.md."""
    low, high = (level / (shift - (shift - 1) * level) for level in (end, top))
    u = low + (high - low) * u
    return (shift * u / (1 + (shift - 1) * u)).clamp(max(ends[0], end), ends[1])


class Network:
    """A stock transformer with given weights, and the discriminator's heads beside it."""

    def __init__(self, rank=0, alpha=None):
        self.net = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
        if rank:
            layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            self.net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
        self.rank, self.heads, self.features = rank, {}, {}
        for i, block in enumerate(self.net.blocks):
            block.register_forward_hook(lambda block, args, out, i=i: self.features.update({i: out}))

    def fill(self, weights):
        """Of a LoRA's network the weights are the LoRA's alone: its base is the teacher, always."""
        own = {k: v for k, v in weights.items() if not k.startswith("heads.")}
        assert own.keys() == {k for k in self.net.state_dict() if ".lora_" in k or not self.rank}
        self.net.load_state_dict(own, strict=not self.rank)
        self.heads = {k: v.clone().requires_grad_() for k, v in weights.items() if k.startswith("heads.")}
        self.net.zero_grad()
        return self

    def velocity(self, x_t, sigma, text):
        return self.net(x_t, 1000 * sigma, text, return_dict=False)[0]

    def x0(self, x_t, sigma, text):
        return x_t - column(sigma) * self.velocity(x_t, sigma, text)

    def logits(self, x_t, sigma, text, blocks):
        self.velocity(x_t, sigma, text)
        out = []
        for j, block in enumerate(blocks):
            w = {k.removeprefix(f"heads.blocks.{j}."): v for k, v in self.heads.items()}
            h = F.layer_norm(self.features[block], self.features[block].shape[-1:], w["0.weight"], w["0.bias"])
            out.append(F.linear(F.silu(F.linear(h, w["1.weight"], w["1.bias"])), w["3.weight"], w["3.bias"]))
        return torch.cat(out, dim=-1)

    def gradients(self):
        every = {k: p for k, p in self.net.named_parameters() if ".lora_" in k or not self.rank} | self.heads
        return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in every.items()}


class Reference:
    """What a run must have done, update by update, from the weights that it had before each."""

    def __init__(self, args, cache):
        self.args = args
        self.model = common.Model("tiny", 9, 32, 32)
        self.shape = self.model.latent_shape
        self.data = common.load_data(self.model, None, None, cache, CPU, args.seed)
        self.null = common.encode_text(self.model, [""], cache, CPU).cond_of([0])["text"]
        self.teacher, self.fake_score = Network(), Network(args.fake_lora_rank, args.lora_alpha)
        self.student = Network(args.lora_rank, args.lora_alpha)
        self.exits = set()

    def guided(self, x_t, sigma, text):
        """The teacher's x0 after guidance."""
        uncond = self.teacher.x0(x_t, sigma, self.null.expand_as(text))
        return uncond + self.args.guidance_scale * (self.teacher.x0(x_t, sigma, text) - uncond)

    def ode(self, noise, text, steps):
        """Euler steps of the guided teacher on the shifted grid, in velocities."""
        u = torch.linspace(1, 0, steps + 1)
        sigmas, x = self.args.shift * u / (1 + (self.args.shift - 1) * u), noise
        for sigma, after in pairwise(sigmas):
            level = sigma.expand(len(x))
            x = x + (after - sigma) * (x - self.guided(x, level, text)) / sigma
        return x

    def micro_batches(self, step, stream):
        for micro in range(self.args.grad_accum):
            first = (step * self.args.grad_accum + micro) * self.args.batch_size
            numbers = range(first, first + self.args.batch_size)
            text = self.data.cond(numbers)["text"]
            yield numbers, common.SampleRNG(self.args.seed, stream, numbers, CPU), text

    # what the scripts differ in; the methods of DMD2 are the default

    def levels(self, step):
        """Noise levels of the rollouts of a step, the last of which carries gradient."""
        count = 1 + int(common.SharedRNG(self.args.seed, step).uniform("exit") * len(self.args.student_sigmas))
        self.exits.add(count)
        return self.args.student_sigmas[:count]

    def sample(self, network, rng, text, levels, clips=None):
        x = rng.normal(self.shape)
        if clips is not None:
            return network.x0(noised(clips, x, torch.full((len(x),), levels[-1])), self.full(rng, levels[-1]), text)
        for sigma, after in pairwise(levels):
            with torch.no_grad():
                x = noised(network.x0(x, self.full(rng, sigma), text), rng.normal(self.shape), self.full(rng, after))
        return network.x0(x, self.full(rng, levels[-1]), text)

    def full(self, rng, level):
        return torch.full((len(rng),), level)

    def clips(self, numbers):
        """The clips that a student may start from; None where it starts from noise."""
        return self.data.latents(numbers) if self.args.student_input == "data" else None

    def teacher_input(self, step, numbers, x0, noise, sigma):
        return noised(x0, noise, sigma)

    def extra(self, x0, x0_teacher, x0_fake, figures):
        """Further losses of the student on the same sample."""
        return 0.0

    def student_update(self, step, figures):
        args, student, levels = self.args, self.student, self.levels(step)
        for numbers, rng, text in self.micro_batches(step, "student"):
            x0 = self.sample(student, rng, text, levels, self.clips(numbers))
            sigma, noise = score_time(rng.uniform(), args.shift), rng.normal(self.shape)
            x_t = noised(x0, noise, sigma)
            with torch.no_grad():
                x0_fake = self.fake_score.x0(x_t, sigma, text)
                x0_teacher = self.guided(self.teacher_input(step, numbers, x0, noise, sigma), sigma, text)
                weight = (x0 - x0_teacher).abs().flatten(1).mean(1)
                grad = (x0_fake - x0_teacher) / column(weight)
            # a linear loss with the wanted gradient
            loss = (grad * x0).mean() + self.extra(x0, x0_teacher, x0_fake, figures)
            figures["loss/student"] += 0.5 * grad.square().mean().item() / args.grad_accum
            if getattr(args, "gan_weight", 0):
                gan = F.softplus(-self.fake_score.logits(x_t, sigma, text, args.discriminator_blocks)).mean()
                figures["loss/gan_student"] += gan.item() / args.grad_accum
                loss = loss + args.gan_weight * gan
            (loss / args.grad_accum).backward()
            self.regression(numbers, figures)

    def regression(self, numbers, figures):
        pass

    def fake_score_update(self, step, figures):
        args, levels = self.args, self.levels(step)
        for numbers, rng, text in self.micro_batches(step, "fake_score"):
            with torch.no_grad():
                x0 = self.sample(self.student, rng, text, levels, self.clips(numbers))
            sigma, noise = score_time(rng.uniform(), args.shift), rng.normal(self.shape)
            x_t = noised(x0, noise, sigma)
            loss = (self.fake_score.velocity(x_t, sigma, text) - (noise - x0)).square().mean()
            figures["loss/fake_score"] += loss.item() / args.grad_accum
            (loss / args.grad_accum).backward()
            self.discriminator(x_t, numbers, noise, sigma, text, figures)

    def discriminator(self, x_t, numbers, noise, sigma, text, figures):
        args = self.args
        if getattr(args, "gan_weight", 0):
            real = noised(self.data.latents(numbers), noise, sigma)
            logits = [self.fake_score.logits(x, sigma, text, args.discriminator_blocks) for x in (x_t, real)]
            loss = F.softplus(logits[0]).mean() + F.softplus(-logits[1]).mean()
            figures["loss/discriminator"] += loss.item() / args.grad_accum
            (args.discriminator_weight * loss / args.grad_accum).backward()

    def rate(self, step):
        return 1 - step / self.args.steps

    def preview(self, name, states):
        """Latents of a preview of these weights: "teacher", or a step's number for the average."""
        args, total = self.args, self.args.preview_prompts * self.args.preview_seeds
        out = []
        for first in range(0, total, args.batch_size):
            numbers = range(first, first + args.batch_size)
            rng = common.SampleRNG(args.seed, "preview", numbers, CPU)
            text = self.data.cond_of([number // args.preview_seeds for number in numbers])["text"]
            if name == "teacher":
                out.append(self.ode(rng.normal(self.shape), text, args.teacher_steps))
            else:
                out.append(self.preview_sample(rng, text, states))
        return torch.cat(out)

    def preview_sample(self, rng, text, states):
        return self.sample(self.student.fill(states["ema"]), rng, text, self.args.student_sigmas)

    def phase(self, step):
        return 0


class DMD(Reference):
    def __init__(self, args, cache):
        super().__init__(args, cache)
        self.pairs = common.Shards(args.pairs, self.model, CPU, args.seed, ("latents", "noise"))

    def levels(self, step):
        return (1.0,)

    def clips(self, numbers):
        return None

    def regression(self, numbers, figures):
        noise, video = self.pairs.latents(numbers, "noise"), self.pairs.latents(numbers)
        x0 = self.student.x0(noise, torch.ones(len(noise)), self.pairs.cond(numbers)["text"])
        loss = (x0 - video).square().mean()
        figures["loss/regression"] += loss.item() / self.args.grad_accum
        (self.args.regression_weight * loss / self.args.grad_accum).backward()

    def preview_sample(self, rng, text, states):
        return self.sample(self.student.fill(states["ema"]), rng, text, (1.0,))


class DFD(Reference):
    coins = frozenset()

    def teacher_input(self, step, numbers, x0, noise, sigma):
        heads = common.SharedRNG(self.args.seed, step).uniform("coin") < self.args.data_prob
        self.coins |= {heads}
        return noised(self.data.latents(numbers) if heads else x0, noise, sigma)


class CoDMD(Reference):
    def extra(self, x0, x0_teacher, x0_fake, figures):
        args, tau = self.args, self.args.relation_temperature

        def kl(rows):
            """Of the rows [n, c] of student, teacher and fake score; mean over rows."""
            s, r, f = ((z / z.norm(dim=1, keepdim=True)) @ (z / z.norm(dim=1, keepdim=True)).T for z in rows)
            p, q = torch.softmax((s - (f - r)).detach() / tau, dim=1), torch.softmax(s / tau, dim=1)
            return (p * (p / q).log()).sum(1).mean()

        x = x0, x0_teacher, x0_fake
        samples = kl([z.mean((2, 3, 4)) for z in x])
        frames = torch.stack([kl([z[i].mean((2, 3)).T for z in x]) for i in range(len(x0))]).mean()
        loss = args.sample_relation * samples + args.frame_relation * frames
        figures["loss/relation"] += loss.item() / args.grad_accum
        return args.relation_weight * loss


def ablated(args, name):
    """Whether a flag of experiments/phased_ablations.py is set."""
    return getattr(args, name, False)


class PhasedDMD(Reference):
    def __init__(self, args, cache):
        super().__init__(args, cache)
        self.experts = [Network(args.lora_rank, args.lora_alpha) for _ in args.phase_ends]

    def phase(self, step):
        return step * len(self.args.phase_ends) // self.args.steps

    def rate(self, step):
        each = self.args.steps // len(self.args.phase_ends)
        return 1 - step % each / each

    def ends(self, step):
        """Noise levels at which this step's phase starts and ends."""
        ends = (1.0, *self.args.phase_ends)
        return ends[self.phase(step)], ends[self.phase(step) + 1]

    def score_sigmas(self, step, rng):
        floor = (self.args.score_ends or self.args.phase_ends)[self.phase(step)]
        top = self.ends(step)[0] if ablated(self.args, "disjoint_times") else 1.0
        return score_time(rng.uniform(), self.args.shift, floor, top, self.args.score_sigmas)

    def levels(self, step):
        start, end = self.ends(step)
        own = [sigma for sigma in self.args.student_sigmas if end < sigma <= start]
        count = 1 + int(common.SharedRNG(self.args.seed, step).uniform("exit") * len(own))
        self.exits.add((self.phase(step), count))
        return [sigma for sigma in self.args.student_sigmas if sigma > start] + own[:count]

    def euler(self, network, x, rng, sigma, after, text):
        return x + (after - sigma) * network.velocity(x, self.full(rng, sigma), text)

    def carry(self, step, rng, text, clips):
        """x_s at the phase's end, and the video that its last step aims at."""
        levels, end, x = self.levels(step), self.ends(step)[1], rng.normal(self.shape)
        if clips is not None:
            x, levels = noised(clips, x, self.full(rng, levels[-1])), levels[-1:]
        with torch.no_grad():
            for sigma, after in pairwise(levels):
                x = self.euler(self.expert_of(sigma, self.phase(step)), x, rng, sigma, after, text)
        v = self.student.velocity(x, self.full(rng, levels[-1]), text)
        return x + (end - levels[-1]) * v, x - levels[-1] * v

    def expert_of(self, sigma, phase):
        """Whose noise range this level is in: a finished expert, or the student in training."""
        own = next(i for i, end in enumerate(self.args.phase_ends) if sigma > end)
        return self.student if own >= phase else self.experts[own]

    def renoised(self, x_s, noise, sigma, s):
        """x_t from x_s: a = (1 - t) / (1 - s), b by the variance that is missing."""
        t = column(sigma)
        a = (1 - t) / (1 - s)
        b = (t**2 - a**2 * s**2).sqrt()
        return a * x_s + b * noise, b

    def student_update(self, step, figures):
        args, s = self.args, self.ends(step)[1]
        for numbers, rng, text in self.micro_batches(step, "student"):
            x_s, x0 = self.carry(step, rng, text, self.clips(numbers))
            sigma, noise = self.score_sigmas(step, rng), rng.normal(self.shape)
            x_t, _ = self.renoised(x_s, noise, sigma, s)
            t = column(sigma)
            with torch.no_grad():
                x0_fake, x0_teacher = self.fake_score.x0(x_t, sigma, text), self.guided(x_t, sigma, text)
                v_fake, v_real = (x_t - x0_fake) / t, (x_t - x0_teacher) / t
                if ablated(args, "velocity_gradient"):
                    on, grad = x_s, (1 - t) ** 2 / ((1 - s) * t) * (v_real - v_fake)
                else:
                    on, grad = x0, (x0_fake - x0_teacher) / column((x0 - x0_teacher).abs().flatten(1).mean(1))
            on = x_s if ablated(args, "velocity_gradient") else x0
            loss = (grad * on).mean()
            figures["loss/student"] += 0.5 * grad.square().mean().item() / args.grad_accum
            if args.gan_weight:
                gan = F.softplus(-self.fake_score.logits(x_t, sigma, text, args.discriminator_blocks)).mean()
                figures["loss/gan_student"] += gan.item() / args.grad_accum
                loss = loss + args.gan_weight * gan
            (loss / args.grad_accum).backward()

    def fake_score_update(self, step, figures):
        args, s = self.args, self.ends(step)[1]
        for numbers, rng, text in self.micro_batches(step, "fake_score"):
            with torch.no_grad():
                x_s, _ = self.carry(step, rng, text, self.clips(numbers))
            sigma, noise = self.score_sigmas(step, rng), rng.normal(self.shape)
            x_t, b = self.renoised(x_s, noise, sigma, s)
            v, t = self.fake_score.velocity(x_t, sigma, text), column(sigma)
            if s and not ablated(args, "naive_target"):
                loss = ((10 * b**2).clamp(max=1) * (v - (t * noise / b - x_t) / (1 - t)).square()).mean()
            else:
                loss = (v - (noise - x_s)).square().mean()
            figures["loss/fake_score"] += loss.item() / args.grad_accum
            (loss / args.grad_accum).backward()
            self.discriminator(x_t, numbers, noise, sigma, text, figures)

    def preview_sample(self, rng, text, states):
        """Euler steps over all levels, each by the finished expert of its range, else by the average."""
        x, levels = rng.normal(self.shape), (*self.args.student_sigmas, 0.0)
        for sigma, after in pairwise(levels):
            own = next(i for i, end in enumerate(self.args.phase_ends) if sigma > end)
            weights = states.get(f"expert_{own}", states.get("ema", states["student"]))
            x = self.euler(self.student.fill(weights), x, rng, sigma, after, text)
        return x


# ------------------------------------------------------------------------------------------------------ comparing


def close(got, wanted, tolerance=1e-4):
    """Every tensor of a dict is near the wanted one, in units of its own size, or of rounding where that is nothing."""
    assert got.keys() == wanted.keys()
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    for key, value in wanted.items():
        error = (got[key] - value).norm()
        assert error <= tolerance * value.norm() + 1e-6 * whole, f"{key}: off by {error / value.norm():.2g} of itself"


def check_adamw(update, got, lr, args, moments):
    """The weights moved by AdamW's step with these gradients and the flags' numbers, the others not at all."""
    steps, m, v = moments.setdefault(update.name, [0, {}, {}])
    moments[update.name][0] = steps = steps + 1
    for key, after in update.after.items():
        before = update.before[update.name][key]
        if key not in got:
            assert torch.equal(after, before)
            continue
        m[key] = args.betas[0] * m.get(key, 0) + (1 - args.betas[0]) * got[key]
        v[key] = args.betas[1] * v.get(key, 0) + (1 - args.betas[1]) * got[key] ** 2
        deviation = (v[key] / (1 - args.betas[1] ** steps)).sqrt() + 1e-8
        wanted = -lr * (m[key] / (1 - args.betas[0] ** steps) / deviation + args.weight_decay * before)
        off = (after - before - wanted).norm()
        assert off <= 1e-3 * wanted.norm() + 1e-7 * before.norm(), f"{update.name}'s {key}"


def check(watch, reference, tmp_path, script):
    args, count, moments, average = reference.args, 0, {}, watch.start.get("ema")
    for step in range(args.steps):
        figures = dict.fromkeys(watch.figures[step], 0.0)
        if step and reference.phase(step) > reference.phase(step - 1):
            left = average or watch.updates[count - 1].before["student"]
            begun = watch.updates[count].before
            close(begun[f"expert_{reference.phase(step) - 1}"], left, 1e-5)
            average, moments = begun.get("ema"), {}
        for name in ("student", "fake_score") if step % args.student_every == 0 else ("fake_score",):
            update, count = watch.updates[count], count + 1
            assert update.name == name
            reference.student.fill(update.before["student"])
            reference.fake_score.fill(update.before["fake_score"])
            for i in range(reference.phase(step)):
                reference.experts[i].fill(update.before[f"expert_{i}"])
            getattr(reference, f"{name}_update")(step, figures)
            wanted = getattr(reference, name).gradients()
            norm = torch.stack([g.norm() for g in wanted.values()]).norm().item()
            figures[f"grad_norm/{name}"] = norm
            got = update.gradients
            close(got, {k: min(1.0, args.max_grad_norm / norm) * g for k, g in wanted.items()})
            lr = args.lr if name == "student" else args.fake_score_lr
            check_adamw(update, got, lr * (reference.rate(step) if args.anneal_lr else 1), args, moments)
            if average:  # it moves with the student's updates and at no other time
                close(update.before["ema"], average, 1e-5)
                if name == "student":
                    decay = args.ema_decay
                    average = {k: decay * a + (1 - decay) * update.after[k] for k, a in average.items()}
        figures["time/step"] = watch.figures[step]["time/step"]
        assert watch.figures[step] == pytest.approx(figures, rel=1e-4, abs=1e-6), f"step {step}"
    assert count == len(watch.updates)

    names = list(range(0, args.steps + 1, args.preview_every))
    assert list(watch.previews) == ["teacher", *names]
    for name, (latents, states) in watch.previews.items():
        with torch.no_grad():
            torch.testing.assert_close(latents, reference.preview(name, states), rtol=1e-3, atol=1e-4)
    folder = only_run(tmp_path, script) / "checkpoints" / f"step_{args.steps:07d}" / "student"
    exported = [load_file(path) for path in sorted(folder.glob("transformer*/*.safetensors"))]
    final = watch.previews[names[-1]][1]
    owners = [final[name] for name in sorted(final) if name.startswith("expert_")]
    owners.append(final["ema"] if args.ema_decay else final["student"])
    assert len(exported) == len(owners)
    for weights, owner in zip(exported, owners):
        if not args.lora_rank:  # merged, see test_adapters.py
            close(weights, owner, 0)


def compare(tmp_path, monkeypatch, script, reference, **flags):
    args = small_args(script, runs_dir=str(tmp_path), **{**FLAGS, **flags})
    for name in ("rollout", "sample_sigma", "flow_loss", "dmd_gradient", "student_loss", "__file__"):
        monkeypatch.setattr(phased_dmd, name, getattr(phased_dmd, name))  # so that the ablations' changes are undone
    watch = Watch(monkeypatch)
    script.main(args)
    monkeypatch.undo()
    common.init_distributed()
    reference = reference(args, tmp_path / "cache")
    check(watch, reference, tmp_path, script)
    return watch, reference


# ---------------------------------------------------------------------------------------------------------- scripts


def test_dmd(tmp_path, monkeypatch):
    """The pairs' prompts, noise and videos are none of the data's, so that none can stand in for another."""
    model, g = common.Model("tiny", 9, 32, 32), torch.Generator().manual_seed(0)
    texts = [torch.randn(n, model.text_dim, generator=g) for n in (3, 4, 5, 6, 7)]
    noise, video = torch.randn(2, 5, *model.latent_shape, generator=g)
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "0.safetensors", ["x"] * 5, texts, noise=noise, latents=video)
    flags = {"pairs": str(tmp_path / "pairs"), "regression_weight": 0.4}
    compare(tmp_path, monkeypatch, dmd, DMD, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"student_input": "data", "anneal_lr": False},
        {"gan_weight": 0.0, "max_grad_norm": 100.0},
        {"lora_rank": 2, "fake_lora_rank": 3, "lora_alpha": 3.0},
        {"gan_weight": 0.0, "fake_lora_rank": 2},
    ],
    ids=["gan", "data", "plain", "loras", "fake score's lora"],
)
def test_dmd2(tmp_path, monkeypatch, flags):
    _, reference = compare(tmp_path, monkeypatch, dmd2, Reference, **{**FEW_STEPS, **flags})
    assert reference.exits == {1, 2, 3}


@pytest.mark.parametrize("student_input", ["simulate", "data"])
def test_dfd(tmp_path, monkeypatch, student_input):
    flags = {**FEW_STEPS, "data_prob": 0.5, "gan_weight": 0.0, "student_input": student_input}
    _, reference = compare(tmp_path, monkeypatch, dfd, DFD, **flags)
    assert reference.exits == {1, 2, 3} and reference.coins == {True, False}


@pytest.mark.parametrize(
    "flags", [{"sample_relation": 0.8, "frame_relation": 0.0}, {"sample_relation": 0.5, "frame_relation": 0.9}]
)
def test_codmd(tmp_path, monkeypatch, flags):
    flags = {**FEW_STEPS, "relation_weight": 0.6, "relation_temperature": 0.2, **flags}
    compare(tmp_path, monkeypatch, codmd, CoDMD, **{**flags, "gan_weight": 0.0})


@pytest.mark.parametrize(
    "flags",
    [
        {"gan_weight": 0.7},
        {"student_input": "data"},
        {"velocity_gradient": True, "ema_decay": 0.0, "score_ends": (0.8, 0.1)},
        {"naive_target": True, "disjoint_times": True, "score_ends": (0.85, 0.0), "score_sigmas": (0.2, 0.9)},
        {"lora_rank": 2, "lora_alpha": 3.0, "anneal_lr": False},
    ],
    ids=["gan", "data", "eq. 10", "ablations", "lora"],
)
def test_phased_dmd(tmp_path, monkeypatch, flags):
    levels = {"student_sigmas": (1.0, 0.9, 0.75, 0.5), "phase_ends": (0.75, 0.0), "steps": 12, "seed": 2}
    flags = {"gan_weight": 0.0, "discriminator_weight": 0.3, "lora_rank": 0, **levels, **flags}
    ablations = {"velocity_gradient", "naive_target", "disjoint_times"}
    script = phased_ablations if ablations & flags.keys() else phased_dmd
    watch, reference = compare(tmp_path, monkeypatch, script, PhasedDMD, **flags)
    assert reference.exits == {(0, 1), (0, 2), (1, 1), (1, 2)}
    # the second phase began at the teacher, before its first update: student, fake score and average
    teacher = load_file(f"{TINY}/transformer/diffusion_pytorch_model.safetensors")
    first = 6 + 3  # updates of the first phase
    names = {"student", "fake_score"} | ({"ema"} if reference.args.ema_decay else set())
    assert {(name, count) for name, count, _ in watch.resets} == {(name, first) for name in names}
    for name, _, weights in watch.resets:
        if reference.args.lora_rank and name != "fake_score":
            assert all(v.abs().sum() == 0 for k, v in weights.items() if ".lora_B." in k)
        else:
            assert all(torch.equal(weights[key], value) for key, value in teacher.items())
