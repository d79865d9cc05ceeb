"""Video and normalised latents: what all families' VAEs have in common, a mean and a deviation for each channel."""

import torch

from training.files import UserError


def latent_shape(config, vae, frames, height, width):
    """Latent shape (c, f, h, w) and patch size (f, h, w) of a video of that many pixels; UserError if it has none.

    config and vae are the dicts of the transformer's and the VAE's config.json.
    """
    time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    patch = config["patch_size"]
    patch = patch if isinstance(patch, (list, tuple)) else (1, patch, patch)  # an image model's is one number
    if (frames - 1) % time or height % (space * patch[1]) or width % (space * patch[2]):
        needs = f"--height a multiple of {space * patch[1]}, --width of {space * patch[2]}"
        raise UserError(f"--frames must be 1 + a multiple of {time}, {needs}; got {frames}, {height} and {width}")
    return (config["out_channels"], (frames - 1) // time + 1, height // space, width // space), patch


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
