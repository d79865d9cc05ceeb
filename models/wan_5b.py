"""Wan 2.2 TI2V 5B: text-to-video as Wan 2.1's; image-to-video with the clean first latent frame in its place.

For image-to-video cond holds "first" [b, c, 1, h, w]: the tokens of the first frame are at noise level 0, and its
velocity is the one that leads there, so that every prediction of x0 keeps the frame.
"""

import torch

from models.latents import encode
from models.wan import Wan


class FirstFrame:
    """Image-to-video of a network that reads the first latent frame as it is."""

    @staticmethod
    def conditions(config, shape):
        return {"first": (shape[0], 1, *shape[2:])}

    @staticmethod
    def image_encoder(folder, vae, frames):
        """A function: first frames [b, 3, 1, h, w] in [0, 1] -> what cond holds of them."""
        return lambda images: {"first": encode(vae, images)}


class Wan5B(Wan):
    fps = 24


class Wan5BI2V(FirstFrame, Wan5B):
    def velocity(self, x_t, sigma, cond):
        (_, ph, pw), first, (*_, f, h, w) = self.transformer.config.patch_size, cond["first"], x_t.shape
        level = sigma.float()[:, None].repeat(1, f)
        level[:, 0] = 0
        tokens = level.repeat_interleave(h // ph * (w // pw), dim=1)  # a noise level for each
        v = super().velocity(torch.cat([first, x_t[:, :, 1:]], dim=2), tokens, cond)
        return torch.cat([(x_t[:, :, :1] - first) / sigma.view(-1, 1, 1, 1, 1), v[:, :, 1:]], dim=2)
