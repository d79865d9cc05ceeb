"""VBench (Huang et al. 2023, arXiv 2311.17982) of a student or its teacher, beside metrics that need no weights.

    python eval_vbench.py all --checkpoint runs/dmd2__tiny__0__… --out eval/student     # the tiny teacher's 12 captions
    torchrun --nproc_per_node=8 eval_vbench.py generate --checkpoint RUN --vbench-info vbench-0.1.5-….whl --out DIR
    python eval_vbench.py score --out DIR && python eval_vbench.py report --out DIR --compare TEACHER_DIR

generate samples 5 videos of each prompt, score runs VBench in its own environment (make vbench-env) and our metrics,
report writes results.json, results.md and contact sheets. Each step can be killed and started again. A number is
VBench's own or it is not there; a set that is not complete has no totals. Protocol, files and caveats:
docs/eval_vbench.md.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from einops import rearrange, reduce
from tqdm import tqdm

import common
import dmd2
from tiny import data as tiny
from tools import evidence, metrics, vbench
from tools.ledger import Ledger, write_json, write_text


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
    guidance_scale: float | None = None
    """Teacher's guidance instead of the run's, or without a run the recipe's; so are the next five."""
    shift: float | None = None
    """Shift of the teacher's noise levels."""
    teacher_steps: int | None = None
    """Euler steps of the teacher."""
    frames: int | None = None
    """Frames of the video."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""

    prompts: str | None = None
    """Text file with one prompt a line instead of VBench's list; VBench is not run and there are no totals."""
    vbench_info: str | None = None
    """VBench_full_info.json, or a wheel of the vbench package that holds it. Else the installed package's, here or in
    --vbench-python's environment. The tiny teacher has its 12 captions unless this or --prompts is given."""
    gen_prompts: str | None = None
    """Text file with what to feed the model for each entry of the list, one a line, in its order (augmented prompts).
    Files keep the original prompt's name."""
    samples: int = 5
    """Samples of each prompt; VBench wants 5."""
    seed: int = 0
    """Base seed: sample j of entry i has seed base + 100000 i + j, on any number of processes."""
    batch_size: int = 1
    """Samples of one prompt in a forward."""
    dims: tuple[str, ...] = ()
    """Only these of VBench's dimensions, and the prompts they need."""
    limit: int = 0
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
    sheets: int = 8
    """Contact sheets to write, of the first prompts."""


# ------------------------------------------------------------------------------------------------- prompts and files


def check(args):
    """One line for the first flag that cannot work, before anything is read."""
    lowest = {"samples": 1, "batch_size": 1, "limit": 0, "sheets": 0, "seed": 0, "teacher_steps": 1, "shift": 1}
    for name, low in lowest.items():
        if (value := getattr(args, name)) is not None and not value >= low:
            raise common.Fatal(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if unknown := [name for name in args.dims if name not in vbench.DIMENSIONS]:
        raise common.Fatal(f"--dims: no dimension {unknown[0]!r}; there are {', '.join(vbench.DIMENSIONS)}")
    if args.samples > 100_000:
        raise common.Fatal(f"--samples must be at most 100000, or seeds repeat, got {args.samples}")
    if args.prompts and (args.vbench_info or args.dims):
        raise common.Fatal("--prompts is a list of its own: leave out --vbench-info and --dims")
    if args.limit and not args.allow_partial and args.command != "generate":
        raise common.Fatal("--limit makes a partial set, which has no totals: add --allow-partial")
    if (args.features != "none") != bool(args.features_folder):
        raise common.Fatal("--features and --features-folder go together")
    if args.features != "none" and args.command in ("score", "all"):
        kind = common.read_json(Path(args.features_folder) / "config.json").get("model_type")
        if kind != args.features:
            raise common.Fatal(f"{args.features_folder} holds a model of type {kind!r}, not {args.features}")
    if args.vbench_python and not Path(args.vbench_python).is_file():
        raise common.Fatal(f"--vbench-python: no such file {args.vbench_python}; make vbench-env builds one")
    if args.vbench_python and not os.access(args.vbench_python, os.X_OK):
        raise common.Fatal(f"--vbench-python: {args.vbench_python} is no program; make vbench-env builds one")
    if args.compare and not (args.compare / "config.json").is_file():
        raise common.Fatal(f"--compare: {args.compare} is not an evaluation (no config.json)")
    if args.command in ("score", "report") and not (args.out / "config.json").is_file():
        raise common.Fatal(f"{args.out} holds no videos (no config.json): run generate first")
    if args.command in ("generate", "all") and not args.checkpoint and (args.role == "student" or not args.teacher):
        raise common.Fatal("--checkpoint RUN is missing (a teacher alone: --role teacher --teacher NAME)")


def vbench_python(args):
    """Python of VBench's environment, or None."""
    default = Path(__file__).resolve().parent / ".venv-vbench/bin/python"
    # not resolved: a virtual environment's python is a link
    return os.path.abspath(args.vbench_python) if args.vbench_python else (str(default) if default.is_file() else None)


def read_prompt_list(args, teacher):
    """The prompt list, [{"prompt", "fed", "dimensions"}], `fed` being what the model gets; its id if it is VBench's."""
    if args.prompts or (common.recipe_name(teacher) == "tiny" and not args.vbench_info):
        if args.dims:
            raise common.Fatal("--dims needs VBench's list, and the tiny teacher's is its captions: pass --vbench-info")
        prompts = common.read_prompts(args.prompts) if args.prompts else tiny.CAPTIONS
        entries, list_id = [{"prompt": prompt, "dimensions": []} for prompt in prompts], None
    else:
        text, source = vbench.find_info(args.vbench_info, vbench_python(args))
        if text is None:
            raise common.Fatal(f"VBench's prompts are not here: {source}")
        entries = vbench.read_entries(text, source)
        list_id = vbench.entries_id(entries)
    fed = common.read_prompts(args.gen_prompts) if args.gen_prompts else [entry["prompt"] for entry in entries]
    if len(fed) != len(entries):
        raise common.Fatal(f"{args.gen_prompts} has {len(fed)} lines, the list has {len(entries)} entries")
    return [entry | {"fed": words} for entry, words in zip(entries, fed)], list_id


def select(items, args):
    """The items that --dims and --limit ask for."""
    wanted = [item for item in items if not args.dims or set(args.dims) & set(item["dimensions"])]
    return wanted[: args.limit or None]


def manifest(out):
    return Ledger(out, "manifest", "file", lambda row: (row["entry"], row["sample"]))


def is_done(out, row, config_hash):
    """Whether the video of a manifest row (or None) is there, whole, and of this configuration."""
    path = out / "videos" / row["file"] if row and row["config"] == config_hash else None
    return path is not None and path.is_file() and path.stat().st_size == row["bytes"]


def files_of(dimension, items, found):
    """{file: bytes} of a dimension's videos that are there, 5 a prompt at most. found None: of all, {file: None}."""
    names = [name for item in items if dimension in item["dimensions"] for name in item["files"][:5]]
    return {name: found[name] for name in names if name in found} if found is not None else dict.fromkeys(names)


# --------------------------------------------------------------------------------------------------------- generate


class Noise:
    """What a sampler draws from: sample k's numbers come from a generator on the CPU with seed seeds[k]."""

    def __init__(self, seeds, device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __len__(self):
        return len(self.generators)

    def normal(self, shape):
        """Standard normal [b, *shape], float32, on the device."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


def contents_id(folder, contents=True):
    """Hash of a folder's files: names, sizes, configs and, with `contents`, every byte."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if contents or path.suffix == ".json":
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()


def run_of(args):
    """(script, its Args with this command's on top, checkpoint or None) of what is to be sampled."""
    if args.checkpoint:
        script, run_args, checkpoint = evidence.load_run(args.checkpoint)
        common.check_checkpoint(checkpoint)
    else:
        script, checkpoint = dmd2, None
        run_args = common.with_recipe(dmd2.Args, dmd2.RECIPES, teacher=args.teacher)
    names = ("teacher", "guidance_scale", "shift", "teacher_steps", "frames", "height", "width")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return script, replace(run_args, **flags), checkpoint


def configuration(args, script, run_args, checkpoint, spec, device, items):
    """All that decides the pixels, as a dict for JSON; not the number of processes, --dims or --limit."""
    if args.role == "teacher":
        weights, steps, shift = spec.folder / "transformer", run_args.teacher_steps, run_args.shift
        u = [1 - i / steps for i in range(steps)]
        sigmas = [round(shift * x / (1 + (shift - 1) * x), 6) for x in u]
        evaluations = 2 * steps  # both halves of guidance
        how = {"guidance_scale": run_args.guidance_scale, "shift": shift, "negative_prompt": spec.negative_prompt}
    else:
        raw = args.checkpoint.endswith(":raw")
        weights, sigmas = checkpoint / ("state" if raw else "student"), list(getattr(run_args, "student_sigmas", [1.0]))
        evaluations, how = len(sigmas), {"averaged": not raw, "phase_ends": list(getattr(run_args, "phase_ends", []))}
    return {
        "role": args.role, "script": f"{script.__name__}.py" if args.role == "student" else "dmd2.py", **how,
        "teacher": common.recipe_name(run_args.teacher), "checkpoint": contents_id(weights),
        "text_encoder": contents_id(spec.folder / "text_encoder", contents=False),
        "vae": contents_id(spec.folder / "vae"), "sigmas": sigmas, "nfe": evaluations,
        "frames": run_args.frames, "height": run_args.height, "width": run_args.width, "fps": spec.fps,
        "video": {"codec": "libx264", **metrics.h264_options(run_args.height, run_args.width)},
        "seed": args.seed, "samples": args.samples, "batch_size": args.batch_size,
        "device": device.type,
        "prompts": vbench.short_hash([(item["entry"], item["prompt"], item["fed"]) for item in items]),
    }  # fmt: skip


def read_record(folder):
    """config.json of an evaluation's folder."""
    record = common.read_json(folder / "config.json")
    if not {"hash", "config", "items", "vbench_list"} <= record.keys() or "prompts" not in record["config"]:
        raise common.Fatal(f"{folder} is no evaluation: its config.json is of something else")
    return record


def read_video(path, bar=None):
    """The frames of an evaluation's video, [3, f, h, w] in [0, 1]; closes the bar before it complains."""
    try:
        return metrics.read_mp4(path)
    except ValueError as error:
        if bar:
            bar.close()
        raise common.Fatal(f"{error}: delete it and generate it again", code=1, alone=True) from None


def refuse_mixed(out, record, rows):
    """One line for a file that is no video of the list, or a manifest row of another configuration."""
    known = {file for item in record["items"] for file in item["files"]}
    if strays := sorted({path.name for path in (out / "videos").glob("*")} - known):
        raise common.Fatal(f"{out / 'videos'} holds {strays[0]!r}, no video of this list ({len(strays)} such): move it")
    if mixed := [row["file"] for row in rows.values() if row["config"] != record["hash"]]:
        raise common.Fatal(f"the manifest in {out} mixes configurations ({mixed[0]!r}): generate into another --out")


def open_folder(args, record):
    """On rank 0: make the folder, or check that what is in it belongs to this configuration. Returns the rows."""
    before, videos = args.out / "config.json", args.out / "videos"
    if before.is_file():
        known = read_record(args.out)["config"]
        differ = [k for k in sorted({*known, *record["config"]}) if known.get(k) != record["config"].get(k)]
        if differ:
            raise common.Fatal(
                f"{args.out} holds videos of another configuration ({', '.join(differ)}): use another --out"
            )
    elif args.out.is_dir() and any(args.out.iterdir()):
        raise common.Fatal(f"{args.out} is not empty and no evaluation (no config.json): use another --out")
    common.make_folder(videos, hint="; see --out")
    for leftover in videos.glob(".*.mp4.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    rows = manifest(args.out).merge()
    refuse_mixed(args.out, record, rows)
    if not before.is_file():
        write_json(before, record)
    return rows


@torch.no_grad()
def generate(args):
    """Sample what is missing, every rank its share. A chunk, the samples of one forward, is a function of the list
    alone, so neither the number of processes nor a restart changes a bit of a video (on one kind of device).
    """
    script, run_args, checkpoint = run_of(args)
    entries, list_id = read_prompt_list(args, run_args.teacher)
    items = vbench.distinct(entries, args.samples)
    rank, world, device = common.init_distributed()
    spec = common.Teacher(run_args.teacher, run_args.frames, run_args.height, run_args.width)
    config = [configuration(args, script, run_args, checkpoint, spec, device, items) if rank == 0 else None]
    dist.broadcast_object_list(config)
    config = config[0]
    compared(args, config)
    record = {
        "hash": vbench.short_hash(config), "config": config, "vbench_list": list_id, "items": items,
        "checkpoint_path": str(checkpoint), "revision": common.git_revision().split("\n")[0],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "av")},
    }  # fmt: skip
    rows = open_folder(args, record) if rank == 0 else {}
    dist.barrier()
    rows, book = rows or manifest(args.out).rows(), manifest(args.out)
    dist.barrier()

    def missing(item, chunk):
        return [j for j in chunk if not is_done(args.out, rows.get(item["files"][j]), record["hash"])]

    starts = range(0, args.samples, args.batch_size)
    chunks = [(item, range(j, min(j + args.batch_size, args.samples))) for item in select(items, args) for j in starts]
    mine = [(item, chunk) for item, chunk in chunks[rank::world] if missing(item, chunk)]
    rounds = torch.tensor(len(mine))
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    if not rounds:
        return
    fed = [item["fed"] for item in items]
    text = common.encode_text(spec, fed, args.cache, device)
    if args.role == "teacher":
        network = spec.load_network(False, device)
        null = common.encode_text(spec, [spec.negative_prompt], args.cache, device).cond_of([0])
        solver = (null, run_args.guidance_scale, run_args.shift, run_args.teacher_steps)

        def sample(rng, cond):
            return dmd2.solve_ode(network, rng.normal(spec.latent_shape), cond, *solver)
    else:
        sample = evidence.sampler(spec, device, script, run_args, checkpoint, args.checkpoint.endswith(":raw"))
    vae, row_of = spec.family.load_vae(spec.folder, device), {item["entry"]: row for row, item in enumerate(items)}

    bar = tqdm(range(int(rounds)), desc="generate", disable=rank > 0)
    for i in bar:
        # sharded networks run in step on all ranks: who has nothing left makes a chunk again and drops it
        item, chunk = mine[i] if i < len(mine) else chunks[0]
        seeds = [args.seed + 100_000 * item["entry"] + j for j in chunk]
        latents = sample(Noise(seeds, device), text.cond_of([row_of[item["entry"]]] * len(chunk)))
        for j in missing(item, chunk) if i < len(mine) else []:
            video = spec.family.decode(vae, latents[j - chunk[0], None])[0].cpu()
            file = item["files"][j]
            try:
                metrics.write_mp4(args.out / "videos" / file, video, spec.fps)
            except (OSError, ValueError, RuntimeError) as error:
                bar.close()
                raise common.Fatal(f"cannot write {file!r} (entry {item['entry']}): {error}", 1, alone=True) from None
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


def complete_set(args, record):
    """(items, {file: bytes} of their videos that are there, number that --dims needs in all, whether some are missing).

    One line for files that do not belong, for rows of another configuration and, without --allow-partial, for missing
    videos: VBench would take all of these without a word.
    """
    rows = manifest(args.out).rows()
    refuse_mixed(args.out, record, rows)
    items, needed = select(record["items"], args), select(record["items"], replace(args, limit=0))
    found = [file for item in items for file in item["files"] if is_done(args.out, rows.get(file), record["hash"])]
    gone = [file for item in needed for file in item["files"] if file not in set(found)]
    expected = len(found) + len(gone)
    if gone and not args.allow_partial:
        raise common.Fatal(
            f"{len(gone)} of {expected} videos are missing, the first is {gone[0]!r}: run generate again"
        )
    if not found:
        raise common.Fatal(f"{args.out} holds none of the {expected} videos: run generate first")
    return items, {file: rows[file]["bytes"] for file in found}, expected, bool(gone)


def measure(clips, fps):
    """Metrics of the samples of one prompt [s, 3, f, h, w] in [0, 1] without weights, a dict of floats."""
    values = metrics.saturation(clips) | metrics.motion(clips)
    values |= {"smoothness": metrics.smoothness(clips), "optical_flow": metrics.optical_flow(clips, fps)}
    if len(clips) > 1:
        values |= {"diversity": metrics.pairwise_rms(clips), "vendi": metrics.vendi_score(clips)}
    return values


def feature_model(kind, folder, device):
    """A function: clips [s, 3, f, h, w] in [0, 1] -> features [s, d], of a local DINOv2 or CLIP.

    The mean over at most 8 evenly spaced frames of the normalised class token (DINOv2) or image embedding (CLIP).
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise common.Fatal(f"cannot load {kind} from {folder}: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def features(clips):
        shown = torch.linspace(0, clips.shape[2] - 1, min(8, clips.shape[2])).round().long()
        frames = rearrange(clips[:, :, shown], "s c f h w -> (s f) c h w")
        pixels = processor(images=list(frames), do_rescale=False, return_tensors="pt")["pixel_values"].to(device)
        if kind == "clip":
            out = model.visual_projection(model.vision_model(pixels).pooler_output)
        else:
            out = model(pixels).last_hidden_state[:, 0]
        out = torch.nn.functional.normalize(out.float(), dim=-1)
        return reduce(out, "(s f) d -> s d", "mean", s=len(clips)).cpu()

    return features


def feature_diversity(features):
    """1 - mean cosine over pairs of the samples' features [s, d], s > 1; in [0, 2]. What DFD's paper reports."""
    cosine = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine, s = cosine @ cosine.mT, len(features)
    return 1 - ((cosine.sum() - cosine.trace()) / (s * (s - 1))).item()


def own_metrics(args, record, items, found):
    """Our metrics of every prompt whose row is not there yet, into scores/proxies.jsonl, every rank its share."""
    rank, world, device = common.init_distributed()
    common.make_folder(args.out / "scores", hint="; see --out")
    book = Ledger(args.out / "scores", "proxies", "prompt", lambda row: row["entry"])
    extract = feature_model(args.features, args.features_folder, device) if args.features != "none" else None
    if rank == 0:
        book.merge()
    dist.barrier()
    rows = book.rows()
    dist.barrier()
    bar = tqdm(items[rank::world], desc="metrics", disable=rank > 0)
    for item in bar:
        files = {file: found[file] for file in item["files"] if file in found}
        old = rows.get(item["prompt"], {"files": None, "values": {}})
        wanted = f"diversity_{args.features}"
        if not files or (old["files"] == files and (extract is None or wanted in old["values"] or len(files) < 2)):
            continue
        clips = [read_video(args.out / "videos" / file, bar) for file in files]
        for file, clip in zip(files, clips):
            if clip.shape[1] != record["config"]["frames"]:
                bar.close()
                whole = record["config"]["frames"]
                raise common.Fatal(
                    f"{file!r} has {clip.shape[1]} of {whole} frames: delete it and generate it again", 1, alone=True
                )
        clips = torch.stack(clips)
        values = old["values"] if old["files"] == files else measure(clips, record["config"]["fps"])
        if extract and len(clips) > 1:
            values[wanted] = feature_diversity(extract(clips))
        flicker = [metrics.motion(clip)["temporal_flickering"] for clip in clips]
        book.append(
            {"prompt": item["prompt"], "entry": item["entry"], "files": files, "values": values, "flicker": flicker}
        )
    dist.barrier()
    if rank == 0:
        book.merge()
    dist.barrier()


def score(args):
    """Our metrics, then VBench's dimensions in turn, each into scores/<dimension>.json. Returns the rejected ones."""
    record = read_record(args.out)
    items, found, _, _ = complete_set(args, record)
    rank, world, _ = common.init_distributed()
    own_metrics(args, record, items, found)
    if world > 1:
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
            raise common.Fatal(f"the videos are of another prompt list than {source}: pass the same --vbench-info")
        write_text(folder / "VBench_full_info.json", text)
    rejected = []
    for dimension in args.dims or vbench.DIMENSIONS:
        path, files = folder / f"{dimension}.json", files_of(dimension, items, found)
        of_videos = vbench.short_hash([record["hash"], sorted(files.items())])
        old = common.read_json(path) if path.is_file() else {}
        if "raw" in old and old["videos"] == of_videos:
            continue
        reason = why or (None if files else "none of its videos are there")
        reason = reason or (None if args.download_weights else vbench.lacking(dimension, environment))
        info, videos, work = folder / "VBench_full_info.json", args.out / "videos", folder / f".{dimension}"
        result = {"reason": reason}
        if not reason:
            result = vbench.run_dimension(python, dimension, info, videos, files, work)
        rejected += [dimension] if result.get("rejected") else []
        write_json(path, result | {"videos": of_videos, "versions": (environment or {}).get("versions")})
        print(f"{dimension}: {result.get('raw', 'not run: ' + str(result.get('reason')))}", flush=True)
    return rejected


# ----------------------------------------------------------------------------------------------------------- report


def collect(args, record):
    """results.json as a dict, from the manifest and scores/ of an evaluation."""
    items, found, expected, partial = complete_set(args, record)
    folder, dimensions, values = args.out / "scores", {}, {}
    rows, own = Ledger(folder, "proxies", "prompt", None).rows(), {}
    for item in items:
        row = rows.get(item["prompt"])
        if row and row["files"] == {file: found[file] for file in item["files"] if file in found}:
            own[item["prompt"]] = row
    flicker = {file: value for row in own.values() for file, value in zip(row["files"], row["flicker"])}
    for name in vbench.DIMENSIONS:
        path, files = folder / f"{name}.json", files_of(name, items, found)
        wanted = len(files_of(name, record["items"], None))
        scored = common.read_json(path) if path.is_file() else {"reason": "score has not been run on it"}
        if "raw" in scored and scored["videos"] != vbench.short_hash([record["hash"], sorted(files.items())]):
            scored = {"reason": "it was scored on other videos: run score again"}
        if "raw" not in scored and name == "temporal_flickering" and files and files.keys() <= flicker.keys():
            each = {file: flicker[file] for file in files}
            scored = {"raw": sum(each.values()) / len(each), "values": each, "by": "eval_vbench.py"}
        if "raw" not in scored:
            dimensions[name] = {"reason": scored["reason"], "expected": wanted}
            continue
        of_prompt = defaultdict(list)
        for file, value in scored["values"].items():
            of_prompt[file.rpartition("-")[0]].append(value)
        values[name] = of_prompt
        dimensions[name] = {
            "raw": scored["raw"], "normalised": vbench.normalise(name, scored["raw"]), "n": len(scored["values"]),
            "expected": wanted, "by": scored.get("by", "VBench"), "versions": scored.get("versions"),
        }  # fmt: skip
    errors, errors_of_totals = vbench.bootstrap(values) if values else ({}, None)
    for name, error in errors.items():
        dimensions[name]["standard_error"] = error
    of_vbench = {name: row["raw"] for name, row in dimensions.items() if row.get("by") == "VBench"}
    totals = vbench.aggregate(of_vbench)  # nothing of ours is in them
    withheld = next((why for why, so in {
        "the prompts are not VBench's list": not record["vbench_list"],
        "the set is PARTIAL": partial,
        "the list is not that of vbench 0.1.5": record["vbench_list"] != vbench.OFFICIAL,
        "VBench wants 5 samples of each prompt": record["config"]["samples"] < 5,
        f"VBench has not scored {len(dimensions) - len(of_vbench)} of 16 dimensions": totals is None,
    }.items() if so), None)  # fmt: skip
    names = ("Quality", "Semantic", "Total")
    proxies = defaultdict(dict)
    for prompt, row in own.items():
        for name, value in row["values"].items():
            proxies[f"proxy/{name}"][prompt] = [value]
    spread, _ = vbench.bootstrap(proxies) if proxies else ({}, None)
    return {
        "partial": partial, "videos": len(found), "expected": expected, "dimensions": dimensions,
        "totals": {"withheld": withheld} if withheld else {
            name: {"value": value, "standard_error": error}
            for name, value, error in zip(names, totals, errors_of_totals or [math.nan] * 3)
        },
        "proxies": {
            name: {
                "value": sum(v[0] for v in each.values()) / len(each), "standard_error": spread[name],
                "n": len(each), "expected": len(select(record["items"], replace(args, limit=0))),
            } for name, each in proxies.items()
        },
        **{key: value for key, value in record.items() if key != "items"},
        "bootstrap": "standard deviation of 1000 resamplings of the prompts, each with all of its samples",
    }  # fmt: skip


def figure(row, key="raw", digits=4):
    """A cell: the figure, its standard error where there is one; or why there is none."""
    if row is None or key not in row:
        return "" if row is None else f"not run: {row['reason']}"
    error = row.get("standard_error", math.nan)
    return f"{row[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def noise_verdict(difference, error):
    """Words for a difference of Totals, in points: a standard error and what re-encoding can move are no difference."""
    error = error if math.isfinite(error) else 0.0
    inside = abs(difference) <= error + vbench.NOISE
    return f"{difference:+.2f}, {'inside' if inside else 'beyond'} the standard error ({error:.2f}) plus {vbench.NOISE}"


def markdown(results, other):
    """results.md. other: results of --compare, or None."""
    config, partial = results["config"], " (PARTIAL)" if results["partial"] else ""
    named = "VBench's prompts" if results["vbench_list"] else "not VBench's prompts"
    lines = [
        f"# VBench of a {config['role']}{partial}", "",
        f"{results['videos']} of {results['expected']} videos, {named}, {config['samples']} samples a prompt, base "
        f"seed {config['seed']}. {config['script']}, checkpoint {config['checkpoint']}, teacher {config['teacher']}, "
        f"text encoder {config['text_encoder']}, {config['nfe']} network evaluations, {config['frames']} x "
        f"{config['height']} x {config['width']} at {config['fps']} fps, libx264 crf {config['video']['crf']}. "
        f"Configuration {results['hash']}, revision {results['revision']}.", "",
    ]  # fmt: skip
    against = f" {other['config']['role']} |" if other else ""
    lines += [f"| dimension | raw{partial} | normalised | n of expected | by |{against}"]
    lines += ["|---|---|---:|---:|---|" + ("---|" if other else "")]
    for name, row in results["dimensions"].items():
        normalised = f"{row['normalised']:.4f}" if "raw" in row else ""
        cells = [name, figure(row), normalised, f"{row.get('n', 0)} of {row['expected']}", row.get("by", "")]
        lines.append(f"| {' | '.join(cells + ([figure(other['dimensions'][name])] if other else []))} |")
    lines += ["", "temporal_flickering is over all samples, without VBench's optional filter for static videos.", ""]
    lines += [
        "| Totals, % | Quality | Semantic | Total | source | this Total minus it |",
        "|---|---:|---:|---:|---|---|",
    ]
    own, rows = results["totals"], [("this evaluation", results["totals"], f"configuration {results['hash']}")]
    if other:
        rows.append((f"--compare, {other['config']['role']}", other["totals"], f"configuration {other['hash']}"))
    for label, quality, semantic, points, source in vbench.PUBLISHED:
        given = {"Quality": quality, "Semantic": semantic, "Total": points}
        rows.append((label, {k: {"value": v} for k, v in given.items() if v is not None}, source))
    for label, totals, source in rows:
        cells = [
            figure(totals[k], "value", 2) if k in totals else "not in our notes"
            for k in ("Quality", "Semantic", "Total")
        ]
        if "withheld" in totals:
            cells = [f"withheld: {totals['withheld']}", "", ""]
        verdict = ""
        if totals is not own and "Total" in own and "Total" in totals:
            errors = [t["Total"].get("standard_error", 0.0) for t in (own, totals)]
            verdict = noise_verdict(own["Total"]["value"] - totals["Total"]["value"], math.hypot(*errors))
        lines.append(f"| {' | '.join([label, *cells, source, verdict])} |")
    lines += ["", vbench.PUBLISHED_NOTE, "", f"| weight-free{partial} | mean over prompts | n of expected |{against}"]
    lines += ["|---|---:|---:|" + ("---:|" if other else "")]
    for name, row in results["proxies"].items():
        cells = [name, figure(row, "value"), f"{row['n']} of {row['expected']}"]
        lines.append(f"| {' | '.join(cells + ([figure(other['proxies'].get(name), 'value')] if other else []))} |")
    lines += ["", "The proxies are ours; no Total contains them. ± is one standard error, by prompt.", ""]
    return "\n".join(lines)


def compared(args, config):
    """config.json of --compare, None without it; one line if it is of other prompts than this configuration."""
    known = read_record(args.compare) if args.compare else None
    if known and known["config"]["prompts"] != config["prompts"]:
        raise common.Fatal(f"--compare: {args.compare} is of other prompts")
    return known


def report(args):
    """Write results.json, results.md and contact sheets from what is there. On rank 0 alone."""
    record = read_record(args.out)
    known, results, other = compared(args, record["config"]), collect(args, record), None
    shown = [(record["config"]["role"], args.out / "videos")]
    if known:
        other = collect(replace(args, out=args.compare), known)
        shown.append((f"{known['config']['role']} (--compare)", args.compare / "videos"))
    (args.out / "sheets").mkdir(exist_ok=True)
    for item in select(record["items"], args)[: args.sheets]:
        rows = []
        for label, folder in shown:
            clips = [read_video(folder / file) for file in item["files"][:5] if (folder / file).is_file()]
            rows += [(f"{item['prompt']}: {label}", clips)] if clips else []
        if rows:
            metrics.contact_sheet(args.out / "sheets" / f"{item['entry']:04d}.png", rows, frames=8)
    # NaN is no JSON
    write_json(args.out / "results.json", json.loads(json.dumps(results), parse_constant=lambda _: None))
    write_text(args.out / "results.md", markdown(results, other))
    print(f"{markdown(results, other)}\n{args.out / 'results.md'}, results.json and sheets/ beside it")


def main(args):
    check(args)
    rejected = []
    if args.command in ("generate", "all"):
        generate(args)
    if args.command in ("score", "all"):
        rejected = score(args)
    if args.command in ("report", "all") and int(os.environ.get("RANK", 0)) == 0:
        report(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rejected:
        raise common.Fatal(f"VBench's results were rejected for {', '.join(rejected)}", code=1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
