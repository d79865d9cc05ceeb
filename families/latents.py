"""Video and normalised latents: what all families' VAEs have in common, a mean and a deviation for each channel."""

import torch


def latent_statistics(vae):
    """Mean and standard deviation of each channel of a VAE's latents, [c, 1, 1, 1]."""
    config = vae.config
    return (torch.tensor(x, device=vae.device).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))


@torch.no_grad()
def encode(vae, video):
    """Video [b, 3, f, h, w] in [0, 1] -> normalised latents [b, c, f', h', w'], float32 (the posterior's mode)."""
    latents = vae.encode((2 * video - 1).to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = latent_statistics(vae)
    return (latents.float() - mean) / std


@torch.no_grad()
def decode(vae, latents):
    """Normalised latents [b, c, f', h', w'] -> video [b, 3, f, h, w] in [0, 1], float32, one sample at a time."""
    mean, std = latent_statistics(vae)
    parts = [vae.decode(x.to(vae.dtype), return_dict=False)[0] for x in (latents * std + mean).split(1)]
    return (torch.cat(parts).float() + 1) / 2
