"""eval_vbench.py and evaluation/: VBench's list, names and totals; which clips a folder may hold; scores and report."""

import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import dmd2
import eval_vbench
from eval_vbench import Args
from evaluation import proxies, vbench
from models.images import read_images
from models.latents import decode
from tests.conftest import ROOT, only_run, small_args
from tests.ranks import on_ranks
from tiny import world as tiny
from training import media

CPU, TEACHER = torch.device("cpu"), ROOT / "tiny" / "teacher"
LONG = "x" * 260
PROMPTS = ["a red circle", "a blue square", "a façade/with a slash", LONG + "a", LONG + "b", "a red circle", "a", "b"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of one step of dmd2.py."""
    folder = tmp_path_factory.mktemp("runs")
    common.init_distributed()
    dmd2.main(small_args(dmd2, runs_dir=folder, steps=1, gan_weight=0.0))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return only_run(folder, dmd2)


def args(run, out, command="generate", **flags):
    place = run.parent
    own = {"checkpoint": str(run), "cache": str(place / "cache"), "prompts": str(place / "prompts.txt")}
    return Args(**{"command": command, "out": out, "samples": 2, "batch_size": 2, **own, **flags})


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Two samples of PROMPTS, generated and measured by one process; their folder."""
    out = tmp_path_factory.mktemp("eval") / "out"
    eval_vbench.main(args(run, out, "all"))
    return out


def contents(out):
    return {path.name: path.read_bytes() for path in (out / "videos").iterdir()}


# ---------------------------------------------------------------- totals


def test_vbenchs_constants():
    """scripts/constant.py of VBench 0.1.5, written a second time: what is not here is 0, 1 and 1."""
    low = {"subject_consistency": 0.1462, "background_consistency": 0.2615, "temporal_flickering": 0.6293}
    low |= {"motion_smoothness": 0.706, "appearance_style": 0.0009}
    high = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855}
    high |= {"temporal_style": 0.364, "overall_consistency": 0.364}
    for name, bounds in vbench.DIMENSIONS.items():
        assert bounds == (low.get(name, 0), high.get(name, 1), 0.5 if name == "dynamic_degree" else 1)
    quality = {*list(low)[:4], "dynamic_degree", "aesthetic_quality", "imaging_quality"}
    assert {*vbench.QUALITY} == quality and len(vbench.SEMANTIC) == 9 and {*high} < {*vbench.DIMENSIONS}


def test_totals_by_hand():
    for quality, semantic, published in ((85.86, 80.15, 84.72), (85.69, 79.92, 84.53)):
        assert vbench.total(quality, semantic) == pytest.approx(published, abs=0.0101)  # of figures rounded to .01
    top = vbench.totals({name: high for name, (_, high, _) in vbench.DIMENSIONS.items()})
    assert list(top.values()) == [100, 100, 100]
    # dynamic_degree has half a vote of 6.5, any other Quality dimension a whole one; a Semantic one is 1 of 9
    for name, gain in {"dynamic_degree": (5 / 6.5, 0, 4 / 6.5), "scene": (0, 10 / 0.8222 / 9, 2 / 0.8222 / 9)}.items():
        both = [vbench.totals({**dict.fromkeys(vbench.DIMENSIONS, 0.5), name: raw}) for raw in (0.5, 0.6)]
        assert np.subtract(*(list(totals.values()) for totals in both[::-1])) == pytest.approx(gain, abs=1e-9)
    assert vbench.normalise("scene", 0.9) > 1 and vbench.normalise("motion_smoothness", 0.5) < 0  # not clamped


# ---------------------------------------------------------------- VBench's list and package


@pytest.mark.slow
def test_the_official_list(tmp_path):
    """Of vbench 0.1.5 from the package registry."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries=0", "-d", str(tmp_path)]
    if subprocess.run([*command, "vbench==0.1.5"], capture_output=True).returncode:
        pytest.skip("the package registry is out of reach")
    (wheel,) = tmp_path.glob("*.whl")
    entries = vbench.read_info(zipfile.ZipFile(wheel).extract("vbench/VBench_full_info.json", tmp_path))
    items = vbench.items_of(entries, [prompt for prompt, _ in entries])
    assert (len(entries), len(items), vbench.is_official(items)) == (946, 944, True)
    assert not vbench.is_official(items[1:]) and not vbench.is_official([{**items[0], "dimensions": []}, *items[1:]])
    assert all(vbench.file_name(item["prompt"], 4) == f"{item['prompt']}-4.mp4" for item in items)
    counts = {name: len(vbench.select(items, [name], 0)) for name in vbench.DIMENSIONS}
    assert sum(counts.values()) == 1362 and counts["temporal_flickering"] == 75 and counts["human_action"] == 100


FAKE = """
import json, os
class VBench:
    def __init__(self, device, *places):
        self.info, self.out = places
    def evaluate(self, videos_path, name, **kwargs):
        entries, raw = [e for e in json.load(open(self.info)) if name in e["dimension"]], 0.25
        for e in entries:
            names = [f"{e['prompt_en']}-{i}.mp4" for i in range(5)]
            e["video_list"] = [f"{videos_path}/{n}" for n in names if n in os.listdir(videos_path)]
        HOW
        rows = [{"video_path": v} for e in entries for v in e["video_list"]][FIRST:]
        json.dump(entries, open(f"{self.out}/{name}_full_info.json", "w"))
        json.dump({name: [raw, rows]}, open(f"{self.out}/{name}_eval_results.json", "w"))
"""
INFO = {"p": ["scene"], "q": ["color", "scene"], "r": ["color"]}


@pytest.fixture
def scorer(tmp_path):
    """An environment with a VBench that does as it is told: its folder, and a function that tells it."""
    site, python = tmp_path / "env/lib/python3.11/site-packages", tmp_path / "env/bin/python"
    (site / "vbench").mkdir(parents=True), python.parent.mkdir()
    info = [{"prompt_en": prompt, "dimension": dimensions} for prompt, dimensions in INFO.items()]
    (site / "vbench" / "VBench_full_info.json").write_text(json.dumps(info))
    (site / "torch.py").write_text("device = str\nclass cuda:\n    is_available = staticmethod(lambda: False)\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -B -S "$@"\n')
    python.chmod(0o755)

    def tell(how="pass", first=0):
        (site / "vbench" / "__init__.py").write_text(FAKE.replace("HOW", how).replace("FIRST", str(first)))

    tell()
    return tmp_path / "env", tell


@pytest.mark.parametrize(
    "dimension, how, why",
    [
        ("scene", {}, None),
        ("color", {"first": 1}, None),  # it leaves out clips without the object
        ("scene", {"first": 1}, "scored 9"),
        ("color", {"how": 'del entries[0]["video_list"][0]'}, "read 9"),
        ("scene", {"how": 'raw = float("nan")'}, "nan"),
        ("scene", {"how": 'raise MemoryError("no memory left")'}, "MemoryError: no memory left"),
    ],
)
def test_vbench_is_judged_by_its_result(scorer, tmp_path, dimension, how, why):
    env, tell = scorer
    names = [vbench.file_name(prompt, j) for prompt in INFO if dimension in INFO[prompt] for j in range(5)]
    (tmp_path / "videos").mkdir()
    for name in names:
        (tmp_path / "videos" / name).touch()
    tell(**how)
    vbench.run_dimension(env, dimension, vbench.find_info(env), tmp_path / "videos", tmp_path / "out")
    score = vbench.read_score(tmp_path / "out", dimension, names)
    assert why in score["reason"] if why else (score["raw"], score["clips"]) == (0.25, 10)


def test_dims_limit_and_what_is_scored_already(scorer, run, tmp_path):
    """Of the run's teacher."""
    env, tell = scorer
    out, flags = tmp_path / "out", {"vbench_env": env, "samples": 5, "batch_size": 5, "prompts": None}
    flags |= {"vbench_info": vbench.find_info(env), "role": "teacher"}
    results = lambda: json.loads((out / "results.json").read_text())
    eval_vbench.main(args(run, out, "all", **flags, dims=("color",), limit=1))
    assert set(contents(out)) == {f"q-{j}.mp4" for j in range(5)}, "the first prompt that color reads"
    color = results()["dimensions"]["color"]
    assert (color["raw"], color["clips"], color["of"], results()["totals"]) == (0.25, 5, 10, {})
    eval_vbench.main(args(run, out, "generate", **flags))
    eval_vbench.main(args(run, out, "report", **flags))
    assert "raw" not in results()["dimensions"]["color"], "it was scored on fewer clips"
    eval_vbench.main(args(run, out, "score", **flags, dims=("color",)))
    tell('raise MemoryError("no memory left")')
    eval_vbench.main(args(run, out, "all", **flags))
    dimensions = results()["dimensions"]
    assert dimensions["color"]["clips"] == 10 and "MemoryError" in dimensions["scene"]["reason"]


# ---------------------------------------------------------------- clips


def test_file_names():
    assert vbench.file_name("rock-carved façades, 'old' (new).", 4) == "rock-carved façades, 'old' (new).-4.mp4"
    names = [vbench.file_name(prompt, 0) for prompt in ("a/b", "a b", "ü" * 210, "ü" * 210 + "!", LONG, LONG + "y")]
    assert len(set(names)) == 6 and all("/" not in name and len(name.encode()) <= 255 for name in names)


def test_every_prompt_and_seed_is_there_once(whole):
    clips = contents(whole)
    assert set(clips) == {vbench.file_name(prompt, j) for prompt in PROMPTS for j in range(2)}
    assert len(set(clips.values())) == len(clips) == 14
    results = json.loads((whole / "results.json").read_text())["ours"]
    assert all(row["prompts"] == 7 for row in results.values()) and results["diversity"]["mean"] > 0.001


@pytest.mark.slow
def test_two_ranks_make_and_measure_what_one_does(whole, run, tmp_path):
    """7 chunks: one of the ranks has one less."""
    on_ranks(2, eval_vbench.main, args(run, tmp_path / "two", "all"))
    assert contents(tmp_path / "two") == contents(whole)
    ours = [json.loads((out / "results.json").read_text())["ours"] for out in (tmp_path / "two", whole)]
    assert ours[0] == ours[1]


def test_a_clip_is_the_students_of_its_prompt_and_seed(whole, run):
    """A rollout that is written out here."""
    common.init_distributed()
    model, sigmas = common.Model("tiny", 9, 32, 32), [1.0, 0.9, 0.75, 0.5, 0.0]
    student, vae = model.load_network("teacher", CPU), model.load_vae(CPU)
    (checkpoint,) = (run / "checkpoints").iterdir()
    common.put_weights(student, checkpoint / "student" / "transformer")
    text = common.encode_text(model, ["b"], str(run.parent / "cache"), CPU).cond_of([0])
    generator = torch.Generator().manual_seed(700_001)  # entry 7, sample 1
    x_t = torch.randn(model.latent_shape, generator=generator)[None]
    for sigma, after in zip(sigmas, sigmas[1:]):
        with torch.no_grad():
            x0 = x_t - sigma * student(x_t, torch.tensor([sigma]), text)[0]
        x_t = (1 - after) * x0 + after * torch.randn(model.latent_shape, generator=generator)
    clip = media.read_video(whole / "videos" / "b-1.mp4")
    assert (decode(vae, x_t)[0].clamp(0, 1) - clip).abs().mean() < 0.01  # H.264 is between them


def test_a_stopped_one_goes_on(whole, run, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    gone = {vbench.file_name("a", 0), vbench.file_name("a", 1), vbench.file_name(LONG + "b", 1)}
    for name in gone:
        (out / "videos" / name).unlink()
    (out / "videos" / ".0123456789abcdef.mp4.tmp").touch()  # killed while it wrote
    before = {path: path.stat().st_mtime_ns for path in (out / "videos").glob("[!.]*")}
    eval_vbench.main(args(run, out, "score"))
    assert len(json.loads((out / "scores" / "proxies.json").read_text())) == 5, "of prompts whose clips are all there"
    eval_vbench.main(args(run, out))
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again


def changed(Model, *args, **flags):
    (model := Model(*args, **flags)).negative_prompt = "ugly"
    return model


@pytest.mark.parametrize(
    "what, flags",
    [
        ("seed", {"seed": 1}),
        ("role", {"role": "teacher"}),
        ("prompts", {"gen_prompts": "other.txt"}),
        ("negative_prompt", {}),
        ("raw", {"checkpoint": "{run}:raw"}),
        ("weights", {"checkpoint": "other/run"}),
        ("weights", {"teacher": "other/teacher"}),
        ("prompts", {"out": "foreign"}),
    ],
)
def test_clips_of_other_settings_are_refused(what, flags, whole, run, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("\n".join(["other words", *PROMPTS[1:]]))
    (tmp_path / "foreign" / "videos").mkdir(parents=True)
    (tmp_path / "foreign" / "videos" / "a-0.mp4").touch()
    if what == "weights":
        copies = shutil.copytree(run, tmp_path / "other/run"), shutil.copytree(TEACHER, tmp_path / "other/teacher")
        for path in [path for copy in copies for path in copy.rglob("*transformer/*.safetensors")]:
            save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    if what == "negative_prompt":
        monkeypatch.setattr(common, "Model", partial(changed, common.Model))
    flags = {key: value.format(run=run) if isinstance(value, str) else value for key, value in flags.items()}
    fails(lambda: eval_vbench.main(args(run, **{"out": whole, **flags})), "other settings", what)


def test_a_clip_begins_with_the_image_and_words_of_its_prompt(tmp_path, monkeypatch, fails):
    """More of them than are encoded at once; what the sampler gets for each is looked at."""
    words, seen = list(tiny.CAPTIONS[:18]), []
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, range(18))))
    (tmp_path / "words.txt").write_text("\n".join(words))
    images = [tmp_path / "images" / f"{i + 1}.png" for i in range(18)]
    images[0].parent.mkdir()
    for i, path in enumerate(images):
        Image.new("RGB", (32, 32), (14 * i, 255 - 14 * i, 9 * i)).save(path)
    model = common.Model("tiny-i2v", 9, 32, 32)

    def sample(rng, cond):
        seen.append((rng.normal((1,)).item(), cond))
        return torch.zeros(1, *model.latent_shape)

    monkeypatch.setattr(eval_vbench, "load_run", lambda _: (dmd2, small_args(dmd2, teacher="tiny-i2v"), tmp_path))
    monkeypatch.setattr(eval_vbench, "student_sampler", lambda *_: sample)
    flags = {"prompts": str(tmp_path / "prompts.txt"), "gen_prompts": str(tmp_path / "words.txt"), "samples": 1}
    generate = lambda **more: eval_vbench.main(Args("generate", tmp_path / "out", cache=str(tmp_path), **flags, **more))
    fails(generate, "--images")
    generate(images=str(tmp_path / "images"))
    assert set(contents(tmp_path / "out")) == {f"{i}-0.mp4" for i in range(18)} and len(seen) == 18
    common.init_distributed()
    texts, read = common.encode_text(model, words[::-1], tmp_path / "own", CPU), model.image_encoder(CPU)
    for i in (0, 1, 15, 16, 17):
        draw, cond = seen[i]
        assert draw == torch.randn(1, generator=torch.Generator().manual_seed(100_000 * i)).item()
        own = texts.cond_of([17 - i]) | read(read_images([images[i]], 32, 32))
        assert all(torch.allclose(cond[key], own[key], atol=1e-4) for key in ("text", *model.conditions))


# ---------------------------------------------------------------- report


def evaluation(out, raw, diversity):
    """The folder of an evaluation of two prompts, with these scores of VBench and of our own."""
    items = [{"prompt": prompt, "dimensions": list(vbench.DIMENSIONS)} for prompt in "ab"]
    videos = [str(out / "videos" / f"{prompt}-{j}.mp4") for prompt in "ab" for j in range(5)]
    files = dict.fromkeys(videos, "") | {"config.json": {"prompts": items, "samples": 5, "suffix": ".mp4"}}
    for name in vbench.DIMENSIONS:
        files[f"scores/{name}/{name}_eval_results.json"] = {name: [raw, [{"video_path": path} for path in videos]]}
        files[f"scores/{name}/{name}_full_info.json"] = [{"video_list": videos}]
    files["scores/proxies.json"] = {p: {"diversity": value} for p, value in zip("ab", diversity)}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(content))
    return out


def test_report(tmp_path, monkeypatch, fails):
    student, teacher = evaluation(tmp_path / "s", 0.5, (0.1, 0.3)), evaluation(tmp_path / "t", 0.6, (0.2, 0.2))

    def report(**flags):
        eval_vbench.main(Args("report", student, **flags))
        return json.loads((student / "results.json").read_text()), (student / "results.md").read_text()

    results, text = report()
    assert results["totals"] == {}, "not VBench's list"
    assert results["ours"]["diversity"] == pytest.approx({"mean": 0.2, "prompts": 2, "standard_error": 0.1})
    monkeypatch.setattr(vbench, "is_official", lambda items: True)
    results, text = report(compare=teacher)
    ours, other = (vbench.totals(dict.fromkeys(vbench.DIMENSIONS, raw)) for raw in (0.5, 0.6))
    assert results["totals"] == ours
    assert f"| Total, % | {ours['Total']:.2f} | {other['Total']:.2f} |" in text
    assert "diversity | 0.2000 ± 0.1000 (2 prompts) | 0.2000 ± 0.0000 (2 prompts) |" in text
    (teacher / "config.json").write_text(json.dumps({"prompts": [], "samples": 5, "suffix": ".mp4"}))
    fails(lambda: report(compare=teacher), "other prompts")
    (student / "videos" / "a-0.mp4").unlink()
    assert report()[0]["totals"] == {}, "not all clips"


# ---------------------------------------------------------------- metrics of our own


def square(speed, f=9):
    """A textured square that moves right by `speed` pixels a frame."""
    video = torch.full((1, 3, f, 64, 64), 0.2)
    for t in range(f):
        texture = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
        video[:, :, t, 24:40, 4 + round(speed * t) : 20 + round(speed * t)] += 0.6 * texture
    return video


def test_optical_flow_is_speed():
    still, slow, fast = (proxies.optical_flow(square(speed), 8) for speed in (0, 1, 3))
    assert still == 0 and 0.6 < slow / (1 * 256 / 64) < 1.5 and 0.6 < fast / (3 * 256 / 64) < 1.5
    # at 16 fps every second frame is read: half the speed a frame is the same motion
    assert proxies.optical_flow(square(0.5, f=17), 16) == pytest.approx(slow)
    big = square(3).repeat_interleave(8, -1).repeat_interleave(8, -2)  # 512 pixels: shrunk, the same picture
    assert proxies.optical_flow(big, 8) == pytest.approx(fast, rel=0.5)


def test_metrics_are_of_all_frames_and_samples():
    clips = torch.cat([square(speed) for speed in (1, 1, 1)])
    before = proxies.measure(clips, 8)
    assert before["diversity"] == 0 and before["vendi"] == pytest.approx(1)
    clips[2, :, -1] = 1
    after = proxies.measure(clips, 8)
    assert all(after[name] > before[name] for name in ("diversity", "vendi", "motion", "clipped"))
    assert not {"diversity", "vendi"} & proxies.measure(clips[:1], 8).keys()
    assert not {"motion", "optical_flow"} & proxies.measure(clips[:, :, :1], 8).keys()
