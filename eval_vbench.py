"""VBench (Huang et al. 2023, arXiv 2311.17982) of a run's student or its teacher, beside metrics that need no weights.

    python eval_vbench.py all --checkpoint runs/dmd2__tiny__0__… --out eval/student     # 12 captions of the tiny world
    torchrun --nproc_per_node=8 eval_vbench.py generate --checkpoint RUN --out eval/student
    torchrun --nproc_per_node=8 eval_vbench.py score --out eval/student
    python eval_vbench.py report --out eval/student --compare eval/teacher

generate samples 5 clips of each of VBench's prompts, score measures them with the vbench package in its own environment
(make vbench-env) and with metrics of our own, report writes results.json and results.md. A step that was stopped is
started again by the same command: clips and scores that are there are kept. See docs/eval_vbench.md.
"""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from tqdm import tqdm

import common
import dmd2
from evaluation import proxies, vbench
from models.images import find_images
from models.latents import decode
from models.presets import TINY_WORLD, name_of
from tiny import world as tiny
from training.files import UserError, hashed, read_json, read_prompts, stamps, written_aside
from training.finished import load_run, model_of, student_sampler, teacher_sampler
from training.flags import cli, one_line_errors
from training.media import h264_options, read_video, write_video
from training.run import check_shared


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["generate", "score", "report", "all"]]
    """What to do; all does the three in turn."""
    out: Path
    """Folder of one evaluation: videos/, config.json, scores/, results.json, results.md."""
    checkpoint: str = ""
    """Run folder (its newest checkpoint) or checkpoint folder of any script. RUN:raw samples the student itself where
    the export is its average."""
    role: Literal["student", "teacher"] = "student"
    """Sample the run's student, or its teacher with the run's guidance, shift and --teacher-steps."""
    teacher: str | None = None
    """The run's teacher where it is now, a folder or a name."""
    frames: Annotated[int, Ge(1)] | None = None
    """Frames of the video instead of the run's; a causal student (--frame-block) can make more."""
    height: Annotated[int, Ge(1)] | None = None
    """Height in pixels instead of the run's."""
    width: Annotated[int, Ge(1)] | None = None
    """Width in pixels instead of the run's."""
    kept_frames: Annotated[int, Ge(0)] = 0
    """Latent frames before a block that a causal student reads, in whole blocks; 0 for all. For longer videos: those of
    training, less a block."""

    prompts: str | None = None
    """Text file with one prompt per line instead of VBench's list; only our own metrics are of them. The tiny teacher
    has 12 captions of its world unless this or --vbench-info is given."""
    vbench_info: Path | None = None
    """VBench_full_info.json, which has the prompts, instead of the installed package's."""
    gen_prompts: str | None = None
    """Text file with what to feed the model for each entry of the list, one per line (augmented prompts). Files keep
    the name of the original prompt; one that is in the list twice is fed the words of its first entry."""
    images: str | None = None
    """Folder of the first frames of the list for an image-to-video teacher: that of entry n, from 1, is named n."""
    samples: Annotated[int, Ge(1)] = vbench.SAMPLES
    """Samples of each prompt; VBench wants 5."""
    seed: Annotated[int, Ge(0)] = 0
    """Sample j of entry i has seed SEED + 100000 i + j."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Samples of one prompt in a forward."""
    dims: tuple[Literal[tuple(vbench.DIMENSIONS)], ...] = ()
    """Only these of VBench's dimensions, and the prompts that they read."""
    limit: Annotated[int, Ge(0)] = 0
    """Generate only the first of those prompts, this many; 0 for all."""
    cache: str = "runs/cache"
    """Folder for text embeddings."""

    vbench_env: Path = Path(__file__).parent / ".venv-vbench"
    """Environment in which the vbench package is installed."""
    compare: Path | None = None
    """Another --out folder with the same prompts, the teacher's as a rule, for a second column in the report."""


def write_json(path, value):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- generate


def read_entries(args, teacher):
    """The list of prompts, [(prompt, VBench's dimensions that read it)], and what the model gets for each."""
    if args.prompts:
        entries = [(prompt, []) for prompt in read_prompts(args.prompts)]
    elif name_of(teacher) in TINY_WORLD and not args.vbench_info:
        entries = [(prompt, []) for prompt in tiny.EXAMPLES]
    else:
        entries = vbench.read_info(args.vbench_info or vbench.find_info(args.vbench_env))
    fed = read_prompts(args.gen_prompts) if args.gen_prompts else [prompt for prompt, _ in entries]
    if len(fed) != len(entries):
        raise UserError(f"{args.gen_prompts} has {len(fed)} lines, the list has {len(entries)} entries")
    return entries, fed


def open_folder(out, config):
    """Make the folder of an evaluation, on rank 0; one line if it holds clips of another configuration."""
    path, videos = out / "config.json", out / "videos"
    before = read_json(path) if path.is_file() else {} if any(videos.glob("*")) else config
    if differ := sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key)):
        raise UserError(f"{out} holds clips of other settings ({', '.join(differ)}): use another --out")
    videos.mkdir(parents=True, exist_ok=True)
    for leftover in videos.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    write_json(path, config)


class SeededRNG(common.SampleRNG):
    """What a sampler draws from: sample k's numbers come from a generator on the CPU with seed seeds[k]."""

    def __init__(self, seeds, device):
        self.generators, self.device = [torch.Generator().manual_seed(seed) for seed in seeds], device

    def normal(self, shape):
        return super().normal(shape).to(self.device)


@torch.no_grad()
def generate(args, device):
    """Sample the clips that are not there, every rank its share. A chunk, the samples of one forward, is a function of
    the list alone, so neither the number of processes nor a restart changes a clip (on one kind of device).
    """
    script, run_args, checkpoint = load_run(args.checkpoint)
    own = {name: vars(args)[name] for name in ("teacher", "frames", "height", "width")}
    run_args = replace(run_args, **{name: value for name, value in own.items() if value is not None})
    model = model_of(run_args)
    entries, fed = read_entries(args, run_args.teacher)
    images = find_images(model, args.images, len(entries))
    items, raw = vbench.items_of(entries, fed), args.checkpoint.endswith(":raw")
    if not vbench.select(items, args.dims, args.limit):
        raise UserError(f"--dims {' '.join(args.dims)}: no prompt is for them but VBench's own")
    weights = [path for folder in (checkpoint, model.folder) for path in sorted(folder.rglob("*.safetensors"))]
    config = asdict(run_args) | {
        "script": script.__name__, "checkpoint": checkpoint.name, "weights": f"{hashed(stamps(weights)):x}",
        "role": args.role, "raw": raw, "kept_frames": args.kept_frames, "teacher": name_of(run_args.teacher),
        "negative_prompt": model.negative_prompt, "seed": args.seed, "samples": args.samples,
        "batch_size": args.batch_size, "device": device.type, "fps": model.fps, "video": h264_options(*model.size[1:]),
        "suffix": ".mp4" if run_args.frames > 1 else ".png", "prompts": items, "images": f"{hashed(stamps(images)):x}",
    }  # fmt: skip
    config = json.loads(json.dumps(config, default=str))
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        open_folder(args.out, config)
    dist.barrier()
    check_shared(args.out)

    files = lambda item, chunk: [args.out / "videos" / file_of(config, item, j) for j in chunk]
    chunks = [range(j, min(j + args.batch_size, args.samples)) for j in range(0, args.samples, args.batch_size)]
    wanted = [(item, chunk) for item in vbench.select(items, args.dims, args.limit) for chunk in chunks]
    missing = [(item, chunk) for item, chunk in wanted if not all(path.is_file() for path in files(item, chunk))]
    dist.barrier()  # nobody writes before all have looked
    if not missing:
        return
    cond_of = common.encode_text(model, fed, args.cache, device, images).cond_of
    if args.role == "student":
        sample = student_sampler(model, device, script, run_args, checkpoint, raw, args.kept_frames)
    else:
        sample = teacher_sampler(model, device, run_args, args.cache, dmd2.sample_teacher)
    vae = model.load_vae(device, only_decodes=True)
    for turn in tqdm(range(math.ceil(len(missing) / world)), desc="generate", disable=rank > 0):
        # sharded networks run in step on all ranks: who has nothing left makes a chunk again
        item, chunk = missing[(turn * world + rank) % len(missing)]
        seeds = [args.seed + 100_000 * item["entry"] + j for j in chunk]
        latents = sample(SeededRNG(seeds, device), cond_of([item["entry"]] * len(chunk)))
        for path, x0 in zip(files(item, chunk), latents.split(1)):
            if not path.is_file():
                write_video(path, decode(vae, x0)[0].cpu(), model.fps)
    dist.barrier()


def file_of(config, item, sample):
    return vbench.file_name(item["prompt"], sample, config["suffix"])


# ------------------------------------------------------------------------------------------------------------ score


def clips_of(config, dimension=None):
    """{prompt: names of its clips}; of a dimension the prompts and the five clips of each that VBench reads."""
    items = [item for item in config["prompts"] if dimension is None or dimension in item["dimensions"]]
    samples = vbench.SAMPLES if dimension else config["samples"]
    return {item["prompt"]: [file_of(config, item, j) for j in range(samples)] for item in items}


def found(out, clips):
    """The names of `clips_of` whose files are there."""
    there = {path.name for path in (out / "videos").iterdir()}
    return [name for names in clips.values() for name in names if name in there]


def score_ours(args, config):
    """Our metrics of each prompt whose clips are all there, in scores/proxies.json: {prompt: {name: value}}."""
    path, rank, world = args.out / "scores" / "proxies.json", dist.get_rank(), dist.get_world_size()
    clips = clips_of(config)
    there = set(found(args.out, clips))
    whole = {prompt: names for prompt, names in clips.items() if there.issuperset(names)}
    if path.is_file() and list(read_json(path)) == list(whole):
        return
    mine, gathered = {}, [None] * world
    for prompt in tqdm(list(whole)[rank::world], desc="metrics", disable=rank > 0):
        videos = torch.stack([read_video(args.out / "videos" / name) for name in whole[prompt]])
        mine[prompt] = proxies.measure(videos, config["fps"])
    dist.all_gather_object(gathered, mine)
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {prompt: row for part in gathered for prompt, row in part.items()}
        write_json(path, {prompt: rows[prompt] for prompt in whole})


def score_vbench(args, config):
    """scores/<dimension>/ for each of VBench's dimensions that has clips."""
    for dimension in args.dims or vbench.DIMENSIONS:
        out, names = args.out / "scores" / dimension, found(args.out, clips_of(config, dimension))
        if names and "raw" not in vbench.read_score(out, dimension, names):
            info = args.vbench_info or vbench.find_info(args.vbench_env)
            vbench.run_dimension(args.vbench_env, dimension, info, args.out / "videos", out)
            print(f"{dimension}: {vbench.read_score(out, dimension, names)}", flush=True)


# ----------------------------------------------------------------------------------------------------------- report


def collect(out):
    """All figures of an evaluation, a dict for results.json."""
    config, dimensions, of_prompts = read_json(out / "config.json"), {}, defaultdict(list)
    for name in vbench.DIMENSIONS:
        clips = clips_of(config, name)
        score = vbench.read_score(out / "scores" / name, name, found(out, clips))
        dimensions[name] = score | {"of": sum(map(len, clips.values()))}
    path = out / "scores" / "proxies.json"
    for row in read_json(path).values() if path.is_file() else ():
        for name, value in row.items():
            of_prompts[name].append(value)
    ours = {
        name: {
            "mean": statistics.mean(values), "prompts": len(values),
            "standard_error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        } for name, values in of_prompts.items()
    }  # fmt: skip
    whole = vbench.is_official(config["prompts"]) and all(row.get("clips") == row["of"] for row in dimensions.values())
    totals = vbench.totals({name: row["raw"] for name, row in dimensions.items()}) if whole else {}
    return {"dimensions": dimensions, "totals": totals, "ours": ours, "config": config}


def table(columns):
    """Markdown table of the results of evaluations, {folder: what `collect` returns}."""
    rows = defaultdict(lambda: [""] * len(columns))
    for i, results in enumerate(columns.values()):
        for name, row in results["dimensions"].items():
            if row["of"]:  # not for a list that is not VBench's
                some = f" ({row.get('clips')} of {row['of']} clips)" if row.get("clips") != row["of"] else ""
                rows[name][i] = f"{row['raw']:.4f}{some}" if "raw" in row else row["reason"]
                for part in ("Quality", "Semantic", "Total"):
                    value = results["totals"].get(part)
                    rows[f"{part}, %"][i] = f"{value:.2f}" if value is not None else "not all clips and dimensions"
        for name, row in results["ours"].items():
            error = f" ± {row['standard_error']:.4f}" if row["standard_error"] is not None else ""
            rows[f"ours: {name}"][i] = f"{row['mean']:.4f}{error} ({row['prompts']} prompts)"
    lines = [["", *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(args):
    """Write results.json and results.md."""
    columns = {folder: collect(folder) for folder in (args.out, args.compare) if folder}
    prompts = [[item["prompt"] for item in results["config"]["prompts"]] for results in columns.values()]
    if prompts[0] != prompts[-1]:
        raise UserError(f"--compare: {args.compare} is of other prompts")
    text = table(columns) + "\n"
    write_json(args.out / "results.json", columns[args.out])
    with written_aside(args.out / "results.md") as aside:
        aside.write_text(text, encoding="utf-8")
    print(text)


def main(args):
    device = common.init_distributed()
    rank = dist.get_rank()
    if args.command in ("generate", "all"):
        generate(args, device)
    if args.command in ("score", "all"):
        score_ours(args, read_json(args.out / "config.json"))
    dist.destroy_process_group()  # the others are done, and VBench may take longer than a collective waits
    if rank == 0 and args.command in ("score", "all"):
        score_vbench(args, read_json(args.out / "config.json"))
    if rank == 0 and args.command in ("report", "all"):
        report(args)


if __name__ == "__main__":
    with one_line_errors():
        main(cli(Args, description=__doc__))
