"""The optimizer of both trainings: Muon for matrices, AdamW for all else."""

import torch
from torch.nn.utils import clip_grad_norm_


class MuonAndAdamW:
    """torch.optim.Muon (Jordan et al. 2024) for `matrices`, kernels too, and AdamW for the other `params`.

    Most of these pixels' variance is brightness and position; colour and outline are a small rest that AdamW is slow
    to reach. Muon's step is equally long in every direction and needs far fewer updates.
    """

    def __init__(self, params, matrices):
        self.params, self.matrices = params, matrices
        # torch's Muon takes two dimensions only; these are other views of the same memory
        self.flat = [torch.nn.Parameter(p.detach().flatten(1)) for p in matrices]
        self.muon = torch.optim.Muon(self.flat, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        rest = [p for p in params if not any(p is matrix for matrix in matrices)]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0)

    def step(self, loss, lr):
        """One update down the gradient of `loss`, its norm clipped to 1."""
        for p in self.params:
            p.grad = None
        loss.backward()
        clip_grad_norm_(self.params, 1.0)
        for flat, p in zip(self.flat, self.matrices):
            flat.grad = p.grad.flatten(1)
        self.muon.param_groups[0]["lr"], self.adamw.param_groups[0]["lr"] = 2 * lr, lr
        self.muon.step()
        self.adamw.step()
