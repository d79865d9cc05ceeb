"""The VAE: diffusers' AutoencoderKLWan at the size of the tiny world, its loss, and its training in two parts."""

import math
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan_vae
from einops import rearrange

from tiny import world
from tiny.training.optim import Muon, cosine_lr, flags_of, generator, load_state, save_state

# flags that decide what is trained, for the snapshots
FLAGS = ("vae_steps", "decoder_steps", "vae_batch", "vae_lr", "kl_weight")


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


def whole_clip_resample(self, x, feat_cache=None, feat_idx=None):
    """WanResample for all frames at once. x: [b, c, f, h, w].

    Without its feature cache diffusers' module leaves out the resampling in time; this does it, with the first frame as
    its own chunk. So encoder and decoder see a clip in one call: the numbers of the chunked call, in half the time.
    """
    if self.mode == "upsample3d":
        rest = rearrange(self.time_conv(x[:, :, 1:]), "b (two c) f h w -> b c (f two) h w", two=2)
        x = torch.cat([x[:, :, :1], rest], dim=2)
    frames = x.shape[2]
    x = self.resample(rearrange(x, "b c f h w -> (b f) c h w"))
    x = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


@contextmanager
def whole_clips():
    """In this block diffusers' encoder and decoder take whole clips, without a feature cache."""
    stock = wan_vae.WanResample.forward
    wan_vae.WanResample.forward = whole_clip_resample
    try:
        yield
    finally:
        wan_vae.WanResample.forward = stock


def encode(vae, videos):
    """Videos [b, 3, f, h, w] in [0, 1] to the mean and standard deviation of their latents, each [b, c, f, h, w]."""
    with whole_clips():
        code = vae.encoder(wan_vae.patchify(videos * 2 - 1, vae.config.patch_size))
    mean, logvar = vae.quant_conv(code).chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def decode(vae, latents):
    """Latents [b, c, f, h, w] to videos [b, 3, f, h, w], in [0, 1] but for overshoot."""
    with whole_clips():
        x = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return (wan_vae.unpatchify(x, vae.config.patch_size) + 1) / 2


def latent_statistics(vae):
    """Mean and standard deviation that latents are normalised by, each [c, 1, 1, 1]."""
    return (rearrange(torch.tensor(v), "c -> c 1 1 1") for v in (vae.config.latents_mean, vae.config.latents_std))


def normalised(vae, videos):
    """Latents [b, c, f, h, w] of videos [b, 3, f, h, w] in [0, 1]: the posterior's mode, as the transformer has it."""
    shift, scale = latent_statistics(vae)
    return (encode(vae, videos)[0] - shift) / scale


def reconstruct(vae, videos, g, extra_noise):
    """Loss, KL and squared error of videos [b, 3, f, h, w] sent through the VAE, with noise from the generator g.

    extra_noise: the latents get up to this many of their own standard deviations of further noise, mostly far less. A
    decoder that is trained with it forgives a sampler's small errors. It is for training the decoder alone, so the
    latents stay as they are.
    """
    mean, std = encode(vae, videos)
    if extra_noise:
        level = extra_noise * torch.rand(len(mean), 1, 1, 1, 1, generator=g) ** 2
        std = std + level * mean.std((0, 2, 3, 4), keepdim=True)
    error = (decode(vae, mean + std * torch.randn(mean.shape, generator=g)) - videos).abs()
    # the background is most of the frame and easy: count the shape and its rim five times
    chroma = videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)
    near = F.max_pool3d((chroma > 0.01).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    # squares find the shape while it is far off (absolute errors would settle for background), L1 makes it crisp
    loss = ((2 * error + 16 * error**2) * (1 + 4 * near)).mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
    return loss, kl, (error**2).mean().item()


def train_vae(args, name, params, vae, first, steps, lr, extra_noise=0.0, world=world):
    """Train `params` of the VAE, in place, for `steps` updates on the world's clips from index `first` on."""
    matrices = [p for p in params if p.ndim > 1]
    optimizer = Muon(matrices, [p for p in params if p.ndim == 1], lr)
    snapshot, flags = args.work / f"{name}.safetensors", flags_of(args, *FLAGS)
    start = load_state(snapshot, {"vae": vae}, optimizer, flags)
    begin, average = time.time(), None
    for step in range(start, steps):
        videos, _ = world.batch(args.seed, range(first + step * args.vae_batch, first + (step + 1) * args.vae_batch))
        loss, kl, mse = reconstruct(vae, videos, generator(args.seed, first, step), extra_noise)
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, lr, warmup=100)
        optimizer.zero_grad()
        (loss + args.kl_weight * min(1, (first + step) / 1000) * kl).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average = mse if average is None else average + 0.05 * (mse - average)
        if step % 50 == 0:
            psnr, rate = -10 * math.log10(average), (time.time() - begin) / (step - start + 1)
            figures = f"loss {loss.item():.4f} KL {kl.item():.2f} PSNR {psnr:.1f}"
            print(f"{name} {step}: {figures} ({rate:.2f} s/step)", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_state(snapshot, step + 1, {"vae": vae}, optimizer, flags)


def vae_stage(args, world=world):
    """Train encoder and decoder, then the decoder alone, measure the latents, and save it all in the work folder."""
    torch.manual_seed(args.seed)
    vae = build_vae()
    train_vae(args, "vae", list(vae.parameters()), vae, 0, args.vae_steps, args.vae_lr, world=world)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    params = [p for p in vae.parameters() if p.requires_grad]
    first = args.vae_steps * args.vae_batch
    train_vae(args, "decoder", params, vae, first, args.decoder_steps, args.vae_lr / 2, 1.0, world)
    with torch.no_grad():
        means = torch.cat([encode(vae, world.batch(args.seed + 1, range(i, i + 64))[0])[0] for i in range(0, 2048, 64)])
    vae.register_to_config(
        latents_mean=means.mean((0, 2, 3, 4)).tolist(),
        latents_std=means.std((0, 2, 3, 4)).tolist(),
    )
    vae.save_pretrained(args.work / "vae")
