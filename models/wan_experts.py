"""Wan 2.2 A14B: two experts as one network, `transformer` at noise levels of boundary_ratio and above, `transformer_2`
below. All ranks run the same experts, as FSDP2 must: if a batch needs both on any rank, both run on all.
"""

import torch
import torch.distributed as dist

from models.wan import Wan
from models.wan_i2v import WanI2V


class WanExperts(Wan):
    parts = ("transformer", "transformer_2")
    expert = Wan

    def __init__(self, transformer, transformer_2, index):
        super().__init__(transformer)
        self.transformer_2, self.boundary = transformer_2, index["boundary_ratio"]

    @property
    def blocks(self):
        return [*self.transformer.blocks, *self.transformer_2.blocks]

    def forward(self, x_t, sigma, cond, blocks=()):
        experts = [self.expert(transformer) for transformer in (self.transformer, self.transformer_2)]
        if sigma.is_meta:  # what a forward costs: a sample needs one expert
            return experts[0](x_t, sigma, cond, blocks)
        high = sigma >= self.boundary
        needed = torch.stack([high.any(), ~high.all()]).int()
        dist.all_reduce(needed, op=dist.ReduceOp.MAX)
        total = None
        for expert, mine, run in zip(experts, (high, ~high), needed.tolist()):
            if not run:
                continue
            # where none of this rank's samples is this expert's, it runs on the first, for nothing
            rows = mine.nonzero()[:, 0] if mine.any() else needed.new_zeros(1, dtype=torch.long)
            v, features = expert(x_t[rows], sigma[rows], {key: x[rows] for key, x in cond.items()}, blocks)
            parts = []
            for part in (v, *features):
                weight = mine[rows].view(-1, *[1] * (part.ndim - 1)).to(part.dtype)
                parts.append(part.new_zeros(len(sigma), *part.shape[1:]).index_add(0, rows, part * weight))
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total[0], total[1:]


class WanI2VExperts(WanExperts, WanI2V):
    expert = WanI2V
