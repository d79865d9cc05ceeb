"""Flags that change a network's time and memory, and its results by rounding at most.

common.Model imports this late: --help need not wait for diffusers.
"""

from functools import partial

from diffusers.models.attention_dispatch import attention_backend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.adapters import layers_with_loras, turned_on
from training.files import UserError


def prepare(network, transformers, gradient_checkpointing=0, keep_attention=False, compile=False, attention=None):
    """Make a network with these transformers run as a script's flags of the same names say, before it is sharded."""
    if attention and ("sage" in attention or attention == "_flash_3"):
        raise UserError(f"--attention {attention} has no gradient in diffusers: nothing would train through it")
    for transformer in transformers:
        if attention:
            try:
                with attention_backend("native"):  # gives back what diffusers sets for all networks of the process
                    transformer.set_attention_backend(attention)
            except (ValueError, ImportError, RuntimeError) as error:
                raise UserError(f"--attention {attention}: {' '.join(str(error).split())[:300]}") from None
        if gradient_checkpointing:
            how = recompute(list(network.blocks), gradient_checkpointing, keep_attention)
            transformer.enable_gradient_checkpointing(how)
        if compile:
            transformer.compile_repeated_blocks()


def self_attention(context, op, query=None, key=None, *_, **__):
    """What a block that runs again need not: its self-attention, the most work for what it would keep."""
    own = "attention" in str(op) and query.shape == key.shape
    return CheckpointPolicy.MUST_SAVE if own else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(blocks, every, keep_attention=False):
    """How diffusers is to call a block under a gradient: every n-th one keeps its input alone, or with that its
    self-attention's output, and its backward runs it again with the LoRA on that was on in the forward.
    """
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, self_attention)} if keep_attention else {}

    def call(block, *args):
        if blocks.index(block) % every:
            return block(*args)
        on = next((layer._active_adapter for layer in layers_with_loras(block)), None)

        def run(*args):
            with turned_on(block, on):
                return block(*args)

        return checkpoint(run, *args, use_reentrant=False, **keep)

    return call
