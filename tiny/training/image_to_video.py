"""The image-to-video teacher: the text-to-video one, trained on with a clean first latent frame, as Wan 2.2 5B."""

import shutil
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from einops import rearrange

from tiny import world
from tiny.training.optim import Muon, flags_of, generator, load_state, save_state, trapezoid_lr
from tiny.training.teacher import FLAGS, Clips, PaddedText, padding_bias, text_table


def save_image_to_video(args, transformer):
    """Write the transformer and its model_index.json; the other parts are links to those of the folder args.out."""
    out = args.out.with_name(args.out.name + "_i2v")
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "image_encoder", "image_processor"))
    pipe = WanImageToVideoPipeline(
        **parts,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=args.shift),
        expand_timesteps=True,
    )
    pipe.save_pretrained(aside)
    index = (args.out / "model_index.json").read_text()
    ours = (aside / "model_index.json").read_text()
    for part in ("tokenizer", "text_encoder", "vae"):
        entry = index[index.index(f'"{part}": [') :].partition("]")[0]
        ours = ours.replace(ours[ours.index(f'"{part}": [') :].partition("]")[0], entry)
        (aside / part).symlink_to(Path("..") / args.out.name / part)
    (aside / "model_index.json").write_text(ours)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)


def train_image_to_video(args):
    """Train the transformer of the folder args.out on, and write <out>_i2v beside it with its weight average.

    Text encoder and VAE stay. Targets are the clips themselves: the mean over a caption's clips, which are those of the
    text-to-video teacher at high noise, is not that over the clips with this first frame.
    """
    pipe = WanPipeline.from_pretrained(args.out)
    data = Clips(args, pipe.vae, "i2v-latents")
    tokens = pipe.tokenizer([*world.CAPTIONS, ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        table = text_table(pipe.text_encoder, tokens)
    transformer, padded = pipe.transformer, PaddedText()
    ema = deepcopy(transformer).requires_grad_(False)
    for block in transformer.blocks:
        block.attn2.set_processor(padded)
    params, modules = list(transformer.parameters()), {"transformer": transformer, "ema": ema}
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen, lr = set(matrices), args.lr / 2
    optimizer = Muon(matrices, [p for p in params if p not in chosen], lr)
    snapshot, flags = args.work / "i2v.safetensors", flags_of(args, "i2v_steps", *FLAGS)
    start = load_state(snapshot, modules, optimizer, flags)
    velocity = torch.compile(transformer) if args.compile else transformer
    begin, average = time.time(), 1.0

    for step in range(start, args.i2v_steps):
        g = generator(args.seed, step, 5)
        rows = torch.randint(args.clips, (args.batch,), generator=g)
        x0 = data.latents[rows]
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=g)) / args.batch
        sigma = args.train_shift * u / (1 + (args.train_shift - 1) * u)
        noise = torch.randn(x0.shape, generator=g)
        levels = sigma[:, None].repeat(1, x0.shape[2])
        levels[:, 0] = 0  # the first frame is known, and its tokens are told so
        s = rearrange(levels, "b f -> b 1 f 1 1")
        x_t = (1 - s) * x0 + s * noise
        tokens_per_frame = x0.shape[3] // 2 * (x0.shape[4] // 2)
        timestep = 1000 * levels.repeat_interleave(tokens_per_frame, dim=1)

        drop = torch.rand(args.batch, generator=g) < args.dropout
        text = table[data.shown(rows, drop, g)]
        padded.bias = padding_bias(text, g)
        v = velocity(x_t, timestep, text, return_dict=False)[0]
        loss = F.mse_loss(v[:, :, 1:], (noise - x0)[:, :, 1:])
        for group in optimizer.param_groups:
            group["lr"] = trapezoid_lr(step, args.i2v_steps, lr, warmup=100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in params], 1 - decay)

        average += 0.01 * (loss.item() - average)
        if step % 100 == 0:
            rate = (time.time() - begin) / (step - start + 1)
            print(f"image to video {step}: loss {average:.4f} ({rate:.3f} s/step)", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.i2v_steps:
            save_state(snapshot, step + 1, modules, optimizer, flags)
            save_image_to_video(args, ema)
    if start >= args.i2v_steps:  # of a finished snapshot, perhaps into another folder
        save_image_to_video(args, ema)
