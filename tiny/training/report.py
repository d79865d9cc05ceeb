"""How good a trained teacher is: two tables beside the data, and a contact sheet."""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from einops import rearrange, repeat
from PIL import Image

from tiny import measures, world
from tiny.training.optim import generator
from tiny.training.teacher import STOCK_TEXT_LENGTH, TEXT_LENGTH


def sample(pipe, captions, guidance_scale, text_length=TEXT_LENGTH, steps=50, seed=0):
    """Videos [b, 3, f, h, w] for a list of captions, by the stock pipeline: Euler, `steps` steps."""
    videos, g = [], generator(seed, 2)
    for i in range(0, len(captions), 64):
        frames = pipe(
            captions[i : i + 64],
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=text_length,
            generator=g,
            output_type="pt",
        ).frames
        videos.append(rearrange(frames.float(), "b f c h w -> b c f h w"))
    return torch.cat(videos)


def contact_sheet(columns):
    """uint8 image [H, W, 3] at twice the scale: a column for each of the videos [b, 3, f, h, w], a row for each clip,
    every second frame side by side.
    """
    sheets = []
    for videos in columns:
        sheet = rearrange(videos[:, :, ::2].clamp(0, 1), "b c f h w -> (b h) (f w) c")
        sheet = (repeat(sheet, "h w c -> (h i) (w j) c", i=2, j=2) * 255).round().byte()
        sheets += [sheet, torch.full((len(sheet), 16, 3), 255, dtype=torch.uint8)]
    return torch.cat(sheets[:-1], dim=1).numpy()


def level_captions(count):
    """{level: `count` captions of it, each as often}, for the levels of detail in world.LEVELS."""
    captions = {}
    for level, names in world.LEVELS.items():
        of_level = [caption for caption, named in world.NAMED.items() if tuple(named) == names]
        captions[level] = (of_level * math.ceil(count / len(of_level)))[:count]
    return captions


def table(columns, rows):
    """Print a markdown table of {row: cells}."""
    print("\n| | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def report(args):
    """Print the tables of data, reconstructions and teacher, and write samples.png beside the folder of the weights.

    Every level of detail has `args.samples` samples. Entropies of the looks and of the directions that its captions
    leave open are relative to those of as many clips of the data.
    """
    pipe = WanPipeline.from_pretrained(args.out)
    pipe.set_progress_bar_config(disable=True)
    levels = level_captions(args.samples)
    captions = [caption for of_level in levels.values() for caption in of_level]
    videos, _ = world.batch(args.seed + 3, range(len(captions)), captions)
    with torch.no_grad():
        means = [pipe.vae.encode(x * 2 - 1).latent_dist.mode() for x in videos.split(64)]
        begin = time.time()
        reconstructions = torch.cat([pipe.vae.decode(x).sample for x in means]) / 2 + 0.5
    print(f"decoding: {len(videos) / (time.time() - begin):.0f} clips/s on {torch.get_num_threads()} threads")
    psnr = -10 * torch.log10(F.mse_loss(reconstructions, videos))
    print(f"reconstruction PSNR: {psnr:.1f} dB")
    columns = {"data": videos, "reconstructions": reconstructions}
    for g in (1.0, args.guidance_scale):
        begin = time.time()
        columns[f"teacher, guidance {g:g}"] = sample(pipe, captions, g)
        print(f"sampling, guidance {g:g}: {len(videos) / (time.time() - begin):.2f} clips/s, 50 steps and decoding")

    figures = [measures.summary(x, captions) for x in columns.values()]
    units = {"x": ", px", "y": ", px", "speed": ", px/frame", "size": ", px"}
    rows = {f"{key}, %": [f"{f[key]:.1f}" for f in figures] for key in ("clean", "right")}
    for name in measures.FREE:
        cells = [f"{f[f'{name}_mean']:.3g} ± {f[f'{name}_std']:.2g}" for f in figures]
        rows[name + units.get(name, "")] = cells
    rows["coherence, px"] = [f"{f['coherence']:.3f}" for f in figures]
    table(columns, rows)

    rows, parts = {}, [x.split(args.samples) for x in columns.values()]
    for i, (level, of_level) in enumerate(levels.items()):
        f = [measures.summary(part[i], of_level) for part in parts]
        rows[f"{level}: right, %"] = [f"{g['right']:.1f}" for g in f]
        for key in ("looks", "motions"):
            if f[0][key] > 0:  # it leaves some open, and there are enough samples to say so
                rows[f"{level}: {key}"] = [f"{g[key] / f[0][key]:.3f}" for g in f]
    table(columns, rows)

    # what a user gets who does not know about the short texts, on fewer samples because 512 tokens are slow
    few = [caption for of_level in levels.values() for caption in of_level[:12]]
    right = measures.summary(sample(pipe, few, args.guidance_scale, STOCK_TEXT_LENGTH, seed=1), few)["right"]
    scale = f"guidance {args.guidance_scale:g}"
    print(f"\ntext padded to {STOCK_TEXT_LENGTH} tokens, {scale}: {right:.1f} % right of {len(few)}")

    shown = [i * args.samples + j for i in range(len(levels)) for j in range(min(3, args.samples))]
    picture = args.out.resolve().parent / "samples.png"
    Image.fromarray(contact_sheet([x[shown] for x in columns.values()])).save(picture, optimize=True)
    print(f"{picture}: rows are {', '.join(captions[i] for i in shown)}; columns {', '.join(columns)}")
