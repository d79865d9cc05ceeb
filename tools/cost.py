"""What a training script costs: parameters, memory per GPU, disk, FLOPs and hours, and on which cards it fits.

    python tools/cost.py dmd2 --teacher wan2.1-1.3b --gpus 8
    python tools/cost.py dmd2 --teacher wan2.1-14b --gpus 8 --lora-rank 64 --fake-lora-rank 64
    python tools/cost.py all                                      # two tables of all names, in Markdown

`python tools/cost.py dmd2 --help` lists the flags; each counts as it does in the script. All figures come from shapes
alone: no weights are read, and for the presets no file at all. FLOPs are counted by PyTorch, a backward as two
forwards, that of a LoRA as one (its base has no gradient), and of each block whose activations are recomputed one more;
of two experts one runs, though a step whose noise levels need both runs both. Activations are what autograd saves in a
differentiated forward of the bf16 network with flash attention. Not counted: the allocator's slack, temporary buffers,
a LoRA's own activations and FLOPs, the discriminator's heads and previews.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Annotated, NamedTuple
from unittest import mock

import torch
from annotated_types import Ge
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
from models.folders import family_of
from models.latents import latent_shape
from models.presets import PRESETS, TINY_WORLD, name_of
from training.files import UserError
from training.flags import check_flags, one_line_errors, parse_args, with_recipe

TRAINED = common.TRAINED


class Update(NamedTuple):
    """What an update runs for one sample: forwards of each network, and how many of them are differentiated. Guidance
    is two forwards of the teacher.
    """

    student: float
    fake_score: float
    teacher: float
    student_backwards: int
    fake_score_backwards: int


class Method(NamedTuple):
    """What a script runs.

    student_update     in one of --student-every steps
    fake_score_update  in every step
    graphs             differentiated forwards that wait for their backward at once
    experts            frozen ones that it holds in the end
    """

    student_update: Update
    fake_score_update: Update
    graphs: int
    experts: int = 0


def rollout(args, phase_ends):
    """Forwards of a rollout of the student: the mean over the phases, and over the steps at which it may stop."""
    if args.student_input == "data":
        return 1
    done = [0, *(sum(sigma > end for sigma in args.student_sigmas) for end in phase_ends)]  # steps by each phase's end
    return sum((first + 1 + last) / 2 for first, last in pairwise(done)) / len(phase_ends)


def dmd(args):
    return Method(
        student_update=Update(2, 1, 2, student_backwards=2, fake_score_backwards=0),  # with the regression's
        fake_score_update=Update(1, 1, 0, student_backwards=0, fake_score_backwards=1),
        graphs=1,
    )


def dmd2(args, phase_ends=(0.0,)):
    steps, gan = rollout(args, phase_ends), int(args.gan_weight > 0)
    steps += getattr(args, "frame_block", 0) > 0  # its clean blocks; a causal student's attention costs less than that
    return Method(
        student_update=Update(steps, 1 + gan, 2, student_backwards=1, fake_score_backwards=gan),
        fake_score_update=Update(steps, 1 + gan, 0, student_backwards=0, fake_score_backwards=1 + gan),
        graphs=1 + gan,
    )


def phased_dmd(args):
    return dmd2(args, args.phase_ends)._replace(experts=len(args.phase_ends) - 1)


METHODS = {"dmd": dmd, "dmd2": dmd2, "dfd": dmd2, "codmd": dmd2, "phased_dmd": phased_dmd}
CARDS = (24, 48, 80)  # GiB
FULL = 0.85  # of a card: the rest is for what is not counted
RATE = 4e14  # FLOP/s that a GPU sustains: assumed, not measured
GIB = 1024**3
LORAS = {"lora_rank": 64, "fake_lora_rank": 64, "ema_decay": 0.0}
WAYS = {"in full": {}, "no average": {"ema_decay": 0.0}, "LoRAs": LORAS, "LoRAs, no GAN": LORAS | {"gan_weight": 0.0}}


def args_of(script):
    """The script's Args with the number of GPUs."""

    @dataclass(kw_only=True)
    class Args(script.Args):
        """The script's own flags and its recipe, and --gpus."""

        gpus: Annotated[int | None, Ge(1)] = None
        """GPUs to plan for. None: as many as the recipe is written for."""

    return Args


def recipe_gpus(teacher):
    """GPUs that the recipes' batches are written for."""
    return 1 if name_of(teacher) in TINY_WORLD else 8


class Shapes(SimpleNamespace):
    """What is known of a teacher without its files, compared by identity as common.Model is: one_forward is cached."""

    __hash__, __eq__ = object.__hash__, object.__eq__


@cache  # a table asks for each teacher some thirty times
def describe(teacher, frames, height, width):
    """What common.Model says of a teacher's shapes; of a preset on the Hub without its files."""
    if teacher not in PRESETS or teacher in TINY_WORLD:
        return common.Model(teacher, frames, height, width)
    preset = PRESETS[teacher]
    family = family_of(preset.family)
    with torch.device("meta"):
        config = dict(family.transformer_class.from_config(preset.config).config)
    vae = {"scale_factor_spatial": 16} if config["out_channels"] == 48 else {}  # Wan 2.2 5B's, else 8
    shape, patch = latent_shape(config, vae, frames, height, width)
    conditions = family.conditions(config, shape)
    index = {"boundary_ratio": 0.9 if conditions else 0.875} if len(family.parts) > 1 else {}  # Wan 2.2 A14B's
    model = Shapes(
        name=teacher, family=family, config=config, latent_shape=shape, patch=patch,
        text_length=512, text_dim=config[family.text_dim], conditions=conditions, index=index,
    )  # fmt: skip
    model.network_class = partial(common.Model.network_class, model)
    return model


@cache
def one_forward(model):
    """(network on the meta device in bf16, FLOPs of a forward of one sample, bytes that autograd keeps of it)."""
    with torch.device("meta"):
        parts = [model.family.transformer_class.from_config(model.config) for _ in model.family.parts]
        network = model.family(*parts, index={"boundary_ratio": 0.5}).to(torch.bfloat16)
        x_t = torch.empty(1, *model.latent_shape)
        sigma, cond = torch.empty(1), {"text": torch.empty(1, model.text_length, model.text_dim)}
        cond |= {key: torch.empty(1, *shape) for key, shape in model.conditions.items()}
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
    return network, counter.get_total_flops(), sum(storage.nbytes() for storage in saved.values())


def teacher_forwards(script, args):
    """Forwards of the teacher before the first step: for pairs, or for clips where a method needs some and has none."""
    if script.__name__ == "dmd":
        return 0 if args.pairs else 2 * args.num_samples * args.pair_steps
    has_clips = args.data or (name_of(args.teacher) in TINY_WORLD and not args.prompts)
    return 2 * args.num_samples * args.teacher_steps if script.needs_clips(args) and not has_clips else 0


def figures(script, args):
    """What a run costs, as a namespace: parameters, those of the LoRAs by their network, tokens and FLOPs of a forward;
    bytes of memory per GPU by what they are for, and in all; those of a checkpoint; samples, FLOPs and seconds of a
    step; hours by what they are for.
    """
    check_flags(args)
    model = describe(args.teacher, args.frames, args.height, args.width)
    if script.__name__ != "dmd":  # which has nothing to check
        script.check(args, model)
    method, gpus = METHODS[script.__name__](args), args.gpus or recipe_gpus(args.teacher)

    # parameters
    network, flops, activations = one_forward(model)
    activations *= len(model.family.parts)  # of two experts both, where a step's noise levels need both
    parameters = sum(p.numel() for p in network.parameters())
    layers = [m for name, m in network.named_modules() if name.endswith(tuple(model.family.lora_layers))]
    a_rank = sum(layer.in_features + layer.out_features for layer in layers)
    roles = ["student", "fake_score", *["ema"] * (args.ema_decay > 0)]
    roles += [f"expert_{i}" for i in range(method.experts)]
    loras = {role: rank * a_rank for role, (rank, _) in args.adapters.items()}
    updated = sum(loras.get(role, parameters) for role in TRAINED)

    # memory: the teacher, which is the base of the LoRAs, is bf16, all others are float32
    shards = args.shard_size or gpus
    if gpus % shards:
        raise UserError(f"--shard-size must divide the {gpus} GPUs, got {shards}")
    weights = 2 * parameters + 4 * sum(loras.get(role, parameters) for role in roles)
    block = sum(p.numel() for p in network.blocks[0].parameters())
    tokens, blocks = math.prod(model.latent_shape[1:]) // math.prod(model.patch), len(network.blocks)
    again = -(-blocks // args.gradient_checkpointing) if args.gradient_checkpointing else 0  # blocks recomputed
    if again:  # of each of these its input, of the others all, and one block's own
        activations = again * tokens * network.width * 2 + (blocks - again + 1) / blocks * activations
    memory = {
        "weights": weights / shards,
        "gradients": 4 * updated / shards,
        "optimizer": 8 * updated / shards,
        "one unsharded block": 2 * 2 * block,
        "activations": method.graphs * args.batch_size * activations,
    }
    if causal := getattr(args, "frame_block", 0):  # keys and values of the past, which all its blocks' backwards need
        turns = model.latent_shape[1] / causal
        # each once, and where a layer is not recomputed also joined, as it was read in every turn
        kept = blocks * (turns - 1) / turns + (blocks - again) * (turns - 1) / 2
        memory["past of the blocks"] = args.batch_size * 2 * 2 * network.width * tokens * kept
    total = sum(memory.values())
    # a checkpoint: networks and optimizers to go on from, and the student whole, one per phase or one of two experts
    students = 1 if len(model.family.parts) > 1 else 1 + method.experts
    disk = 4 * sum(loras.get(role, parameters) for role in roles) + 8 * updated + 4 * parameters * students

    # work
    samples = args.batch_size * args.grad_accum * gpus
    step, rate = 0, RATE * gpus
    for update, part in ((method.student_update, 1 / args.student_every), (method.fake_score_update, 1)):
        forwards = update.student + update.fake_score + update.teacher
        for role, backwards in zip(TRAINED, (update.student_backwards, update.fake_score_backwards), strict=True):
            forwards += backwards * ((1 if role in loras else 2) + again / blocks)
        step += part * samples * flops * forwards
    hours = {
        "teacher samples": teacher_forwards(script, args) * flops / rate / 3600,
        f"all {args.steps:,} steps": args.steps * step / rate / 3600,
    }
    return SimpleNamespace(
        model=model, gpus=gpus, parameters=parameters, loras=loras, tokens=tokens, flops=flops, memory=memory,
        total=total, disk=disk, samples=samples, step=step, seconds=step / rate, hours=hours,
    )  # fmt: skip


def main(script, args):
    run = figures(script, args)
    fits = [f"{card} GB {'fits' if run.total <= FULL * card * GIB else 'does not fit'}" for card in CARDS]
    recipe, planned = with_recipe(script.Args, script.RECIPES, teacher=args.teacher), recipe_gpus(args.teacher)
    wanted = recipe.batch_size * recipe.grad_accum * planned
    accum, rest = divmod(wanted, args.batch_size * run.gpus)

    kinds = [f"{run.loras[role] / 1e6:,.1f} M of LoRA" if role in run.loras else "in full" for role in TRAINED]
    trained = f"student {kinds[0]}, fake score {kinds[1]}"
    batch = f"{args.batch_size} x {args.grad_accum} accumulated x {run.gpus} GPU{'s' * (run.gpus > 1)}"
    print(f"teacher             {run.model.name}: {run.parameters / 1e6:,.1f} M parameters; trained: {trained}")
    print(f"latents             {' x '.join(map(str, run.model.latent_shape))} (c f h w), {run.tokens:,} tokens")
    print(f"batch               {batch} = {run.samples} samples a step")
    if run.samples != wanted:
        keeps = "" if rest else f"; --grad-accum {accum} makes it the same"
        print(
            f"  another batch     the recipe has {wanted} samples a step, on {planned} GPU{'s' * (planned > 1)}{keeps}"
        )
    print("memory per GPU      an estimate: float32 master weights and Adam, bf16 compute")
    for name, size in [*run.memory.items(), ("total", run.total)]:
        print(f"  {name:<20}{size / GIB:10.3f} GiB")
    print(f"cards               {', '.join(fits)}, with {1 - FULL:.0%} left for what is not counted")
    kept = f", {(args.keep + 1) * run.disk / GIB:.3g} GiB with --keep {args.keep} and one that is being written"
    print(f"disk                {run.disk / GIB:.3g} GiB a checkpoint{kept if args.keep else '; all are kept'}")
    per_gpu = f"{run.step / run.gpus:.3g} per GPU"
    print(f"FLOPs per step      {run.step:.3g}, {per_gpu}; {run.flops:.3g} a forward of one sample")
    print(f"time per step       {run.seconds:.3g} s if a GPU sustains {RATE / 1e12:.0f} TFLOP/s: assumed, not measured")
    for name, time in run.hours.items():
        refused = name == "teacher samples" and time > args.max_hours
        if time:
            print(f"  {name:<18}{time:.3g} hours{f', more than --max-hours {args.max_hours:g}' if refused else ''}")


def table():
    """Print what all named teachers cost with each script's recipe, in Markdown: GiB per GPU on 8, and how many GPUs of
    80 GB it takes; never if 256 are too few, for activations are not shared. Then on which cards dmd2.py fits how.
    """
    head = ["teacher", "parameters, M", "tokens", "TFLOP a forward", *(f"`{name}.py`" for name in METHODS)]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    teachers = [name for name in PRESETS if name not in TINY_WORLD]
    for teacher in teachers:
        cells = []
        for name in METHODS:
            for needed in (8, 16, 32, 64, 128, 256):
                run = planned(name, teacher, needed)
                cells += [f"{run.total / GIB:.0f}"] if needed == 8 else []
                if fits := run.total <= FULL * CARDS[-1] * GIB:
                    break
            cells[-1] += f", {needed}" if fits else ", never"
        first = [f"`{teacher}`", f"{run.parameters / 1e6:,.0f}", f"{run.tokens:,}", f"{run.flops / 1e12:,.0f}"]
        print(f"| {' | '.join([*first, *cells])} |", flush=True)

    cards = [(1, card) for card in CARDS] + [(8, CARDS[-1])]
    print(f"\n| `dmd2.py` | {' | '.join(f'{gpus} x {card} GB' for gpus, card in cards)} |\n|---|{'---|' * len(cards)}")
    for teacher in teachers:
        cells = []
        for gpus, card in cards:
            runs = ((how, planned("dmd2", teacher, gpus, **flags)) for how, flags in WAYS.items())
            fitting = (f"{how}, {run.total / GIB:.0f}" for how, run in runs if run.total <= FULL * card * GIB)
            cells.append(next(fitting, "no"))
        print(f"| {' | '.join([f'`{teacher}`', *cells])} |", flush=True)


def planned(name, teacher, gpus, **flags):
    script = import_module(name)
    return figures(script, with_recipe(args_of(script), script.RECIPES, teacher=teacher, gpus=gpus, **flags))


def start(doc, main, args_of, others=None):
    """Run a tool whose first word is a script's name, and the rest its flags. others: {another word: function}."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        asked = {"-h", "--help"} & set(sys.argv)
        print(doc, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    with one_line_errors():
        name, others = sys.argv.pop(1).removesuffix(".py"), others or {}
        if name in others:
            sys.exit(others[name]())
        if name not in METHODS:
            raise UserError(f"unknown script {name!r}: use {', '.join([*METHODS, *(f'or {word}' for word in others)])}")
        sys.argv[0] = f"{name}.py"  # whose flags these are, and whose run --resume means
        script = import_module(name)
        main(script, parse_args(args_of(script), script.RECIPES))


if __name__ == "__main__":
    start(__doc__, main, args_of, {"all": table})
