"""How good a trained teacher is: two tables beside the data, and a contact sheet."""

import math

from diffusers import WanPipeline
from PIL import Image

from tiny.modes import measures, world
from tiny.training.report import columns_of, contact_sheet, sample
from tiny.training.teacher import STOCK_TEXT_LENGTH


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
    levels = level_captions(args.samples)
    captions = [caption for of_level in levels.values() for caption in of_level]
    videos, _ = world.batch(args.seed + 3, range(len(captions)), captions)
    columns = columns_of(pipe, videos, captions, args.guidance_scale)

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
