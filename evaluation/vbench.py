"""What VBench (Huang et al. 2023, arXiv 2311.17982) fixes: prompts, file names, constants and totals; and its package,
version 0.1.5, run in an environment of its own. No file of VBench is kept here.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

from training.files import UserError

# dimension: min, max, weight (VBench's scripts/constant.py); the first seven are Quality, the others Semantic
DIMENSIONS = {
    "subject_consistency": (0.1462, 1, 1), "background_consistency": (0.2615, 1, 1),
    "temporal_flickering": (0.6293, 1, 1), "motion_smoothness": (0.706, 0.9975, 1), "dynamic_degree": (0, 1, 0.5),
    "aesthetic_quality": (0, 1, 1), "imaging_quality": (0, 1, 1),
    "object_class": (0, 1, 1), "multiple_objects": (0, 1, 1), "human_action": (0, 1, 1), "color": (0, 1, 1),
    "spatial_relationship": (0, 1, 1), "scene": (0, 0.8222, 1), "appearance_style": (0.0009, 0.2855, 1),
    "temporal_style": (0, 0.364, 1), "overall_consistency": (0, 0.364, 1),
}  # fmt: skip
QUALITY, SEMANTIC = list(DIMENSIONS)[:7], list(DIMENSIONS)[7:]
SAMPLES = 5  # of each prompt; VBench reads no more

SCORER = """
import sys, torch, vbench
dimension, info, videos, out = sys.argv[1:]
bench = vbench.VBench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), info, out)
bench.evaluate(videos_path=videos, name=dimension, dimension_list=[dimension], local=True, mode="vbench_standard",
               imaging_quality_preprocessing_mode="longer")
"""


# ---------------------------------------------------------------- prompts and files


def short_hash(value):
    """16 hex digits of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def find_info(env):
    """VBench_full_info.json of the package that is installed in the environment `env`."""
    found = list(Path(env).glob("lib/python*/site-packages/vbench/VBench_full_info.json"))
    if not found:
        raise UserError(f"VBench is not in {env}: make vbench-env, or give its prompts by --vbench-info")
    return found[0]


def read_info(path):
    """[(prompt, list of dimensions)] of VBench_full_info.json, in order."""
    return [(entry["prompt_en"], entry["dimension"]) for entry in json.loads(Path(path).read_text(encoding="utf-8"))]


def items_of(entries, fed):
    """One item for each prompt of entries, [{"prompt", "fed", "entry", "dimensions"}].

    fed: what the model gets for each entry. A prompt that is there twice is one set of files to VBench: it has number
    and words of its first entry, and the dimensions of both.
    """
    items = {}
    for number, ((prompt, dimensions), words) in enumerate(zip(entries, fed, strict=True)):
        item = items.setdefault(prompt, {"prompt": prompt, "fed": words, "entry": number, "dimensions": []})
        item["dimensions"] = sorted({*item["dimensions"], *dimensions})
    return list(items.values())


def is_official(items):
    """Whether these are the 944 prompts of vbench 0.1.5, with their dimensions."""
    return short_hash([[item["prompt"], item["dimensions"]] for item in items]) == "c39c117a631730a7"


def select(items, dims, limit):
    """The first `limit` (0: all) of the items that one of the dimensions `dims` (none: any) reads."""
    return [item for item in items if not dims or {*dims} & {*item["dimensions"]}][: limit or None]


def file_name(prompt, sample, suffix=".mp4"):
    """VBench's name for the file of a sample, `{prompt}-{sample}.mp4`, character for character.

    A prompt of another list that cannot be a file's name (a slash, more than 255 bytes) has its first letters there and
    a hash.
    """
    name = f"{prompt}-{sample}{suffix}"
    if "/" not in name and len(name.encode()) <= 255:
        return name
    return f"{re.sub('[^A-Za-z0-9]+', ' ', prompt)[:100]}~{short_hash(prompt)}-{sample}{suffix}"


# ---------------------------------------------------------------- scores


def run_dimension(env, dimension, info, videos, out):
    """Run VBench on one dimension of the clips in `videos`. Its results and log.txt are then in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    python, info, videos, out = (Path(path).absolute() for path in (Path(env) / "bin/python", info, videos, out))
    words = [python, "-W", "ignore", "-c", SCORER, dimension, info, videos, out]
    with open(out / "log.txt", "w") as log:
        subprocess.run(words, cwd=out, stdout=log, stderr=subprocess.STDOUT)


def read_score(out, dimension, files):
    """{"raw", "normalised", "clips": how many} of what `run_dimension` wrote, or {"reason": why there is no score}.

    files: the names of the dimension's clips. VBench leaves out what it does not find or cannot read without an error,
    so the names in its results must be these. Only `color` leaves out clips on purpose: those without the object.
    """
    try:
        raw, rows = json.loads((out / f"{dimension}_eval_results.json").read_text())[dimension]
        given = json.loads((out / f"{dimension}_full_info.json").read_text())
    except (OSError, ValueError):
        log = out / "log.txt"
        said = log.read_text(errors="replace").strip().rpartition("\n")[2] if log.is_file() else "not run"
        return {"reason": f"no result: {said[:200]}"}
    given = {Path(video).name for entry in given for video in entry["video_list"]}
    scored = {Path(row["video_path"]).name for row in rows}
    if given != {*files} or (scored != given and dimension != "color") or not math.isfinite(raw):
        return {"reason": f"VBench read {len(given)} and scored {len(scored)} of {len(files)} clips: {raw}"}
    return {"raw": raw, "normalised": normalise(dimension, raw), "clips": len(files)}


def normalise(dimension, raw):
    low, high, _ = DIMENSIONS[dimension]
    return (raw - low) / (high - low)  # not clamped, as VBench's


def total(quality, semantic):
    return (4 * quality + semantic) / 5


def totals(raw):
    """{"Quality", "Semantic", "Total"} in percent, from the raw score in [0, 1] of each of the 16 dimensions: weighted
    means of the normalised ones.
    """
    parts = []
    for names in (QUALITY, SEMANTIC):
        weights = [DIMENSIONS[name][2] for name in names]
        parts.append(100 * sum(w * normalise(name, raw[name]) for name, w in zip(names, weights)) / sum(weights))
    return dict(zip(("Quality", "Semantic", "Total"), (*parts, total(*parts))))
