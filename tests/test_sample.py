"""tools/sample.py: the bits of the previews, its files, every kind of run, and mistakes before anything is loaded."""

import dataclasses
from pathlib import Path

import pytest
import torch

import common
import dfd
import dmd2
import phased_dmd
from models import latents as latents_module
from models.images import to_pil
from tests.conftest import ROOT, only_run, small_args
from tiny import world
from tools import sample
from training import preview
from training.media import read_video
from training.preview import Preview

FAST = {"student_every": 1, "lr": 1e-2}  # in three steps the student is no longer the teacher
RUNS = {
    "dmd2, an average": (dmd2, {"ema_decay": 0.5}),
    "phased_dmd, LoRAs": (phased_dmd, {"lora_rank": 2, "fake_lora_rank": 2, "ema_decay": 0.5, "steps": 4}),
    "dfd, images": (dfd, {"frames": 1, "prompts": "PROMPTS", "student_input": "simulate", "data_prob": 0.0}),
    "dmd2, causal, smaller": (dmd2, {"frame_block": 1, "student": "tiny-small", "negative_prompt": "a blue square"}),
}


def sampled(checkpoint, **flags):
    sample.main(sample.Args(checkpoint=str(checkpoint), **flags))


@pytest.fixture
def latents(monkeypatch):
    """Latents [c, f, h, w] in the order in which they are decoded, {preview: list of them}."""
    decode, write_preview, seen, name = latents_module.decode, Preview.write, {}, ["sample.py"]

    def watched_decode(vae, x0):
        seen.setdefault(name[0], []).extend(x0.clone())
        return decode(vae, x0)

    def watched_write(preview, which, sampler):
        name[0] = which
        write_preview(preview, which, sampler)
        name[0] = "sample.py"

    for module in (preview, sample):
        monkeypatch.setattr(module, "decode", watched_decode)
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


@pytest.mark.parametrize("name", [*list(RUNS)[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in list(RUNS)[1:])])
def test_the_bits_are_those_of_the_preview(tmp_path, prompts, latents, name):
    """Latents and files of student and teacher, in batches that do not end where a prompt does."""
    script, flags = RUNS[name]
    flags = {key: prompts if value == "PROMPTS" else value for key, value in flags.items()}
    flags = {"runs_dir": tmp_path, "seed": 3, "batch_size": 3, "gan_weight": 0.0, "preview_every": 100, **FAST, **flags}
    flags |= {"num_samples": 4, "pair_steps": 2}
    known = {field.name for field in dataclasses.fields(script.Args)}
    args = small_args(script, **{key: value for key, value in flags.items() if key in known})
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


@pytest.mark.slow
def test_which_noise_a_sample_has(tmp_path, prompts, latents):
    """Seed s of prompt p is sample p * preview_seeds + s of a preview, whatever else is sampled; :raw is no average."""
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, gan_weight=0.0, ema_decay=0.5, preview_every=100, **FAST))
    run, whole = only_run(tmp_path, dmd2), latents[3]
    for name, flags, numbers in (
        ("second", {"prompt": world.CAPTIONS[1:2], "seeds": 2, "seed": 2}, [2, 3]),
        ("file", {"prompts": prompts, "seeds": 1, "seed": 1}, [1, 3]),
    ):
        latents.pop("sample.py", None)
        sampled(run, **flags, out=tmp_path / name)
        wanted = [whole[number] for number in numbers]
        torch.testing.assert_close(latents["sample.py"], wanted, rtol=0, atol=1e-4)  # other batches: rounding
    latents.pop("sample.py")
    sampled(f"{run}:raw", prompts=prompts, seeds=2, out=tmp_path / "raw")
    assert (torch.stack(latents["sample.py"]) - torch.stack(whole)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on the tiny teacher."""
    common.init_distributed()
    folder = tmp_path_factory.mktemp("runs")
    dmd2.main(small_args(dmd2, runs_dir=folder, steps=1, gan_weight=0.0))
    return only_run(folder, dmd2)


def test_image_to_video(tmp_path, fails):
    """One image for all prompts, or a folder with one for each."""
    dmd2.main(small_args(dmd2, teacher="tiny-i2v", runs_dir=tmp_path, steps=1, gan_weight=0.0))
    run, images = only_run(tmp_path, dmd2), tmp_path / "images"
    images.mkdir()
    clips, _ = world.batch(0, [0, 1], world.CAPTIONS[:2])
    for line, clip in enumerate(clips, 1):
        to_pil(clip).save(images / f"{line}.png")
    two = {"prompt": ("a red circle", "a red square"), "seeds": 1}
    sampled(run, **two, image=images, out=tmp_path / "many")
    sampled(run, **two, image=images / "1.png", out=tmp_path / "one")
    for video, clip in (("many/00_0", 0), ("many/01_0", 1), ("one/00_0", 0), ("one/01_0", 0)):
        begun = read_video(tmp_path / f"{video}.mp4")[:, 0]
        assert (begun - clips[clip][:, 0]).abs().mean() < 0.05, video
    fails(lambda: sampled(run, **two, out=tmp_path / "no"), "--image")
    (images / "2.png").unlink()
    fails(lambda: sampled(run, **two, image=images, out=tmp_path / "no"), "image named 2")
    assert not (tmp_path / "no").exists()


MISTAKES = [
    ({}, "--prompt"),
    ({"prompts": "gone.txt"}, "gone.txt"),
    ({"prompt": ("a",), "image": Path("1.png")}, "--image"),
    ({"prompt": ("a",), "frames": 10}, "--frames"),
    ({"prompt": ("a",), "teacher_folder": "gone"}, "gone"),
    ({"prompt": ("a",), "out": ROOT}, "not empty"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_told_before_anything_is_loaded(run, fails, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    loaded = []
    for name in ("load_network", "load_vae"):
        monkeypatch.setattr(common.Model, name, lambda *_, **__: loaded.append(1))
    fails(lambda: sampled(**{"checkpoint": run, "out": tmp_path / "new", **flags}), words)
    assert not loaded and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_causal_student_makes_longer_videos(tmp_path, fails):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0, frame_block=5))
    run, flags = only_run(tmp_path, dmd2), {"prompt": ("a red circle",), "seeds": 1}
    for kept in (0, 3):
        sampled(run, **flags, frames=29, kept_frames=kept, out=tmp_path / str(kept))
    every, last = (read_video(tmp_path / str(kept) / "00_0.mp4") for kept in (0, 3))
    apart = (every - last).abs().mean((0, 2, 3))  # the codec looks ahead
    assert every.shape == (3, 29, 32, 32) and 5 * apart[:19].max() < apart[19:].max(), apart
    fails(lambda: sampled(run, **flags, frames=13, out=tmp_path / "no"), "--frame-block")
