"""For test_codmd.py, on several ranks: the gradient of the relation loss of one global batch, split over them."""

import torch
import torch.distributed as dist

import codmd
import common


def student_gradient(path=None):
    """Gradient [4, 4] of a linear student x0 = W z on this rank's share of the batch, averaged over ranks as FSDP2
    does; also written to a file.
    """
    common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    z, x0_teacher, x0_fake = (torch.randn(8, 4, 3, 2, 2, generator=g).chunk(world)[rank] for _ in range(3))
    w = torch.eye(4).requires_grad_()
    x0 = torch.einsum("oc,bcfhw->bofhw", w, z)
    codmd.relation_loss(x0, x0_teacher, x0_fake, 1.0, 0.0, 0.1).backward()
    dist.all_reduce(w.grad)
    if path and rank == 0:
        torch.save(w.grad / world, path)
    dist.destroy_process_group()
    return w.grad / world
