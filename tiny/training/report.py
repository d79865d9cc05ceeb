"""How good a trained teacher is: the table and contact sheet of `report`, and the tables `levels` and `denoiser`."""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from einops import rearrange, repeat
from PIL import Image

from tiny import measures, world
from tiny.training.optim import generator
from tiny.training.teacher import STOCK_TEXT_LENGTH, TEXT_LENGTH, posterior_mean
from tiny.training.vae import decode, latent_statistics, normalised


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


def columns_of(pipe, videos, captions, guidance_scale):
    """{name: videos [b, 3, f, h, w]}: these clips, their reconstructions, and the teacher's samples of their captions
    without and with guidance. Prints how fast each was made.
    """
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        means = [pipe.vae.encode(x * 2 - 1).latent_dist.mode() for x in videos.split(64)]
        begin = time.time()
        reconstructions = torch.cat([pipe.vae.decode(x).sample for x in means]) / 2 + 0.5
    print(f"decoding: {len(videos) / (time.time() - begin):.0f} clips/s on {torch.get_num_threads()} threads")
    psnr = -10 * torch.log10(F.mse_loss(reconstructions, videos))
    print(f"reconstruction PSNR: {psnr:.1f} dB")
    columns = {"data": videos, "reconstructions": reconstructions}
    for g in (1.0, guidance_scale):
        begin = time.time()
        columns[f"teacher, guidance {g:g}"] = sample(pipe, captions, g)
        print(f"sampling, guidance {g:g}: {len(videos) / (time.time() - begin):.2f} clips/s, 50 steps and decoding")
    return columns


def report(args):
    """Print the table of data, reconstructions and teacher, and write samples.png beside the folder of the weights."""
    pipe = WanPipeline.from_pretrained(args.out)
    captions = [world.CAPTIONS[i % len(world.CAPTIONS)] for i in range(args.samples)]
    videos, _ = world.batch(args.seed + 3, range(args.samples), captions)
    columns = columns_of(pipe, videos, captions, args.guidance_scale)
    figures = {name: measures.summary(x, captions) for name, x in columns.items()}
    # what a user gets who does not know about the short texts, on fewer samples because 512 tokens are slow
    few = captions[:48]
    name = f"guidance {args.guidance_scale:g}, text padded to {STOCK_TEXT_LENGTH} ({len(few)} samples)"
    figures[name] = measures.summary(sample(pipe, few, args.guidance_scale, STOCK_TEXT_LENGTH, seed=1), few)

    print("\n| | " + " | ".join(figures) + " |\n|---" + "|---" * len(figures) + "|")
    units = {"x": ", px", "y": ", px", "speed": ", px/frame", "size": ", px"}
    rows = {"clean %": [f"{f['clean']:.1f}" for f in figures.values()]}
    rows["right caption %"] = [f"{f['right']:.1f}" for f in figures.values()]
    for name in measures.FREE:
        cells = [f"{f[f'{name}_mean']:.3g} ± {f[f'{name}_std']:.2g}" for f in figures.values()]
        rows[name + units.get(name, "")] = cells
    rows["direction: total variation from uniform"] = [f"{f['direction_tv']:.3f}" for f in figures.values()]
    rows["direction: entropy"] = [f"{f['direction_entropy']:.3f}" for f in figures.values()]
    rows["coherence, px"] = [f"{f['coherence']:.3f}" for f in figures.values()]
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")

    sheet = contact_sheet([videos[: len(world.CAPTIONS)] for videos in columns.values()])
    picture = args.out.resolve().parent / "samples.png"
    Image.fromarray(sheet).save(picture, optimize=True)
    print(f"\n{picture}: one row per caption; " + ", ".join(columns))


@torch.no_grad()
def levels(args, steps=50):
    """Print a table: clips noised to sigma and denoised by the teacher, guidance 1, against the same clips.

    A row tells what the noise levels below its sigma do; its difference from the row above, what the levels between the
    two do. Sigma 0 is the VAE alone, sigma 1 samples from pure noise.
    """
    pipe = WanPipeline.from_pretrained(args.out)
    captions = [world.CAPTIONS[i % len(world.CAPTIONS)] for i in range(args.samples)]
    videos, _ = world.batch(args.seed + 3, range(args.samples), captions)
    wanted = measures.read_factors(videos)
    text = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]
    shift, scale = latent_statistics(pipe.vae)
    x0 = torch.cat([normalised(pipe.vae, x) for x in videos.split(64)])
    noise = torch.randn(x0.shape, generator=generator(args.seed, 3))
    stretch, names = pipe.scheduler.config.shift, ["speed", "size", "brightness", "saturation"]
    columns = ["sigma", "right %", *(f"{name}: mean, spread (%), correlation" for name in names), "coherence, px"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for top in (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        z = (1 - top) * x0 + top * noise
        start = top / (stretch - (stretch - 1) * top)  # the scheduler shifts it back to top
        if top:
            pipe.scheduler.set_timesteps(sigmas=torch.linspace(start, 0, steps + 1)[:-1].tolist())
            for t in pipe.scheduler.timesteps:
                v = pipe.transformer(z, t.expand(len(z)), text, return_dict=False)[0]
                z = pipe.scheduler.step(v, t, z, return_dict=False)[0]
        out = torch.cat([decode(pipe.vae, part * scale + shift) for part in z.split(64)])
        f, figures = measures.read_factors(out), measures.summary(out, captions)
        cells = [f"{top:g}", f"{figures['right']:.1f}"]
        for name in names:
            got, want = f[name][f["clean"]], wanted[name][f["clean"]]
            mean, spread = 100 * (got.mean() / want.mean() - 1), 100 * (got.std() / want.std() - 1)
            cells.append(f"{mean:+.0f}, {spread:+.0f}, {torch.corrcoef(torch.stack([got, want]))[0, 1]:.2f}")
        print("| " + " | ".join([*cells, f"{figures['coherence']:.3f}"]) + " |", flush=True)


def excess(prediction, x0, halves):
    """Squared errors, means over all values: (the best possible one, how far `prediction` is beyond it).

    prediction: of x0 from some x_t, [b, ...]; halves: E[x0 | x_t], [b, ...], estimated twice from different clips. The
    noise of each estimate is in only one factor of a product, so it cancels in the mean. What both estimates share
    stays: with few clips near x_t each is drawn to the nearest.
    """
    return [math.prod(x - half for half in halves).mean().item() for x in (x0, prediction)]


@torch.no_grad()
def denoiser(args):
    """Print a table: the squared error of the teacher's prediction of x0 from x_t, beside the best possible one's.

    The world is known, so the best possible prediction is too: the mean of all clips of the caption, weighed by how
    likely each makes x_t. Two halves of `args.clips` fresh clips stand for all. At sigma .9 they are few, and what the
    teacher is beyond the best is more than the table says; below they are too few.
    """
    pipe, caption = WanPipeline.from_pretrained(args.out), world.CAPTIONS[0]
    text = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]

    def latents(seed, count):
        parts = torch.arange(count).split(64)
        return torch.cat([normalised(pipe.vae, world.batch(seed, part, caption)[0]) for part in parts])

    x0, halves = latents(args.seed + 3, args.samples), latents(args.seed + 4, args.clips).flatten(1).chunk(2)
    noise = torch.randn(x0.shape, generator=generator(args.seed, 3))
    print(f"{caption}; squared error per latent value\n")
    print("| sigma | best possible | teacher | beyond the best | of the best, % |\n|---|---|---|---|---|")
    for level in (0.9, 0.93, 0.95, 0.98, 1.0):
        x_t, sigma = (1 - level) * x0 + level * noise, torch.full((len(x0),), level)
        parts = zip(x_t.split(64), (1000 * sigma).split(64))
        v = [pipe.transformer(x, t, text.expand(len(x), -1, -1), return_dict=False)[0] for x, t in parts]
        prediction = x_t - level * torch.cat(v)
        best, beyond = excess(prediction, x0, [posterior_mean(x_t, sigma, h, h.square().sum(1)) for h in halves])
        total = F.mse_loss(prediction, x0).item()
        print(f"| {level:g} | {best:.3f} | {total:.3f} | {beyond:.4f} | {100 * beyond / best:.1f} |", flush=True)
