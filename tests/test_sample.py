"""tools/sample.py: the bits of the previews, its files, every kind of run, and mistakes in one line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import dfd
import dmd
import dmd2
import phased_dmd
from models.images import to_pil
from models.presets import PRESETS
from tests.conftest import ROOT, only_run, small_args, stopped
from tests.small_teachers import SMALL, write
from tiny import world
from tools import ode_init, sample
from training.media import read_video
from training.preview import Preview

TINY_SIZE = {"frames": 9, "height": 32, "width": 32}
FAST = {"student_every": 1, "lr": 1e-2}  # in three steps the student is no longer the teacher
RUNS = {
    "dmd": (dmd, {"regression_weight": 0.02}),
    "dmd2, an average": (dmd2, {"ema_decay": 0.5}),
    "dfd, images": (dfd, {"frames": 1, "prompts": "PROMPTS", "student_input": "simulate", "data_prob": 0.0}),
    "phased_dmd, LoRAs": (phased_dmd, {"lora_rank": 2, "fake_lora_rank": 2, "ema_decay": 0.5, "steps": 4}),
    "phased_dmd, LoRAs without an average": (phased_dmd, {"lora_rank": 2, "ema_decay": 0.0, "steps": 4}),
    "dmd2, causal": (dmd2, {"frame_block": 1, "ema_decay": 0.5}),
    "ode_init": (ode_init, {"frame_block": 1}),
}


def sampled(checkpoint, **flags):
    sample.main(sample.Args(checkpoint=str(checkpoint), **flags))


@pytest.fixture
def latents(monkeypatch):
    """Latents [c, f, h, w] in the order in which they are decoded, {preview: list of them}."""
    decode, write_preview, seen, name = common.decode, Preview.write, {}, ["sample.py"]

    def watched_decode(vae, x0):
        seen.setdefault(name[0], []).extend(x0.clone())
        return decode(vae, x0)

    def watched_write(preview, which, sampler):
        name[0] = which
        write_preview(preview, which, sampler)
        name[0] = "sample.py"

    monkeypatch.setattr(common, "decode", watched_decode)
    monkeypatch.setattr(Preview, "write", watched_write)
    return seen


@pytest.fixture
def prompts(tmp_path):
    """The first of the tiny world's captions as a file: what previews have."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(world.CAPTIONS[:2]) + "\n")
    return str(path)


def same_videos(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_are_those_of_the_preview(tmp_path, prompts, latents, name):
    """Latents and files of student and teacher, in batches that do not end where a prompt does."""
    script, flags = RUNS[name]
    flags = {key: prompts if value == "PROMPTS" else value for key, value in flags.items()}
    flags = {"runs_dir": tmp_path, "seed": 3, "batch_size": 3, "gan_weight": 0.0, **FAST, **flags}
    known = {field.name for field in dataclasses.fields(script.Args)}
    args = small_args(script, **{key: value for key, value in flags.items() if key in known}, preview_every=100)
    args = dataclasses.replace(args, num_samples=4, **({"pair_steps": 2} if "pair_steps" in known else {}))
    script.main(args)
    run, end = only_run(tmp_path, script), args.steps
    sampled(run, prompts=prompts, seeds=2, teacher=True, out=tmp_path / "out")

    ours, taught = latents["sample.py"][-8:-4], latents["sample.py"][-4:]
    assert same_videos(ours, latents[end])
    assert not same_videos(ours, latents[0]), "training changed it"
    suffix = "png" if args.frames == 1 else "mp4"
    pairs = [(f"step_{end:07d}", "")]
    if "teacher" in latents:  # ode_init.py shows none
        assert same_videos(taught, latents["teacher"]) and not same_videos(taught, ours)
        pairs.append(("teacher", "_teacher"))
    for folder, mark in pairs:
        for stem in ("00_0", "00_1", "01_0", "01_1"):
            preview = run / "previews" / folder / f"{stem}.{suffix}"
            assert (tmp_path / "out" / f"{stem}{mark}.{suffix}").read_bytes() == preview.read_bytes()


def test_which_noise_a_sample_has(tmp_path, prompts, latents):
    """Seed s of prompt p is sample p * preview_seeds + s of a preview, whatever else is sampled; :raw is no average."""
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, gan_weight=0.0, ema_decay=0.5, preview_every=100, **FAST))
    run = only_run(tmp_path, dmd2)
    whole = latents[3]
    for words, flags, numbers in (
        ("the second prompt alone", {"prompt": world.CAPTIONS[1:2], "seeds": 2, "seed": 2}, [2, 3]),
        ("a prompt of a file, one seed", {"prompts": prompts, "seeds": 1, "seed": 1}, [1, 3]),
    ):
        latents.pop("sample.py", None)
        sampled(run, **flags, out=tmp_path / words)
        wanted = [whole[number] for number in numbers]
        torch.testing.assert_close(latents["sample.py"], wanted, rtol=0, atol=1e-4)  # other batches: rounding
        assert len(list((tmp_path / words).glob("*.mp4"))) == 2
    assert (tmp_path / words / "01_1.mp4").is_file()
    latents.pop("sample.py")
    sampled(f"{run}:raw", prompts=prompts, seeds=2, out=tmp_path / "raw")
    difference = (torch.stack(latents["sample.py"]) - torch.stack(whole)).abs().max()
    assert 1e-3 < difference, "the student itself is another network than its average"


def test_a_prompt_has_the_same_condition_as_in_training(tmp_path):
    """Encoded alone and as a file's text it is, to the bit, what the tiny world's data have."""
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    data = common.load_data(model, None, None, tmp_path, device, seed=0)
    for row in (0, 4, 11):
        own = common.encode_text(model, [world.CAPTIONS[row]], tmp_path, device).cond_of([0])
        assert own.keys() == {"text"} and torch.equal(own["text"], data.cond_of([row])["text"])
        assert not torch.equal(own["text"], data.cond_of([row - 1])["text"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on the tiny teacher."""
    common.init_distributed()
    folder = tmp_path_factory.mktemp("runs")
    dmd2.main(small_args(dmd2, runs_dir=folder, steps=1, gan_weight=0.0))
    return only_run(folder, dmd2)


def test_as_a_user_starts_it(run, tmp_path):
    """Files of two prompts, one of them of words that the tiny tokenizer does not know, and a second start refused."""
    flags = ["--checkpoint", str(run), "--prompt", "a red circle", "--prompt", "a café at night", "--seeds", "3"]
    start = lambda *more: subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sample.py"), *flags, *more], cwd=tmp_path, capture_output=True, text=True
    )
    first = start("--seed", "5", "--teacher")
    out = run / "samples"
    assert first.returncode == 0, first.stderr
    assert f"12 samples: {out}/<prompt>_<seed>.mp4; sheet.png, clips.webp (moving)" in first.stdout
    assert "1 of 2 prompts are cut at 16 tokens" in first.stdout and "'a café at night'" in first.stdout
    assert "12/12" in first.stderr and "Traceback" not in first.stderr
    names = [f"{p:02d}_{seed}{mark}.mp4" for p in range(2) for seed in (5, 6, 7) for mark in ("", "_teacher")]
    assert sorted(path.name for path in out.iterdir()) == sorted(["clips.webp", "samples.json", "sheet.png", *names])
    assert all(read_video(out / name).shape == (3, 9, 32, 32) for name in names)
    with Image.open(out / "clips.webp") as moving, Image.open(out / "sheet.png") as sheet:
        assert moving.n_frames == 9
        assert sheet.width > 3 * 4 * 64 and sheet.height > 4 * 64 > moving.height // 2  # three clips, four rows
    record = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert record["prompts"] == ["a red circle", "a café at night"] and record["flags"]["seed"] == 5
    again = start()
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {out} is not empty: delete it, or give another folder with --out\n"
    assert not any(tmp_path.iterdir())
    shutil.rmtree(out)


def test_image_to_video(tmp_path, fails, capsys):
    """One image for a prompt, one for each line of a file; none, or one that is no image, in one line."""
    args = small_args(dmd2, teacher="tiny-i2v", runs_dir=tmp_path, steps=1, gan_weight=0.0)
    dmd2.main(args)
    run, images = only_run(tmp_path, dmd2), tmp_path / "images"
    images.mkdir()
    clips, _ = world.batch(0, [0, 1], world.CAPTIONS[:2])
    for line, clip in enumerate(clips, 1):
        to_pil(clip).save(images / f"{line}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na red square\n")
    sampled(run, prompts=str(prompts), images=str(images), seeds=1, out=tmp_path / "many")
    sampled(run, prompt=("a red circle",), image=str(images / "1.png"), seeds=1, out=tmp_path / "one")
    for video, clip in (("many/00_0", clips[0]), ("many/01_0", clips[1]), ("one/00_0", clips[0])):
        begun = read_video(tmp_path / f"{video}.mp4")[:, 0]
        assert (begun - clip[:, 0]).abs().mean() < 0.05, video
    no, red = tmp_path / "no", ("a red circle",)
    fails(lambda: sampled(run, prompt=red, out=no), "begins with an image: give --image FILE")
    fails(lambda: sampled(run, prompt=red, image=str(prompts), out=no), "cannot read")
    fails(lambda: sampled(run, prompt=red, image="gone.png", out=no), "cannot read gone.png")
    fails(lambda: sampled(run, prompt=red, images=str(images), out=no), "--images goes with --prompts")
    both = {"prompts": str(prompts), "image": str(prompts), "images": str(images)}
    fails(lambda: sampled(run, **both, out=no), "leave one of them out")
    (images / "2.png").unlink()
    fails(lambda: sampled(run, prompts=str(prompts), images=str(images), out=no), "named 2")
    assert not no.exists()


MISTAKES = [
    ({}, "give --prompt TEXT or --prompts FILE"),
    ({"prompt": ("a",), "prompts": "p.txt"}, "one of the two"),
    ({"prompt": ("a red circle", " ")}, "--prompt is empty"),
    ({"prompts": "gone.txt"}, "cannot read the prompts in gone.txt"),
    ({"prompt": ("a",), "seeds": 0}, "--seeds must be at least 1"),
    ({"prompt": ("a",), "image": "1.png"}, "does text-to-video: leave out --image"),
    ({"prompt": ("a",), "frames": 10}, "--frames must be 1 + a multiple of 2"),
    ({"prompt": ("a",), "width": 36}, "--width of 8"),
    ({"prompt": ("a",), "height": 48}, "the tiny world is 32 x 32 pixels"),
    ({"prompt": ("a",), "kept_frames": 2}, "--kept-frames is for a causal student"),
    ({"prompt": ("a",), "teacher_folder": "gone"}, "gone is not there: say with --teacher-folder where it is"),
    ({"prompt": ("a",), "checkpoint": "nowhere"}, "no such run 'nowhere'"),
    ({"prompt": ("a",), "checkpoint": "empty"}, "empty is no run: give runs/NAME"),
    ({"prompt": ("a",), "checkpoint": "begun"}, "begun has no checkpoint yet"),
    ({"prompt": ("a",), "checkpoint": ""}, "no such run ''"),
    ({"prompt": ("a",), "checkpoint": "damaged"}, "is incomplete: student/transformer/config.json is missing"),
    ({"prompt": ("a",), "out": "full"}, "full is not empty: delete it, or give another folder with --out"),
    ({"prompt": ("a",), "out": "file"}, "it is no folder; see --out"),
    ({"prompt": ("a",), "cache": "file"}, "it is no folder; see --cache"),
    ({"prompt": ("caf\udce9",)}, "--prompt is not UTF-8"),
    ({"prompt": ("a",), "checkpoint": "copied"}, "copied is in no run's folder: say with --out and --cache"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_one_line(run, tmp_path, fails, monkeypatch, flags, words):
    """Before any network is loaded."""
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "file").touch()
    if flags.get("checkpoint") == "damaged":
        shutil.copytree(run, tmp_path / "damaged")
        next((tmp_path / "damaged").glob("checkpoints/*/student/transformer/config.json")).unlink()
    if flags.get("checkpoint") == "copied":
        shutil.copytree(next(run.glob("checkpoints/*")), tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    loaded = []
    for name in ("load_network", "load_vae"):
        monkeypatch.setattr(common.Model, name, lambda *args, name=name: loaded.append(name))
    paths = {name: Path(value) for name, value in flags.items() if name in ("out", "cache")}
    fails(lambda: sampled(**{"checkpoint": run, "out": Path("new"), **flags, **paths}), words)
    assert not loaded and (words.endswith("--cache") or not Path("new").exists())


def test_unfinished_phases(tmp_path, monkeypatch, fails):
    args = small_args(phased_dmd, runs_dir=tmp_path, steps=4)
    stopped(monkeypatch, 1, lambda: phased_dmd.main(args))
    run = only_run(tmp_path, phased_dmd)
    fails(lambda: sampled(run, prompt=("a",), out=tmp_path / "out"), "1 of 2 phases are trained; finish the run")
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_has_moved(tmp_path, fails):
    """And one of another family: images, by a small random Qwen-Image."""
    build, suffix, frames, height, width = SMALL["qwen_image"]
    prompts, size = tmp_path / "prompts.txt", {"frames": frames, "height": height, "width": width}
    prompts.write_text("one\ntwo\nthree\n")
    teacher = write("qwen_image", tmp_path / "here")
    own = {"teacher": teacher, "prompts": str(prompts), "runs_dir": tmp_path, "steps": 1, "gan_weight": 0.0, **size}
    dmd2.main(small_args(dmd2, **own))
    (tmp_path / "here").rename(tmp_path / "there")
    (run,) = tmp_path.glob("dmd2__*")
    words = {"prompt": ("one",), "seeds": 1}
    fails(lambda: sampled(run, **words, out=tmp_path / "out"), f"the teacher {teacher} is not there")
    moved = teacher.replace("/here/", "/there/")
    sampled(run, **words, teacher=True, teacher_folder=moved, out=tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["00_0.png", "00_0_teacher.png", "samples.json", "sheet.png"]
    tiny = PRESETS["tiny"].source
    fails(lambda: sampled(run, **words, teacher_folder=tiny, out=tmp_path / "tiny", **TINY_SIZE), "do not fit")


def test_a_causal_student_makes_longer_videos(tmp_path, fails):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0, frame_block=5))
    run, words = only_run(tmp_path, dmd2), {"prompt": ("a red circle",), "seeds": 1}
    sampled(run, **words, frames=19, kept_frames=3, out=tmp_path / "out")
    assert read_video(tmp_path / "out" / "00_0.mp4").shape == (3, 19, 32, 32)
    fails(lambda: sampled(run, **words, frames=13, out=tmp_path / "no"), "--frame-block")
    assert not (tmp_path / "no").exists()
