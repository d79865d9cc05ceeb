"""What a step of a training script takes here: seconds, peak memory, FLOPs, and the share of this device's matmul rate.

    python tools/step_time.py dmd2 --teacher wan2.1-1.3b --lora-rank 64 --fake-lora-rank 64
    python tools/step_time.py dmd2                             # the tiny teacher, for a CPU
    python tools/step_time.py dmd2 --markdown                  # one row of a table

The script's own main() runs for a few steps. A teacher on the Hub has its real configuration and random weights, and
random texts and latents stand for data, so nothing is downloaded; the tiny one and local folders are what they are.
Every second step updates the student too, and what that adds is the student's. FLOPs are those of cost.py, for the
calls that were made. Previews and checkpoints are off. On a GPU under torchrun the figures are of rank 0.
"""

import resource
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

import torch
from annotated_types import Ge

import common
from models.adapters import Adapted
from models.presets import PRESETS, TINY_WORLD
from tools import cost
from training.flags import check_flags
from training.run import Run


def args_of(script):
    """The script's Args with what is measured."""

    @dataclass(kw_only=True)
    class Args(script.Args):
        """The script's own flags and its recipe, and how long to measure."""

        timed_steps: Annotated[int, Ge(2)] = 8
        """Steps to measure, every second one with an update of the student."""
        warm_steps: Annotated[int, Ge(1)] = 2
        """Steps before them, in which memory is first allocated and, with --compile, blocks are compiled."""
        markdown: bool = False
        """Print a row of a table in Markdown instead."""

    return Args


class Described(common.Model):
    """A named teacher of which no file is there."""

    def __init__(self, teacher, frames, height, width, compute=None):
        known = cost.describe(teacher, frames, height, width)
        self.__dict__ |= {key: value for key, value in vars(known).items() if key != "network_class"}
        self.compute = dict(compute or {})
        self.shard_size = self.compute.pop("shard_size", 0)
        self.folder, self.size, self.world = Path(f"{teacher}, random weights"), (frames, height, width), None
        self.fps, self.negative_prompt, self.index = self.family.fps, "", {"boundary_ratio": 0.9}


@torch.no_grad()
def random_weights(network, folder, part="transformer"):
    """In place of common.put_weights: matrices small, scales one, all else zero. What is computed stays finite."""
    common.reshard(network)
    for name, parameter in network.get_submodule(part).named_parameters():
        if ".lora_" in name:
            continue
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(float(name.endswith("weight")))


class RandomData(common.Samples):
    """Texts, conditions and clips that are noise, of the right shapes."""

    has_clips, prompts = True, ["noise"]

    def __init__(self, model, device, seed=0):
        self.model, self.device, self.seed = model, device, seed

    def row(self, number):
        return 0

    def noise(self, count, *shape):
        return torch.randn(count, *shape, device=self.device)

    def cond_of(self, rows):
        text = self.noise(len(rows), self.model.text_length, self.model.text_dim)
        return {"text": text} | {key: self.noise(len(rows), *shape) for key, shape in self.model.conditions.items()}

    def latents(self, numbers, key=None):
        return self.noise(len(numbers), *self.model.latent_shape)


class Watch:
    """Steps of a run: when each ended, and of every network the samples that it was called for and differentiated."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.ends, self.calls, self.inside, self.busy = [], [Counter()], [Counter()], False

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def network(self, network, role):
        """Watch the forwards of a network. The base is also called by its LoRAs, which are watched themselves."""
        forward, kind = network.forward, "LoRA" if isinstance(network, Adapted) else "full"

        def watched(x_t, *rest, **named):
            if self.busy:
                return forward(x_t, *rest, **named)
            out = self.timed("forward", lambda: forward(x_t, *rest, **named))
            self.calls[-1][role, "forward"] += len(x_t)
            if out[0].requires_grad:
                self.calls[-1][kind, "backward"] += len(x_t)
            return out

        network.forward = watched
        return network

    def timed(self, what, function):
        """Call a function; its time counts as spent inside the networks. On a GPU that is the time of its launches."""
        self.busy, started = True, time.perf_counter()
        try:
            return function()
        finally:
            self.busy = False
            self.inside[-1][what] += time.perf_counter() - started

    def step_done(self):
        self.ends.append(self.now())
        self.calls.append(Counter())
        self.inside.append(Counter())


def measured(script, args):
    """Run the script's main(): the device, the model, a Watch of its steps, and the peak memory in bytes."""
    device, model = common.init_distributed(), []
    watch, load = Watch(device), common.Model.load_network
    backward, wanted = torch.Tensor.backward, args.warm_steps + args.timed_steps
    noise = lambda model, *_, **__: RandomData(model, device)

    def load_network(self, role, *rest, **named):
        model[:] = [self]
        return watch.network(load(self, role, *rest, **named), role)

    def log(run, step, values, total):
        watch.step_done()
        if len(watch.ends) == args.warm_steps and watch.cuda:
            torch.cuda.reset_peak_memory_stats()

    changes = [
        (common.Model, "load_network", load_network),
        (torch.Tensor, "backward", lambda loss: watch.timed("backward", lambda: backward(loss))),
        (Run, "log", log),
        (Run, "save", lambda *_, **__: None),
        (Run, "stop_signal", lambda run: len(watch.ends) == wanted),
        (Run, "finish", lambda run, *_: run.close()),
        (script, "teacher_samples", lambda run, data, *_, **__: noise(data.model)),
    ]
    if args.teacher in PRESETS and args.teacher not in TINY_WORLD:
        changes += [(common, "Model", Described), (common, "put_weights", random_weights)]
        changes += [(common, "load_data", noise), (common, "encode_text", noise)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        plain = {name: value for name, value in vars(args).items() if name in script.Args.__dataclass_fields__}
        own = {"student_every": 2, "preview_every": 0, "runs_dir": folder, "init": None, "resume": None, "track": False}
        # so many steps that all that run are of the first phase
        steps = 2 * wanted * len(getattr(args, "phase_ends", (0,)))
        script.main(script.Args(**{**plain, **own, "steps": steps}))
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return device, model[0], watch, torch.cuda.max_memory_allocated() if watch.cuda else most


def matmul_rate(device):
    """FLOP/s of this device's own matrix product, bf16 on a GPU, float32 on the CPU: the best of ten."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b, times = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times)


def flops_of(calls, flops, args, blocks):
    """FLOPs of a step's calls, {(role, "forward"): samples, ("full" or "LoRA", "backward"): samples}."""
    again = -(-blocks // args.gradient_checkpointing) / blocks if args.gradient_checkpointing else 0
    per = {"forward": 1, "full": 2 + again, "LoRA": 1 + again}
    return flops * sum(n * per[what if what == "forward" else kind] for (kind, what), n in calls.items())


class Part(NamedTuple):
    """What the mean of some steps took."""

    seconds: float
    flops: float
    calls: dict
    inside: dict


def mean_of(watch, steps, args, flops, blocks):
    """The Part that these steps, a list of their numbers, took on average."""
    mean = lambda counters: {key: value / len(steps) for key, value in sum(counters, Counter()).items()}
    calls, inside = mean([watch.calls[i] for i in steps]), mean([watch.inside[i] for i in steps])
    seconds = sum(watch.ends[i] - watch.ends[i - 1] for i in steps) / len(steps)
    return Part(seconds, flops_of(calls, flops, args, blocks), calls, inside)


def parts_of(watch, args, flops, blocks):
    """A step with the fake score's update alone, and what the student's update adds to it."""
    timed = range(args.warm_steps, len(watch.ends))
    both, fake = (mean_of(watch, [i for i in timed if i % 2 == rest], args, flops, blocks) for rest in (0, 1))
    less = lambda a, b: {key: a[key] - b.get(key, 0) for key in a}
    student = Part(
        both.seconds - fake.seconds,
        both.flops - fake.flops,
        less(both.calls, fake.calls),
        less(both.inside, fake.inside),
    )
    return {"fake-score step": fake, "student adds": student}


def main(script, args):
    check_flags(args)
    device, model, watch, peak = measured(script, args)
    network, flops, _ = cost.one_forward(model)
    parts, rate = parts_of(watch, args, flops, len(network.blocks)), matmul_rate(device)
    card = torch.cuda.get_device_name() if watch.cuda else f"CPU, {torch.get_num_threads()} threads"
    shape = " x ".join(map(str, model.latent_shape))
    if args.markdown:
        shares = [f"{part.seconds:.3g} | {part.flops / part.seconds / rate:.0%}" for part in parts.values()]
        print(f"| {card} | {script.__name__} | {model.name} | {' | '.join(shares)} | {peak / cost.GIB:.1f} |")
        return
    print(f"device          {card}, torch {torch.__version__}; its matrix product {rate / 1e12:.3g} TFLOP/s")
    print(f"teacher         {model.name}: latents {shape}, {flops / 1e12:.3g} TFLOP a forward of one sample")
    print(f"peak memory     {peak / cost.GIB:.2f} GiB{'' if watch.cuda else ', of the whole process'}")
    for name, part in parts.items():
        forwards = {role: n for (role, what), n in part.calls.items() if what == "forward" and n}
        back = sum(n for (_, what), n in part.calls.items() if what == "backward")
        share = f"{part.flops / part.seconds / rate:.0%} of the matrix product's rate"
        print(f"{name:<16}{part.seconds:.3g} s, {part.flops / 1e12:.3g} TFLOP, {share}")
        print(f"  samples       {', '.join(f'{role} {n:g}' for role, n in forwards.items())}; backward {back:g}")
        if not watch.cuda:
            shares = {what: seconds / part.seconds for what, seconds in part.inside.items()}
            shares["rest"] = 1 - sum(shares.values())
            print(f"  time          {', '.join(f'{what} {share:.0%}' for what, share in shares.items())}")


if __name__ == "__main__":
    cost.start(__doc__, main, args_of)
