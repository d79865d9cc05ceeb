"""experiments/: the figures of clips that are known, a small table, the controls, and which runs can be sampled."""

import fcntl
import importlib
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from experiments import evidence, evidence_runs, finetune, vanilla
from models.presets import PRESETS
from tests.conftest import ROOT, only_run, same, small_args, stopped, student_weights
from tests.exact import COND, ScaleShift, draws
from tiny import measures
from tiny import world as tiny
from training.finished import load_run, noise_levels, students_of
from training.flags import check_flags, with_recipe
from training.run import Run


def clips_of(seed, seeds=8):
    captions = [caption for caption in tiny.EXAMPLES for _ in range(seeds)]
    return tiny.batch(seed, range(len(captions)), captions)[0].unflatten(0, (len(tiny.EXAMPLES), seeds))


@pytest.fixture(scope="module")
def reference():
    return measures.read_factors(tiny.batch(1, range(1024))[0])


def test_data_measures_as_data(reference):
    row = evidence.measure(clips_of(5), reference)
    assert row["right"] == 100 and row["clipped"] == 0
    assert row["distance"] < 0.15 and row["looks"] > 0.7 and row["motions"] > 0.7
    low, high = tiny.RANGES["background"]
    assert row["background"] == pytest.approx((low + high) / 2, abs=0.03)


def test_collapse_and_drift_show(reference):
    clips, row = clips_of(5), evidence.measure(clips_of(5), reference)
    one_each = clips[:, :1].expand_as(clips)
    collapsed = evidence.measure(one_each, reference)
    assert collapsed["diversity"] == 0
    assert collapsed["looks"] == collapsed["motions"] == 0
    assert collapsed["position"] == pytest.approx(0, abs=1e-4)
    brighter = evidence.measure(clips * 1.1, reference)
    assert brighter["distance"] > row["distance"] + 0.05 and brighter["right"] == 100
    wrong = evidence.measure(clips.roll(1, dims=0), reference)
    # what is said of the last caption's clips is now said of the first's, and so on: true of some by chance
    before = [caption for caption in [tiny.EXAMPLES[-1], *tiny.EXAMPLES[:-1]] for _ in range(8)]
    shown = [tiny.draw_factors(5, (i - 8) % 96, caption) for i, caption in enumerate(before)]
    said = [tiny.NAMED[caption] for caption in tiny.EXAMPLES for _ in range(8)]
    fits = [all(factors[name] == named[name] for name in named) for factors, named in zip(shown, said)]
    assert 0 < sum(fits) < 48 and wrong["right"] == pytest.approx(100 * sum(fits) / 96)
    assert wrong["diversity"] == pytest.approx(row["diversity"])
    assert math.isnan(evidence.measure(torch.zeros_like(clips), reference)["distance"])


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert evidence.wasserstein(x + 0.3, x) == pytest.approx(0.3, abs=1e-5)


def test_a_small_table(tmp_path, capsys):
    for seed in (0, 1):
        dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=2, gan_weight=0.0, seed=seed))
    first = sorted(tmp_path.glob("dmd2__*"))[0]
    for data_prob in (0.5, 1.0):
        dfd.main(small_args(dfd, runs_dir=tmp_path / str(data_prob), steps=1, data_prob=data_prob, init=str(first)))
    finetune.main(small_args(dfd, runs_dir=tmp_path, steps=6, init=str(first)))
    runs = [str(path) for path in sorted(tmp_path.glob("d*__*")) + sorted(tmp_path.glob("*/dfd__*"))]
    runs += [str(path) for path in tmp_path.glob("finetune__*")]
    evidence.main(evidence.Args(runs=tuple(runs), seeds=2, repeats=2, teacher_steps=(2,), out=tmp_path / "out"))
    table, _, below = (tmp_path / "out" / "table.md").read_text().partition("\n\n")
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    assert [(name.strip(), int(seeds)) for name, seeds in rows] == [
        ("data", 2),
        ("teacher, 2 steps, guidance 2", 2),
        ("teacher, 2 steps, guidance 1", 2),
        ("DMD2, 4 steps", 2),
        ("+ DFD, 4 steps", 1),
        ("+ DFD, 4 steps, data_prob 1.0", 1),
        ("+ finetune.py, 4 steps", 1),
    ]
    parent = "from (dmd2.py, 2 training steps, batch_size 2, gan_weight 0.0)"
    assert below.splitlines() == [
        '- "DMD2, 4 steps": dmd2.py, 2 training steps, batch_size 2, gan_weight 0.0',
        f'- "+ DFD, 4 steps": dfd.py, 1 training steps, batch_size 2, {parent}',
        f'- "+ DFD, 4 steps, data_prob 1.0": dfd.py, 1 training steps, batch_size 2, data_prob 1.0, {parent}',
        f'- "+ finetune.py, 4 steps": finetune.py, 6 training steps, batch_size 2, {parent}',
    ]
    with Image.open(tmp_path / "out" / "clips.webp") as moving:
        assert moving.n_frames == tiny.FRAMES and moving.info["loop"] == 0
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 10_000
    (tuned,) = tmp_path.glob("finetune__*")
    assert (tuned / "finetune.py").is_file()
    exported = "student/transformer/diffusion_pytorch_model.safetensors"
    before, after = (load_file(next(run.glob(f"checkpoints/*/{exported}"))) for run in (first, tuned))
    assert not same(before, after)


def test_image_to_video_has_its_first_frame(tmp_path):
    """The column is there, rounding for data, and no student can lose what the velocity holds to the image."""
    dmd2.main(small_args(dmd2, teacher="tiny-i2v", runs_dir=tmp_path, steps=1, gan_weight=0.0))
    run, out = str(next(tmp_path.glob("dmd2__*"))), tmp_path / "out"
    evidence.main(evidence.Args(runs=(run,), seeds=2, repeats=2, teacher_steps=(1,), out=out))
    rows = [line.strip("|").split("|") for line in (out / "table.md").read_text().partition("\n\n")[0].splitlines()]
    assert rows[0][-1].strip() == "first frame, error"
    data, *others = (float(row[-1].split("±")[0]) for row in rows[2:])
    assert data < 1e-6 and all(0.001 < error < 0.01 for error in others)
    spread = dict(zip((cell.strip() for cell in rows[0]), rows[2]))["motions"]
    assert float(spread.split("±")[1]) > 0, "another draw of continuations for each sampling seed"


def test_labels_say_what_tells_rows_apart():
    rows = [("DMD2, 4 steps", "dmd2.py", f"{n} training steps", "batch_size 2") for n in (200, 500)]
    rows += [(*rows[1], "not averaged"), ("DMD, 1 step", "dmd.py", "9 training steps", "lr 0.1")]
    assert list(evidence.labels(rows).values()) == [
        "DMD2, 4 steps, 200 training steps",
        "DMD2, 4 steps, 500 training steps",
        "DMD2, 4 steps, 500 training steps, not averaged",
        "DMD, 1 step",
    ]


def test_the_same_run_twice(tmp_path, fails):
    for time in ("a", "b"):
        dmd2.main(small_args(dmd2, runs_dir=tmp_path / time, steps=1, gan_weight=0.0))
    runs = tuple(str(path) for path in tmp_path.glob("*/dmd2__*"))
    fails(lambda: evidence.main(evidence.Args(runs=runs)), "the same run twice", "name one of them")


def test_one_table_has_one_teacher(tmp_path, fails):
    shutil.copytree(PRESETS["tiny"].source, tmp_path / "teacher")
    for teacher in ("tiny", str(tmp_path / "teacher")):
        flags = {"teacher": teacher, "runs_dir": tmp_path, "steps": 1, "gan_weight": 0.0, "guidance_scale": 1.0}
        dmd2.main(small_args(dmd2, **flags))
    runs = tuple(str(path) for path in tmp_path.glob("dmd2__*"))
    fails(lambda: evidence.main(evidence.Args(runs=runs)), "different teachers")
    moved = tmp_path / "moved" / Path(runs[0]).name  # from a machine with other folders
    moved.parent.mkdir()
    Path(runs[0]).rename(moved)
    path = moved / "checkpoints" / "step_0000001" / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runs_dir": "/proc/nowhere"}))
    runs = (str(moved), *runs[1:])
    evidence.main(evidence.Args(runs=runs[:1], seeds=2, repeats=1, teacher_steps=(1,), out=tmp_path / "out"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| teacher, 1 step, guidance 1 | 1 |") == 1  # guidance 1 is no second row of these runs
    (tmp_path / "file").touch()
    fails(lambda: evidence.main(evidence.Args(runs=runs[:1], out=tmp_path / "file")), "cannot write", "--out")


def test_a_folder_that_is_no_run(tmp_path, fails):
    fails(lambda: evidence.main(evidence.Args(runs=(str(tmp_path),))), "is no run: give runs/NAME")
    fails(lambda: evidence.main(evidence.Args(runs=())), "at least one run")
    fails(lambda: evidence.main(evidence.Args(runs=(str(tmp_path),), seeds=0)), "--seeds", "at least 1")


def test_noise_levels_are_those_of_the_sampler():
    for script, levels in (
        (dmd, [[1.0]]),
        (codmd, [[1.0, 0.9, 0.75, 0.5]]),
        (phased_dmd, [[1.0, 0.9], [0.75, 0.5]]),
        (vanilla, [[1.0, 0.9, 0.75, 0.5]]),
    ):
        assert noise_levels(script, with_recipe(script.Args, script.RECIPES)) == levels


def test_a_run_is_known_by_its_record_not_by_its_name(tmp_path, fails):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0))
    run = only_run(tmp_path, dmd2).rename(tmp_path / "the good one")
    script, args, checkpoint = load_run(run)
    assert script is dmd2 and args.student_sigmas == (1.0, 0.9, 0.75, 0.5)  # a tuple again
    assert load_run(f"{checkpoint}:raw") == (script, args, checkpoint)
    evidence.main(evidence.Args(runs=(str(run),), seeds=1, repeats=1, teacher_steps=(1,), out=tmp_path / "out"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| DMD2, 4 steps | 1 |" in table and "dmd2.py, 1 training steps, batch_size 2, gan_weight 0.0" in table
    named = {"seeds": 1, "repeats": 1, "teacher_steps": (1,), "out": tmp_path / "out"}
    fails(lambda: evidence.main(evidence.Args(runs=(str(run),), names=("a", "b"), **named)), "--names", "2 for 1")
    evidence.main(evidence.Args(runs=(str(run),), names=("mine",), **named))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mine | 1 |" in table and '- "mine": dmd2.py, 1 training steps' in table
    path = run / "checkpoints" / "step_0000001" / "args.json"
    record = json.loads(path.read_text())
    for changed, words in (({"script": "os"}, "no script that is here"), ({"cfg": 1}, "does not fit today's dmd2.py")):
        path.write_text(json.dumps(record | changed))
        fails(lambda: load_run(run), words)


def test_raw_is_the_student_itself(tmp_path):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0, ema_decay=0.5))
    script, args, checkpoint = load_run(only_run(tmp_path, dmd2))
    model, device = common.Model("tiny", 9, 32, 32), common.init_distributed()  # main took the group down
    teacher = model.load_network("teacher", device)
    (average,), (raw,) = (students_of(model, device, script, args, checkpoint, raw) for raw in (False, True))
    exported = student_weights(tmp_path, 1, dmd2)
    assert same(average.transformer.state_dict(), exported)
    for key, value in raw.state_dict().items():  # the average went half the way
        half = (value + teacher.state_dict()[key]) / 2
        assert torch.allclose(average.state_dict()[key], half, atol=1e-6), key


def test_raw_has_its_lora_and_an_unfinished_run_with_phases_is_refused(tmp_path, monkeypatch, fails):
    flags = {"runs_dir": tmp_path, "steps": 2, "lora_rank": 2, "student_every": 1}
    stopped(monkeypatch, 1, lambda: phased_dmd.main(small_args(phased_dmd, **flags)))
    unfinished = load_run(only_run(tmp_path, phased_dmd))
    model, device = common.Model("tiny", 9, 32, 32), common.init_distributed()  # main took the group down
    fails(lambda: students_of(model, device, *unfinished, raw=False), "1 of 2 phases are trained; finish the run")
    phased_dmd.main(small_args(phased_dmd, **flags, resume="latest"))
    common.init_distributed()
    finished = load_run(only_run(tmp_path, phased_dmd))
    merged, raw = (students_of(model, device, *finished, raw=raw) for raw in (False, True))
    x_t, sigma, cond = torch.randn(1, *model.latent_shape), torch.tensor([0.5]), {"text": torch.randn(1, 3, 32)}
    of = lambda network: network(x_t, sigma, cond)[0]
    with torch.no_grad():
        assert len(merged) == len(raw) == 2 and torch.equal(of(merged[0]), of(raw[0]))
        assert torch.allclose(of(merged[1]), of(raw[1]), atol=1e-4)
        assert all("lora_" in name for name, _ in raw[1].named_parameters())
        assert not torch.allclose(of(raw[1]), of(model.load_network("teacher", device)), atol=1e-3)


def test_vanilla_gives_the_gradient_of_all_steps():
    """A student whose velocity is (1 - theta) x_t predicts a(sigma) x_t, a = 1 - sigma + sigma theta. In two steps that
    is a(.6) * (.6 noise_2 + .4 a(1) noise_1); dmd2.rollout leaves out the derivative of a(1)."""
    student, shape = ScaleShift(0.7, 0.0), (1, 1, 1, 1)
    rng = draws("student", 64)
    first, second = rng.normal(shape), rng.normal(shape)
    x_t = 0.6 * second + 0.4 * 0.7 * first
    for rollout, through in ((dmd2.rollout, 0), (vanilla.rollout, 1)):
        x0 = rollout(student, draws("student", 64), COND, shape, (1.0, 0.6))
        assert torch.allclose(x0, 0.82 * x_t)
        (grad,) = torch.autograd.grad(x0.sum(), student.theta)
        assert grad.item() == pytest.approx((0.6 * x_t + through * 0.82 * 0.4 * first).sum().item(), rel=1e-4)


def test_vanilla_takes_all_steps_and_keeps_its_name(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(dmd2, "rollout", dmd2.rollout)  # put back at the end, as is __file__
    monkeypatch.setattr(dmd2, "__file__", dmd2.__file__)
    taken, original = [], vanilla.rollout
    monkeypatch.setattr(vanilla, "rollout", lambda *args: taken.append(args[-1]) or original(*args))
    vanilla.main(small_args(dmd2, runs_dir=tmp_path, steps=2, gan_weight=0.0))
    assert set(taken) == {dmd2.RECIPES["tiny"]["student_sigmas"]} and len(taken) == 3  # one student step, two others
    (run,) = tmp_path.glob("vanilla__*")
    script, args, _ = load_run(run)
    words = evidence.description(script, args, 2)
    assert (run / "vanilla.py").is_file() and words[:3] == ["vanilla.py, 4 steps", "vanilla.py", "2 training steps"]
    fails(lambda: vanilla.main(small_args(dmd2, student_input="data")), "nothing to go back through")
    fails(lambda: vanilla.main(small_args(dmd2, frame_block=1)), "--frame-block", "leave it out")


def test_what_a_run_starts_from_is_trained_before_it_and_rows_have_short_names(tmp_path, monkeypatch, fails):
    calls = []

    def call(words, **_):
        calls.append(words)
        if words[1] != "experiments/evidence.py":
            name, last = (
                Path(words[words.index("--runs-dir") + 1]),
                f"step_{int(words[words.index('--steps') + 1]):07d}",
            )
            (record := name / "x__tiny__3__now" / "checkpoints" / last / "checkpoint.json").parent.mkdir(parents=True)
            record.touch()
        return 0

    monkeypatch.setattr(evidence_runs.subprocess, "call", call)
    evidence_runs.main(evidence_runs.Args(tables=("causal",), seeds=(3,), runs_dir=tmp_path))
    *trained, table = calls
    order = [Path(words[words.index("--runs-dir") + 1]).name for words in trained]
    assert set(order) == set(evidence_runs.TABLES["causal"]) and order.index("causal_start") < order.index("causal")
    for words in trained[-3:]:
        assert words[words.index("--init") + 1] == str(tmp_path / "causal" / "x__tiny__3__now")
    names = table[table.index("--names") + 1 : table.index("--out")]
    assert names == list(evidence_runs.TABLES["causal"].values()) and len(names) == len(
        table[2 : table.index("--names")]
    )
    fails(lambda: evidence_runs.main(evidence_runs.Args(tables=("dmd3",))), "unknown table 'dmd3'")
    untrained = evidence_runs.Args(tables=("i2v",), train=False, runs_dir=tmp_path)
    fails(lambda: evidence_runs.main(untrained), "no run of the table i2v")


def test_two_calls_do_not_train_the_same_run(tmp_path, monkeypatch):
    """The second waits for the first, deletes nothing of it, and finds it done."""
    run = tmp_path / "dmd2" / "dmd2__tiny__0__now"
    run.mkdir(parents=True)
    monkeypatch.setattr(evidence_runs.subprocess, "call", lambda *_, **__: pytest.fail("trained again"))
    with open(tmp_path / "dmd2" / "0.lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=evidence_runs.train, args=(tmp_path, "dmd2", 0))
        second.start()
        second.join(0.5)
        assert second.is_alive() and run.is_dir()
        (run / "checkpoints" / "step_0000500").mkdir(parents=True)
        (run / "checkpoints" / "step_0000500" / "checkpoint.json").touch()
    second.join(10)
    assert not second.is_alive() and evidence_runs.finished(tmp_path, "dmd2", 0) == run


def test_finetune_needs_a_student_and_clips(tmp_path, fails):
    fails(lambda: finetune.main(small_args(dfd)), "--init CHECKPOINT is missing", "dmd2.py")
    fails(lambda: finetune.main(small_args(dfd, init="x", lora_rank=2)), "trained in full: leave out --lora-rank")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = {"runs_dir": tmp_path, "init": str(tmp_path), "prompts": str(tmp_path / "prompts.txt")}
    fails(lambda: finetune.main(small_args(dfd, **flags)), "clips", "--data")


def test_an_interrupted_finetune_says_so_and_goes_on_without_its_start(tmp_path, monkeypatch):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "start", steps=1, gan_weight=0.0))
    (start,) = (tmp_path / "start").glob("dmd2__*")
    flags = {"runs_dir": tmp_path, "init": str(start), "steps": 3, "student_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_signal", lambda run: 15)
        with pytest.raises(SystemExit) as stop:
            finetune.main(small_args(dfd, **flags))
    assert stop.value.code == 128 + 15
    shutil.rmtree(start)
    finetune.main(small_args(dfd, **flags, resume="latest"))
    assert len(list(tmp_path.glob("finetune__*/checkpoints/step_0000003"))) == 1


def test_every_run_of_the_evidence_is_a_command_of_today():
    for script, flags, parent in evidence_runs.RUNS.values():
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = tyro.cli(module.Args, args=flags.split(), default=with_recipe(module.Args, module.RECIPES))
        check_flags(args)
        assert noise_levels(module, args)[0][0] == 1
        assert (ROOT / script).is_file() and parent in {None, *evidence_runs.RUNS}
    assert {name for rows in evidence_runs.TABLES.values() for name in rows} == set(evidence_runs.RUNS)
