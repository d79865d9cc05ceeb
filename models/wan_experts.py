"""Wan 2.2 A14B: two experts as one network, `transformer` at noise levels of boundary_ratio and above, `transformer_2`
below. All ranks run the same experts, as FSDP2 must: if any rank's batch needs both, both run on all, on whole batches.
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
        needed = needed.tolist()  # the only wait for the device
        outputs = [expert(x_t, sigma, cond, blocks) for expert, run in zip(experts, needed) if run]
        if len(outputs) == 1:
            return outputs[0]
        # of each sample the output of its own expert; the backward runs both, on all ranks, too
        pick = lambda above, below: torch.where(high.view(-1, *[1] * (above.ndim - 1)), above, below)
        (v, features), (v_below, features_below) = outputs
        return pick(v, v_below), list(map(pick, features, features_below))


class WanI2VExperts(WanExperts, WanI2V):
    expert = WanI2V
