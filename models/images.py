"""Images: the first frames that image-to-video begins with."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps

from training.files import UserError, readable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def find_images(model, images, count):
    """Paths of the images that `count` prompts begin with, none for text-to-video. images: a file for all of them, or a
    folder with that of line n of a file of prompts as n (1.png, 002.jpg, …).
    """
    if bool(model.conditions) != bool(images):
        what = "begins with an image: give" if model.conditions else "takes no"
        raise UserError(f"{model.name} {what} --images (sample.py: --image)")
    if not images or Path(images).is_file():
        return [Path(images)] * count if images else []
    paths = [path for path in Path(images).iterdir() if path.suffix.lower() in SUFFIXES and path.stem.isdecimal()]
    lines = [int(path.stem) for path in paths]
    for line in range(1, count + 1):
        if lines.count(line) != 1:
            raise UserError(f"{images} needs one image named {line} ({', '.join(SUFFIXES)})")
    return [paths[lines.index(line)] for line in range(1, count + 1)]


def read_images(paths, height, width):
    """Images as videos of one frame [n, 3, 1, height, width] in [0, 1], scaled to cover it, cropped in the middle."""
    videos = []
    for path in paths:
        with readable(path), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # which PIL would cut off at 255
            raise UserError(f"{path} has more than 8 bits a channel: convert it first")
        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
        videos.append(rearrange(pixels, "h w c -> c 1 h w").float() / 255)
    return torch.stack(videos)


def to_pil(video):
    """The first frame of a video [3, f, h, w] in [0, 1] as a PIL image."""
    pixels = (video[:, 0].clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").cpu().numpy())
