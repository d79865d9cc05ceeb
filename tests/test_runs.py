"""Whole runs on the tiny teacher: what they leave, exact resume, kills and stops, --init, flags, mistakes."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from models.presets import needs_gpu
from models.recipes import RECIPES
from tests.conftest import ROOT, checkpoint_of, distance, only_run, same, small_args, state_of, student_weights
from tests.ranks import end_of, on_ranks, run_program, start
from training.checkpoints import find_checkpoint, find_init, flat_state, latest_checkpoint, load_init, save_state
from training.files import UserError
from training.finished import load_run
from training.flags import one_line_errors, parse_args, recipe_args
from training.preview import Preview
from training.run import Run, check_shared

TEACHER, CPU = ROOT / "tiny" / "teacher", torch.device("cpu")
WEIGHTS = load_file(TEACHER / "transformer" / "diffusion_pytorch_model.safetensors")
slow = lambda *params: pytest.param(*params, marks=pytest.mark.slow)


def train(script=dmd, **flags):
    script.main(small_args(script, **flags))


def opened(tmp_path, **flags):
    run = Run(dmd.__file__, small_args(runs_dir=tmp_path, **flags), CPU)
    run.open()
    return run


def checkpoints(runs_dir):
    return [int(path.name[5:]) for path in sorted(only_run(runs_dir).glob("checkpoints/*"))]


def logged(runs_dir, prefix="loss/"):
    """{name: {step: value}} of the scalars of the only run there. Each step is there once."""
    events = EventAccumulator(str(only_run(runs_dir))).Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"] if name.startswith(prefix)}
    steps = {name: {event.step: event.value for event in scalars} for name, scalars in found.items()}
    assert all(len(steps[name]) == len(scalars) for name, scalars in found.items())
    return steps


def test_a_run_leaves_everything_a_reader_needs(tmp_path, capsys):
    train(runs_dir=tmp_path, preview_every=2, student_every=2)
    run, sheets = only_run(tmp_path), ["data", "step_0000000", "step_0000002", "step_0000003", "teacher"]
    assert (run / "dmd.py").read_text() == (ROOT / "dmd.py").read_text()
    assert sorted(path.stem for path in run.glob("previews/*.png")) == sheets
    assert len(list(run.glob("previews/*/*.mp4"))) == 20
    assert (run / "previews" / "table.md").read_text() in capsys.readouterr().out + "\n"
    steps = {name: list(found) for name, found in logged(tmp_path, "").items()}
    every = ("loss/fake_score", "grad_norm/fake_score", "time/step", "lr/student")
    assert [steps[name] for name in every] == [[0, 1, 2]] * 4
    assert steps["loss/student"] == steps["grad_norm/student"] == steps["loss/regression"] == [0, 2]
    assert steps["preview/diversity"] == [0, 2, 3] and steps["preview_teacher/right"] == [0]
    student = WanTransformer3DModel.from_pretrained(latest_checkpoint(run) / "student", subfolder="transformer")
    (written,) = (latest_checkpoint(run) / "student" / "transformer").glob("*.safetensors")
    assert written.stat().st_mode & 0o777 == (run / "args.json").stat().st_mode & 0o777
    state = state_of(tmp_path, 3)
    assert all(torch.equal(x, state[f"ema.transformer.{key}"]) for key, x in student.state_dict().items())


def clips_of_a_preview(path):
    run, data = SimpleNamespace(device=common.init_distributed()), SimpleNamespace(prompts="abcd", seed=0)
    data.cond_of = lambda rows: torch.tensor(rows).view(-1, 1, 1, 1, 1)
    preview = Preview(run, None, data, prompts=3, seeds=3, batch_size=2)
    preview.decode, preview.look = lambda latents: latents, lambda name, p, s, clip: clip
    preview.score = lambda _, found: torch.save(torch.stack(found).unflatten(0, (3, 3)), path)
    preview.write(0, lambda rng, cond: rng.normal((1, 1, 1, 1)) + cond)
    dist.destroy_process_group()


def test_a_preview_shows_every_prompt_and_seed_once_on_any_number_of_ranks(tmp_path):
    clips_of_a_preview(tmp_path / "one")
    on_ranks(2, clips_of_a_preview, tmp_path / "two")  # one rank has 5 of the 9 samples
    noise = common.SampleRNG(0, "preview", range(9), CPU).normal((1, 1, 1, 1)).unflatten(0, (3, 3))
    for name in ("one", "two"):
        assert torch.equal(torch.load(tmp_path / name), noise + torch.arange(3).view(3, 1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("script", "step", "flags"),
    [
        (dmd2, 2, {"lora_rank": 2, "fake_lora_rank": 3, "preview_every": 2, "preview_prompts": 1}),
        (phased_dmd, 2, {"steps": 4, "lora_rank": 2}),  # where the second phase begins
        slow(phased_dmd, 3, {"steps": 4, "gan_weight": 0.0, "ema_decay": 0.9, "student_every": 1}),
        slow(dfd, 2, {"frame_block": 1, "gan_weight": 0.0, "student_input": "simulate", "fake_lora_rank": 3}),
        slow(codmd, 2, {"student": "tiny-small", "lora_rank": 2, "fake_lora_rank": 3}),
    ],
)
def test_resume_is_exact(tmp_path, script, step, flags):
    flags = {"steps": 3, "student_every": 2, "save_every": step} | flags
    train(script, runs_dir=tmp_path / "whole", **flags)
    middle = checkpoint_of(tmp_path / "whole", step, script)
    train(script, runs_dir=tmp_path / "parts", resume=middle, **flags)
    whole, parts = (state_of(tmp_path / name, flags["steps"], script) for name in ("whole", "parts"))
    assert same(whole, parts) and not same(whole, state_of(tmp_path / "whole", step, script))
    if {"lora_rank", "fake_lora_rank"} <= flags.keys():
        assert all("lora" in key or ".heads." in key for key in whole), "the base is in no checkpoint"


def resident(function):
    """By how much this process grew in memory, at most, while it called a function."""
    read = lambda name: 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def test_saving_and_previews_hold_little_in_memory(tmp_path):
    """A checkpoint a part of one network, of seven that it holds; a preview three of its eight clips."""
    network = torch.nn.ModuleList(torch.nn.Linear(700, 700, bias=False) for _ in range(32))
    optimizer = torch.optim.AdamW(network.parameters())
    networks = {name: network for name in ("student", "fake_score", "ema")}
    optimizers = dict.fromkeys(("student", "fake_score"), optimizer)
    flat_state(networks, optimizers)  # makes the optimizer's state
    assert resident(lambda: save_state(tmp_path / "state", networks, optimizers)) < 0.5 * 4 * 700**2 * 32
    run, data = SimpleNamespace(device=CPU, folder=tmp_path), SimpleNamespace(prompts=[""] * 2, seed=0)
    data.cond_of, model = (lambda rows: None), SimpleNamespace(fps=8, world=False)
    clip = (3, 33, 320, 320)  # above what malloc keeps
    preview = Preview(run, model, data, prompts=2, seeds=4, batch_size=4)
    preview.decode, preview.score = lambda latents: (torch.rand(clip) for _ in latents), lambda _, found: None
    with mock.patch("training.media.write_video", lambda *_: None):  # a codec has a memory of its own
        preview.write(0, lambda rng, cond: rng.normal((1,)))
        assert resident(lambda: preview.write(0, lambda rng, cond: rng.normal((1,)))) < 3 * 4 * math.prod(clip)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, fails):
    train(runs_dir=tmp_path, steps=1)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, most))
    try:
        fails(lambda: train(runs_dir=tmp_path, steps=2, resume="latest"), "step_0000002", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert list((only_run(tmp_path) / "checkpoints").iterdir()) == [checkpoint_of(tmp_path, 1)]


def test_a_real_teacher_trains_on_the_cpu_when_asked(tmp_path, fails):
    args = small_args(runs_dir=tmp_path, teacher="wan2.1-1.3b")
    fails(lambda: Run(dmd.__file__, args, CPU), "--cpu")
    Run(dmd.__file__, replace(args, cpu=True), CPU)
    (path := tmp_path / "teacher" / "transformer" / "a.safetensors").parent.mkdir(parents=True)
    path.touch()
    for size in (10**8, 2 * 10**9):
        os.truncate(path, size)
        assert needs_gpu(f"{path.parents[1]}:i2v") == (size > 10**9)


def killed(name, args):
    """dmd.main, killed at the first call of a function that gets the folder of step 2."""
    function = resolve_name(name)

    def call(*args, **named):
        if "step_0000002" in f"{args}":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)

    with mock.patch(name, call):
        dmd.main(args)


def test_a_kill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path):
    """Between the networks and the student of the next one, and before the last rename."""
    flags, said = {"save_every": 1, "keep": 1, "resume": None}, tmp_path / "said"
    train(runs_dir=tmp_path / "unbroken", **flags)
    for name in ("training.run.save_weights", "os.replace"):
        (process := start(killed, name, small_args(runs_dir=tmp_path / "broken", **flags), said=said)).join()
        assert end_of(process) == "SIGKILL", said.read_text()
        assert latest_checkpoint(only_run(tmp_path / "broken")) == checkpoint_of(tmp_path / "broken", 1)
        flags["resume"] = "latest"
    train(runs_dir=tmp_path / "broken", **flags)
    assert same(state_of(tmp_path / "unbroken", 3), state_of(tmp_path / "broken", 3))
    assert checkpoints(tmp_path / "broken") == [3]


def test_two_ranks_are_one_and_go_on_where_one_stopped(tmp_path):
    """Two gloo processes with batch b and one with batch 2b, or with two micro-batches, train the same weights: up to
    float32 sums in another order. Previews too: a forward without gradient leaves FSDP2's root unsharded.
    """
    train(runs_dir=tmp_path / "1", batch_size=4, save_every=1)
    flags = {"save_every": 1, "preview_every": 2, "preview_prompts": 1, "gradient_checkpointing": 1}
    on_ranks(2, dmd.main, small_args(runs_dir=tmp_path / "2", resume=checkpoint_of(tmp_path / "1", 1), **flags))
    train(runs_dir=tmp_path / "3", resume=checkpoint_of(tmp_path / "2", 2), grad_accum=2)
    one, losses = student_weights(tmp_path / "1", 3), logged(tmp_path / "1")
    for other, steps in (("2", {1, 2}), ("3", {2})):
        assert distance(student_weights(tmp_path / other, 3), one) < 1e-3 * distance(WEIGHTS, one)
        for name, found in logged(tmp_path / other).items():
            assert found == pytest.approx({step: losses[name][step] for step in steps}, rel=1e-2)


def test_a_gradient_that_is_not_finite_ends_the_run_and_steps_are_logged_once(tmp_path, fails, monkeypatch):
    flags, norms = {"runs_dir": tmp_path, "steps": 4, "save_every": 2}, [math.inf] * 2 + [torch.tensor(1.0)] * 6
    with monkeypatch.context() as patch:
        patch.setattr(common, "clip_grad_norm", lambda *_: norms.pop())
        fails(lambda: train(**flags), "grad_norm/student", "step 3", "step_0000002")
    train(resume="latest", **flags)
    assert [list(steps) for steps in logged(tmp_path).values()] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_one_that_is_ignored_stays_so(tmp_path, number):
    before = signal.getsignal(number)
    for handler, heard in ((signal.SIG_DFL, number), (signal.SIG_IGN, 0)):  # SIGHUP is ignored under nohup
        signal.signal(number, handler)
        run = opened(tmp_path)
        for _ in range(3):  # torchrun repeats what a terminal sends
            os.kill(os.getpid(), number)
        assert run.stop_signal() == heard
        run.close()
        assert signal.signal(number, before) == handler


def stopped_by(rank, folder):
    common.init_distributed()
    run = Run(dmd.__file__, small_args(runs_dir=folder), CPU)
    run.signal = signal.SIGTERM * (dist.get_rank() == rank)
    assert run.stop_signal() == signal.SIGTERM


def test_a_signal_to_one_rank_stops_all(tmp_path):
    on_ranks(2, stopped_by, 1, tmp_path)


def test_a_stopped_run_is_saved_and_goes_on(tmp_path, monkeypatch, capsys, fails):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(Run, "log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train(runs_dir=tmp_path, steps=1000)
    run = only_run(tmp_path)
    train(runs_dir=tmp_path, steps=2, resume=run, batch_size=4)
    out = capsys.readouterr().out
    assert list(logged(tmp_path, "lr/")["lr/student"].values())[-1] == pytest.approx(5e-4)
    assert "resuming with --steps 2, it was 1000" in out and "4 samples per update, there were 2" in out
    train(runs_dir=tmp_path, steps=2, resume=run, guidance_scale=9.0)  # finished, it stays what it was trained with
    assert "is finished" in capsys.readouterr().out
    fails(lambda: train(runs_dir=tmp_path, steps=1, resume=run), "--steps 1", str(run))
    assert checkpoints(tmp_path) == [1, 2]
    assert [load_run(path)[1].guidance_scale for path in (run, latest_checkpoint(run))] == [2.0, 2.0]
    assert json.loads((run / "args.json").read_text())["guidance_scale"] == 2.0


def test_runs_of_one_second_have_folders_of_their_own_and_none_is_trained_twice(tmp_path, fails):
    runs = [opened(tmp_path) for _ in range(3)]
    assert len({run.folder for run in runs}) == len(list(tmp_path.glob("dmd__*"))) == 3
    checkpoint = old_run(runs[0].folder, 1, **runs[0].args)
    fails(lambda: opened(tmp_path, resume=checkpoint), "another process", str(runs[0].folder))
    for run in runs[::-1]:
        run.close()
    (run := opened(tmp_path, resume=checkpoint)).close()
    assert run.folder == runs[0].folder


def test_a_process_that_does_not_see_the_runs_folder(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", lambda seen, value: seen.__setitem__(slice(None), [False]))
    fails(lambda: check_shared(tmp_path / "runs"), "1 of 1 processes", str(tmp_path / "runs"))
    assert not any((tmp_path / "runs").iterdir())


def test_checkpoints_that_cannot_go_on_are_named(tmp_path, fails):
    train(runs_dir=tmp_path, steps=1)
    run, checkpoint = only_run(tmp_path), checkpoint_of(tmp_path, 1)
    fails(lambda: train(dmd2, runs_dir=tmp_path, resume=run), "--resume", str(run))
    shard = next((checkpoint / "state").iterdir())
    shard.write_bytes(shard.read_bytes()[:-10])
    fails(lambda: train(runs_dir=tmp_path, resume=run), str(checkpoint))
    (checkpoint / "checkpoint.json").unlink()
    fails(lambda: train(runs_dir=tmp_path, resume=run), str(checkpoint), "step_N")


def test_saving_before_an_optimizers_first_step_changes_nothing():
    """PyTorch fills an optimizer that is to be saved by a step, and counts it: Adam's first steps would be others."""
    ends = set()
    for saved in ({}, {"student"}):
        network = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.AdamW([torch.nn.init.ones_(network.weight)], lr=0.1)
        flat_state({"student": network}, dict.fromkeys(saved, optimizer))
        for scale in (1.0, 0.01):
            (scale * network(torch.ones(1))).backward()
            optimizer.step()
        ends.add(network.weight.item())
    assert len(ends) == 1


def old_run(folder, when, **args):
    """A checkpoint, of that time, in a run's folder."""
    (checkpoint := folder / "checkpoints" / "step_0000002").mkdir(parents=True, exist_ok=True)
    (checkpoint / "checkpoint.json").write_text('{"step": 2, "world_size": 1}')
    (folder / "args.json").write_text(json.dumps(args))
    os.utime(checkpoint, (when, when))
    return checkpoint


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_latest_and_a_scripts_name_mean_the_newest_run(tmp_path, newest):
    latest = lambda seed: find_checkpoint(tmp_path, "dmd2", "tiny", seed, "latest")
    found = [old_run(tmp_path / f"dmd2__tiny__0__{i}", 100 + 10 * (i == newest), steps=2) for i in range(3)]
    other = old_run(tmp_path / "dmd2__tiny__1__4", 200, steps=3)  # of another seed, and not finished
    old_run(tmp_path / "dmd2__other__0__4", 300, steps=2)
    (tmp_path / "dmd2__tiny__0__5" / "checkpoints" / "step_0000002 (copy)").mkdir(parents=True)
    assert latest(0) == found[newest] and latest(1) == other
    assert find_init(tmp_path, "tiny", "dmd2") == found[newest].parents[1]
    small = old_run(tmp_path / f"dmd2__{small_args(dmd2, student='tiny-small').subject}__0__6", 300, steps=2)
    assert find_init(tmp_path, "tiny-small", "dmd2", "tiny-small-of-tiny") == small.parents[1]


def test_a_teacher_of_any_name(tmp_path, monkeypatch):
    """No folder has in its name what scp, NTFS or Weights & Biases read otherwise; folders that have it are found."""
    teacher, runs = shutil.copytree(TEACHER, tmp_path / "a:b;c,d#e?'f"), tmp_path / "runs"
    monkeypatch.setitem(sys.modules, "wandb", wandb := mock.MagicMock())  # it is not installed
    train(steps=1, teacher=teacher, runs_dir=runs, track=True)
    run = only_run(runs)
    assert wandb.init.call_args.kwargs["id"] == run.name and not set(run.name) & set("/\\#?%:")  # what it refuses
    assert run.name.startswith("dmd__a-b-c-d-e--f__0__")
    run.rename(older := runs / f"dmd__{teacher.name}__0__1")
    assert find_checkpoint(runs, "dmd", str(teacher), 0, "latest").parents[1] == older
    assert find_init(runs, str(teacher), "dmd") == older


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of dmd2.py whose networks all differ."""
    common.init_distributed()
    train(dmd2, runs_dir=(folder := tmp_path_factory.mktemp("finished")), steps=2, student_every=1, ema_decay=0.5)
    return folder


@pytest.mark.parametrize("source", ["run", "checkpoint", "dmd2", "student", "student/transformer", "sharded"])
def test_init_takes_every_network_that_is_there(tmp_path, finished, source, capsys):
    checkpoint, state = checkpoint_of(finished, 2, dmd2), state_of(finished, 2, dmd2)
    sources = {"run": checkpoint.parents[1], "checkpoint": checkpoint, "dmd2": "dmd2", "sharded": tmp_path}
    if source == "sharded":  # as the export of a large one is
        student = WanTransformer3DModel.from_pretrained(checkpoint / "student", subfolder="transformer")
        student.save_pretrained(tmp_path / "transformer", max_shard_size="500KB")
    model = common.Model("tiny", 9, 32, 32)
    networks = {name: model.load_network(name, CPU) for name in ("student", "ema", "fake_score")}
    flags = {"init": sources.get(source, checkpoint / source), "student_sigmas": (1.0, 0.5)}
    run = Run(dmd2.__file__, small_args(dmd2, runs_dir=finished, **flags), CPU)
    load_init(run.init, networks, run.args)
    whole, out = source in ("run", "checkpoint", "dmd2"), capsys.readouterr().out
    assert ("--student-sigmas" in out) == whole and ("no fake score" in out) != whole
    state |= {f"teacher.transformer.{key}": value for key, value in WEIGHTS.items()}
    wanted = networks if whole else ("ema", "ema", "teacher")  # a student alone is its own average
    for name, network in zip(wanted, networks.values(), strict=True):
        assert all(torch.equal(x, state[f"{name}.{key}"]) for key, x in network.state_dict().items()), name


def parsed(monkeypatch, *words, script=dmd2):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    return vars(parse_args(script.Args))


def test_a_flag_beats_a_recipe_and_a_recipe_beats_a_default(tmp_path, monkeypatch):
    default, tiny, no_gan = vars(dmd2.Args()), parsed(monkeypatch), {"gan_weight": 0.0}
    assert tiny == default | RECIPES["tiny"]["dmd2"] | {"frames": 9, "height": 32, "width": 32}
    assert parsed(monkeypatch, "--lr", 0.5) == tiny | {"lr": 0.5} == vars(recipe_args(dmd2.Args, lr=0.5))
    for flag, file, off in (("data", "f", {}), ("prompts", "f", no_gan), ("gan_weight", 0.1, {})):  # no clips, no GAN
        words, own = (f"--{flag.replace('_', '-')}", file), {flag: file}
        assert parsed(monkeypatch, "--teacher", "wan2.1-1.3b", *words) == default | off | own | {
            "teacher": "wan2.1-1.3b"
        }
        assert parsed(monkeypatch, *words) == tiny | off | own
    wan14b = RECIPES["wan2.1-14b"]["dmd2"] | {"teacher": "wan2.1-i2v-14b"}  # which is like that one
    assert parsed(monkeypatch, "--teacher", "wan2.1-i2v-14b") == default | wan14b | no_gan
    for file in ("model_index.json", "transformer/config.json"):  # a teacher of this kind that was trained again
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(TEACHER / file, tmp_path / file)
    assert parsed(monkeypatch, "--teacher", tmp_path) == tiny | {"teacher": str(tmp_path)}


def test_resume_takes_the_flags_of_the_run(tmp_path, monkeypatch):
    run, seed = tmp_path / "dmd2__tiny__4__1", ["--seed", 4, "--runs-dir", tmp_path]
    before = asdict(small_args(dmd2, runs_dir="before", lr=3e-4, betas=(0.5, 0.9), seed=4))
    old_run(run, 1, script="dmd2", **before)
    for resume, more in (("latest", seed), (run, [])):
        args = parsed(monkeypatch, "--resume", resume, "--steps", 9, *more)
        assert args == before | {"steps": 9, "resume": str(resume), "runs_dir": str(tmp_path)}


def test_a_start_hands_on_its_levels_guidance_size_and_frame_block(tmp_path, monkeypatch, fails, capsys):
    own = {"student_sigmas": (1.0, 0.8), "shift": 2.0, "guidance_scale": 3.0, "frame_block": 1, "height": 64}
    start = tmp_path / "dmd2__tiny__0__1"
    old_run(start, 1, **asdict(small_args(dmd2, steps=2, lr=0.1, **own)))
    read = lambda *words, script=dfd: parsed(monkeypatch, "--runs-dir", tmp_path, *words, script=script)
    plain = read("--init", "None") | {"init": "dmd2"}
    assert read() == plain | own and read("--shift", 7) == plain | own | {"shift": 7.0}
    assert (
        read("--init", start / "checkpoints" / "step_0000002")["shift"] == plain["shift"]
    )  # no record there: no run's
    one_step = {"init": "dmd2", "height": 64}
    assert read("--init", "dmd2", script=dmd) == read(script=dmd) | one_step
    fails(lambda: train(dfd, runs_dir=tmp_path, init=start), str(start), "--frame-block 1")
    Run(dfd.__file__, small_args(dfd, runs_dir=tmp_path, init=start, frame_block=1), CPU)
    out = capsys.readouterr().out
    assert f"starting from {start}" in out and "other --height: 64" in out and "other --shift: 2.0" in out


@pytest.mark.parametrize(
    ("flag", "before", "now"),
    [("lora_rank", 0, 4), ("fake_lora_rank", 2, 0), ("ema_decay", 0.0, 0.9), ("gan_weight", 0.0, 0.1)]
    + [("ema_decay", 0.9, 0.0), ("frame_block", 0, 1), ("teacher", "tiny", "tiny-small")],
)
def test_resume_with_other_networks_is_one_line(tmp_path, fails, flag, before, now):
    old_run(tmp_path, 1, **asdict(small_args(dmd2, **{flag: before})), script="dmd2")
    run = lambda value: Run(dmd2.__file__, small_args(dmd2, runs_dir=tmp_path, resume=tmp_path, **{flag: value}), CPU)
    assert run(before).step == 2
    fails(lambda: run(now), f"--{flag.replace('_', '-')} {now}", f"has {before}")


def test_help_is_in_groups_the_methods_own_first(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help", script=dfd)
    text = capsys.readouterr().out
    marks = "method options|--data-prob FLOAT|data options|--teacher STR|recipe options|run options|--seed INT"
    places = [text.index(mark) for mark in f"{marks}|compute options|--lora-rank INT".split("|")]
    assert places == sorted(places) and max(map(len, text.splitlines())) <= 120
    assert "Steps between checkpoints" in text  # what dfd.py gives another value keeps its text


BAD = [("steps", 0), ("guidance_scale", math.nan), ("score_sigmas", (0.9, 0.1))]
BAD += [("student_sigmas", (1.0, 0.2, 0.5)), ("student_sigmas", (0.7,)), ("discriminator_blocks", (1, 6))]
BAD += [("frame_block", 2), ("attention", "nonsense"), ("resume", "latest"), ("init", "nowhere")]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_a_flag_that_cannot_be_is_one_line_before_any_run(tmp_path, fails, flag, value):
    fails(lambda: train(dmd2, runs_dir=tmp_path, **{flag: value}), f"--{flag.replace('_', '-')}", str(value))
    assert not list(tmp_path.glob("dmd2__*"))


@pytest.mark.parametrize(
    "words",
    ["steps 0", "steps many", "step 1", "prompts missing", f"runs-dir {ROOT}/dmd2.py/runs", "resume nowhere"],
)
def test_a_program_ends_with_one_line(tmp_path, words):
    flag, value = words.split()
    words = ["--runs-dir", str(tmp_path), f"--{flag}", value]
    code, out, err = run_program(ROOT / "dmd2.py", words, tmp_path, tmp_path / "said")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and value in err


def test_torchrun_shows_the_error_of_the_first_process_to_fail(tmp_path, monkeypatch):
    files = [tmp_path / rank / "error.json" for rank in "102"]
    for file in files:
        file.parent.mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(SystemExit, match="^1$"), one_line_errors():
            raise UserError("a mistake")
    failure = ProcessFailure(local_rank=1, pid=2, exitcode=1, error_file=str(files[0]))  # as torchrun reads it
    assert failure.message["message"] == "error: a mistake" and not any(file.exists() for file in files[1:])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"SLURM_NTASKS": "8"}, "torchrun"),
    ],
)
def test_processes_that_nobody_joins_do_not_start(monkeypatch, fails, environment, words):
    dist.destroy_process_group()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fails(common.init_distributed, words)


def test_a_process_has_a_gpu_of_its_own(monkeypatch, fails):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    for gpus, local, own in ((8, "3", 3), (1, "3", 0), (2, "2", None)):  # one alone is visible where each sees its own
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if own is None:
            fails(common.local_device, "2 are visible")
        else:
            assert common.local_device() == torch.device("cuda", own)


def test_a_restarted_launch_goes_on_with_its_own_run(tmp_path, monkeypatch):
    """Not with an older one of the same flags, nor with what --resume named."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    before, ours, others = (
        old_run(tmp_path / f"dmd2__tiny__0__{i}", i, **asdict(small_args(dmd2)), script="dmd2") for i in (1, 2, 3)
    )
    (ours.parents[1] / "launch.txt").write_text(f"launch {os.getppid()}")
    (others.parents[1] / "launch.txt").write_text("another")
    for count, resume, checkpoint in (("0", before, before), ("0", None, None), ("1", before, ours), ("1", None, ours)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert Run(dmd2.__file__, small_args(dmd2, runs_dir=tmp_path, resume=resume), CPU).checkpoint == checkpoint


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_from_the_newest_checkpoint(tmp_path):
    words = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1 dmd2.py --gan-weight 0"
    words += " --batch-size 1 --preview-every 0 --steps 400 --save-every 5 --keep 0 --student-every 1 --runs-dir"
    launch = subprocess.Popen([sys.executable, *words.split(), str(tmp_path)], cwd=ROOT)
    worker = lambda: Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()[0]
    found = lambda: len([*tmp_path.glob("*/checkpoints/step_*[05]")])
    while launch.poll() is None and found() < 2:
        time.sleep(0.2)
    before = found()
    os.kill(int(worker()), signal.SIGKILL)
    while launch.poll() is None and found() < before + 2:
        time.sleep(0.2)
    os.kill(launch.pid, signal.SIGTERM)
    launch.wait()
    assert len([*tmp_path.glob("dmd2__*")]) == 1 and found() >= before + 2
