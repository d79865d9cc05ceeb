"""Encode a folder of captioned videos into the latent shards that --data reads. Once, before training.

    torchrun --nproc_per_node=8 tools/make_shards.py clips/ shards/ --teacher wan2.1-1.3b
    torchrun --nproc_per_node=8 dmd2.py --data shards/ --teacher wan2.1-1.3b

Beside every video (avi, m4v, mkv, mov, mp4, webm) lies its caption, UTF-8, in a .txt of the same name; or --metadata is
a table of all. A clip is the first frames of a video at the teacher's frame rate (nearest in time), as ffplay shows
them, scaled to cover height x width and cropped in the middle, encoded to the posterior's mode.

A video that cannot be used is skipped, and skipped.txt beside the shards says why. Run it again after an interruption,
or with more clips: it encodes those that no shard holds yet.
"""

import secrets
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge
from safetensors import SafetensorError, safe_open

import common
import dmd2
from tools.video_in.clips import SUFFIXES, find_clips
from tools.video_in.video import Unreadable, read_clip
from training.files import UserError, hashed, make_folder, opened, stamps, write_shard, written_aside
from training.flags import check_flags, one_line_errors, with_recipe

READER = 2  # one more whenever read_clip gives other pixels, so that old shards are not taken for new ones
LISTED = 20  # skipped clips that are printed; skipped.txt has all


@dataclass
class Args:
    clips: tyro.conf.Positional[Path]
    """Folder of videos with captions beside them; looked through with its subfolders and links to folders."""
    out: tyro.conf.Positional[Path]
    """Folder for the shards."""
    metadata: Path | None = None
    """Table of videos and captions, in place of .txt files: JSONL, or CSV with a header. Columns: file_name, path,
    video or file (below the folder of clips), and caption, text or prompt."""
    teacher: str = "wan2.1-1.3b"
    """Whose VAE and encoders: a name (docs/teachers.md), or a local folder in the diffusers layout, perhaps :i2v."""
    frames: Annotated[int | None, Ge(1)] = None
    """Frames of a clip; a shorter video is skipped. None: as many as the scripts train on with this teacher."""
    height: Annotated[int | None, Ge(1)] = None
    """Height in pixels. None: the scripts' with this teacher."""
    width: Annotated[int | None, Ge(1)] = None
    """Width in pixels. None: the scripts' with this teacher."""
    shard: Annotated[int, Ge(1)] = 64
    """Clips in a shard."""


def from_rank_0(function):
    """What `function` returns on rank 0, on every rank; a UserError there is raised on all."""
    told = [None]
    if dist.get_rank() == 0:
        try:
            told = [function()]
        except UserError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], UserError):
        raise told[0]
    return told[0]


def turns(count, name):
    """Numbers below `count`, each on one rank only: whoever is free takes the next, so that none waits for long."""
    store = dist.distributed_c10d._get_default_store()
    while (turn := store.add(f"make_shards/{name}", 1) - 1) < count:
        yield turn


def settings_key(model, frames, height, width):
    """A number of all that turns videos and captions into what the shards hold."""
    parts = ("vae", "tokenizer", *model.family.text_parts, *(("image_encoder",) if model.conditions else ()))
    encoders = stamps([file for part in parts for file in sorted((model.folder / part).glob("*")) if file.is_file()])
    shapes = (model.latent_shape, *((model.conditions,) if model.conditions else ()))
    return hashed(READER, frames, height, width, model.fps, *shapes, model.text_length, encoders)


def keys_in(out):
    """{shard's path: keys of its clips} of the finished shards in a folder."""
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found[path] = {file.get_tensor(name).item() for name in file.keys() if name.endswith(".clip")}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read shard {path} ({error}): delete it, and it is made again") from None
    return found


def survey(args, model, frames, height, width):
    """(todo, done, skipped): [(key, Clip)] that no shard in args.out holds, how many one does, [(name, reason)].

    A clip's key is a number of its name, contents and caption and of the settings; shards keep the keys of their clips.
    """
    clips, skipped, aside = find_clips(args.clips, args.metadata, args.out)
    said = ", ".join(f"{n} {kind}" for kind, n in sorted(aside.items()))
    if not clips and not skipped:
        raise UserError(
            f"no videos ({', '.join(sorted(SUFFIXES))}) in {args.clips}" + (f"; it has {said}" if said else "")
        )
    if said:
        print(f"left aside in {args.clips}: {said}")
    settings, keyed = settings_key(model, frames, height, width), {}
    for clip in clips:
        try:
            keyed[hashed(settings, clip.name, stamps([clip.path]), clip.caption)] = clip
        except OSError as error:
            skipped.append((clip.name, f"it cannot be read: {error.strerror}"))
    shards = keys_in(args.out)
    others = [path.name for path, keys in shards.items() if not keys or not keys <= keyed.keys()]
    if others:
        raise UserError(
            f"{args.out} holds shards of other clips or settings ({', '.join(others[:3])}{', …' * (len(others) > 3)}): "
            "delete these, and what belongs in them is encoded again, or give another folder"
        )
    done = set().union(*shards.values())
    return [(key, clip) for key, clip in keyed.items() if key not in done], len(done), skipped


def report(out, done, skipped):
    """Print and write to skipped.txt what was skipped and why, one clip a line, and say what there is."""
    clean = lambda text: " ".join(text.encode(errors="replace").decode().split())
    lines = [f"{clean(name)}\t{clean(reason)}" for name, reason in sorted(skipped)]
    file = out / "skipped.txt"
    if lines:
        with written_aside(file) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)
    for line in lines[:LISTED]:
        print("skipped " + line.replace("\t", ": "))
    more = f"; {len(lines)} skipped, see {file}" if lines else ""
    if not done:
        raise UserError(f"not one clip can be used{more}")
    print(f"{done} clips in {len(list(out.glob('*.safetensors')))} shards: --data {out}{more}")


def main(args):
    if not args.clips.is_dir():
        raise UserError(f"no such folder {args.clips}")
    check_flags(args)
    device = common.init_distributed()
    recipe = with_recipe(dmd2.Args, dmd2.RECIPES, teacher=args.teacher)
    frames, height, width = (getattr(args, name) or getattr(recipe, name) for name in ("frames", "height", "width"))
    model = common.Model(args.teacher, frames, height, width)
    todo, done, skipped = from_rank_0(lambda: survey(args, model, frames, height, width))
    make_folder(args.out, hint="")
    parts = [range(first, min(first + args.shard, len(todo))) for first in range(0, len(todo), args.shard)]
    name = from_rank_0(lambda: secrets.token_hex(8))

    if todo:
        encoded = common.encode_text(model, [clip.caption for _, clip in todo], args.out / "text", device)
        vae, read = model.load_vae(device), model.image_encoder(device)
    skipped, encoded_here = skipped if dist.get_rank() == 0 else [], 0
    for turn in turns(len(parts), name):
        kept, tensors = [], defaultdict(list)
        for number in parts[turn]:
            clip = todo[number][1]
            try:
                video = read_clip(clip.path, frames, height, width, model.fps)[None]
                own = {"latents": common.encode(vae, video), **read(video[:, :, :1])}  # and what its first frame gives
                if not own["latents"].isfinite().all():
                    raise Unreadable("the VAE gives latents that are not finite")
            except Unreadable as error:
                skipped.append((clip.name, str(error)))
                continue
            kept.append(number)
            for key, value in own.items():
                tensors[key].append(value[0].cpu())
        if kept:
            captions, keys = zip(*((todo[number][1].caption, todo[number][0]) for number in kept), strict=True)
            texts = [opened(file).get_tensor(f"{i}.text") for file, i in (encoded.rows[number] for number in kept)]
            path = args.out / f"{done + parts[turn][0]:08d}_{hashed(*keys):016x}.safetensors"
            write_shard(path, list(captions), texts, **tensors, clip=[torch.tensor(key) for key in keys])
        encoded_here += len(kept)
        print(
            f"shard {turn + 1} of {len(parts)}: {len(kept)} clips, {len(parts[turn]) - len(kept)} skipped", flush=True
        )

    # every rank is here within the time of one shard
    all_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, (encoded_here, skipped))
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        report(args.out, done + sum(n for n, _ in all_ranks), [line for _, lines in all_ranks for line in lines])


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
