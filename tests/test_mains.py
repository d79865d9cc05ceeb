"""Every script's `main` against a second, plain writing of its paper's equations.

A real run of `main` on a small random teacher is watched: gradients that reach each optimizer, the weights before and
after, the logged figures, the previews, the export. Student, fake score and average are made different first, so that
no network can stand in for another, and every weight counts. The second writing below calls no function of a script: it
has the equations, stock diffusers networks, and the draws of common.py, which are tested on their own.
"""

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from experiments import variant
from models.wan import Wan
from models.wan_causal import CausalWan
from tests import small_teachers
from tests.conftest import only_run, small_args
from tests.exact import column
from tools import ode_init
from training.files import write_shard
from training.preview import Preview
from training.run import Run

CPU = torch.device("cpu")
# small, but with everything on: micro-batches, guidance, both time scales, an average, annealing, AdamW's own numbers
FLAGS = {
    "steps": 6, "student_every": 2, "batch_size": 2, "grad_accum": 2, "guidance_scale": 2.5, "shift": 3.0,
    "lr": 2e-3, "fake_score_lr": 1e-3, "anneal_lr": True, "betas": (0.3, 0.9), "weight_decay": 0.1,
    "max_grad_norm": 0.4, "ema_decay": 0.8, "preview_every": 9, "preview_prompts": 2, "preview_seeds": 2,
    "teacher_steps": 3, "score_sigmas": (0.1, 0.95), "gradient_checkpointing": 0, "discriminator_blocks": (1, 0),
    "negative_prompt": "a blue square",
}  # fmt: skip
FEW_STEPS = {"student_sigmas": (1.0, 0.8, 0.4), "gan_weight": 0.7, "discriminator_weight": 0.3, "seed": 10}


# -------------------------------------------------------------------------------------------------- watching a run


class Watch:
    """What happens in a run of `main`, from the moment its networks are filled. An update is (whose, all networks'
    weights before it, the gradients it was given, the weights after it).
    """

    def __init__(self, monkeypatch):
        self.updates, self.figures, self.previews = [], [], {}
        load, log, write, adamw = Run.load, Run.log, Preview.write, torch.optim.AdamW.step

        def watched_load(run, networks, optimizers):
            load(run, networks, optimizers)
            self.networks, self.optimizers = networks, optimizers
            torch.manual_seed(0)
            for parameter in (p for network in networks.values() for p in network.parameters()):
                parameter.data += 0.02 * torch.randn(parameter.shape)
            self.start = self.states()

        def watched_step(optimizer):
            (name,) = [name for name, other in self.optimizers.items() if other is optimizer]
            others = [p for other, network in self.networks.items() if other != name for p in network.parameters()]
            assert all(p.grad is None for p in others), "only what learns has a gradient, the student's GAN or not"
            before, network = self.states(), self.networks[name]
            gradients = {stock_key(k): p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
            adamw(optimizer)
            self.updates.append((name, before, gradients, state(network)))

        def watched_log(run, step, values):
            self.figures.append({name: float(value) for name, value in values.items()})
            log(run, step, values)

        def watched_write(preview, name, sample):
            latents = []
            write(preview, name, lambda rng, cond: latents.append(sample(rng, cond)) or latents[-1])
            self.previews[name] = torch.cat(latents), self.states()

        monkeypatch.setattr(Run, "load", watched_load)
        monkeypatch.setattr(Run, "log", watched_log)
        monkeypatch.setattr(Preview, "write", watched_write)
        monkeypatch.setattr(Preview, "decode", lambda preview, latents: latents)
        monkeypatch.setattr(Preview, "look", lambda *_: None)
        monkeypatch.setattr(Preview, "score", lambda *_: None)
        monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)

    def states(self):
        return {name: state(network) for name, network in self.networks.items()}


def state(network):
    return {stock_key(key): value.clone() for key, value in network.state_dict().items()}


def stock_key(key):
    """What a stock transformer, with one LoRA on it or none, calls this parameter of a run's network."""
    key = key.removeprefix("transformer.")
    return f"{key.removeprefix('lora.transformer/').replace('/', '.')}.default.weight" if "lora_" in key else key


# ------------------------------------------------------------------------------------------------ the second writing


def full(x, level):
    return torch.full((len(x),), level)


def noised(x0, noise, sigma):
    return (1 - column(sigma)) * x0 + column(sigma) * noise


class Network:
    """A stock transformer with given weights, and the discriminator's heads beside it."""

    def __init__(self, folder, rank=0, alpha=None, block=0, heads=0):
        self.net = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        if rank:
            layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            self.net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
        width = self.net.config.num_attention_heads * self.net.config.attention_head_dim
        head = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.rank, self.heads, self.features = rank, nn.ModuleList(head() for _ in range(heads)), {}
        self.frames = (CausalWan if block else Wan)(self.net)  # what is denoised when, and the past: test_causal.py
        self.frames.frame_block = block
        for i, block in enumerate(self.net.blocks):
            block.register_forward_hook(lambda block, args, out, i=i: self.features.update({i: out}))

    def fill(self, weights):
        """Of a LoRA's network the weights are the LoRA's alone: its base is the teacher, always."""
        own = {k: v for k, v in weights.items() if not k.startswith("heads.")}
        assert own.keys() == {k for k in self.net.state_dict() if ".lora_" in k or not self.rank}
        self.net.load_state_dict(own, strict=not self.rank)
        heads = {k.removeprefix("heads.blocks."): v for k, v in weights.items() if k not in own}
        self.heads.load_state_dict(heads)
        self.net.zero_grad(), self.heads.zero_grad()
        return self

    def velocity(self, x_t, sigma, cond):
        if "first" not in cond:
            return self.net(x_t, 1000 * sigma, cond["text"], return_dict=False)[0]
        (b, _, f, h, w), first = x_t.shape, cond["first"]  # the known frame is clean, and its velocity leads there
        level = 1000 * sigma.view(b, 1, 1).repeat(1, f, h * w // 4)
        level[:, 0] = 0
        v = self.net(torch.cat([first, x_t[:, :, 1:]], 2), level.flatten(1), cond["text"], return_dict=False)[0]
        return torch.cat([(x_t[:, :, :1] - first) / column(sigma), v[:, :, 1:]], 2)

    def x0(self, x_t, sigma, cond):
        return x_t - column(sigma) * self.velocity(x_t, sigma, cond)

    def logits(self, x_t, sigma, cond, blocks):
        self.velocity(x_t, sigma, cond)
        return torch.cat([head(self.features[block]) for head, block in zip(self.heads, blocks)], dim=-1)

    def gradients(self):
        every = {k: p for k, p in self.net.named_parameters() if ".lora_" in k or not self.rank}
        every |= {f"heads.blocks.{k}": p for k, p in self.heads.named_parameters()}
        return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in every.items()}


class Reference:
    """What a run must have done, update by update, from the weights that it had before each. This is DMD2; the others
    are what they do differently. Samples are matched at the noise level s to which a step carries them, here 0.
    """

    def __init__(self, args, cache):
        self.args, self.drawn, folder = args, set(), args.teacher.removesuffix(":i2v")
        self.model = common.Model(args.teacher, args.frames, args.height, args.width)
        self.shape = self.model.latent_shape
        self.data = common.Shards(args.data, self.model, CPU, args.seed, ("latents",))
        self.null = common.encode_text(self.model, [args.negative_prompt], cache, CPU).cond_of([0])["text"]
        own = args.student or folder
        student = own, args.lora_rank, args.lora_alpha, getattr(args, "frame_block", 0)
        self.teacher, self.student, self.begun = Network(folder), Network(*student), Network(own).net.state_dict()
        self.gan_weight = getattr(args, "gan_weight", 0)
        heads = 2 if self.gan_weight else 0
        self.fake_score = Network(own, args.fake_lora_rank, args.lora_alpha, heads=heads)
        self.experts = [Network(*student) for _ in getattr(args, "phase_ends", ())]
        if getattr(args, "pairs", None):
            self.pairs = common.Shards(args.pairs, self.model, CPU, args.seed, ("latents", "noise"))

    def guided(self, x_t, sigma, cond):
        """The teacher's x0 after guidance."""
        uncond = self.teacher.x0(x_t, sigma, cond | {"text": self.null.expand_as(cond["text"])})
        return uncond + self.args.guidance_scale * (self.teacher.x0(x_t, sigma, cond) - uncond)

    def ode(self, x, cond):
        """Euler steps of the guided teacher on the shifted grid, in velocities."""
        u = torch.linspace(1, 0, self.args.teacher_steps + 1)
        for sigma, after in pairwise(self.args.shift * u / (1 + (self.args.shift - 1) * u)):
            x = x + (after - sigma) * (x - self.guided(x, full(x, sigma), cond)) / sigma
        return x

    def micro_batches(self, step, stream):
        for micro in range(self.args.grad_accum):
            first = (step * self.args.grad_accum + micro) * self.args.batch_size
            numbers = range(first, first + self.args.batch_size)
            yield numbers, common.SampleRNG(self.args.seed, stream, numbers, CPU), self.data.cond(numbers)

    def pair(self, numbers):
        return self.pairs.latents(numbers, "noise"), self.pairs.latents(numbers), self.pairs.cond(numbers)

    def turns(self, step):
        return ("student", "fake_score") if step % self.args.student_every == 0 else ("fake_score",)

    def phase(self, step):
        return 0

    def rate(self, step):
        return 1 - step / self.args.steps

    def ends(self, step):
        """Noise levels at which this step's phase starts and ends."""
        return 1.0, 0.0

    def top(self, step):
        """The highest noise level that is scored, before the clamp."""
        return 1.0

    def levels(self, step):
        """Noise levels of the predictions of a step, the last of which carries gradient."""
        start, end = self.ends(step)
        own = [sigma for sigma in self.args.student_sigmas if end < sigma <= start]
        count = 1 + int(common.SharedRNG(self.args.seed, step).uniform("exit") * len(own))
        self.drawn.add((self.phase(step), count))
        return [sigma for sigma in self.args.student_sigmas if sigma > start] + own[:count]

    def sample(self, network, rng, cond, levels, clips=None):
        start, video = rng.normal(self.shape), []
        if clips is not None:
            start, levels = noised(clips, start, full(rng, levels[-1])), levels[-1:]
        for x in network.frames.chunks(start):
            for sigma, after in pairwise(levels):
                with torch.no_grad():
                    x0 = network.x0(x, full(x, sigma), cond)
                x = noised(x0, rng.normal(x.shape[1:]), full(x, after))
            video.append(network.x0(x, full(x, levels[-1]), cond))
            network.frames.update_cache(video[-1].detach(), cond)
        return torch.cat(video, dim=2)

    def carry(self, step, rng, cond, clips):
        """The samples x_s that a step makes, and the video that its last prediction is."""
        x0 = self.sample(self.student, rng, cond, self.levels(step), clips)
        return x0, x0

    def score(self, step, numbers, rng, cond):
        """Samples, and where they are scored: x_s, x0, noise, sigma, x_t and the scale b of the noise that is new."""
        clips = self.data.latents(numbers) if getattr(self.args, "student_input", "") == "data" else None
        (x_s, x0), (_, s), shift = self.carry(step, rng, cond, clips), self.ends(step), self.args.shift
        floor = (getattr(self.args, "score_ends", ()) or (*getattr(self.args, "phase_ends", ()), 0))[self.phase(step)]
        low, top = (level / (shift - (shift - 1) * level) for level in (floor, self.top(step)))
        u = low + (top - low) * rng.uniform()
        low, high = self.args.score_sigmas
        sigma, noise = (shift * u / (1 + (shift - 1) * u)).clamp(max(low, floor), high), rng.normal(self.shape)
        a = (1 - column(sigma)) / (1 - s)
        b = (column(sigma) ** 2 - a**2 * s**2).sqrt()  # the variance that is missing
        return x_s, x0, noise, sigma, a * x_s + b * noise, b

    def student_update(self, step, figures):
        args = self.args
        for numbers, rng, cond in self.micro_batches(step, "student"):
            x_s, x0, noise, sigma, x_t, _ = self.score(step, numbers, rng, cond)
            with torch.no_grad():
                x0_fake = self.fake_score.x0(x_t, sigma, cond)
                x0_teacher = self.guided(self.teacher_input(step, numbers, x_t, noise, sigma), sigma, cond)
                samples, grad = self.gradient(step, x_s, x0, x0_teacher, x0_fake, column(sigma))
            # a linear loss with the wanted gradient
            loss = (grad * samples).mean() + self.extra(x0, x0_teacher, x0_fake, figures)
            figures["loss/student"] += 0.5 * grad.square().mean().item() / args.grad_accum
            if self.gan_weight:
                gan = F.softplus(-self.fake_score.logits(x_t, sigma, cond, args.discriminator_blocks)).mean()
                figures["loss/gan_student"] += gan.item() / args.grad_accum
                loss = loss + args.gan_weight * gan
            (loss / args.grad_accum).backward()
            self.regression(numbers, figures)

    def fake_score_update(self, step, figures):
        args, (_, s) = self.args, self.ends(step)
        for numbers, rng, cond in self.micro_batches(step, "fake_score"):
            with torch.no_grad():
                x_s, _, noise, sigma, x_t, b = self.score(step, numbers, rng, cond)
            v, t = self.fake_score.velocity(x_t, sigma, cond), column(sigma)
            target = (t * noise / b - x_t) / (1 - t) if s else noise - x_s
            loss = (((10 * b**2).clamp(max=1) if s else 1) * (v - target).square()).mean()
            figures["loss/fake_score"] += loss.item() / args.grad_accum
            if self.gan_weight:
                real = noised(self.data.latents(numbers), noise, sigma)
                fake, real = (self.fake_score.logits(x, sigma, cond, args.discriminator_blocks) for x in (x_t, real))
                discriminator = F.softplus(fake).mean() + F.softplus(-real).mean()
                figures["loss/discriminator"] += discriminator.item() / args.grad_accum
                loss = loss + args.discriminator_weight * discriminator
            (loss / args.grad_accum).backward()

    def gradient(self, step, x_s, x0, x0_teacher, x0_fake, t):
        return x0, (x0_fake - x0_teacher) / column((x0 - x0_teacher).abs().flatten(1).mean(1))

    def teacher_input(self, step, numbers, x_t, noise, sigma):
        return x_t

    def extra(self, x0, x0_teacher, x0_fake, figures):
        """Further losses of the student on the same sample."""
        return 0.0

    def regression(self, numbers, figures):
        pass

    def preview(self, name, states):
        """Latents of a preview: of the teacher, or at a step of the average with these weights."""
        args, out = self.args, []
        for first in range(0, args.preview_prompts * args.preview_seeds, args.batch_size):
            numbers = range(first, first + args.batch_size)
            rng = common.SampleRNG(args.seed, "preview", numbers, CPU)
            cond = self.data.cond_of([number // args.preview_seeds for number in numbers])
            teacher = name == "teacher"
            out.append(self.ode(rng.normal(self.shape), cond) if teacher else self.preview_sample(rng, cond, states))
        return torch.cat(out)

    def preview_sample(self, rng, cond, states):
        return self.sample(self.student.fill(states["ema"]), rng, cond, getattr(self.args, "student_sigmas", (1.0,)))


class DMD(Reference):
    def levels(self, step):
        return (1.0,)

    def regression(self, numbers, figures):
        noise, video, cond = self.pair(numbers)
        loss = (self.student.x0(noise, full(noise, 1.0), cond) - video).square().mean()
        figures["loss/regression"] += loss.item() / self.args.grad_accum
        (self.args.regression_weight * loss / self.args.grad_accum).backward()


class ODEInit(Reference):
    def turns(self, step):
        return ("student",)

    def student_update(self, step, figures):
        frames, levels = self.student.frames, torch.tensor(self.args.student_sigmas)
        for numbers, rng, _ in self.micro_batches(step, "student"):
            noise, video, cond = self.pair(numbers)
            sigma = levels[(rng.uniform() * len(levels)).long()]
            self.drawn |= set(sigma.tolist())
            for x, clean in zip(frames.chunks(noised(video, noise, sigma)), video.unbind(2)):
                loss = (self.student.x0(x, sigma, cond)[:, :, 0] - clean).square().mean() / self.shape[1]
                frames.update_cache(clean[:, :, None], cond)
                figures["loss/regression"] += loss.item() / self.args.grad_accum
                (loss / self.args.grad_accum).backward()


class DFD(Reference):
    def teacher_input(self, step, numbers, x_t, noise, sigma):
        heads = common.SharedRNG(self.args.seed, step).uniform("coin") < self.args.data_prob
        self.drawn.add(heads)
        return noised(self.data.latents(numbers), noise, sigma) if heads else x_t


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


class PhasedDMD(Reference):
    def phase(self, step):
        return step * len(self.args.phase_ends) // self.args.steps

    def rate(self, step):
        each = self.args.steps // len(self.args.phase_ends)
        return 1 - step % each / each

    def ends(self, step):
        ends = (1.0, *self.args.phase_ends)
        return ends[self.phase(step)], ends[self.phase(step) + 1]

    def euler(self, network, x, sigma, after, cond):
        return x + (after - sigma) * network.velocity(x, full(x, sigma), cond)

    def range_of(self, sigma):
        return next(i for i, end in enumerate(self.args.phase_ends) if sigma > end)

    def carry(self, step, rng, cond, clips):
        levels, end, x = self.levels(step), self.ends(step)[1], rng.normal(self.shape)
        if clips is not None:
            x, levels = noised(clips, x, full(x, levels[-1])), levels[-1:]
        with torch.no_grad():
            for sigma, after in pairwise(levels):
                own = self.range_of(sigma)
                x = self.euler(self.student if own >= self.phase(step) else self.experts[own], x, sigma, after, cond)
        v = self.student.velocity(x, full(x, levels[-1]), cond)
        return x + (end - levels[-1]) * v, x - levels[-1] * v

    def preview_sample(self, rng, cond, states):
        """Euler steps over all levels, each by the finished expert of its range, else by the average."""
        x = rng.normal(self.shape)
        for sigma, after in pairwise((*self.args.student_sigmas, 0.0)):
            weights = states.get(f"expert_{self.range_of(sigma)}", states.get("ema", states["student"]))
            x = self.euler(self.student.fill(weights), x, sigma, after, cond)
        return x


class VelocityGradient(PhasedDMD):
    def gradient(self, step, x_s, x0, x0_teacher, x0_fake, t):
        return x_s, (1 - t) ** 2 / ((1 - self.ends(step)[1]) * t) * (x0_fake - x0_teacher) / t


class DisjointSigmas(PhasedDMD):
    def top(self, step):
        return self.ends(step)[0]


# ------------------------------------------------------------------------------------------------------ comparing


def close(got, wanted, tolerance=1e-4):
    """Every tensor of a dict is near the wanted one, in units of its own size, or of rounding where that is nothing."""
    assert got.keys() == wanted.keys()
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    for key, value in wanted.items():
        error = (got[key] - value).norm()
        assert error <= tolerance * value.norm() + 1e-6 * whole, f"{key} is off by {error / value.norm()}"


def shards(folder, model, seed):
    """Random samples, prompts and conditions of a teacher."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"latents": model.latent_shape, "noise": model.latent_shape, **model.conditions}
    tensors = {name: torch.randn(5, *shape, generator=g) for name, shape in shapes.items()}
    texts = [torch.randn(n, model.text_dim, generator=g) for n in (3, 4, 5, 6, 7)]
    write_shard(folder / "0.safetensors", ["x"] * 5, texts, **tensors)
    return str(folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def compare(tmp_path, monkeypatch, teachers):
    return partial(run_and_compare, tmp_path, monkeypatch, teachers)


def run_and_compare(tmp_path, monkeypatch, teachers, script, reference, teacher="wan", **flags):
    """A run of a script and its second writing, compared. No prompt, noise or video of the pairs is one of the data's,
    so that none can stand in for another.
    """
    name, size = small_teachers.write(teacher, teachers), small_teachers.SMALL[teacher][2:]
    model = common.Model(name, *size)
    flags = {**FLAGS, "teacher": name, "data": shards(tmp_path / "data", model, 1), **flags}
    flags |= dict(zip(("frames", "height", "width"), size))
    if flags.get("student"):  # of another depth
        flags["student"] = str(teachers / "student")
        small_teachers.wan(seed=2, layers=3).save_pretrained(flags["student"])
    if script in (dmd, ode_init):
        flags["pairs"] = shards(tmp_path / "pairs", model, 2)
    accepted = {field.name for field in dataclasses.fields(script.Args)}
    args = small_args(script, runs_dir=str(tmp_path), **{k: v for k, v in flags.items() if k in accepted})
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        script.main(args)
    common.init_distributed()
    reference = reference(args, tmp_path / "cache")
    updates, optimizers, average, left = iter(watch.updates), {}, watch.start.get("ema"), None
    for step in range(args.steps):
        figures = dict.fromkeys(watch.figures[step], 0.0)
        for name in reference.turns(step):
            owner, before, got, after = next(updates)
            assert owner == name
            if step and name == "student" and reference.phase(step) > reference.phase(step - 1):
                close(before[f"expert_{reference.phase(step) - 1}"], average or left, 1e-5)
                average, optimizers, teacher = before.get("ema"), {}, reference.begun
                for weights in (before[own] for own in before if own[:6] != "expert"):  # they begin at the teacher
                    assert all(torch.equal(v, teacher.get(k, v)) for k, v in weights.items())
                    assert not any(v.any() for k, v in weights.items() if ".lora_B." in k)
            for other, weights in before.items():
                if other.startswith("expert_"):
                    reference.experts[int(other[-1])].fill(weights)
                elif other != "ema":
                    getattr(reference, other).fill(weights)
            getattr(reference, f"{name}_update")(step, figures)
            wanted = getattr(reference, name).gradients()
            figures[f"grad_norm/{name}"] = norm = torch.stack([g.norm() for g in wanted.values()]).norm().item()
            close(got, {k: min(1.0, args.max_grad_norm / norm) * g for k, g in wanted.items()})
            own = before[name]
            if name not in optimizers:
                parameters = {k: nn.Parameter(v.clone()) for k, v in own.items()}
                adamw = torch.optim.AdamW(parameters.values(), betas=args.betas, weight_decay=args.weight_decay)
                optimizers[name] = adamw, parameters
            adamw, parameters = optimizers[name]
            for k, parameter in parameters.items():
                parameter.data, parameter.grad = own[k].clone(), got.get(k)
            lr = args.lr if name == "student" else args.fake_score_lr
            adamw.param_groups[0]["lr"] = lr * (reference.rate(step) if args.anneal_lr else 1)
            adamw.step()
            close({k: after[k] - own[k] for k in own}, {k: p.detach() - own[k] for k, p in parameters.items()}, 1e-3)
            left = after if name == "student" else left
            if average:  # it moves with the student's updates and at no other time
                close(before["ema"], average, 1e-5)
                if name == "student":
                    average = {k: args.ema_decay * a + (1 - args.ema_decay) * after[k] for k, a in average.items()}
        assert watch.figures[step] == pytest.approx(figures, rel=1e-4, abs=1e-6), f"step {step}"
    assert next(updates, None) is None

    assert set(watch.previews) - {"teacher"} == {0, args.steps} and (script is ode_init or "teacher" in watch.previews)
    for name, (latents, final) in watch.previews.items():
        with torch.no_grad():
            torch.testing.assert_close(latents, reference.preview(name, final), rtol=1e-3, atol=1e-4)
    folder = only_run(tmp_path, script) / "checkpoints" / f"step_{args.steps:07d}" / "student"
    exported = [load_file(path) for path in sorted(folder.glob("transformer*/*.safetensors"))]
    owners = [final[name] for name in sorted(final) if name.startswith("expert_")]
    owners.append(final["ema"] if args.ema_decay else final["student"])
    for weights, owner in zip(exported, owners, strict=True):
        if not args.lora_rank:  # merged, see test_adapters.py
            close(weights, owner, 0)
    return reference


# ---------------------------------------------------------------------------------------------------------- scripts

NAMES = lambda value: getattr(value, "__name__", None)


@pytest.mark.parametrize(
    ("script", "reference", "flags"),
    [
        (dmd, DMD, {"regression_weight": 0.4}),
        (ode_init, ODEInit, {"frame_block": 1}),
        (dmd2, Reference, {}),
        (dmd2, Reference, {"student_input": "data", "anneal_lr": False, "gan_weight": 0.0, "max_grad_norm": 100.0}),
        (dmd2, Reference, {"lora_rank": 2, "fake_lora_rank": 3, "lora_alpha": 3.0}),
        (dmd2, Reference, {"frame_block": 1}),
        (dmd2, Reference, {"teacher": "wan_5b_i2v"}),
        (dmd2, Reference, {"student": "of its own", "discriminator_blocks": (2, 0)}),
        (dfd, DFD, {"data_prob": 0.5, "student_input": "data"}),
        (codmd, CoDMD, {"sample_relation": 0.5, "frame_relation": 0.9}),
    ],
    ids=NAMES,
)
def test_main(compare, script, reference, flags):
    flags = {"relation_weight": 0.6, "relation_temperature": 0.2, "student_input": "simulate", **FEW_STEPS, **flags}
    reference = compare(script, reference, **flags)
    assert len(reference.drawn) == {dmd: 0, dfd: 5}.get(script, 3), "exit steps or levels, and coins"


@pytest.mark.parametrize(
    ("name", "reference", "flags"),
    [
        ("", PhasedDMD, {"gan_weight": 0.7, "score_ends": (0.8, 0.2)}),
        ("", PhasedDMD, {"student_input": "data", "ema_decay": 0.0}),
        ("", PhasedDMD, {"lora_rank": 2, "lora_alpha": 3.0, "anneal_lr": False, "student": "of its own"}),
        ("velocity_gradient", VelocityGradient, {"ema_decay": 0.0}),
        ("disjoint_sigmas", DisjointSigmas, {"ema_decay": 0.0}),
    ],
    ids=NAMES,
)
def test_phased_dmd(compare, name, reference, flags):
    levels = {"student_sigmas": (1.0, 0.9, 0.75, 0.5), "phase_ends": (0.75, 0.0), "steps": 8, "seed": 38}
    flags = {"gan_weight": 0.0, "discriminator_weight": 0.3, "lora_rank": 0, **levels, **flags}
    script = variant.load(name) if name else phased_dmd
    assert compare(script, reference, **flags).drawn == {(0, 1), (0, 2), (1, 1), (1, 2)}
