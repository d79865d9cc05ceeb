"""VBench (Huang et al. 2023, arXiv 2311.17982) of a student or its teacher, beside metrics that need no weights.

    python eval_vbench.py all --checkpoint runs/dmd2__tiny__0__… --out eval/student     # 12 captions of the tiny world
    torchrun --nproc_per_node=8 eval_vbench.py generate --checkpoint RUN --vbench-info vbench-0.1.5-….whl --out DIR
    python eval_vbench.py score --out DIR && python eval_vbench.py report --out DIR --compare TEACHER_DIR

generate samples 5 videos of each prompt, score runs VBench in its own environment (make vbench-env) and our metrics,
report writes results.json, results.md and contact sheets. Each step can be killed and started again. A number is
VBench's own or it is not there; a set that is not complete has no totals. Protocol, files and caveats:
docs/eval_vbench.md. What the steps are made of is in evaluation/: folder.py (files and what does not belong),
sampling.py, proxies.py (metrics that are ours), vbench.py (what VBench fixes, and its scorer), report.py, ledger.py.
"""

import json
import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge, Le
from tqdm import tqdm

import common
import dmd2
from evaluation import vbench
from evaluation.folder import (
    files_of,
    find_videos,
    is_done,
    manifest,
    open_folder,
    read_record,
    read_video,
    select,
)
from evaluation.ledger import Ledger, write_json, write_text
from evaluation.proxies import feature_diversity, feature_model, measure, temporal_flickering
from evaluation.report import collect, markdown, summary
from evaluation.sampling import Noise, Source, conditions, configuration, sampler
from models.images import find_images
from models.presets import TINY_WORLD, name_of
from tiny import world as tiny
from training.checkpoints import check_checkpoint
from training.files import UserError, make_folder, read_json, stamps
from training.finished import load_run, student_folders
from training.flags import check_flags, one_line_errors, with_recipe
from training.media import contact_sheet, write_video
from training.run import git_revision


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["generate", "score", "report", "all"]]
    """What to do; all does the three in turn."""
    out: Path
    """Folder of one evaluation: videos/, manifest.jsonl, config.json, scores/, results.json, results.md, sheets/."""
    checkpoint: str | None = None
    """Run folder (its newest checkpoint) or checkpoint folder of any script. RUN:raw samples the student itself where
    the export is its average. For a teacher it only says which teacher, and with which settings."""
    role: Literal["student", "teacher"] = "student"
    """Sample the student by its script's rollout, or the teacher by its ODE with guidance."""
    teacher: str | None = None
    """The teacher (see dmd2.py) instead of the run's: its text encoder and VAE, and with --role teacher its network."""
    guidance_scale: Annotated[float | None, Ge(0)] = None
    """Teacher's guidance instead of the run's, or without a run the recipe's; so are the next five."""
    shift: Annotated[float | None, Ge(1)] = None
    """Shift of the teacher's noise levels."""
    teacher_steps: Annotated[int | None, Ge(1)] = None
    """Euler steps of the teacher."""
    frames: int | None = None
    """Frames of the video; a causal student (--frame-block) can make more than it was trained with."""
    kept_frames: Annotated[int, Ge(0)] = 0
    """Latent frames before a block that a causal student reads, in whole blocks; 0 for all. For longer videos: those of
    training, less a block."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""

    prompts: str | None = None
    """Text file with one prompt per line instead of VBench's list; VBench is not run and there are no totals."""
    vbench_info: str | None = None
    """VBench_full_info.json, or a wheel of the vbench package that holds it. Else the installed package's, here or in
    --vbench-python's environment. The tiny teacher has 12 captions of its world unless this or --prompts is given."""
    images: str | None = None
    """Folder of the first frames of the list for an image-to-video teacher: that of entry n, from 1, is named n."""
    gen_prompts: str | None = None
    """Text file with what to feed the model for each entry of the list, one per line, in its order (augmented prompts).
    Files keep the original prompt's name."""
    samples: Annotated[int, Ge(1), Le(100_000)] = 5
    """Samples of each prompt; VBench wants 5. With more than 100000, seeds would repeat."""
    seed: Annotated[int, Ge(0)] = 0
    """Base seed: sample j of entry i has seed base + 100000 i + j, on any number of processes."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Samples of one prompt in a forward."""
    dims: tuple[str, ...] = ()
    """Only these of VBench's dimensions, and the prompts they need."""
    limit: Annotated[int, Ge(0)] = 0
    """Only the first prompts of the list; 0 for all."""
    cache: str = "runs/cache"
    """Folder for text embeddings."""

    allow_partial: bool = False
    """Score a set that is not complete. Everything is then marked PARTIAL and there are no totals."""
    vbench_python: str | None = None
    """Python of VBench's environment; .venv-vbench/bin/python if that is there."""
    download_weights: bool = False
    """Let VBench download the weights it lacks. Else a dimension that lacks some is not run, and says which."""
    features: Literal["none", "dinov2", "clip"] = "none"
    """Also the diversity of image features, 1 - mean pairwise cosine over the samples of a prompt."""
    features_folder: str | None = None
    """Local folder of that model in the transformers layout, safetensors only."""
    compare: Path | None = None
    """Another --out folder with the same prompts, the teacher's as a rule: a column, and clips on contact sheets."""
    sheets: Annotated[int, Ge(0)] = 8
    """Contact sheets to write, of the first prompts."""


# ------------------------------------------------------------------------------------------------- flags and prompts


def check(args):
    """One line for the first flag that cannot work, before anything is read."""
    check_flags(args)
    if unknown := [name for name in args.dims if name not in vbench.DIMENSIONS]:
        raise UserError(f"--dims: no dimension {unknown[0]!r}; there are {', '.join(vbench.DIMENSIONS)}")
    if args.prompts and (args.vbench_info or args.dims):
        raise UserError("--prompts is a list of its own: leave out --vbench-info and --dims")
    if args.limit and not args.allow_partial and args.command != "generate":
        raise UserError("--limit makes a partial set, which has no totals: add --allow-partial")
    if (args.features != "none") != bool(args.features_folder):
        raise UserError("--features and --features-folder go together")
    if args.features != "none" and args.command in ("score", "all"):
        kind = read_json(Path(args.features_folder) / "config.json").get("model_type")
        if kind != args.features:
            raise UserError(f"{args.features_folder} holds a model of type {kind!r}, not {args.features}")
    if args.vbench_python and not Path(args.vbench_python).is_file():
        raise UserError(f"--vbench-python: no such file {args.vbench_python}; make vbench-env builds one")
    if args.vbench_python and not os.access(args.vbench_python, os.X_OK):
        raise UserError(f"--vbench-python: {args.vbench_python} is no program; make vbench-env builds one")
    if args.compare and not (args.compare / "config.json").is_file():
        raise UserError(f"--compare: {args.compare} is not an evaluation (no config.json)")
    if args.command in ("score", "report") and not (args.out / "config.json").is_file():
        raise UserError(f"{args.out} holds no videos (no config.json): run generate first")
    if args.command in ("generate", "all") and not args.checkpoint and (args.role == "student" or not args.teacher):
        raise UserError("--checkpoint RUN is missing (a teacher alone: --role teacher --teacher NAME)")


def vbench_python(args):
    """Python of VBench's environment, or None."""
    default = Path(__file__).resolve().parent / ".venv-vbench/bin/python"
    # not resolved: a virtual environment's python is a link
    return os.path.abspath(args.vbench_python) if args.vbench_python else (str(default) if default.is_file() else None)


def read_prompt_list(args, teacher):
    """The prompt list, [{"prompt", "fed", "dimensions"}], `fed` being what the model gets; its id if it is VBench's."""
    if args.prompts or (name_of(teacher) in TINY_WORLD and not args.vbench_info):
        if args.dims:
            raise UserError("--dims needs VBench's list, and the tiny teacher's is its captions: pass --vbench-info")
        prompts = common.read_prompts(args.prompts) if args.prompts else tiny.EXAMPLES
        if (args.images or args.gen_prompts) and len(set(prompts)) < len(prompts):
            twice = max(prompts, key=prompts.count)
            raise UserError(
                f"{args.prompts} has {twice!r} twice: files are named after prompts, so each has one image or words"
            )
        entries, list_id = [{"prompt": prompt, "dimensions": []} for prompt in prompts], None
    else:
        text, source = vbench.find_info(args.vbench_info, vbench_python(args))
        if text is None:
            raise UserError(f"VBench's prompts are not here: {source}")
        entries = vbench.read_entries(text, source)
        list_id = vbench.entries_id(entries)
    fed = common.read_prompts(args.gen_prompts) if args.gen_prompts else [entry["prompt"] for entry in entries]
    if len(fed) != len(entries):
        raise UserError(f"{args.gen_prompts} has {len(fed)} lines, the list has {len(entries)} entries")
    return [entry | {"fed": words} for entry, words in zip(entries, fed)], list_id


# --------------------------------------------------------------------------------------------------------- generate


def source_of(args):
    """What is to be sampled: the student or the teacher of a run, or a teacher alone with dmd2.py's recipe."""
    raw = args.role == "student" and args.checkpoint.endswith(":raw")
    if args.checkpoint:
        script, run_args, checkpoint = load_run(args.checkpoint)
        check_checkpoint(checkpoint)
    else:
        script, run_args, checkpoint = dmd2, with_recipe(dmd2.Args, dmd2.RECIPES, teacher=args.teacher), None
    if args.role == "student":
        student_folders(script, run_args, checkpoint)  # one line unless all phases are trained
    names = ("teacher", "guidance_scale", "shift", "teacher_steps", "frames", "height", "width")
    flags = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if args.kept_frames and (args.role == "teacher" or not getattr(run_args, "frame_block", 0)):
        raise UserError("--kept-frames is for a causal student, a run with --frame-block")
    return Source(args.role, script, replace(run_args, **flags), checkpoint, raw, args.kept_frames)


@torch.no_grad()
def generate(args):
    """Sample what is missing, every rank its share. A chunk, the samples of one forward, is a function of the list
    alone, so neither the number of processes nor a restart changes a bit of a video (on one kind of device).
    """
    source = source_of(args)
    make_folder(args.cache, hint="; see --cache")
    entries, list_id = read_prompt_list(args, source.args.teacher)
    items = vbench.distinct(entries, args.samples)
    device = common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    model = common.Model(source.args.teacher, source.args.frames, source.args.height, source.args.width)
    config = [configuration(source, model) if rank == 0 else None]
    dist.broadcast_object_list(config)
    if args.images and not model.conditions:
        raise UserError("--images is for an image-to-video teacher")
    if list_id and model.size[0] == 1:
        raise UserError("VBench's list is for videos: give --prompts, as this teacher makes images")
    for item in items if model.size[0] == 1 else ():
        item["files"] = [f"{file.removesuffix('.mp4')}.png" for file in item["files"]]
    images = find_images(args.images, len(entries)) if args.images else []
    config = config[0] | ({"images": vbench.short_hash(stamps(images))} if images else {}) | {
        "seed": args.seed, "samples": args.samples, "batch_size": args.batch_size, "device": device.type,
        "prompts": vbench.short_hash([(item["entry"], item["prompt"], item["fed"]) for item in items]),
    }  # fmt: skip
    compared(args, config)
    record = {
        "hash": vbench.short_hash(config), "config": config, "vbench_list": list_id, "items": items,
        "checkpoint_path": str(source.checkpoint), "revision": git_revision().split("\n")[0],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "av")},
    }  # fmt: skip
    rows = open_folder(args.out, record) if rank == 0 else {}
    dist.barrier()
    rows, book = rows or manifest(args.out).rows(), manifest(args.out)
    dist.barrier()

    def missing(item, chunk):
        return [j for j in chunk if not is_done(args.out, rows.get(item["files"][j]), record["hash"])]

    wanted, starts = select(items, args.dims, args.limit), range(0, args.samples, args.batch_size)
    chunks = [(item, range(j, min(j + args.batch_size, args.samples))) for item in wanted for j in starts]
    mine = [(item, chunk) for item, chunk in chunks[rank::world] if missing(item, chunk)]
    rounds = torch.tensor(len(mine))
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    if not rounds:
        return
    given = [images[item["entry"]] for item in items] if images else []
    cond_of = conditions(model, [item["fed"] for item in items], given, args.cache, device)
    row_of = {item["entry"]: row for row, item in enumerate(items)}
    sample, vae = sampler(source, model, args.cache, device), model.load_vae(device)

    with tqdm(range(int(rounds)), desc="generate", disable=rank > 0) as bar:
        for i in bar:
            # sharded networks run in step on all ranks: who has nothing left makes a chunk again and drops it
            item, chunk = mine[i] if i < len(mine) else chunks[0]
            seeds = [args.seed + 100_000 * item["entry"] + j for j in chunk]
            latents = sample(Noise(seeds, device), cond_of([row_of[item["entry"]]] * len(chunk)))
            for j in missing(item, chunk) if i < len(mine) else []:
                video, file = common.decode(vae, latents[j - chunk[0], None])[0].cpu(), item["files"][j]
                try:
                    write_video(args.out / "videos" / file, video, model.fps)
                except (OSError, ValueError, RuntimeError) as error:
                    raise UserError(f"cannot write {file!r} (entry {item['entry']}): {error}", 1, alone=True) from None
                book.append({
                    "file": file, "entry": item["entry"], "sample": j, "prompt": item["prompt"], "fed": item["fed"],
                    "seed": seeds[j - chunk[0]], "bytes": (args.out / "videos" / file).stat().st_size,
                    "config": record["hash"],
                    **{key: config[key] for key in ("checkpoint", "sigmas", "nfe", "text_encoder", "video", "fps")},
                })  # fmt: skip
    dist.barrier()
    if rank == 0:
        book.merge()
    dist.barrier()


# ------------------------------------------------------------------------------------------------------------ score


def own_metrics(args, record, videos):
    """Our metrics of every prompt whose row is not there yet, into scores/proxies.jsonl, every rank its share."""
    device = common.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    make_folder(args.out / "scores", hint="; see --out")
    book = Ledger(args.out / "scores", "proxies", "prompt", lambda row: row["entry"])
    extract = feature_model(args.features, args.features_folder, device) if args.features != "none" else None
    if rank == 0:
        book.merge()
    dist.barrier()
    rows = book.rows()
    dist.barrier()
    with tqdm(videos.items[rank::world], desc="metrics", disable=rank > 0) as bar:
        for item in bar:
            files = {file: videos.files[file] for file in item["files"] if file in videos.files}
            old = rows.get(item["prompt"], {"files": None, "values": {}})
            wanted = f"diversity_{args.features}"
            if not files or (old["files"] == files and (extract is None or wanted in old["values"] or len(files) < 2)):
                continue
            clips = [read_video(args.out / "videos" / file) for file in files]
            for file, clip in zip(files, clips):
                if clip.shape[1] != record["config"]["frames"]:
                    short = f"{file!r} has {clip.shape[1]} of {record['config']['frames']} frames"
                    raise UserError(f"{short}: delete it and generate it again", code=1, alone=True)
            clips = torch.stack(clips)
            values = old["values"] if old["files"] == files else measure(clips, record["config"]["fps"])
            if extract and len(clips) > 1:
                values[wanted] = feature_diversity(extract(clips))
            flicker = [temporal_flickering(clip) for clip in clips]
            row = {"prompt": item["prompt"], "entry": item["entry"], "files": files, "values": values}
            book.append(row | {"flicker": flicker})
    dist.barrier()
    if rank == 0:
        book.merge()
    dist.barrier()


def score(args):
    """Our metrics, then VBench's dimensions in turn, each into scores/<dimension>.json. Returns the rejected ones."""
    record = read_record(args.out)
    videos = find_videos(args.out, record, args.dims, args.limit, args.allow_partial)
    common.init_distributed()
    own_metrics(args, record, videos)
    rank = dist.get_rank()
    if dist.get_world_size() > 1:
        dist.destroy_process_group()  # the others are done, and VBench may take longer than a collective waits
    if rank:
        return []
    folder, python = args.out / "scores", vbench_python(args)
    environment, why = None, "VBench is not installed: make vbench-env"
    if not record["vbench_list"]:
        why = "the prompts are not VBench's list"
    elif python:
        environment, why = vbench.probe(python)
    if not why:
        text, source = vbench.find_info(args.vbench_info, python)
        if text is None or vbench.entries_id(vbench.read_entries(text, source)) != record["vbench_list"]:
            raise UserError(f"the videos are of another prompt list than {source}: pass the same --vbench-info")
        write_text(folder / "VBench_full_info.json", text)
    rejected = []
    for dimension in args.dims or vbench.DIMENSIONS:
        path, files = folder / f"{dimension}.json", files_of(dimension, videos.items, videos.files)
        of_videos = vbench.short_hash([record["hash"], sorted(files.items())])
        old = read_json(path) if path.is_file() else {}
        if "raw" in old and old["videos"] == of_videos:
            continue
        reason = why or (None if files else "none of its videos are there")
        reason = reason or (None if args.download_weights else vbench.lacking(dimension, environment))
        result = {"reason": reason}
        if not reason:
            info, work = folder / "VBench_full_info.json", folder / f".{dimension}"
            result = vbench.run_dimension(python, dimension, info, args.out / "videos", files, work)
        rejected += [dimension] if result.get("rejected") else []
        write_json(path, result | {"videos": of_videos, "versions": (environment or {}).get("versions")})
        if not reason:
            print(f"{dimension}: {result.get('raw', 'rejected: ' + str(result.get('reason')))}", flush=True)
    return rejected


# ----------------------------------------------------------------------------------------------------------- report


def compared(args, config):
    """config.json of --compare, None without it; one line if it is of other prompts than this configuration."""
    known = read_record(args.compare) if args.compare else None
    if known and known["config"]["prompts"] != config["prompts"]:
        raise UserError(f"--compare: {args.compare} is of other prompts")
    return known


def report(args):
    """Write results.json, results.md and contact sheets from what is there. On rank 0 alone."""
    record = read_record(args.out)
    which, other = (args.dims, args.limit, args.allow_partial), None
    known = compared(args, record["config"])
    results = collect(args.out, record, find_videos(args.out, record, *which))
    shown = [(record["config"]["role"], args.out / "videos")]
    if known:
        other = collect(args.compare, known, find_videos(args.compare, known, *which))
        shown.append((f"{known['config']['role']} (--compare)", args.compare / "videos"))
    (args.out / "sheets").mkdir(exist_ok=True)
    for item in select(record["items"], args.dims, args.limit)[: args.sheets]:
        rows = []
        for label, folder in shown:
            clips = [read_video(folder / file) for file in item["files"][:5] if (folder / file).is_file()]
            rows += [(f"{label}: {item['prompt']}", clips)] if clips else []
        if rows:
            contact_sheet(args.out / "sheets" / f"{item['entry']:04d}.png", rows, frames=8)
    # NaN is no JSON
    write_json(args.out / "results.json", json.loads(json.dumps(results), parse_constant=lambda _: None))
    write_text(args.out / "results.md", markdown(results, other))
    print(f"{summary(results, other)}\n\n{args.out / 'results.md'}, results.json and sheets/ beside it")


def main(args):
    check(args)
    rejected = []
    if args.command in ("generate", "all"):
        generate(args)
        if dist.get_rank() == 0:
            print(f"videos: {args.out / 'videos'}, one row each in {args.out / 'manifest.jsonl'}", flush=True)
    if args.command in ("score", "all"):
        rejected = score(args)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"scores: {args.out / 'scores'}", flush=True)
    if args.command in ("report", "all") and int(os.environ.get("RANK", 0)) == 0:
        report(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rejected:
        raise UserError(f"VBench's results were rejected for {', '.join(rejected)}", code=1)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
