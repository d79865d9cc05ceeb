"""What VBench (Huang et al. 2023, arXiv 2311.17982) fixes: its prompt list, file names, constants and totals, and how
its own code is run and believed. No file of VBench is kept here; facts are of 0.1.5.
"""

import hashlib
import json
import math
import shutil
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import numpy as np

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
# entries_id of the 946 entries of vbench 0.1.5
OFFICIAL = "d4510378f9b516ba"

# model, Quality, Semantic, Total in %, source; None where our notes have no figure
CODMD = "CoDMD's paper, arXiv 2606.21982"
PUBLISHED = [
    ("Wan2.1-1.3B teacher", 85.30, 80.09, 84.26, "Self-Forcing's paper, arXiv 2506.08009; from memory, not checked"),
    ("Wan2.1-1.3B teacher", None, None, 82.78, "published; which paper is not in our notes"),
    ("DMD, 4 steps, 1.3B", None, None, 83.38, CODMD),
    ("CoDMD, 4 steps, 1.3B", None, None, 84.46, CODMD),
    ("rCM, 4 steps, 1.3B", None, None, 82.81, CODMD),
    ("DMD, 4 steps, 14B", None, None, 83.81, CODMD),
    ("CoDMD, 4 steps, 14B", None, None, 84.87, CODMD),
    ("rCM, 4 steps, 14B", None, None, 84.05, CODMD),
]
PUBLISHED_NOTE = (
    "Prompts, seeds and encoders differ from paper to paper: the two teachers are one model. For DMD2 and DFD our "
    "notes have no Total. DFD's paper (arXiv 2606.18478) gives the mean of 5 dimensions, teacher .899, DMD2 .901, "
    "DFD .906, and feature diversity over 8 seeds, DINO .301, .190, .205 and CLIP .178, .120, .128."
)
NOISE = 0.3  # points of Total: what re-encoding alone can move (crf 23 instead of 12: +.28)

# what it reads below its cache folder (VBENCH_CACHE_DIR) with local=True
GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
WEIGHTS = {
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    **dict.fromkeys(("object_class", "multiple_objects", "color", "spatial_relationship"), GRIT),
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": ("clip_model/ViT-B-32.pt",),
    "temporal_style": VICLIP, "overall_consistency": VICLIP,
}  # fmt: skip
PROBE = """
import json, sys
from importlib.metadata import version
from importlib.util import find_spec
import numpy, torch, vbench
from vbench.utils import CACHE_DIR
versions = {"vbench": version("vbench"), "torch": torch.__version__, "numpy": numpy.__version__}
versions |= {"python": sys.version.split()[0], "cuda": torch.cuda.is_available()}
print(json.dumps({"cache": CACHE_DIR, "detectron2": bool(find_spec("detectron2")), "versions": versions}))
"""
SCORER = """
import sys, torch
from vbench import VBench
dimension, info, videos, out = sys.argv[1:]
bench = VBench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), info, out)
bench.evaluate(videos_path=videos, name=dimension, dimension_list=[dimension], local=True, mode="vbench_standard",
               imaging_quality_preprocessing_mode="longer")
"""

# ---------------------------------------------------------------- prompts and files


def short_hash(value):
    """16 hex digits of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def find_info(path=None, python=None):
    """(text of VBench_full_info.json, where it is): from a file or a wheel, else from the vbench package installed here
    or for `python`. (None, what to do) if there is none; UserError if it cannot be read. Nothing of it is executed.
    """
    if not path and (spec := find_spec("vbench")) and spec.origin:
        path = Path(spec.origin).parent / "VBench_full_info.json"
    if not path and python:
        code = "import importlib.util as u; print(u.find_spec('vbench').origin)"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
        path = Path(found.stdout.strip()).parent / "VBench_full_info.json" if found.returncode == 0 else None
    if not path:
        return None, "pip download --no-deps vbench==0.1.5 and pass --vbench-info WHEEL, or make vbench-env"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                return wheel.read("vbench/VBench_full_info.json").decode(), str(path)
        return Path(path).read_text(encoding="utf-8"), str(path)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read VBench's prompts in {path}: {error}") from None


def read_entries(text, source):
    """[{"prompt": str, "dimensions": sorted list}] of VBench_full_info.json, in order; UserError if it is no such file."""
    try:
        entries = [{"prompt": e["prompt_en"], "dimensions": sorted(e["dimension"])} for e in json.loads(text)]
        known = all(isinstance(e["prompt"], str) and set(e["dimensions"]) <= DIMENSIONS.keys() for e in entries)
    except (ValueError, KeyError, TypeError):
        entries, known = [], False
    if not entries or not known:
        raise UserError(f"{source} is not VBench's list: a JSON list of prompt_en and dimension")
    return entries


def entries_id(entries):
    """A hash of the prompts and dimensions of entries, in order."""
    return short_hash([[entry["prompt"], entry["dimensions"]] for entry in entries])


def distinct(entries, samples):
    """One item per prompt: {"entry", "prompt", "fed", "dimensions", "files": one name per sample}. A prompt that is
    there twice has the number and words of its first entry and the dimensions of all: VBench reads the same files for
    both.
    """
    items = {}
    for i, entry in enumerate(entries):
        item = items.setdefault(entry["prompt"], {"entry": i, **entry, "dimensions": []})
        item["dimensions"] = sorted({*item["dimensions"], *entry["dimensions"]})
        item["files"] = [file_name(entry["prompt"], sample) for sample in range(samples)]
    return list(items.values())


def file_name(prompt, sample):
    """VBench's name for a sample's file, `{prompt}-{sample}.mp4`, character for character.

    VBench looks files up by exactly that, and all of its prompts can be file names (the longest has 210 characters, one
    has an accent, none a slash). A prompt that cannot, because of a slash, a leading dot, a control character or its
    length in UTF-8, gets a percent-encoded name, cut, with a hash of the prompt; the manifest has both side by side.
    """
    name = f"{prompt}-{sample}.mp4"
    if len(f".{name}.tmp".encode()) <= 255 and "/" not in prompt and prompt[:1] != "." and prompt.isprintable():
        return name
    return f"{quote(prompt, safe=' ').replace('.', '%2E')[:180]}~{short_hash(prompt)}-{sample}.mp4"


# ---------------------------------------------------------------- VBench's own code


def last_line(text):
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1][:300]


def probe(python):
    """({"cache", "detectron2", "versions"} of `python`'s environment, None), or (None, why it cannot import vbench)."""
    asked = subprocess.run([python, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, errors="replace")
    try:
        return json.loads(last_line(asked.stdout)), None
    except ValueError:
        return None, f"{python} cannot import vbench: {last_line(asked.stderr)}"


def lacking(dimension, environment):
    """What a dimension lacks in a `probe`d environment, in words; None if it lacks nothing that is known."""
    if WEIGHTS[dimension] == GRIT and not environment["detectron2"]:
        return "detectron2 is not installed"
    files = [Path(environment["cache"]) / name for name in WEIGHTS[dimension]]
    gone = [str(path) for path in files if not path.exists()]
    return f"weights missing: {', '.join(gone)}; see --download-weights" if gone else None


def run_dimension(python, dimension, info, videos, files, work):
    """Run VBench on one dimension in a process of its own; {"raw": float, "values": {file: float}}, or {"reason": why,
    "rejected": True}.

    info: VBench_full_info.json; videos: the folder; files: names of the dimension's videos that are in it; work: a
    folder to make and remove, beside which <dimension>.log is written. Judged by the result file alone: raw score and
    values are finite and agree, and every video has a value. color leaves out videos in which it finds no object of
    the kind; its record of the files it was given must be whole all the same.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [python, "-W", "ignore", "-c", SCORER, dimension, *(str(Path(p).resolve()) for p in (info, videos, work))]
    with open(work.parent / f"{dimension}.log", "w") as log:
        code = subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT).returncode
    said = last_line((work.parent / f"{dimension}.log").read_text(errors="replace"))

    def rejected(why):
        return {"reason": f"{why} (scores/{dimension}.log)", "rejected": True}

    try:
        raw, rows = json.loads((work / f"{dimension}_eval_results.json").read_text())[dimension]
        given = json.loads((work / f"{dimension}_full_info.json").read_text())
        given = {Path(video).name for entry in given for video in entry["video_list"]}
        raw, values = float(raw), {Path(row["video_path"]).name: float(row["video_results"]) for row in rows}
    except OSError:
        return rejected(f"VBench left no result, exit code {code}: {said}")
    except (ValueError, KeyError, TypeError) as error:
        return rejected(f"VBench's result cannot be read: {type(error).__name__} {error}")
    covered = set(values) == set(files) or (dimension == "color" and values and set(values) <= set(files))
    if given != set(files) or not covered or len(rows) != len(values):
        return rejected(f"VBench was given {len(given)} videos and scored {len(rows)}, {len(files)} are there")
    if not all(map(math.isfinite, [raw, *values.values()])):
        return rejected("VBench's result is not finite")
    scale = 100 if dimension == "imaging_quality" else 1  # its videos' values are on MUSIQ's scale
    values = {file: value / scale for file, value in values.items()}
    mean = sum(values.values()) / len(values)
    if abs(mean - raw) > 1e-3:
        return rejected(f"VBench's result is {raw}, its videos' mean {mean}")
    shutil.rmtree(work)
    return {"raw": raw, "values": values}


# ---------------------------------------------------------------- totals


def normalise(dimension, raw):
    low, high, _ = DIMENSIONS[dimension]
    return (raw - low) / (high - low)  # not clamped, as VBench's


def total(quality, semantic):
    return (4 * quality + semantic) / 5


def aggregate(raw):
    """(Quality, Semantic, Total) in percent, from {dimension: raw score in [0, 1]}, floats or arrays of one shape.

    Weighted means of the normalised dimensions. None if one of the 16 is missing or not finite: never a part of them.
    """
    if not all(dimension in raw and np.isfinite(raw[dimension]).all() for dimension in DIMENSIONS):
        return None
    parts = []
    for names in (QUALITY, SEMANTIC):
        weights = [DIMENSIONS[name][2] for name in names]
        parts.append(100 * sum(w * normalise(name, raw[name]) for name, w in zip(names, weights)) / sum(weights))
    return (*parts, total(*parts))


def bootstrap(values, repeats=1000, seed=0):
    """Standard errors by resampling prompts, each with all of its samples and in all of its dimensions.

    values: {name: {prompt: list of floats}} -> ({name: standard error of the mean}, and those of Quality, Semantic and
    Total in percent, or None if not all 16 dimensions are there). NaN for a single prompt.
    """
    prompts = sorted({prompt for of_prompt in values.values() for prompt in of_prompt})
    counts = np.random.default_rng(seed).multinomial(len(prompts), [1 / len(prompts)] * len(prompts), size=repeats)
    means = {}
    for name, of_prompt in values.items():
        sums, sizes = (np.array([f(of_prompt.get(prompt, [])) for prompt in prompts]) for f in (sum, len))
        drawn = counts @ sizes
        means[name] = (counts @ sums)[drawn > 0] / drawn[drawn > 0]  # a small dimension can be missing from a draw
    errors = {n: float(m.std()) if len(values[n]) > 1 else math.nan for n, m in means.items()}
    shortest = min(len(m) for m in means.values())
    drawn = aggregate({name: m for name, m in means.items()}) if shortest == repeats else None
    return errors, tuple(float(part.std()) for part in drawn) if drawn else None
