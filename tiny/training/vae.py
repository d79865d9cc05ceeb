"""The VAE: diffusers' AutoencoderKLWan at the size of the tiny world, its loss, and its training in two parts."""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from tiny import world
from tiny.training.optim import MuonAndAdamW


def build_vae():
    """A VAE with fresh weights: 2x in time and 4x in space, 8 channels."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,  # 4x in space: 2 by this and 2 by the one level; 2x in time
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -6  # start with a nearly exact code, let the KL add noise to it
    return vae


def reconstruct(vae, videos, extra_noise):
    """Loss, KL and squared error of videos [b, 3, f, h, w] in [0, 1] sent through the VAE.

    extra_noise: the latents get up to this many of their own standard deviations of further noise, mostly far less. A
    decoder that is trained with it forgives a sampler's small errors. It is for training the decoder alone, so the
    latents stay as they are.
    """
    latents = vae.encode(videos * 2 - 1).latent_dist
    mean, std = latents.mean, latents.std
    level = extra_noise * torch.rand(len(mean), 1, 1, 1, 1) ** 2
    noise = (std + level * mean.std((0, 2, 3, 4), keepdim=True)) * torch.randn_like(mean)
    error = (vae.decode(mean + noise).sample / 2 + 0.5 - videos).abs()
    # the background is most of the frame and easy: count the shape and its rim five times
    chroma = videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)
    near = F.max_pool3d((chroma > 0.01).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    # squares find the shape while it is far off (absolute errors would settle for background), L1 makes it crisp
    loss = ((2 * error + 16 * error**2) * (1 + 4 * near)).mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - latents.logvar).mean()
    return loss, kl, error.square().mean().item()


def train_part(args, vae, params, first, steps, peak_lr, extra_noise=0.0):
    """Train `params` of the VAE for `steps` updates on the world's clips from index `first` on."""
    optimizer = MuonAndAdamW(params, [p for p in params if p.ndim > 1])
    begin = time.time()
    for step in range(steps):
        start = first + step * args.vae_batch
        videos, _ = world.batch(args.seed, range(start, start + args.vae_batch))
        loss, kl, mse = reconstruct(vae, videos, extra_noise)
        lr = peak_lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step(loss + args.kl_weight * min(1, (first + step) / 1000) * kl, lr)
        if step % 50 == 0:
            figures = f"loss {loss.item():.4f} KL {kl.item():.2f} PSNR {-10 * math.log10(mse):.1f}"
            print(f"vae {step}: {figures} ({(time.time() - begin) / (step + 1):.2f} s/step)", flush=True)


def train_vae(args):
    """Train encoder and decoder, then the decoder alone, measure the latents, and write <out>/vae."""
    torch.manual_seed(args.seed)
    vae = build_vae()
    train_part(args, vae, list(vae.parameters()), 0, args.vae_steps, args.vae_lr)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = [p for p in vae.parameters() if p.requires_grad]
    train_part(args, vae, decoder, args.vae_steps * args.vae_batch, args.decoder_steps, args.vae_lr / 2, 1.0)
    videos, _ = world.batch(args.seed + 1, range(args.clips // 8))
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in videos.split(64)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(),
        latents_std=latents.std((0, 2, 3, 4)).tolist(),
    )
    vae.save_pretrained(args.out / "vae")
