"""What a training script costs: parameters, memory per GPU, disk, FLOPs and hours, and on which cards it fits.

    python tools/cost.py dmd2 --teacher wan2.1-1.3b --gpus 8
    python tools/cost.py dmd2 --teacher wan2.1-14b --gpus 8 --lora-rank 64 --fake-lora-rank 64
    python tools/cost.py dmd2 --teacher wan2.1-1.3b --measure 8       # seconds and peak memory of real steps here

All other flags are the script's own. No weights are read, and of a teacher on the Hub no file at all. What a step runs
comes from the script's own main(), on networks that only count. FLOPs of a forward are counted by PyTorch; a backward
is two and a half forwards of attention and two of all else, for a LoRA one (its base has no gradient), and each
recomputed block adds its forward. Of two experts one runs. Activations are what autograd saves in a forward of the bf16
network, with flash attention. Not counted: the allocator's slack, temporary buffers, a LoRA's own activations and
FLOPs, the weights of the discriminator's heads.

--measure runs main() on random weights of the real size, with noise in place of data. Every second step updates the
student too; two more are profiled. Under torchrun the figures are those of rank 0.
"""

import argparse
import copy
import math
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import TRAINED
from models.compute import prepare
from models.presets import PRESETS, TINY_WORLD, name_of
from training.flags import one_line_errors, parse_args

SCRIPTS = ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")
CARDS = (24, 48, 80)  # GiB
FULL = 0.85  # of a card: the rest is for what is not counted
RATE = 4e14  # FLOP/s that a GPU sustains: assumed, not measured
GIB = 1024**3
BATCH = 2  # samples that are counted, as some losses relate them
WARM = 2  # steps before those that are measured: memory is first allocated, blocks are compiled

# --------------------------------------------------------------------------------------- the script's own steps


class Described(common.Model):
    """A teacher's model; of a named one on the Hub without its files."""

    def __init__(self, teacher, frames, height, width, student=None, compute=None):
        super().__init__(teacher, frames, height, width, compute)
        self.student = Described(student, frames, height, width, None, compute) if student else None

    def read(self, teacher):
        if teacher not in PRESETS or teacher in TINY_WORLD:
            return super().read(teacher)
        with torch.device("meta"):
            config = dict(self.family.transformer_class.from_config(PRESETS[teacher].config).config)
        vae = {"scale_factor_spatial": 16} if config["out_channels"] == 48 else {}  # Wan 2.2 5B's, else 8
        index = {"boundary_ratio": 0.9 if "I2V" in self.family.__name__ else 0.875}  # Wan 2.2 A14B's
        return Path(teacher), config, index, vae, 512


described = cache(Described)


def size_of(args):
    """What a Described is made of."""
    return args.teacher, *args.size, args.student


class Noise(common.Samples):
    """Texts, conditions and clips that are noise, of the right shapes."""

    prompts = ["noise"]

    def __init__(self, model, device, has_clips=True):
        self.model, self.device, self.seed, self.has_clips = model, device, 0, has_clips

    def row(self, number):
        return 0

    def cond_of(self, rows):
        shapes = {"text": (self.model.text_length, self.model.text_dim), **self.model.conditions}
        return {key: torch.randn(len(rows), *shape, device=self.device) for key, shape in shapes.items()}

    def latents(self, numbers, key=None):
        return torch.randn(len(numbers), *self.model.latent_shape, device=self.device)


class Counting(nn.Module):
    """Stands in for a network. tally.work adds up what a sample takes, in forwards; tally.alive are forwards whose
    backward is to come, tally.graphs the most that were at once.

    frames: of a whole sample; each: what a forward costs, in forwards of the teacher; attention: its share of that;
    again: what a backward recomputes, of attention and of the rest; weights: whether it has those of the weights.
    """

    width, blocks, before = 1, (), 0

    def __init__(self, tally, frames, frame_block, trained, each, attention, again, weights):
        super().__init__()
        self.tally, self.frames, self.frame_block, self.each = tally, frames, frame_block, each
        self.attention, self.again, self.weights = attention, again, weights
        self.weight = nn.Parameter(torch.ones(1), requires_grad=trained)

    def forward(self, x_t, sigma, cond, blocks=()):
        part = len(x_t) / BATCH * x_t.shape[2] / self.frames  # a causal student's block is one
        reach = (self.before + x_t.shape[2]) / self.frames  # it attends to itself and those before it
        others, attention = (share * part * self.each for share in (1 - self.attention, self.attention * reach))
        self.tally.work += others + attention
        weight = 1 * self.weight
        v = weight * x_t
        if v.requires_grad:
            self.tally.alive += part
            self.tally.graphs = max(self.tally.graphs, self.tally.alive)
            backward = (2.5 + self.again[0]) * attention + (1 + self.again[1]) * others
            v.register_hook(lambda _: self.passed(-part, backward))
            weight.register_hook(lambda _: self.passed(0, self.weights * others))
        return v, [v.mean((1, 2, 3, 4)).view(-1, 1, 1) for _ in blocks]

    def passed(self, alive, work):
        self.tally.alive += alive
        self.tally.work += work

    def chunks(self, x_t):
        self.before = 0
        return x_t.split(self.frame_block or x_t.shape[2], dim=2)

    @torch.no_grad()
    def update_cache(self, x0, cond):
        if self.before + x0.shape[2] < self.frames:  # of the last block nothing is kept
            self(x0, None, cond)
            self.before += x0.shape[2]


def run_steps(script, args, model, device, steps, step_done=lambda: None):
    """Run the script's own main() for so many steps on noise, without a run folder. Returns whether it asked for
    samples of the teacher before them. Rollouts stop evenly often at each of their levels.
    """
    data = Noise(model, device, args.data or (name_of(args.teacher) in TINY_WORLD and not args.prompts))
    run, made, ended = mock.Mock(device=device, step=0), mock.Mock(return_value=data), []
    run.log = lambda *_, **__: (step_done(), ended.append(None))
    run.stop_signal = lambda: len(ended) == steps
    evenly = lambda rng, stream: (0.284, 0.716)[len(ended) // args.student_every % 2]  # u, then 1 - u
    changes = {
        common: {"Model": lambda *_: model, "put_weights": random_weights},
        common.SharedRNG: {"uniform": evenly},
        script: {"Run": lambda *_: run, "Preview": mock.Mock(), "teacher_samples": made},
    }
    changes[common] |= dict.fromkeys(("load_data", "encode_text", "Shards"), lambda *_, **__: data)
    with ExitStack() as stack:
        for place, new in changes.items():
            stack.enter_context(mock.patch.multiple(place, **new))
        script.main(replace(args, init=None, preview_every=0))
    return made.called


@torch.no_grad()
def random_weights(network, folder, part="transformer"):
    """In place of common.put_weights."""
    common.reshard(network)
    for parameter in network.get_submodule(part).parameters():
        parameter.normal_(0, 0.02)


def counted(script, args, steps, attention=None):
    """What the first steps run, as a namespace: `each`, a list of their work for one sample, in forwards of the
    teacher, of which attention may be given its share; graphs, the most that wait for their backward; roles of the
    networks; whether samples of the teacher come first.
    """
    whole = described(*size_of(args))
    own, model = whole.student or whole, copy.copy(whole)
    blocks, frames, roles = own.config["num_layers"], model.latent_shape[1], []
    model.latent_shape, model.text_length, model.text_dim, model.conditions = (1, frames, 1, 1), 1, 1, {}
    tally, works = SimpleNamespace(work=0, alive=0, graphs=0), [0]

    def load_network(role, device, frame_block=0, **_):
        roles.append(role)
        mine, again = whole if role == "teacher" else own, recomputed(args, blocks) / blocks
        each, again = one_forward(mine)[1] / one_forward(whole)[1], (again * (not args.keep_attention), again)
        share = one_forward(mine)[2] if attention is None else attention
        return Counting(tally, frames, frame_block, role in TRAINED, each, share, again, role not in args.adapters)

    model.load_network, model.reset, model.shard = load_network, lambda network: network, lambda network, _: network
    args = replace(args, batch_size=BATCH, grad_accum=1)
    samples_first = run_steps(script, args, model, torch.device("cpu"), steps, lambda: works.append(tally.work))
    each = [after - before for before, after in pairwise(works)]
    return SimpleNamespace(each=each, graphs=tally.graphs, roles=roles, samples_first=samples_first)


def recomputed(args, blocks):
    """Blocks of so many that a backward computes again."""
    return math.ceil(blocks / args.gradient_checkpointing) if args.gradient_checkpointing else 0


# --------------------------------------------------------------------------------------------------- figures


@cache
def one_forward(model, blocks=None, gradient_checkpointing=0):
    """(network on the meta device in bf16, FLOPs of a forward of one sample, attention's share of them, bytes that
    autograd keeps of it), with so many blocks, or the teacher's.
    """
    config = {**model.config, "num_layers": blocks or model.config["num_layers"]}
    with torch.device("meta"):
        parts = [model.family.transformer_class.from_config(config) for _ in model.family.parts]
        network = model.family(*parts, index=model.index).to(torch.bfloat16)
        x_t, sigma, cond = torch.empty(1, *model.latent_shape), torch.empty(1), Noise(model, "meta").cond_of([0])
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.float() if common.IN_FLOAT32 in name else parameter.data
    prepare(network, parts, gradient_checkpointing)
    owned, saved = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):  # each storage once, and not the weights
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage
        return tensor

    def flash(query, key, value, **_):  # what a GPU runs; for meta tensors PyTorch would write the matrices out
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with (
        mock.patch.object(nn.functional, "scaled_dot_product_attention", flash),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(x_t, sigma, cond)
    flops = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in flops.items() if "attention" in str(op)) / sum(flops.values())
    return network, sum(flops.values()), attention, sum(storage.nbytes() for storage in saved.values())


def figures(script, args, gpus):
    """What a run costs on that many GPUs, as a namespace: parameters, trained parameters, tokens, FLOPs of a forward;
    bytes of memory per GPU by what they are for, and in all; those of a checkpoint; samples, FLOPs and seconds of a
    step; hours by what they are for.
    """
    phases = len(getattr(args, "phase_ends", (0,)))
    cycle = 2 * args.student_every * phases
    model = described(*size_of(args))
    counts, own = counted(script, replace(args, steps=cycle), cycle), model.student or model
    (network, *_), (scores, flops, *_) = one_forward(own), one_forward(model)
    parameters, frozen = (sum(p.numel() for p in net.parameters()) for net in (network, scores))
    layers = [m for name, m in network.named_modules() if name.endswith(tuple(own.family.lora_layers))]
    a_rank = sum(layer.in_features + layer.out_features for layer in layers)
    sizes = {role: args.adapters[role][0] * a_rank if role in args.adapters else parameters for role in counts.roles}
    base = sizes.pop("base", 0)
    del sizes["teacher"]
    trained, held = sum(sizes[role] for role in TRAINED), sum(sizes.values())

    # memory: the teacher and the base of the LoRAs, often the same, are bf16, all others are float32
    shards, blocks = args.shard_size or gpus, len(network.blocks)
    tokens, again = math.prod(model.latent_shape[1:]) // math.prod(model.patch), recomputed(args, blocks)
    kept = lambda *how: one_forward(own, *how)[-1]
    # of two experts both, where a step's noise levels need both; a discriminator's head keeps three of its features
    graph = kept(None, args.gradient_checkpointing) * len(own.family.parts)
    graph += args.keep_attention * again * 2 * tokens * network.width
    graph += getattr(args, "gan_weight", 0) > 0 and 3 * len(args.discriminator_blocks) * 2 * tokens * network.width
    one_block = (kept(2) - kept(1)) * (again > 0)  # is recomputed at a time
    # two blocks are unsharded, and what is in none
    block, other = (sum(p.numel() for p in net.blocks[0].parameters()) for net in (network, scores))
    memory = {
        "weights": (2 * (frozen + base) + 4 * held) / shards,
        "gradients": 4 * max(sizes[role] for role in TRAINED) / shards,
        "optimizer": 8 * trained / shards,
        "unsharded weights": 2 * max(parameters - (blocks - 2) * block, frozen - (len(scores.blocks) - 2) * other),
        "activations": args.batch_size * (counts.graphs * graph + one_block),
    }
    if causal := getattr(args, "frame_block", 0):  # keys and values of the past, which all its blocks' backwards need
        turns = model.latent_shape[1] / causal
        # each once, and where a layer is not recomputed also joined, as it was read in every turn
        kept = blocks * (turns - 1) / turns + (blocks - again) * (turns - 1) / 2
        memory["past of the blocks"] = args.batch_size * 2 * 2 * network.width * tokens * kept

    samples, rate = args.batch_size * args.grad_accum * gpus, RATE * gpus * 3600  # FLOP an hour
    step = samples * flops * mean(counts.each)
    first = 2 * args.num_samples * getattr(args, "pair_steps", args.teacher_steps) * counts.samples_first
    return SimpleNamespace(
        model=model, parameters=frozen, trained=trained, tokens=tokens, flops=flops,
        memory=memory, total=sum(memory.values()),
        # networks and optimizers to go on from, and the student whole, one per phase or one of two experts
        disk=4 * held + 8 * trained + 4 * parameters * (1 if len(own.family.parts) > 1 else phases),
        samples=samples, step=step, seconds=3600 * step / rate,
        hours={"teacher samples": first * flops / rate, f"all {args.steps:,} steps": args.steps * step / rate},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- output


def tell(script, args, gpus):
    """Print the figures of one run."""
    run = figures(script, args, gpus)
    fits = [f"{card} GB {'fits' if run.total <= FULL * card * GIB else 'does not fit'}" for card in CARDS]
    print(f"parameters          {run.parameters / 1e6:,.1f} M of the teacher; {run.trained / 1e6:,.1f} M are trained")
    print(f"latents             {' x '.join(map(str, run.model.latent_shape))} (c f h w), {run.tokens:,} tokens")
    print(f"samples a step      {args.batch_size} x {args.grad_accum} accumulated x {gpus} GPUs = {run.samples}")
    print("memory per GPU      an estimate: float32 master weights and Adam, bf16 compute")
    for name, size in [*run.memory.items(), ("total", run.total)]:
        print(f"  {name:<20}{size / GIB:10.3f} GiB")
    print(f"cards               {', '.join(fits)}, with {1 - FULL:.0%} left for what is not counted")
    print(f"disk                {run.disk / GIB:.3g} GiB a checkpoint; --keep {args.keep} and one being written")
    print(f"FLOPs               {run.step:.3g} a step, {run.flops:.3g} a forward of one sample")
    print(f"time per step       {run.seconds:.3g} s if a GPU sustains {RATE / 1e12:.0f} TFLOP/s: assumed, not measured")
    for name, hours in run.hours.items():
        if hours:
            print(f"  {name:<18}{hours:.3g} hours")


def measure(script, args, steps):
    """Run that many steps of the script here, and print what those with and those without a student's update take."""
    device, ends = common.init_distributed(), []
    # so many steps that all that run are of the first phase
    total = 2 * (WARM + steps + 2) * len(getattr(args, "phase_ends", (0,)))
    args = replace(args, student_every=2, steps=total)
    counts = counted(script, args, WARM + steps)
    cuda = torch.cuda if device.type == "cuda" else None
    profiler, spent = torch.profiler.profile(), dict.fromkeys(("attention", "matmul", "the rest"), 0)

    def step_done():
        if cuda:
            cuda.synchronize()
        if cuda and len(ends) < WARM:
            cuda.reset_peak_memory_stats()
        ends.append(time.perf_counter())
        if len(ends) == WARM + steps:
            profiler.start()

    run_steps(script, args, Described(*size_of(args), args.compute), device, WARM + steps + 2, step_done)
    profiler.stop()
    peak = cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"device              {name}, torch {torch.__version__}")
    print(f"peak memory         {peak / GIB:.2f} GiB{'' if cuda else ' of the whole process'}")
    forward = args.batch_size * args.grad_accum * one_forward(described(*size_of(args)))[1]
    for name, first in (("fake score alone", WARM + 1), ("student and that", WARM)):
        numbers = range(first, WARM + steps, 2)
        seconds = mean(ends[i] - ends[i - 1] for i in numbers)
        flops = forward * mean(counts.each[i] for i in numbers)
        print(f"{name:<20}{seconds:.3g} s, {flops / 1e12:.3g} TFLOP, {flops / seconds / 1e12:.3g} TFLOP/s")
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operation, with the kernels that it started
            named = lambda *words, event=event: any(word in event.key for word in words)
            matmul = "matmul" if named("::mm", "::addmm", "::bmm") else "the rest"
            kind = "attention" if named("attn", "attention") else matmul
            spent[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    shares = ", ".join(f"{name} {time / sum(spent.values()):.0%}" for name, time in spent.items())
    print(f"time in operations  {shares}, of a step of either kind")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs to plan for")
    parser.add_argument("--measure", type=int, help="steps to measure here, at least 2")
    own, sys.argv[1:] = parser.parse_known_args()
    if own.gpus < 1:
        parser.error("--gpus must be 1 or more")
    common.init_distributed()
    script = import_module(own.script)
    args = parse_args(script.Args)
    described(*size_of(args))  # an unknown teacher ends here
    print(f"counting what a step of {own.script}.py runs: half a minute", file=sys.stderr)
    measure(script, args, own.measure) if own.measure else tell(script, args, own.gpus)
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors():
        main()
