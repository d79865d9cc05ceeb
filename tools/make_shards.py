"""Encode a folder of captioned videos into the latent shards that --data reads. Once, before training.

    torchrun --nproc_per_node=8 tools/make_shards.py clips/ shards/ --teacher wan2.1-1.3b
    torchrun --nproc_per_node=8 dmd2.py --data shards/ --teacher wan2.1-1.3b

Beside every video (avi, m4v, mkv, mov, mp4, webm), for a teacher of images also beside every picture (jpg, png, webp),
lies its caption, UTF-8, in a .txt of the same name; or --metadata is a table of all. A clip is the first frames of a
video at the teacher's frame rate (nearest in time), as ffplay shows them, scaled to cover height x width and cropped in
the middle, encoded to the posterior's mode.

A video that cannot be used is skipped, and skipped.txt beside the shards says why. Run it again after an interruption,
or with more clips: it encodes those that no shard holds yet.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge
from pydantic.dataclasses import dataclass

import common
import dmd2
from models.images import SUFFIXES as PICTURES
from models.images import read_images
from models.latents import encode
from tools.video_in import read_clip
from training.files import UserError, hashed, opened, read_shard, readable, stamps, write_shard, written_aside
from training.flags import cli, one_line_errors, recipe_args

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}  # in any case
READER = 2  # one more whenever read_clip gives other pixels, so that old shards are not taken for new ones


@dataclass
class Args:
    clips: tyro.conf.Positional[Path]
    """Folder of videos with captions beside them; looked through with its subfolders."""
    out: tyro.conf.Positional[Path]
    """Folder for the shards."""
    metadata: Path | None = None
    """Table of videos and captions, in place of .txt files: JSONL, or CSV with a header. Columns: file_name (below the
    folder of clips) and caption."""
    teacher: str = "tiny"
    """Whose VAE and encoders: a name (docs/teachers.md), or a local folder in the diffusers layout, perhaps :i2v."""
    frames: Annotated[int | None, Ge(1)] = None
    """Frames of a clip; a shorter video is skipped. None: as many as the scripts train on with this teacher."""
    height: Annotated[int | None, Ge(1)] = None
    """Height in pixels. None: the scripts' with this teacher."""
    width: Annotated[int | None, Ge(1)] = None
    """Width in pixels. None: the scripts' with this teacher."""
    shard: Annotated[int, Ge(1)] = 64
    """Clips in a shard."""


def find_clips(folder, metadata=None, suffixes=VIDEOS):
    """(clips, skipped): lists of (name, caption), each once, and (name, reason). A name is a path below the folder.
    metadata: a table of them, see read_table, or None where each file of these suffixes has its caption in a .txt file.
    """
    if metadata:
        rows = read_table(metadata)
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        rows = [(str(path.relative_to(folder)), read_caption(path.with_suffix(".txt"))) for path in files]
    clips, skipped = {}, []
    for name, caption in rows:
        caption = " ".join((caption or "").split())
        if not caption:
            skipped.append((name, "it has no caption in UTF-8"))
        elif not (folder / name).is_file():
            skipped.append((name, "there is no such file"))
        else:
            clips[name, caption] = None
    return list(clips), skipped


def read_caption(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def read_table(path):
    """[(file_name, caption)] of a UTF-8 table with these columns: CSV with a header, or JSON objects, one a line."""
    with readable(f"{path} as a table of file_name and caption"), open(path, encoding="utf-8-sig", newline="") as file:
        rows = [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))
        if any(None in row for row in rows):  # a caption with commas and without quotes would be cut
            raise ValueError("a row has more fields than the header: put captions that hold commas into quotes")
        return [(row["file_name"], row["caption"]) for row in rows]


def survey(args, model):
    """(todo, done, skipped): [(key, name, caption)] that no shard in args.out has, how many one has, [(name, reason)].

    A clip's key is a number of its name, contents and caption and of all settings; shards keep the keys of their clips.
    """
    clips, skipped = find_clips(args.clips, args.metadata, VIDEOS | set(PICTURES if model.size[0] == 1 else ()))
    parts = ("vae", "tokenizer", *model.family.text_parts, *(("image_encoder",) if model.conditions else ()))
    encoders = stamps(model.folder / part for part in parts)
    shapes = (model.latent_shape, *((model.conditions,) if model.conditions else ()))
    settings = hashed(READER, *model.size, model.fps, *shapes, model.text_length, encoders)
    stamped = ((name, stamps([args.clips / name]), caption) for name, caption in clips)
    keyed = {hashed(settings, *clip): (clip[0], clip[2]) for clip in stamped}
    done = set()
    for path in args.out.glob("*.safetensors"):
        _, names, _ = read_shard(path)
        own = {opened(path).get_tensor(name).item() for name in names if name.endswith(".clip")}
        if not own or not own <= keyed.keys():
            raise UserError(f"{path} is of other clips or settings: delete it, or give another folder")
        done |= own
    return [(key, *clip) for key, clip in keyed.items() if key not in done], len(done), skipped


def main(args):
    if not args.clips.is_dir():  # before a teacher is fetched
        raise UserError(f"no such folder: {args.clips}")
    device = common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = recipe_args(dmd2.Args, teacher=args.teacher)
    frames, height, width = (getattr(args, name) or getattr(recipe, name) for name in ("frames", "height", "width"))
    model = common.Model(args.teacher, frames, height, width)
    found = [survey(args, model) if rank == 0 else None]
    dist.broadcast_object_list(found)
    (todo, done, skipped), count = found[0], 0
    args.out.mkdir(parents=True, exist_ok=True)
    if todo:
        encoded = common.encode_text(model, [caption for *_, caption in todo], args.out / "text", device)
        vae, read = model.load_vae(device), model.image_encoder(device)

    skipped = skipped if rank == 0 else []
    for first in range(rank * args.shard, len(todo), world * args.shard):
        kept, tensors = [], defaultdict(list)
        for number, (_, name, _) in enumerate(todo[first : first + args.shard], first):
            try:
                path = args.clips / name
                if frames == 1 and path.suffix.lower() in PICTURES:
                    video = read_images([path], height, width)
                else:
                    video = read_clip(path, frames, height, width, model.fps)[None]
            except UserError as error:
                skipped.append((name, str(error)))
                continue
            kept.append(number)
            tensors["latents"].append(encode(vae, video)[0].cpu())
            for key, value in read(video[:, :, :1]).items():  # what an image-to-video teacher reads of the first frame
                tensors[key].append(value[0].cpu())
        if kept:
            captions, keys = [todo[number][2] for number in kept], [todo[number][0] for number in kept]
            texts = [opened(file).get_tensor(f"{i}.text") for file, i in (encoded.rows[number] for number in kept)]
            path = args.out / f"{done + first:08d}_{hashed(*keys):016x}.safetensors"
            write_shard(path, captions, texts, **tensors, clip=[torch.tensor(key) for key in keys])
        count += len(kept)
        print(f"clips {first} to {first + args.shard} of {len(todo)}: {len(kept)} kept", flush=True)

    ranks = [None] * world
    dist.all_gather_object(ranks, (count, skipped))
    dist.destroy_process_group()
    if rank == 0:
        lines = sorted(f"{name}\t{reason}" for _, own in ranks for name, reason in own)
        with written_aside(args.out / "skipped.txt") as aside:
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        done += sum(count for count, _ in ranks)
        if not done:
            raise UserError(
                f"no clip of {args.clips} can be used; {len(lines)} skipped, see {args.out / 'skipped.txt'}"
            )
        print(f"{done} clips: --data {args.out}; {len(lines)} skipped, see {args.out / 'skipped.txt'}")


if __name__ == "__main__":
    with one_line_errors():
        main(cli(Args, description=__doc__))
