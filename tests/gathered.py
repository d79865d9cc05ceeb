"""For test_codmd.py, on several ranks: the gradient of the relation loss of one global batch, split over them.

A linear student x0 = W z stands for the network: its gradient, averaged over ranks as FSDP2 does, goes to a file.
"""

import torch
import torch.distributed as dist

import codmd
import common


def own_rows(x):
    """What public code often does: gather without gradient, put the own rows back."""
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


def student_gradient():
    """Gradient [4, 4] on this rank's share of the batch, averaged over ranks."""
    common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    z, x0_teacher, x0_fake = (torch.randn(8, 4, 3, 2, 2, generator=g).chunk(world)[rank] for _ in range(3))
    w = torch.eye(4).requires_grad_()
    x0 = torch.einsum("oc,bcfhw->bofhw", w, z)
    codmd.relation_loss(x0, x0_teacher, x0_fake, 1.0, 0.0, 0.1).backward()
    dist.all_reduce(w.grad)
    return w.grad / world


def gradients(path):
    """Both gathers' gradients [2, 4, 4], to a file."""
    found, common.gather_rows = [student_gradient()], own_rows
    found.append(student_gradient())
    if dist.get_rank() == 0:
        torch.save(torch.stack(found), path)
    dist.destroy_process_group()
