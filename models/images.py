"""Images: the first frames that image-to-video begins with."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from training.files import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def find_images(folder, count, height, width):
    """Paths of the images of `count` prompts: that of line n of a file of prompts is named n (1.png, 002.jpg, …)."""
    if not Path(folder).is_dir():
        raise UserError(f"--images: no such folder {folder}")
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in SUFFIXES and path.stem.isdecimal():
            if int(path.stem) in found:
                raise UserError(f"--images: {path} and {found[int(path.stem)].name} are both of line {int(path.stem)}")
            found[int(path.stem)] = path
    for line in range(1, count + 1):
        if line not in found:
            raise UserError(f"no image of prompt {line} of {count} (--images): {folder}/{line}{' or '.join(SUFFIXES)}")
    paths = [found[line] for line in range(1, count + 1)]
    tell_cropped(paths, height, width)
    return paths


def tell_cropped(paths, height, width):
    """Say how many of these images have another aspect. One process looks at them."""
    cropped = []
    for path in paths if int(os.environ.get("RANK", 0)) == 0 else ():
        with opened(path) as file:
            w, h = file.size[::-1] if file.getexif().get(ExifTags.Base.Orientation, 1) > 4 else file.size
        scale = max(width / w, height / h)
        if max(scale * w - width, scale * h - height) >= 1:
            cropped.append(path)
    if cropped:
        print(f"{len(cropped)} of {len(paths)} images have another aspect: cropped in the middle, as {cropped[0]}")


@contextmanager
def opened(path):
    """A PIL image of a file; one line if it is none."""
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({str(error).splitlines()[0]})") from None


def read_images(paths, height, width):
    """Images as videos of one frame [n, 3, 1, height, width] in [0, 1], scaled to cover it and cut in the middle.

    Of an animation the first frame is taken; what is transparent becomes white.
    """
    videos = []
    for path in paths:
        with opened(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # which PIL would cut off at 255
                raise UserError(f"{path} has more than 8 bits a channel: convert it first")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
        videos.append(rearrange(pixels, "h w c -> c 1 h w").float() / 255)
    return torch.stack(videos)


def to_pil(video):
    """The first frame of a video [3, f, h, w] in [0, 1] as a PIL image."""
    pixels = (video[:, 0].clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").cpu().numpy())
