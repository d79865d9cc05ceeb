"""experiments/: the figures of clips that are known, a small table, the variants, and which runs can be sampled."""

import csv
import importlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image

import common
import dmd2
from experiments import evidence, evidence_runs, hunt, variant
from tests.conftest import ROOT, only_run, same, small_args, student_weights
from tests.exact import COND, ScaleShift, draws
from tests.ranks import run_program
from tiny import measures
from tiny import world as tiny
from training.finished import load_run, students_of
from training.flags import recipe_args

QUICK = {"seeds": 1, "repeats": 2, "teacher_steps": (1,)}


def test_data_measures_as_data_and_collapse_and_drift_show():
    reference = measures.read_factors(tiny.batch(1, range(256))[0])
    captions = [caption for caption in tiny.EXAMPLES for _ in range(4)]
    clips = tiny.batch(5, range(48), captions)[0].unflatten(0, (12, 4))
    row = evidence.measure(clips, reference)
    assert row["right"] == 100 and row["clipped"] == 0
    assert row["distance"] < 0.2 and row["looks"] > 0.5 and row["motions"] > 0.5
    collapsed = evidence.measure(clips[:, :1].expand_as(clips), reference)
    assert collapsed["diversity"] == collapsed["looks"] == collapsed["motions"] == 0
    assert collapsed["position"] == pytest.approx(0, abs=1e-4)
    brighter = evidence.measure(clips * 1.1, reference)
    assert brighter["distance"] > row["distance"] + 0.05 and brighter["right"] == 100
    wrong = evidence.measure(clips.roll(1, dims=0), reference)
    # what is said of the last caption's clips is now said of the first's, and so on: true of some by chance
    shown = [tiny.draw_factors(5, i % 48, captions[i % 48]) for i in range(-4, 44)]
    fits = [all(factors[k] == v for k, v in tiny.NAMED[said].items()) for factors, said in zip(shown, captions)]
    assert 0 < sum(fits) < 24 and wrong["right"] == pytest.approx(100 * sum(fits) / 48)
    assert math.isnan(evidence.measure(torch.zeros_like(clips), reference)["distance"])


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert evidence.wasserstein(x + 0.3, x) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.slow
def test_a_small_table(tmp_path, fails, monkeypatch):
    """Two seeds of a row, and a variant. Relations are compared with the teacher's, the first that are asked for."""
    known = cycle([torch.tensor([[0.9, 0.1]])] + 9 * [torch.tensor([[0.5, 0.5]])])
    monkeypatch.setattr(evidence, "relations", lambda latents: (next(known),) * 2)
    for seed in (0, 1):
        dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0, seed=seed))
    (first, second), script = sorted(tmp_path.glob("dmd2__*")), variant.load("regression")
    script.main(small_args(script, runs_dir=tmp_path, steps=1, init=str(first)))
    tuned = only_run(tmp_path, script)
    runs, out = tuple(map(str, (first, second, tuned))), tmp_path / "out"
    for _ in range(2):  # the second time its lines stand in place of the first's
        evidence.main(evidence.Args(runs=runs, names=("DMD2", "DMD2", "+ regression"), out=out, **QUICK))
    rows = [line.strip("|").split("|") for line in (out / "table.md").read_text().splitlines()]
    names = "data", "teacher, 1 steps, guidance 2", "teacher, 1 steps, guidance 1", "DMD2", "+ regression"
    assert [(row[0].strip(), int(row[1])) for row in rows[2:]] == list(zip(names, (2, 2, 2, 2, 1)))
    figures = [row for row in csv.DictReader(open(out / "figures.csv")) if row["name"] == "DMD2"]
    lines = [row for row in csv.DictReader(open(out / "figures.csv")) if row["name"] == names[1]]
    assert lines[0]["brighter"] != lines[1]["brighter"], "seeds of the teacher are other noise"
    assert float(figures[0]["frames"]) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-4)
    assert [(row["run"], row["seed"]) for row in figures] == [(first.name, "0"), (second.name, "1")]
    assert figures[0]["commit"] == (first / "revision.txt").read_text().strip()
    words = figures[1]["command"].split()
    again = tyro.cli(dmd2.Args, args=words[2:], default=recipe_args(dmd2.Args))  # as the command line reads it
    assert words[1] == "dmd2.py" and replace(again, runs_dir=str(tmp_path)) == load_run(second)[1]
    mean = sum(float(row["right"]) for row in figures) / 2
    assert float(rows[5][2].split("±")[0]) == pytest.approx(mean, rel=0.01)
    with Image.open(out / "clips.webp") as moving:
        assert moving.n_frames == tiny.FRAMES
    path = second / "checkpoints" / "step_0000001" / "args.json"
    path.write_text(path.read_text().replace('"tiny"', '"tiny-i2v"'))
    fails(lambda: evidence.main(evidence.Args(runs=runs, out=out)), "one tiny teacher", "tiny-i2v")


def test_a_run_is_known_by_its_record_not_by_its_name(tmp_path, fails):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, gan_weight=0.0, ema_decay=0.5))
    exported = student_weights(tmp_path, 1, dmd2)
    run = only_run(tmp_path, dmd2).rename(tmp_path / "the good one")
    script, args, checkpoint = load_run(run)
    assert script is dmd2 and args.student_sigmas == (1.0, 0.9, 0.75, 0.5)  # a tuple again
    assert load_run(f"{checkpoint}:raw") == (script, args, checkpoint)
    model, device = common.Model("tiny", 9, 32, 32), common.init_distributed()  # main took the group down
    teacher = model.load_network("teacher", device)
    (average,), (raw,) = (students_of(model, device, script, args, checkpoint, raw) for raw in (False, True))
    assert same(average.transformer.state_dict(), exported)
    for mean, own, start in zip(average.parameters(), raw.parameters(), teacher.parameters()):
        assert torch.allclose(mean, (own + start) / 2, atol=1e-6), "the average went half the way"
    fails(lambda: load_run(tmp_path), "no run")


# -------------------------------------------------------------------------------------------------- variants and runs


@pytest.mark.parametrize("name", variant.PATCHES)
def test_a_variant_is_a_patch_of_a_few_lines_that_fits(name):
    script, patch = variant.load(name), variant.PATCHES[name].read_text()
    about, base, changes = re.fullmatch(r"(.+?)--- a/(\w+\.py)\n\+\+\+ b/\2\n(.+)", patch, re.DOTALL).groups()
    assert about.strip() and 0 < len(re.findall("^[+-]", changes, re.MULTILINE)) <= 28
    own, others = Path(script.__file__).read_text().splitlines(), (ROOT / base).read_text().splitlines()
    assert {f"+{line}" for line in set(own) - set(others)} <= set(changes.splitlines())
    assert script.__name__ == Path(script.__file__).stem == f"{base.removesuffix('.py')}-{name}"


def test_a_variants_run_keeps_its_source_and_is_found_again(tmp_path):
    script = variant.load("regression")
    script.main(small_args(script, runs_dir=tmp_path, steps=1, init=None))
    run = only_run(tmp_path, script)
    assert (run / "dfd-regression.py").read_text() == Path(script.__file__).read_text() and load_run(run)[0] is script


@pytest.mark.slow
def test_a_hunted_bug_shows_in_a_curve(tmp_path, monkeypatch):
    """Beside the healthy script on one process. Bug 6 has no curve: its ranks wait for each other in vain."""
    monkeypatch.setattr(hunt, "OUT", tmp_path / "runs")
    flags = "--steps 4 --student-every 1 --gan-weight 0 --ema-decay 0"
    flags += " --preview-every 4 --preview-prompts 1 --preview-seeds 2 --teacher-steps 1"
    monkeypatch.setattr(hunt, "FLAGS", flags)
    started, said = subprocess.call, tmp_path / "said"

    def call(words, cwd):  # without their imports, but for those of torchrun
        return started(words, cwd=cwd) if "-m" in words else run_program(cwd / words[1], words[2:], cwd, said)[0]

    monkeypatch.setattr(subprocess, "call", call)
    for bug in (1, 2, 3, 4, 5, 7):
        _, healthy, broken = hunt.both(bug)
        losses = [tag for tag in healthy if tag.startswith(("loss", "grad"))]
        assert max(abs(broken[tag][1] / healthy[tag][1] - 1).max() for tag in losses) > 0.05, bug
    hunt.main(1)
    with Image.open(hunt.OUT / "1.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 50


def test_vanilla_gives_the_gradient_of_all_steps():
    """A student whose velocity is (1 - theta) x_t predicts a(sigma) x_t, a = 1 - sigma + sigma theta. In two steps that
    is a(.6) * (.6 noise_2 + .4 a(1) noise_1); dmd2.rollout leaves out the derivative of a(1)."""
    student, shape = ScaleShift(0.7, 0.0), (1, 1, 1, 1)
    rng = draws("student", 64)
    first, second = rng.normal(shape), rng.normal(shape)
    x_t = 0.6 * second + 0.4 * 0.7 * first
    for rollout, through in ((dmd2.rollout, 0), (variant.load("vanilla").rollout, 1)):
        x0 = rollout(student, draws("student", 64), COND, shape, (1.0, 0.6))
        assert torch.allclose(x0, 0.82 * x_t)
        (grad,) = torch.autograd.grad(x0.sum(), student.theta)
        assert grad.item() == pytest.approx((0.6 * x_t + through * 0.82 * 0.4 * first).sum().item(), rel=1e-4)
    # in Euler steps the noise at level .6 is the first: x_t = a(1) first + .6 (1 - a(1)) first
    for name in ("euler", "dpdmd"):
        x0 = variant.load(name).rollout(student, draws("student", 64), COND, shape, (1.0, 0.6))
        assert torch.allclose(x0, 0.82 * (0.7 + 0.6 * 0.3) * first)


def test_the_relations_of_cells_see_a_move_that_means_of_frames_do_not():
    x, script = torch.eye(4).reshape(1, 1, 4, 2, 2), variant.load("relations")
    assert (
        script.relation_matrix(script.pooled(x, 1)).min() == 1
        and script.relation_matrix(script.pooled(x, 2)).sum() == 4
    )


def test_dpdmds_first_step_has_the_teachers_own_velocity_as_target_if_that_is_one_of_its_steps():
    script, teacher, noise = variant.load("dpdmd"), ScaleShift(0.7), torch.ones(4, 1, 1, 1, 1)
    args = small_args(script, teacher_steps=4, guidance_scale=1.0, shift=3.0)
    x_t = script.sample_teacher(teacher, {}, (1, 1, 1, 1), args, None, COND, noise, 1)  # at u .75
    assert script.anchor_loss(teacher(noise, torch.ones(4), COND)[0], noise, x_t, 0.9).item() < 1e-10


def test_every_run_of_the_evidence_is_a_command_of_today_and_stands_after_its_start():
    names = list(evidence_runs.RUNS)
    for name in names:
        words, parent = evidence_runs.words_of(name)
        at = next(i for i, word in enumerate(words) if word.startswith("--"))
        script, *own = words[:at]
        room = script.removesuffix(".py").replace("/", ".")
        module = variant.load(*own) if own else importlib.import_module(room)
        tyro.cli(module.Args, args=words[at:], default=recipe_args(module.Args))
        assert parent in [None, *names[: names.index(name)]]
    assert {name for rows in evidence_runs.TABLES.values() for name in rows.split()} == set(names)


@pytest.mark.parametrize("name, teacher, tables", [
    ("evidence.csv", "tiny", "dmd2 excess dfd phased_dmd i2v"), ("evidence.csv", "runs/dull/teacher", "dull"),
    ("rare.csv", "runs/rare/teacher", "rare"),
])  # fmt: skip
def test_the_pages_tables_are_those_of_the_csv_files(name, teacher, tables):
    page, path = (ROOT / "docs/evidence.md").read_text().splitlines(), ROOT / "experiments" / name
    for table in tables.split():
        lines = evidence_runs.table_in(path, table, teacher)
        assert len(lines) > 5 and set(lines) <= set(page), table
    assert {line["per_caption"] for line in csv.DictReader(open(path))} == {"64"}  # else looks do not compare


@pytest.mark.parametrize("name", ["rare", "dull"])
def test_another_world_is_a_patch_that_fits_and_can_be_read_back(name, tmp_path):
    """Its clips, read by its own measures in a process of its own, are what their factors say."""
    for room in ("tiny", "experiments"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("teacher", "teacher_*"))
    patch = ROOT / f"experiments/worlds/{name}.patch"
    subprocess.run(["patch", "--quiet", "--fuzz=0", "--strip=1", "--input", patch], cwd=tmp_path, check=True)
    (tmp_path / "look.py").write_text(LOOK)
    code, out, errors = run_program(tmp_path / "look.py", [], tmp_path, tmp_path / "said")
    assert code == 0, errors
    figures = json.loads(out)
    assert figures["right"] == 100 and figures["wrong"] == 0
    if name == "rare":  # of 512: three standard errors
        for mode, share in {"still": 50, "fast": 20, "grow": 25, "shrink": 10, "hue": 5}.items():
            assert abs(figures[mode] - share) < 3 * (share * (100 - share) / 512) ** 0.5, mode
        assert figures["tied"] == pytest.approx(figures["true_tied"])
        assert figures["information"] == pytest.approx(
            0.666, abs=0.2
        )  # log 4 less the entropy of .8 and three times .2 / 3
        assert figures["endpoints"] == pytest.approx(figures["true_endpoints"], abs=0.05)
        assert figures["paths"] == pytest.approx(figures["true_endpoints"] / 2, abs=0.05)  # steady motion
    else:
        assert figures["speed_mean"] < 0.8 and figures["brightness_mean"] < 0.6  # below the shipped world's


LOOK = """
import json, os, sys
sys.path[:0] = [os.getcwd()]
import tiny.world, tiny.measures, torch
assert tiny.world.__file__.startswith(os.getcwd())
videos, captions = tiny.world.batch(0, range(512))
rows = [tiny.world.draw_factors(0, i) for i in range(512)]
read = tiny.measures.read_factors(videos)
truth = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
moves = truth["speed"] > 0
names = ["color", "kind", *(["change"] if "change" in read else [])]
wrong = sum(int((read[name] != truth[name]).sum()) for name in names)
wrong += int((read["direction"] != truth["direction"])[moves].sum())
figures = tiny.measures.summary(videos, captions)
figures["wrong"] = wrong + int(((read["speed"] - truth["speed"]).abs() > 0.05).sum())
if "change" in read:
    free = moves & torch.tensor(["moving" not in caption for caption in captions])
    tied = torch.tensor([0, 2, 1, 3])[truth["color"]] == truth["direction"]
    ends = truth["speed"][:, None] * 8 * torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]])[truth["direction"]]
    own = [ends[[other == caption for other in captions]] for caption in dict.fromkeys(captions)]
    apart = torch.stack([torch.pdist(path).mean() for path in own if len(path) > 1])
    figures |= {"true_tied": 100 * tied[free].float().mean().item(), "true_endpoints": apart.mean().item()}
print(json.dumps(figures))
"""
