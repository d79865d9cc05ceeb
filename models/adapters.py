"""LoRAs on one frozen network (peft). With none of them on it is the teacher, with one of them it is the student, the
fake score, the average or an expert. So a run holds the base once.
"""

import warnings
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def add_adapters(transformer, layers, adapters):
    """Put LoRAs, {name: (rank, alpha)}, on a transformer's layers of these names. None of them is on."""
    from peft import LoraConfig

    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there may be several
    for name, (rank, alpha) in adapters.items():
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), name)
    for layer in layers_with_loras(transformer):
        layer._active_adapter = []


def layers_with_loras(module):
    return [layer for layer in module.modules() if hasattr(layer, "lora_A")]


@contextmanager
def turned_on(module, name):
    """In this block the LoRA of that name is on. What was on before it is on after it, whatever happens in between."""
    layers = layers_with_loras(module)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:  # not by peft's set_adapter: that also sets requires_grad, which FSDP2 has read by now
            layer._active_adapter = name
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._active_adapter = was


class Adapted(nn.Module):
    """A network with one of its LoRAs on, to be called, trained, averaged and saved as a network of its own.

    Its parameters are the LoRA's alone, and those of the heads that a discriminator puts on it.
    """

    def __init__(self, network, name, trained):
        super().__init__()
        self.network, self.adapter_name = (network,), name  # in a tuple the shared weights are no part of this module
        end = f".{name}.weight"
        own = {key.removesuffix(end).replace(".", "/"): p for key, p in network.named_parameters() if key.endswith(end)}
        self.lora = nn.ParameterDict(own).requires_grad_(trained)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network[0], name)

    def forward(self, x_t, sigma, cond, blocks=()):
        with turned_on(self.network[0], [self.adapter_name]):
            return self.network[0](x_t, sigma, cond, blocks)

    @torch.no_grad()
    def start(self):
        """Make the LoRA no change: its first half as nn.Linear's weights begin, its second half zero."""
        generator = torch.Generator().manual_seed(0)
        for key, p in self.lora.items():
            bound = p.shape[1] ** -0.5 if key.endswith("lora_A") else 0
            whole = torch.empty(p.shape).uniform_(-bound, bound, generator=generator).to(p.device)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole)
