"""Flags that change a network's time and memory, and its results by rounding at most.

common.Model imports this, as it does classes.py: --help need not wait for diffusers.
"""

import os
import shutil

from diffusers.models.attention_dispatch import attention_backend
from torch.utils.checkpoint import checkpoint

from models.adapters import layers_with_loras, turned_on
from training.files import UserError


def prepare(network, transformers, gradient_checkpointing=0, compile=False, attention=None):
    """Make a network with these transformers run as a script's flags of the same names say, before it is sharded."""
    for transformer in transformers:
        if attention:
            try:
                with attention_backend("native"):  # gives back what diffusers sets for all networks of the process
                    transformer.set_attention_backend(attention)
            except (ValueError, RuntimeError, ImportError) as error:
                raise UserError(f"--attention {attention}: {str(error).strip().splitlines()[0]}") from None
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing(recompute(list(network.blocks), gradient_checkpointing))
        if compile:
            if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
                raise UserError("--compile needs a C++ compiler, and neither g++ nor clang++ is here: install one")
            transformer.compile_repeated_blocks()


def recompute(blocks, every):
    """How diffusers is to call a block under a gradient: every n-th one keeps its input alone, and its backward runs it
    again with the LoRA on that was on in the forward.
    """

    def call(block, *args):
        if blocks.index(block) % every:
            return block(*args)
        on = next((layer._active_adapter for layer in layers_with_loras(block)), None)

        def run(*args):
            with turned_on(block, on):
                return block(*args)

        return checkpoint(run, *args, use_reentrant=False)

    return call
