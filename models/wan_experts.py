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
        read = torch.cat([needed, high.int()]).tolist()  # the only wait for the device
        outputs, idle = [None] * len(sigma), [0] * (1 + len(blocks))
        for expert, run, side in zip(experts, read, (1, 0)):
            if not run:
                continue
            rows = [i for i, own in enumerate(read[2:]) if own == side]
            # where none of this rank's samples is this expert's, it runs on the first, for nothing
            pick = lambda x, rows=rows: torch.stack([x[i] for i in rows or [0]])
            v, features = expert(pick(x_t), pick(sigma), {key: pick(x) for key, x in cond.items()}, blocks)
            for i, *own in zip(rows, v, *features):
                outputs[i] = own
            if not rows:  # the backward of each output must run here too
                idle = [0 * part.sum() for part in (v, *features)]
        v, *features = (torch.stack(part) + zero for part, zero in zip(zip(*outputs), idle))
        return v, features


class WanI2VExperts(WanExperts, WanI2V):
    expert = WanI2V
