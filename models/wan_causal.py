"""A causal Wan 2.1, for autoregressive students (Self-Forcing, arXiv 2506.08009): latent frames come in blocks, each of
which attends to itself and to the clean ones before it, whose keys and values are kept.

The weights are a stock Wan's. `for x_t in network.chunks(noise)` gives the blocks, `network(x_t, sigma, cond)` is
called on the one whose turn it is, and `network.update_cache(x0, cond)` keeps it when it is clean.
"""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed

from models.wan import Wan


class CausalRope(WanRotaryPosEmbed):
    """The rotary embedding of frames that come after `start` others: (cos, sin, past, new), where

    cos, sin  [tokens, d], of these frames
    past      for each layer pairs of keys and values [b, tokens, heads, d], of the blocks before
    new       a list that takes the keys and values of this call, or None

    The last two travel to the layers as an argument: kept on a module, a transformer block that gradient checkpointing
    computes again would read a longer past than the first time.
    """

    start, past, new = 0, (), None

    def forward(self, x):
        b, c, f, h, w = x.shape
        whole = super().forward(x.new_empty(()).expand(b, c, self.start + f, h, w))
        tokens = f * (h // self.patch_size[1]) * (w // self.patch_size[2])
        return *(angles[0, -tokens:, 0] for angles in whole), self.past, self.new


def rotated(x, cos, sin):
    """x [b, tokens, heads, d] turned by the angles of its tokens, in the precision of the stock attention."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[None, :, None, 0::2], sin[None, :, None, 0::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


class CausalAttention(WanAttnProcessor):
    """Self-attention of a call's frames to themselves and to the past."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        *angles, past, new = rotary_emb
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        query, key = rotated(query, *angles), rotated(key, *angles)
        if new is not None:
            new.append((key, value))
        if past:  # joined here, so that all blocks share what a backward keeps of the past
            key, value = (torch.cat(parts, dim=1) for parts in zip(*past[self.layer], (key, value)))
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(query))


class CausalWan(Wan):
    frame_block = 3  # latent frames a block
    kept_frames = 0  # latent frames before a block that it reads, in whole blocks; 0 for all

    def __init__(self, transformer, index=None):
        super().__init__(transformer)
        config = transformer.config
        transformer.rope = CausalRope(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(CausalAttention(layer))

    def chunks(self, x_t):
        rope, self.frames = self.transformer.rope, x_t.shape[2]
        rope.start, rope.past = 0, ()
        return x_t.split(self.frame_block, dim=2)

    @torch.no_grad()
    def update_cache(self, x0, cond):
        """Keep the keys and values of a clean block x0 [b, c, f, h, w]: one pass at noise level 0."""
        rope, f = self.transformer.rope, x0.shape[2]
        if rope.start + f == self.frames:  # nothing follows
            return
        rope.new = new = []
        self(x0, x0.new_zeros(len(x0)), cond)
        past, blocks = rope.past or [()] * len(new), -(-self.kept_frames // self.frame_block)
        rope.past, rope.new = [(*before, own)[-blocks:] for before, own in zip(past, new)], None
        rope.start += f
