"""Flags that change a network's time and memory, and its results by rounding at most.

common.Model imports this late: --help need not wait for diffusers.
"""

from diffusers.models.attention_dispatch import attention_backend
from torch.utils.checkpoint import checkpoint

from models.adapters import layers_with_loras, turned_on


def prepare(network, transformers, gradient_checkpointing=0, compile=False, attention=None):
    """Make a network with these transformers run as a script's flags of the same names say, before it is sharded."""
    for transformer in transformers:
        if attention:
            with attention_backend("native"):  # gives back what diffusers sets for all networks of the process
                transformer.set_attention_backend(attention)
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing(recompute(list(network.blocks), gradient_checkpointing))
        if compile:
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
