"""Run by test_codmd.py under torchrun: the gradient of the relation loss of one global batch, split over the ranks.

A linear student x0 = W z stands for the network: its gradient, averaged over ranks as FSDP2 does, goes to a file.
"""

import sys

import torch
import torch.distributed as dist

import codmd
import common


def batch(n=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, 3, 2, 2, generator=g) for _ in range(3)]


def student_gradient(own_rows_only=False):
    """Gradient [4, 4] on this rank's share of the batch, averaged over ranks."""
    rank, world, _ = common.init_distributed()
    z, x0_real, x0_fake = (x.chunk(world)[rank] for x in batch())
    w = torch.eye(4).requires_grad_()
    x0 = torch.einsum("oc,bcfhw->bofhw", w, z)
    if own_rows_only:  # what a plain all-gather does: the other ranks' rows have no gradient
        common.GatherRows.backward = staticmethod(lambda ctx, grad: grad.chunk(world)[rank])
    codmd.relation_loss(x0, x0_real, x0_fake, 1.0, 0.0, 0.1).backward()
    dist.all_reduce(w.grad)
    return w.grad / world


if __name__ == "__main__":
    gradients = torch.stack([student_gradient(), student_gradient(own_rows_only=True)])
    if dist.get_rank() == 0:
        torch.save(gradients, sys.argv[1])
    dist.destroy_process_group()
