"""What an update needs, whatever is trained: its learning rate, its random generator, the optimizer, and snapshots."""

import json
import math
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def cosine_lr(step, steps, lr, warmup):
    """Learning rate at `step`: linear warm-up, then a cosine to zero."""
    return lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid_lr(step, steps, lr, warmup):
    """Learning rate at `step`: linear warm-up, level, and a straight line to zero over the last 60 %."""
    return lr * min(1, (step + 1) / warmup, (1 - step / steps) / 0.6)


def generator(*key):
    """A torch generator that depends on nothing but the integers in `key`."""
    g = torch.Generator()
    g.manual_seed(hash(key) % 2**63)
    return g


def flags_of(args, *names):
    """What decides the result of a stage: these flags, and the seed."""
    return {name: getattr(args, name) for name in ("seed", *names)}


def save_state(path, step, modules, optimizer, flags):
    """Snapshot of a dict of modules and the optimizer's state, written aside and then renamed."""
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.tmp", metadata={"step": str(step), "flags": json.dumps(flags)})
    os.replace(f"{path}.tmp", path)


def load_state(path, modules, optimizer, flags):
    """Load the snapshot in place, if there is one; returns the number of steps that it holds. Exits with one line if it
    was made with other flags, a dict of those that decide what is trained.
    """
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}
        before = json.loads(f.metadata().get("flags", json.dumps(flags)))
    if other := [f"--{name.replace('_', '-')} {before[name]}" for name in flags if before[name] != flags[name]]:
        print(f"tiny/train.py: {path} was made with {', '.join(other)}: give another --work", file=sys.stderr)
        sys.exit(2)
    for name, module in modules.items():
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
    state = {}
    for k, v in tensors.items():
        if k.startswith("optimizer."):
            _, i, field = k.split(".")
            state.setdefault(int(i), {})[field] = v
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


class Muon(torch.optim.AdamW):
    """AdamW, but `matrices` (kernels too) move by orthogonalised momentum instead: Muon, Jordan et al. 2024.

    Most of these pixels' variance is brightness and position; colour and outline are a small rest that AdamW is slow
    to reach. A step that is equally long in every direction needs far fewer updates.
    """

    def __init__(self, matrices, others, lr):
        groups = [{"params": others, "orthogonal": False}, {"params": matrices, "orthogonal": True}]
        super().__init__(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0)

    def step(self):
        shapes = {}
        for p in self.param_groups[1]["params"]:
            if not self.state[p]:  # AdamW's `load_state_dict` looks for a step
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            self.state[p]["momentum"].lerp_(p.grad, 0.05)
            nesterov = p.grad.lerp(self.state[p]["momentum"], 0.95).flatten(1)
            shapes.setdefault(nesterov.shape, []).append((p, nesterov))
            p.grad = None  # so that AdamW leaves it alone
        for shape, pairs in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, updates, strict=True):
                # 0.4 sqrt(max(m, n)) gives it about the size of AdamW's step, so that one learning rate serves both
                p.data.add_(update.reshape(p.shape), alpha=-self.param_groups[1]["lr"] * 0.4 * max(shape) ** 0.5)
        super().step()


def orthogonalise(x):
    """Roughly the nearest (semi-)orthogonal matrices to x [b, m, n], by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):  # a quintic that drives every singular value to about 1
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x
