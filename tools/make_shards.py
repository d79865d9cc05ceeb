"""Encode a folder of captioned videos into the latent shards that --data reads. Once, before training.

    torchrun --nproc_per_node=8 tools/make_shards.py clips/ shards/ --teacher wan2.1-1.3b
    torchrun --nproc_per_node=8 dmd2.py --data shards/ --teacher wan2.1-1.3b

Beside every video (mp4, mov, webm, mkv) lies its caption, UTF-8, in a .txt of the same name. A clip is the first frames
of a video at the teacher's frame rate (nearest in time), scaled to cover height x width and cropped in the middle,
encoded to the posterior's mode. Run it again after an interruption: it goes on.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from annotated_types import Ge
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/make_shards.py` finds common

import common  # noqa: E402
import dmd2  # noqa: E402
from harness.files import Fatal, hashed, make_folder, stamps  # noqa: E402
from harness.flags import check_flags, one_line_errors, with_recipe  # noqa: E402

SUFFIXES = {".mp4", ".mov", ".webm", ".mkv"}


@dataclass
class Args:
    clips: tyro.conf.Positional[Path]
    """Folder of videos with captions beside them; looked through with its subfolders."""
    out: tyro.conf.Positional[Path]
    """Folder for the shards."""
    teacher: str = "wan2.1-1.3b"
    """Whose VAE and text encoder: tiny, wan2.1-1.3b, wan2.1-14b, or a local folder in the diffusers layout."""
    frames: Annotated[int | None, Ge(1)] = None
    """Frames of a clip; a shorter video is an error. None: as many as the scripts train on with this teacher."""
    height: Annotated[int | None, Ge(1)] = None
    """Height in pixels. None: the scripts' with this teacher."""
    width: Annotated[int | None, Ge(1)] = None
    """Width in pixels. None: the scripts' with this teacher."""
    shard: Annotated[int, Ge(1)] = 64
    """Clips in a shard."""


def read_clip(path, frames, height, width, fps):
    """The first frames of a video at `fps`, [3, f, h, w] in [0, 1], scaled to cover and cropped in the middle."""
    picked, first, last = [], 0.0, None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                first = frame.time if last is None else first
                # the frame before is the nearest to every time up to half-way
                while last and len(picked) < frames and len(picked) / fps < (last.time + frame.time) / 2 - first:
                    picked.append(last.to_ndarray(format="rgb24"))
                last = frame
                if len(picked) == frames:
                    break
            while last and len(picked) < frames and (len(picked) - 0.5) / fps <= last.time - first:
                picked.append(last.to_ndarray(format="rgb24"))
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise Fatal(f"cannot read {path}: {error}", alone=True) from None
    if len(picked) < frames:
        raise Fatal(
            f"{path} has {len(picked)} of {frames} frames at {fps} a second: leave it out, or lower --frames",
            alone=True,
        )
    video = rearrange(torch.stack([torch.from_numpy(x) for x in picked]).float() / 255, "f h w c -> f c h w")
    scale = max(height / video.shape[2], width / video.shape[3])
    size = [max(n, round(scale * old)) for n, old in zip((height, width), video.shape[2:], strict=True)]
    video = F.interpolate(video, size, mode="bilinear", antialias=True) if size != list(video.shape[2:]) else video
    top, left = ((n - wanted) // 2 for n, wanted in zip(size, (height, width), strict=True))
    return rearrange(video[:, :, top : top + height, left : left + width], "f c h w -> c f h w")


def read_caption(path):
    try:
        caption = " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise Fatal(f"{path} has no caption {path.with_suffix('.txt').name} beside it: {error}") from None
    if not caption:
        raise Fatal(f"{path.with_suffix('.txt')} is empty: write the video's caption into it")
    return caption


def main(args):
    if not args.clips.is_dir():
        raise Fatal(f"no such folder {args.clips}")
    paths = sorted(path for path in args.clips.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise Fatal(f"no videos ({', '.join(sorted(SUFFIXES))}) in {args.clips}")
    check_flags(args)
    captions = [read_caption(path) for path in paths]
    device = common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = with_recipe(dmd2.Args, dmd2.RECIPES, teacher=args.teacher)
    frames, height, width = (getattr(args, name) or getattr(recipe, name) for name in ("frames", "height", "width"))
    model = common.Model(args.teacher, frames, height, width)

    # the folder says what its shards are, so that others are not added to them
    names = [str(path.relative_to(args.clips)) for path in paths]
    files = [*paths, *sorted(file for part in ("vae", "text_encoder") for file in (model.folder / part).iterdir())]
    key, note = str(hashed(names, stamps(files), captions, model.latent_shape, args.shard)), args.out / "key.txt"
    make_folder(args.out, hint="")
    before = [note.read_text() if note.is_file() and any(args.out.glob("*.safetensors")) else key]
    dist.broadcast_object_list(before)
    if before[0] != key:
        raise Fatal(f"{args.out} holds shards of other clips or settings: delete it, or give another folder")
    if rank == 0:
        note.write_text(key)

    encoded = common.encode_text(model, captions, args.out / "text", device)
    vae = model.load_vae(device)
    for first in range(rank * args.shard, len(paths), world * args.shard):
        path, part = args.out / f"{first:08d}.safetensors", range(first, min(first + args.shard, len(paths)))
        if path.is_file():
            continue
        texts = [file.get_tensor(f"{i}.text") for file, i in (encoded.rows[number] for number in part)]
        clips = (read_clip(paths[number], frames, height, width, model.fps) for number in part)
        latents = [common.encode(vae, clip[None])[0] for clip in clips]
        common.write_shard(path, [captions[number] for number in part], texts, latents=latents)
        print(f"clips {first} to {part[-1]} of {len(paths)}", flush=True)
    dist.barrier()
    if rank == 0:
        print(f"{len(paths)} clips in {math.ceil(len(paths) / args.shard)} shards: --data {args.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
