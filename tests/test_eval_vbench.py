"""eval_vbench.py and evaluation/: the totals, the official list, whole small evaluations, what must be refused."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import common
import dmd2
import eval_vbench
import phased_dmd
from eval_vbench import Args
from evaluation import proxies, report, vbench
from evaluation.folder import files_of
from evaluation.ledger import Ledger
from tests.conftest import ROOT, only_run, small_args, stopped
from tiny import world as tiny
from training import media

PROMPTS = ["a red circle", "a blue square", "a façade/with a slash", "x" * 210, "ü" * 210, ".hidden", "a red circle"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of one step of dmd2.py."""
    folder = tmp_path_factory.mktemp("runs")
    common.init_distributed()
    dmd2.main(small_args(dmd2, runs_dir=folder, steps=1, gan_weight=0.0, teacher_steps=2))
    return only_run(folder, dmd2)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An unbroken `all` of two samples of PROMPTS, in this process; its folder."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    common.init_distributed()
    eval_vbench.main(args(run, folder / "out", prompts=str(folder / "prompts.txt")))
    return folder / "out"


def args(run, out, command="all", **flags):
    cache = str(Path(run).parent / "cache") if run else "runs/cache"
    return Args(
        **{"command": command, "out": out, "checkpoint": str(run), "samples": 2, "cache": cache, "sheets": 1, **flags}
    )


def popen(run, out, processes=1, **flags):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    given = {"checkpoint": run, "out": out, "samples": 2, "cache": Path(run).parent / "cache", **flags}
    words = [str(word) for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    return subprocess.Popen(
        [*launch, str(ROOT / "eval_vbench.py"), "generate", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def contents(out):
    """Manifest and every video's bytes of an evaluation."""
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return rows, {path.name: path.read_bytes() for path in (out / "videos").iterdir()}


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize("quality, semantic, published", [(85.86, 80.15, 84.72), (85.69, 79.92, 84.53)])
def test_total_is_the_published_one(quality, semantic, published):
    assert vbench.total(quality, semantic) == pytest.approx(published, abs=0.0101)  # of figures rounded to .01


def raw_scores(**changed):
    return {**dict.fromkeys(vbench.DIMENSIONS, 0.5), **changed}


def test_vbenchs_constants():
    """scripts/constant.py of VBench 0.1.5, written a second time: what is not here is 0, 1 and 1."""
    low = {"subject_consistency": 0.1462, "background_consistency": 0.2615, "temporal_flickering": 0.6293}
    low |= {"motion_smoothness": 0.706, "appearance_style": 0.0009}
    high = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855}
    high |= {"temporal_style": 0.364, "overall_consistency": 0.364}
    names = "subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree "
    names += "aesthetic_quality imaging_quality object_class multiple_objects human_action color spatial_relationship "
    names = (names + "scene appearance_style temporal_style overall_consistency").split()
    wanted = {n: (low.get(n, 0), high.get(n, 1), 0.5 if n == "dynamic_degree" else 1) for n in names}
    assert vbench.DIMENSIONS == wanted and names[:7] == vbench.QUALITY and names[7:] == vbench.SEMANTIC


def test_totals_by_hand():
    assert (len(vbench.QUALITY), len(vbench.SEMANTIC)) == (7, 9)
    assert vbench.aggregate({name: low for name, (low, _, _) in vbench.DIMENSIONS.items()}) == pytest.approx((0, 0, 0))
    top = vbench.aggregate({name: high for name, (_, high, _) in vbench.DIMENSIONS.items()})
    assert top == pytest.approx((100, 100, 100))
    # dynamic_degree has half a vote of 6.5, any other Quality dimension a whole one; a Semantic one is 1 of 9
    base = vbench.aggregate(raw_scores())
    for name, parts in {
        "dynamic_degree": (0.5 / 6.5, 0, 0.4 / 6.5),
        "aesthetic_quality": (1 / 6.5, 0, 0.8 / 6.5),
    }.items():
        gain = np.subtract(vbench.aggregate(raw_scores(**{name: 0.6})), base)
        assert gain == pytest.approx(10 * np.array(parts), abs=1e-9)
    gain = np.subtract(vbench.aggregate(raw_scores(scene=0.6)), base)
    assert gain == pytest.approx((0, 10 / 0.8222 / 9, 2 / 0.8222 / 9))
    assert vbench.normalise("scene", 0.9) > 1 and vbench.normalise("motion_smoothness", 0.5) < 0  # not clamped


def test_no_totals_of_a_part():
    assert vbench.aggregate(raw_scores()) is not None
    for name in vbench.DIMENSIONS:
        assert vbench.aggregate({k: v for k, v in raw_scores().items() if k != name}) is None
        assert vbench.aggregate(raw_scores(**{name: math.nan})) is None


def test_bootstrap_is_by_prompt():
    rng = np.random.default_rng(1)
    means = rng.normal(size=400)
    same = {f"p{i}": [m] * 5 for i, m in enumerate(means)}  # five samples that say the same are one
    errors, totals = vbench.bootstrap({name: same for name in vbench.DIMENSIONS})
    assert errors["scene"] == pytest.approx(means.std() / 20, rel=0.1)
    # all dimensions move together, so their mean has no smaller error than one of them, up to the normalisation
    spread = [1 / (high - low) * weight for low, high, weight in vbench.DIMENSIONS.values()]
    quality, semantic = (100 * errors["scene"] * sum(part) for part in (spread[:7], spread[7:]))
    assert totals[:2] == pytest.approx((quality / 6.5, semantic / 9), rel=1e-6)
    assert totals[2] == pytest.approx((4 * totals[0] + totals[1]) / 5, rel=1e-6)
    assert vbench.bootstrap({"scene": same})[1] is None
    assert math.isnan(vbench.bootstrap({"scene": {"a": [1.0, 2.0]}})[0]["scene"])


def test_a_difference_inside_the_noise_is_called_that():
    assert "inside" in report.noise_verdict(0.45, 0.2) and "beyond" in report.noise_verdict(-0.55, 0.2)
    assert "inside" in report.noise_verdict(0.29, math.nan) and "beyond" in report.noise_verdict(0.31, 0.0)


# ---------------------------------------------------------------- VBench's own list and code


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """vbench 0.1.5 from the package registry; VBENCH_WHEEL names a copy."""
    if os.environ.get("VBENCH_WHEEL"):
        return os.environ["VBENCH_WHEEL"]
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=0", "-d", str(folder)]
    got = subprocess.run([*command, "vbench==0.1.5"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"the package registry is out of reach: {vbench.last_line(got.stderr)}")
    return str(next(folder.glob("vbench-0.1.5*.whl")))


def test_the_official_list(wheel):
    text, source = vbench.find_info(wheel)
    entries = vbench.read_entries(text, source)
    items = vbench.distinct(entries, 5)
    files = [file for item in items for file in item["files"]]
    assert (source, len(entries), len(items), len(set(files))) == (wheel, 946, 944, 4720)
    assert vbench.entries_id(entries) == vbench.OFFICIAL
    # every name is VBench's own, and a file system takes it with what is written aside
    assert files == [f"{item['prompt']}-{j}.mp4" for item in items for j in range(5)]
    assert max(len(item["prompt"]) for item in items) == 210
    assert any("façades" in item["prompt"] for item in items) and not any("/" in item["prompt"] for item in items)
    # the two prompts that are there twice keep their first number, and are in the dimensions of both
    (bund,) = [item for item in items if item["prompt"] == "The bund Shanghai, oil painting"]
    assert bund["dimensions"] == ["aesthetic_quality", "appearance_style", "imaging_quality", "overall_consistency"]
    assert entries[bund["entry"]]["dimensions"] == ["appearance_style"]
    counts = {name: len(files_of(name, items, None)) for name in vbench.DIMENSIONS}
    assert sum(counts.values()) == 5 * 1362 and counts["temporal_flickering"] == 375 and counts["human_action"] == 500


def test_flickering_is_that_of_vbenchs_code(wheel, tmp_path, monkeypatch):
    """VBench's own cal_score, run from the wheel, on mp4s; only its imports of lists and ranks are stood in for."""
    with zipfile.ZipFile(wheel) as archive:
        (tmp_path / "temporal_flickering.py").write_bytes(archive.read("vbench/temporal_flickering.py"))
    for name, members in {
        "vbench": (), "vbench.utils": ("load_dimension_info",),
        "vbench.distributed": ("get_world_size", "get_rank", "all_gather", "barrier", "distribute_list_to_rank",
                               "gather_list_of_dict"),
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(dict.fromkeys(members))
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("vbench.temporal_flickering", tmp_path / "temporal_flickering.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    clips = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0))
    clips[1] = tiny.batch(0, [0])[0].repeat(1, 1, 1, 1, 2)[0, ..., :48]
    for i, clip in enumerate(clips):
        media.write_mp4(tmp_path / f"{i}.mp4", clip, 8)
        ours = proxies.temporal_flickering(media.read_video(tmp_path / f"{i}.mp4"))
        assert ours == pytest.approx(theirs.cal_score(str(tmp_path / f"{i}.mp4")), abs=1e-6) and 0.5 < ours < 0.999


FAKE = """
import json, os
from .utils import CACHE_DIR
class VBench:
    def __init__(self, device, info, out):
        self.info, self.out = info, out
    def evaluate(self, videos_path, name, dimension_list, **kwargs):
        (dimension,), how = dimension_list, open(os.path.join(CACHE_DIR, "how")).read()
        entries = [e for e in json.load(open(self.info)) if dimension in e["dimension"]]
        for e in entries:
            files = [f"{e['prompt_en']}-{i}.mp4" for i in range(5)]
            e["video_list"] = [f"{videos_path}/{f}" for f in files if os.path.exists(f"{videos_path}/{f}")]
        values = [{"video_path": v, "video_results": 0.25 * (i % 2)} for i, v in
                  enumerate(v for e in entries for v in e["video_list"])]
        if how == "crash":
            raise MemoryError("no memory left")
        if how == "silent":
            os._exit(0)
        if how == "few":
            values = values[:-1]
        if how == "blind":
            entries[0]["video_list"] = entries[0]["video_list"][1:]
        if how == "twice":
            values[-1] = values[0]
        raw = sum(v["video_results"] for v in values) / len(values)
        if dimension == "imaging_quality":
            raw /= 100
        if how == "nan":
            raw = float("nan")
        if how == "nan video":
            values[0]["video_results"] = float("nan")
        if how == "other mean":
            raw += 0.1
        json.dump(entries, open(f"{self.out}/{name}_full_info.json", "w"))
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            file.write("{" if how == "cut" else json.dumps({dimension: [raw, values]}))
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A VBench that does as it is told, in an environment with vbench, torch and numpy: (python, set how, info)."""
    folder = tmp_path_factory.mktemp("scorer")
    for package in ("vbench", "torch", "numpy", "vbench-0.1.5.dist-info"):
        (folder / package).mkdir()
    (folder / "vbench" / "__init__.py").write_text(FAKE)
    (folder / "vbench" / "utils.py").write_text(f"CACHE_DIR = {str(folder)!r}\n")
    (folder / "vbench-0.1.5.dist-info" / "METADATA").write_text("Name: vbench\nVersion: 0.1.5\n")
    (folder / "numpy" / "__init__.py").write_text("__version__ = '1'\n")
    stand_in = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    (folder / "torch" / "__init__.py").write_text(f"__version__ = '2'\ndevice = str\n{stand_in}")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    info = [{"prompt_en": p, "dimension": list(vbench.DIMENSIONS)} for p in ("a red circle", "a blue square")]
    (folder / "info.json").write_text(json.dumps(info))
    return str(python), (folder / "how").write_text, folder / "info.json"


@pytest.mark.parametrize(
    "how, words",
    [
        ("silent", "left no result, exit code 0"),
        ("crash", "left no result, exit code 1: MemoryError: no memory left"),
        ("cut", "cannot be read"),
        ("few", "given 10 videos and scored 9, 10 are there"),
        ("blind", "given 9 videos"),
        ("twice", "scored 10, 10 are there"),
        ("nan", "not finite"),
        ("nan video", "not finite"),
        ("other mean", "mean"),
        ("well", None),
    ],
)
def test_a_scorer_is_judged_by_its_result(scorer, tmp_path, how, words):
    python, tell, info = scorer
    files = [vbench.file_name(prompt, j) for prompt in ("a red circle", "a blue square") for j in range(5)]
    (tmp_path / "videos").mkdir()
    for file in files:
        (tmp_path / "videos" / file).touch()
    tell(how)
    work = tmp_path / "scores" / ".work"
    result = vbench.run_dimension(python, "temporal_flickering", info, tmp_path / "videos", files, work)
    if words:
        assert result["rejected"] and "raw" not in result and words in result["reason"]
    else:
        assert result["raw"] == pytest.approx(0.125) and set(result["values"]) == set(files) and not work.exists()
    if how == "few":  # color leaves out what it does not find, and only that
        few = vbench.run_dimension(python, "color", info, tmp_path / "videos", files, work)
        assert len(few["values"]) == 9 and few["raw"] == pytest.approx(1 / 9)


# ---------------------------------------------------------------- names and files


def test_file_names():
    assert vbench.file_name("rock-carved façades, 'old' (new).", 4) == "rock-carved façades, 'old' (new).-4.mp4"
    assert vbench.file_name("x" * 210, 0) == "x" * 210 + "-0.mp4"
    odd = ["a/b", "a%2Fb", "../up", ".", "ü" * 210, "ü" * 210 + "!", "x" * 300, "x" * 299 + "y", "new\nline", "nul\0"]
    names = [vbench.file_name(prompt, 0) for prompt in odd]
    assert len(set(names)) == len(odd) and names[1] == "a%2Fb-0.mp4"
    for name in names:
        assert "/" not in name and not name.startswith(".") and name.endswith("-0.mp4") and name.isprintable()
        assert len(f".{name}.tmp".encode()) <= 255


def test_a_ledger_forgets_only_what_was_not_finished(tmp_path, fails):
    book = Ledger(tmp_path, "rows", "key", lambda row: row["key"])
    for key in (2, 1):
        book.append({"key": key, "text": "é"})
    with open(book.part, "a") as file:
        file.write('{"key": 3, "te')  # killed here
    assert sorted(book.rows()) == [1, 2]
    book.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    book.append({"key": 3})
    assert list(book.rows()) == [1, 2, 3]
    book.path.write_text("{}\n")
    fails(book.rows, "line 1 is no row")


# ---------------------------------------------------------------- whole evaluations


def test_generate_writes_what_it_says(whole):
    rows, videos = contents(whole)
    assert len(rows) == len(videos) == 2 * 6  # the last prompt is the first again
    for row in rows:
        assert row["prompt"] == PROMPTS[row["entry"]] and row["seed"] == 100_000 * row["entry"] + row["sample"]
        assert (
            row["file"] == vbench.file_name(row["prompt"], row["sample"]) and len(videos[row["file"]]) == row["bytes"]
        )
        assert media.read_video(whole / "videos" / row["file"]).shape == (3, 9, 32, 32)
        assert row["nfe"] == 4 and row["sigmas"] == [1.0, 0.9, 0.75, 0.5] and row["fps"] == 8
    assert len({videos[row["file"]] for row in rows}) == 12  # noise differs by prompt and by sample


def test_the_sample_is_the_students(whole, run):
    """Frames agree with a rollout that is written out here, from the seed the manifest has."""
    rows, _ = contents(whole)
    row = rows[3]
    device = common.init_distributed()
    model = common.Model("tiny", 9, 32, 32)
    student = model.load_network("teacher", device)
    (checkpoint,) = (run / "checkpoints").iterdir()
    common.put_weights(student, checkpoint / "student" / "transformer")
    text = common.encode_text(model, [row["prompt"]], str(run.parent / "cache"), device).cond_of([0])
    generator = torch.Generator().manual_seed(row["seed"])
    draw = lambda: torch.randn(model.latent_shape, generator=generator)[None]
    with torch.no_grad():
        x_t = draw()
        for sigma, sigma_next in zip(row["sigmas"], [*row["sigmas"][1:], None]):
            x0 = x_t - sigma * student(x_t, torch.tensor([sigma]), text)[0]
            x_t = (1 - sigma_next) * x0 + sigma_next * draw() if sigma_next else x0
    video = common.decode(model.load_vae(device), x_t)[0].clamp(0, 1)
    assert (video - media.read_video(whole / "videos" / row["file"])).abs().mean() < 0.01  # H.264 is between them


def test_report_says_what_was_not_run(whole, run, capsys):
    results = json.loads((whole / "results.json").read_text())
    text = (whole / "results.md").read_text()
    assert not results["partial"] and (results["videos"], results["expected"]) == (12, 12)
    assert all(row["reason"] == "the prompts are not VBench's list" for row in results["dimensions"].values())
    assert results["totals"] == {"withheld": "the prompts are not VBench's list"} and "84.46" in text
    assert text.count("not run: the prompts are not VBench's list") == 16
    for name in ("diversity", "vendi", "saturation", "optical_flow", "smoothness", "temporal_flickering"):
        assert results["proxies"][f"proxy/{name}"]["n"] == 6
    assert results["proxies"]["proxy/diversity"]["value"] > 0.001
    assert [path.name for path in (whole / "sheets").iterdir()] == ["0000.png"]
    eval_vbench.main(args(run, whole, "report", prompts=str(whole.parent / "prompts.txt")))
    said = capsys.readouterr().out
    assert (
        said.count("not run") == 1 and "16 of VBench's 16 dimensions were not run; results.md has the reasons" in said
    )
    assert "| proxy/diversity |" in said and "| scene |" not in said and "84.46" not in said


def test_killed_and_resumed_is_the_same(whole, run, tmp_path):
    prompts = whole.parent / "prompts.txt"
    process = popen(run, tmp_path, prompts=prompts)
    part = tmp_path / "manifest.rank0.jsonl"
    deadline = time.time() + 120
    while not (part.is_file() and part.read_text().count("\n") >= 3):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows, videos = Ledger(tmp_path, "manifest", "file", None).rows(), tmp_path / "videos"
    assert 3 <= len(rows) < 12
    before = {name: (videos / name).stat().st_mtime_ns for name in rows}
    next(iter(videos.iterdir())).with_name(".left over.mp4.tmp").touch()  # as if killed while it wrote
    eval_vbench.main(args(run, tmp_path, "generate", prompts=str(prompts)))
    assert contents(tmp_path) == contents(whole)
    assert before == {name: (videos / name).stat().st_mtime_ns for name in rows}  # what was done is not done again
    (videos / next(iter(rows))).unlink()
    eval_vbench.main(args(run, tmp_path, "generate", prompts=str(prompts)))
    assert contents(tmp_path) == contents(whole)


def test_two_ranks_make_what_one_makes(whole, run, tmp_path):
    process = popen(run, tmp_path, processes=2, prompts=whole.parent / "prompts.txt")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob("*.rank*"))


def small(scorer, monkeypatch, missing=()):
    """Flags for VBench's list in small, with the 16 dimensions of the scorer's; only `missing` lack weights."""
    python, tell, info = scorer
    tell("well")
    monkeypatch.setattr(vbench, "WEIGHTS", {k: ("w.pth",) if k in missing else () for k in vbench.DIMENSIONS})
    return {"samples": 5, "vbench_info": str(info), "vbench_python": python}


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_totals_and_a_teacher_beside(scorer, run, tmp_path, monkeypatch, fails):
    flags = small(scorer, monkeypatch)
    teacher = {"role": "teacher", "teacher": "tiny", "teacher_steps": 2, "checkpoint": None}
    eval_vbench.main(args(run, tmp_path / "teacher", **flags, **teacher))
    eval_vbench.main(args(run, tmp_path / "out", **flags, compare=tmp_path / "teacher"))
    results = results_of(tmp_path / "out")
    raw = {name: row["raw"] for name, row in results["dimensions"].items()}
    assert raw == pytest.approx({name: 0.00125 if name == "imaging_quality" else 0.125 for name in vbench.DIMENSIONS})
    assert all(row["by"] == "VBench" for row in results["dimensions"].values())
    assert all((row["n"], row["expected"]) == (10, 10) for row in results["dimensions"].values())
    assert results["totals"] == {"withheld": "the list is not that of vbench 0.1.5"}
    assert results["config"]["nfe"] == 4 and results_of(tmp_path / "teacher")["config"]["nfe"] == 4

    # were this the official list, the totals would be there, and compared
    monkeypatch.setattr(vbench, "OFFICIAL", results["vbench_list"])
    eval_vbench.main(args(run, tmp_path / "out", "report", **flags, compare=tmp_path / "teacher"))
    totals, text = results_of(tmp_path / "out")["totals"], (tmp_path / "out" / "results.md").read_text()
    expected = vbench.aggregate(raw)
    assert [totals[name]["value"] for name in ("Quality", "Semantic", "Total")] == pytest.approx(expected)
    (row,) = [line for line in text.splitlines() if line.startswith("| --compare, teacher")]
    assert "+0.00, inside the standard error" in row
    (row,) = [line for line in text.splitlines() if "82.81" in line]
    assert "beyond" in row and "arXiv 2606.21982" in row
    # what is scored is not scored again; what VBench then fails at takes its row and the totals away
    (tmp_path / "out" / "scores" / "scene.json").unlink()
    scorer[1]("silent")
    fails(lambda: eval_vbench.main(args(run, tmp_path / "out", **flags)), "rejected for scene", code=1)
    results = results_of(tmp_path / "out")
    assert "exit code 0" in results["dimensions"]["scene"]["reason"] and "raw" in results["dimensions"]["color"]
    assert results["totals"] == {"withheld": "VBench has not scored 1 of 16 dimensions"}


def test_the_sheet_shows_both_sides(whole, run, tmp_path, fails):
    """Also of two students: the clips of this one above those of the other."""
    flags = {"prompts": str(whole.parent / "prompts.txt")}
    eval_vbench.main(args(run, tmp_path / "out", **flags, seed=1, compare=whole))
    one, both = (Image.open(folder / "sheets" / "0000.png") for folder in (whole, tmp_path / "out"))
    assert both.height > 1.8 * one.height
    sheet, alone = np.array(both), np.array(one)
    height, width = alone.shape[0] - 2 * media.CLIP_GAP, 500  # the right end of the first row of clips
    below = sheet[-media.CLIP_GAP - height : -media.CLIP_GAP, -width:]
    above = sheet[media.CLIP_GAP : media.CLIP_GAP + height, -width:]
    expected = alone[media.CLIP_GAP : -media.CLIP_GAP, -width:]
    assert (below == expected).all() and not (above == expected).all()
    (tmp_path / "other.txt").write_text("a red circle\n")
    other = args(run, tmp_path / "x", prompts=str(tmp_path / "other.txt"), compare=whole)
    fails(lambda: eval_vbench.main(other), "is of other prompts")
    assert not (tmp_path / "x").exists()


def test_a_partial_set(scorer, run, tmp_path, monkeypatch, fails):
    flags, out = small(scorer, monkeypatch, missing=("color", "temporal_flickering")), tmp_path / "out"
    eval_vbench.main(args(run, out, "generate", **flags, limit=1))
    fails(
        lambda: eval_vbench.main(args(run, out, "score", **flags)), "5 of 10 videos are missing", "a blue square-0.mp4"
    )
    assert not (out / "scores").exists()
    flags |= {"allow_partial": True}
    eval_vbench.main(args(run, out, "score", **flags))
    eval_vbench.main(args(run, out, "report", **flags))
    results, text = results_of(out), (out / "results.md").read_text()
    assert results["partial"] and (results["videos"], results["expected"]) == (5, 10)
    assert results["totals"] == {"withheld": "the set is PARTIAL"} and text.startswith(
        "# VBench of a student (PARTIAL)"
    )
    scene, color, flickering = (results["dimensions"][k] for k in ("scene", "color", "temporal_flickering"))
    assert (scene["n"], scene["expected"]) == (5, 10) and scene["raw"] == pytest.approx(0.1)
    assert color["reason"].startswith("weights missing: ") and "w.pth" in color["reason"] and "raw" not in color
    # ours stands in for VBench's where that is not run: the same formula
    own = [proxies.temporal_flickering(media.read_video(path)) for path in (out / "videos").iterdir()]
    assert flickering["by"] == "eval_vbench.py" and flickering["raw"] == pytest.approx(sum(own) / 5, abs=1e-9)
    # more videos than were scored
    eval_vbench.main(args(run, out, "generate", **flags))
    eval_vbench.main(args(run, out, "report", **flags))
    results = results_of(out)
    assert not results["partial"] and "other videos" in results["dimensions"]["scene"]["reason"]


def test_what_does_not_belong_is_refused(whole, run, tmp_path, fails):
    out, flags = tmp_path / "out", {"prompts": str(whole.parent / "prompts.txt")}
    shutil.copytree(whole, out)
    seeded = args(run, out, "generate", **flags, seed=1)
    fails(lambda: eval_vbench.main(seeded), "another configuration (seed)")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    fails(lambda: eval_vbench.main(args(run, tmp_path / "mine", "generate", **flags)), "mine is not empty")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (out / "videos" / "stray.mp4").touch()
    for command in ("generate", "score", "report"):
        fails(lambda c=command: eval_vbench.main(args(run, out, c, **flags)), "stray.mp4")
    (out / "videos" / "stray.mp4").unlink()
    rows, _ = contents(out)
    short = media.read_video(out / "videos" / rows[0]["file"])[:, :5]
    media.write_mp4(out / "videos" / rows[0]["file"], short, 8)
    fails(lambda: eval_vbench.main(args(run, out, "score", **flags)), "1 of 12 videos are missing", rows[0]["file"])
    rows[0]["bytes"] = (out / "videos" / rows[0]["file"]).stat().st_size
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(lambda: eval_vbench.main(args(run, out, "score", **flags)), "has 5 of 9 frames", code=1)
    rows[0]["config"] = "0" * 16
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in ("generate", "score", "report"):
        fails(lambda c=command: eval_vbench.main(args(run, out, c, **flags)), "mixes configurations", rows[0]["file"])


def test_a_run_with_phases_under_another_name(tmp_path, monkeypatch, fails):
    flags = {"runs_dir": tmp_path, "steps": 2, "student_every": 1}
    stopped(monkeypatch, 1, lambda: phased_dmd.main(small_args(phased_dmd, **flags)))
    run = only_run(tmp_path, phased_dmd)
    unfinished = args(run, tmp_path / "out", "generate", samples=1, limit=1)
    fails(lambda: eval_vbench.main(unfinished), "1 of 2 phases are trained; finish the run")
    assert not (tmp_path / "out").exists()
    phased_dmd.main(small_args(phased_dmd, **flags, resume=str(run)))
    run = run.rename(tmp_path / "the good one")
    eval_vbench.main(args(run, tmp_path / "out", "generate", samples=1, limit=1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert config["script"] == "phased_dmd.py" and config["phase_ends"] == [0.75, 0.0]
    assert config["sigmas"] == [1.0, 0.9, 0.75, 0.5] and config["nfe"] == 4


def test_damaged_videos_and_folders_are_one_line(whole, run, tmp_path, fails):
    out, flags = tmp_path / "out", {"prompts": str(whole.parent / "prompts.txt")}
    shutil.copytree(whole, out)
    rows, _ = contents(out)
    first = out / "videos" / rows[0]["file"]
    first.write_bytes(bytes(rows[0]["bytes"]))  # as long as before, and no video
    (out / "scores" / "proxies.jsonl").unlink()
    for command in ("score", "report"):
        fails(lambda c=command: eval_vbench.main(args(run, out, c, **flags)), rows[0]["file"], "generate it", code=1)
    shutil.rmtree(out / "videos")
    fails(lambda: eval_vbench.main(args(run, out, "score", **flags)), "12 of 12 videos are missing")
    (out / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    fails(lambda: eval_vbench.main(args(run, out, "report", **flags)), "is no evaluation")
    fails(lambda: eval_vbench.main(args(run, out, "generate", **flags)), "is no evaluation")
    fails(lambda: eval_vbench.main(args(run, whole, "report", **flags, compare=out)), "is no evaluation")


def test_vbenchs_python_may_be_a_relative_path(tmp_path, monkeypatch):
    """It is started in another folder; and it stays the link that a virtual environment needs."""
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert eval_vbench.vbench_python(Args("score", tmp_path, vbench_python="python")) == str(tmp_path / "python")


def test_prompts_with_line_separators_of_unicode(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red\u2028circle\na blue\x85square\n", encoding="utf-8")
    flags = {"prompts": str(tmp_path / "prompts.txt"), "samples": 1}
    for _ in range(2):
        eval_vbench.main(args(run, tmp_path / "out", **flags))
    assert (tmp_path / "out" / "results.json").is_file()


def test_other_words_for_the_model(run, tmp_path, fails):
    """--gen-prompts changes what is fed, never the file's name; the samples differ."""
    (tmp_path / "list.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "fed.txt").write_text("a blue square\na blue square\n")
    (tmp_path / "long.txt").write_text("one\ntwo\nthree\n")
    flags = {"prompts": str(tmp_path / "list.txt"), "samples": 1}
    long = args(run, tmp_path / "x", "generate", **flags, gen_prompts=str(tmp_path / "long.txt"))
    fails(lambda: eval_vbench.main(long), "3 lines, the list has 2 entries")
    (tmp_path / "twice.txt").write_text("a red circle\na blue square\na red circle\n")
    twice = {"prompts": str(tmp_path / "twice.txt"), "gen_prompts": str(tmp_path / "long.txt")}
    twice = args(run, tmp_path / "x", "generate", samples=1, **twice)
    fails(lambda: eval_vbench.main(twice), "has 'a red circle' twice: files are named after prompts")
    assert not (tmp_path / "x").exists()
    for name, fed in (("plain", None), ("fed", str(tmp_path / "fed.txt"))):
        eval_vbench.main(args(run, tmp_path / name, "generate", **flags, gen_prompts=fed))
    (plain, a), (fed, b) = (contents(tmp_path / name) for name in ("plain", "fed"))
    assert (
        [row["file"] for row in plain] == [row["file"] for row in fed] == ["a red circle-0.mp4", "a blue square-0.mp4"]
    )
    assert [row["fed"] for row in fed] == ["a blue square"] * 2
    assert a["a blue square-0.mp4"] == b["a blue square-0.mp4"] and a["a red circle-0.mp4"] != b["a red circle-0.mp4"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"samples": 0}, "--samples must be at least 1"),
        ({"dims": ("colour",)}, "no dimension 'colour'"),
        ({"dims": ("color",)}, "--dims needs VBench's list"),
        ({"limit": 1}, "add --allow-partial"),
        ({"checkpoint": None}, "--checkpoint RUN is missing"),
        ({"checkpoint": "nowhere"}, "no such run 'nowhere'"),
        ({"command": "score"}, "run generate first"),
        ({"features": "clip"}, "--features-folder go together"),
        ({"vbench_python": "nowhere"}, "no such file nowhere"),
        ({"vbench_python": str(ROOT / "README.md")}, "README.md is no program"),
        ({"compare": Path("nowhere")}, "is not an evaluation"),
        ({"prompts": "nowhere.txt"}, "cannot read the prompts"),
        ({"vbench_info": "nowhere.json"}, "cannot read VBench's prompts"),
        ({"vbench_info": str(ROOT / "pyproject.toml")}, "is not VBench's list"),
        ({"frames": 10}, "--frames must be"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, fails, flags, words):
    fails(lambda: eval_vbench.main(args(run, tmp_path / "out", **flags)), words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- proxies


def square(speed, f=17, size=64, strength=0.6):
    """A bright textured square that moves right by `speed` pixels a frame."""
    video = torch.full((3, f, size, size), 0.2)
    texture = strength * torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    for t in range(f):
        video[:, t, 24:40, 4 + round(speed * t) : 20 + round(speed * t)] += texture
    return video


def test_optical_flow_is_speed():
    still, slow, fast = (proxies.optical_flow(square(speed, f=9), 8) for speed in (0, 1, 3))
    assert still == 0 and 0.6 < slow / (1 * 256 / 64) < 1.5 and 0.6 < fast / (3 * 256 / 64) < 1.5
    # at 16 fps every second frame is read: half the speed a frame is the same motion
    assert proxies.optical_flow(square(0.5), 16) == pytest.approx(slow)
    big = square(3, f=3).repeat_interleave(8, -1).repeat_interleave(8, -2)  # 512 pixels: shrunk, the same picture
    assert proxies.optical_flow(big, 8) == pytest.approx(proxies.optical_flow(square(3, f=3), 8), rel=0.5)
    assert proxies.optical_flow(square(3, f=1), 8) == 0


def test_make_vbench_env_asks_for_every_dimension():
    listed = (ROOT / "Makefile").read_text().split("DIMENSIONS = ")[1].split("\n\n")[0]
    assert listed.replace("\\", " ").split() == list(vbench.DIMENSIONS)


def test_smoothness_is_of_the_second_difference():
    ramp = torch.linspace(0, 1, 9).view(1, 9, 1, 1).expand(3, 9, 8, 8)
    assert proxies.smoothness(ramp) == pytest.approx(1, abs=1e-6)  # it moves, evenly
    flip = (torch.arange(9) % 2).float().view(1, 9, 1, 1).expand(3, 9, 8, 8)
    assert proxies.smoothness(flip) == pytest.approx(0, abs=1e-6)
    assert proxies.smoothness(torch.stack([ramp, flip])) == pytest.approx(0.5, abs=1e-6)
    assert proxies.smoothness(flip[:, :2]) == 1


def test_proxies_move_the_right_way():
    clips = torch.stack([square(speed, f=9) for speed in (1, 2, 3)])
    base = proxies.measure(clips, 8)
    frozen, collapsed = (proxies.measure(c, 8) for c in (clips[:, :, :1].expand_as(clips), clips[:1].expand_as(clips)))
    for name in ("frame_difference", "optical_flow"):
        assert frozen[name] == 0 < base[name]
    assert frozen["smoothness"] == frozen["temporal_flickering"] == 1 > base["smoothness"]
    assert collapsed["diversity"] == 0 < base["diversity"] and collapsed["vendi"] == pytest.approx(1)
    red = clips * torch.tensor([1, 0.3, 0.3]).view(3, 1, 1, 1)
    for name in ("saturation", "colourfulness"):
        assert base[name] == pytest.approx(0, abs=1e-5) and proxies.measure(red, 8)[name] > 0.3
    assert proxies.measure(3 * clips, 8)["clipped"] > base["clipped"] == 0
    assert proxies.measure(clips / 2 + 0.2, 8)["luma_std"] == pytest.approx(base["luma_std"] / 2, rel=1e-4)
    assert "diversity" not in proxies.measure(clips[:1], 8)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_feature_diversity_of_a_local_model(kind, tmp_path, fails):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        model, size = transformers.Dinov2Model(transformers.Dinov2Config(**vision)), {"shortest_edge": 28}
        processor = transformers.BitImageProcessor(size=size, crop_size={"height": 28, "width": 28})
    else:
        config = transformers.CLIPConfig(vision_config=vision | {"intermediate_size": 16}, projection_dim=8)
        config.text_config.hidden_size, config.text_config.num_hidden_layers = 16, 1
        config.text_config.num_attention_heads, config.text_config.vocab_size = 2, 10
        model, size = transformers.CLIPModel(config), {"shortest_edge": 28}
        processor = transformers.CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    features = proxies.feature_model(kind, tmp_path, torch.device("cpu"))
    clips = torch.rand(3, 3, 9, 28, 28, generator=torch.Generator().manual_seed(0))
    got = features(clips)
    assert got.shape == (3, 16 if kind == "dinov2" else 8) and got.isfinite().all()
    assert torch.allclose(features(clips[1:]), got[1:], atol=1e-5)
    assert proxies.feature_diversity(got) > 1e-6
    assert proxies.feature_diversity(features(clips[:1].expand_as(clips))) == pytest.approx(0, abs=1e-6)
    # by hand: angles of 0, 90 and 180 degrees have cosines 0, 0 and -1
    by_hand = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    assert proxies.feature_diversity(by_hand) == pytest.approx(1 + 1 / 3)
    other = Args("score", tmp_path, features="clip" if kind == "dinov2" else "dinov2", features_folder=str(tmp_path))
    fails(lambda: eval_vbench.main(other), f"a model of type '{kind}'")
