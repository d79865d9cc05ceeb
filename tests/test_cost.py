"""tools/cost.py: its table against real steps, its parameters, FLOPs and activations against counts by hand."""

import re
import sys
from collections import Counter

import pytest
import torch

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from tests.conftest import small_args
from tools import cost
from training.flags import parse_args, with_recipe


def costs(script, **flags):
    """What the tool prints for a script with these flags."""
    cost.main(script, with_recipe(cost.args_of(script), script.RECIPES, **flags))


class Counts:
    """Forwards of each network and backwards, in samples, and the most graphs that were alive at once."""

    def __init__(self, monkeypatch):
        self.loaded, self.samples, self.alive, self.graphs = [], Counter(), 0, 0
        self.hooked, self.role = set(), None
        load = common.Model.load_network

        def load_network(model, role, *args, **kwargs):
            network = load(model, role, *args, **kwargs)
            forward, role = network.forward, role if role in ("teacher", "fake_score") else "student"
            network.forward = lambda x_t, *rest, **named: counted(forward, role, x_t, *rest, **named)
            if network.blocks[0] not in self.hooked:  # which LoRAs on one base share
                network.blocks[0].register_forward_hook(differentiated)
            self.hooked.add(network.blocks[0])
            self.loaded.append(network)
            return network

        def counted(forward, role, x_t, *rest, **named):
            if self.role:  # the base, called by one of its LoRAs
                return forward(x_t, *rest, **named)
            self.samples[role] += len(x_t)
            self.role = role
            out = forward(x_t, *rest, **named)
            self.role = None
            return out

        def differentiated(block, inputs, out):
            if out.requires_grad:
                self.alive += 1
                self.graphs = max(self.graphs, self.alive)
                out.register_hook(lambda gradient, role=self.role: finished(role, len(gradient)))

        def finished(role, samples):
            self.alive -= 1
            self.samples[f"{role}_backwards"] += samples

        monkeypatch.setattr(common.Model, "load_network", load_network)


UNEQUAL = {"phase_ends": (0.5, 0.0), "student_sigmas": (1.0, 0.9, 0.75, 0.5)}  # three steps, then one


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (dmd, {}),
        (dmd, {"student_every": 1, "grad_accum": 2}),
        (dmd2, {}),
        (dmd2, {"gan_weight": 0.0, "ema_decay": 0.0}),
        (dmd2, {"student_input": "data"}),
        (dmd2, {"gan_weight": 0.0, "student_sigmas": (1.0, 0.5), "student_input": "data"}),
        (dfd, {}),
        (dfd, {"student_input": "simulate", "gan_weight": 0.1, "data_prob": 0.0}),
        (codmd, {}),
        (phased_dmd, {}),
        (dmd2, {"lora_rank": 2, "fake_lora_rank": 3}),
        (phased_dmd, {"gan_weight": 0.1, "lora_rank": 2, "ema_decay": 0.9}),
        (phased_dmd, UNEQUAL),
        (phased_dmd, {"student_input": "data", **UNEQUAL}),
    ],
)
def test_the_table_is_what_a_run_runs(tmp_path, monkeypatch, script, flags):
    """Exit steps are dealt out in turn, and a run is long enough for each to be there as often as the others."""
    flags = {"student_every": 2, **flags}
    turns = 3 if "phase_ends" in flags else 4  # a multiple of each number of exits
    steps = (2 if script is phased_dmd else 1) * turns * flags["student_every"]
    counts, asked = Counts(monkeypatch), []
    script_args = small_args(script, runs_dir=tmp_path, steps=steps, save_every=steps, **flags)

    def chunks(shared, stream):
        _, step = shared.key
        if stream == "exit":
            asked.append(step)
        return (step // script_args.student_every % turns + 0.5) / turns

    monkeypatch.setattr(common.SharedRNG, "uniform", chunks)
    # only training is counted, not the pairs before it
    restore = script.Run.restore
    monkeypatch.setattr(script.Run, "restore", lambda *args: (restore(*args), counts.samples.clear()))
    script.main(script_args)

    method = cost.METHODS[script.__name__](script_args)
    student, fake_score = method.student_update, method.fake_score_update
    samples = steps * script_args.batch_size * script_args.grad_accum
    for name in student._fields:
        expected = samples * (getattr(fake_score, name) + getattr(student, name) / script_args.student_every)
        assert counts.samples[name] == expected, name
    assert (counts.graphs, counts.alive) == (method.graphs, 0)
    assert len(counts.loaded) == 3 + (script_args.ema_decay > 0) + method.experts
    assert script is dmd or asked == list(range(steps))


def test_the_real_model_without_its_files(capsys, monkeypatch):
    """Parameters and FLOPs of Wan2.1-1.3B, against a count by hand."""
    monkeypatch.setattr(common, "teacher_folder", None)
    costs(dmd, teacher="wan2.1-1.3b", gpus=8)
    out = capsys.readouterr().out
    assert "1,419.0 M parameters" in out and "32,760 tokens" in out
    n, d, ffn, text, layers = 32760, 1536, 8960, 512, 30
    block = 2 * n * (6 * d * d + 2 * d * ffn) + 4 * n * n * d + 2 * text * 2 * d * d + 4 * n * text * d
    ends = 2 * n * d * 64 * 2 + 2 * text * (4096 * d + d * d) + 2 * (256 * d + d * d + 6 * d * d)
    forward = float(out.split("per GPU; ")[1].split()[0])
    assert forward == pytest.approx(layers * block + ends, rel=0.005)


def test_activations_are_what_autograd_keeps(capsys):
    """Of one forward, against the tensors that a bf16 network on the CPU keeps for its backward."""
    model, saved = common.Model("tiny", 9, 32, 32), {}
    network = model.load_network("student", torch.device("cpu"), dtype=torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(1, *model.latent_shape), torch.rand(1), {"text": torch.randn(1, 16, 32)})
    expected = 256 * sum(storage.nbytes() for storage in saved.values()) / 1024**3
    costs(dmd, batch_size=256)
    printed = float(capsys.readouterr().out.split("activations")[1].split()[0])
    assert printed == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("script", "given", "steps"),
    [
        (dmd, {"pairs": "pairs/"}, {"pair_steps": 40}),
        (dmd2, {"data": "shards/"}, {"teacher_steps": 40}),
        (dmd2, {"gan_weight": 0.0}, {"teacher_steps": 40}),
    ],
)
def test_hours_are_those_of_all_steps_and_of_the_teachers_samples(capsys, script, given, steps):
    flags = {"teacher": "wan2.1-1.3b", "steps": 3600, "num_samples": 1000, **steps}
    for more in ({}, given):
        costs(script, **flags, **more)
        out = capsys.readouterr().out
        forward = float(out.split("per GPU; ")[1].split()[0])
        step = float(out.split("time per step")[1].split()[0])
        assert float(out.split("all 3,600 steps")[1].split()[0]) == pytest.approx(step, rel=0.01)
        if not more:
            hours = float(out.split("teacher samples")[1].split()[0])
            assert hours == pytest.approx(1000 * 40 * 2 * forward / (8 * 4e14) / 3600, rel=0.01)
            assert "--max-hours" not in out
    assert "teacher samples" not in out
    costs(script, **flags, gpus=2)
    assert "more than --max-hours 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "backwards"),
    [
        ({"gradient_checkpointing": 0}, 3 * 2),
        ({"gradient_checkpointing": 1}, 3 * 3),
        ({"gradient_checkpointing": 2}, 3 * 2.5),  # of six blocks three run again
        ({"gradient_checkpointing": 3}, 3 * (2 + 1 / 3)),  # the first and the fourth
        ({"gradient_checkpointing": 0, "lora_rank": 4}, 2 * 1 + 2),
        ({"gradient_checkpointing": 1, "lora_rank": 4, "fake_lora_rank": 4}, 3 * 2),
    ],
)
def test_flops_of_a_step(capsys, flags, backwards):
    """dmd.py's 7 forwards, 3 of them differentiated, two of the student and one of the fake score, of 4 x 2 samples on
    3 GPUs."""
    costs(dmd, batch_size=4, grad_accum=2, gpus=3, **flags)
    out = capsys.readouterr().out
    figures = re.search(r"FLOPs per step +(\S+), (\S+) per GPU; (\S+) a forward", out).groups()
    step, each, forward = (float(figure) for figure in figures)
    assert step == pytest.approx(24 * (7 + backwards) * forward, rel=0.02)
    assert each == pytest.approx(step / 3, rel=0.01)


def test_the_verdict(capsys):
    """Cards, and whether another number of GPUs is another batch."""
    costs(dmd2, teacher="wan2.1-1.3b")
    out = capsys.readouterr().out
    assert "24 GB does not fit, 48 GB fits, 80 GB fits" in out and "another batch" not in out
    costs(dmd2, teacher="wan2.1-1.3b", gpus=1)
    out = capsys.readouterr().out
    assert "48 GB does not fit, 80 GB fits" in out
    assert "= 8 samples a step" in out and "64 samples a step, on 8 GPUs; --grad-accum 64 makes it the same" in out
    costs(dmd2, teacher="wan2.1-1.3b", gpus=1, grad_accum=64)
    assert "another batch" not in capsys.readouterr().out
    costs(dmd2, teacher="wan2.1-1.3b", gpus=3)
    out = capsys.readouterr().out
    assert "the recipe has 64" in out and "--grad-accum" not in out
    costs(dmd2)
    assert "another batch" not in capsys.readouterr().out  # the tiny recipe is written for one process


def test_memory_of_a_lora_and_of_frozen_experts(capsys):
    """Per parameter: teacher 2 bytes, fake score, student, average and one expert 4 each, and Adam with gradient 12."""

    def printed(**flags):
        costs(phased_dmd, teacher="wan2.1-1.3b", gpus=1, **flags)
        out = capsys.readouterr().out
        sizes = [float(out.split(f"  {name} ")[1].split()[0]) for name in ("weights", "gradients", "optimizer")]
        return out, torch.tensor(sizes, dtype=torch.float64) * 1024**3

    out, full = printed(lora_rank=0)
    million = 1419.0 * 1e6
    assert full.tolist() == pytest.approx([18 * million, 8 * million, 16 * million], rel=1e-3)
    out, low = printed(lora_rank=64)
    # 30 blocks: 8 attention layers of 1536 x 1536, 2 of 1536 x 8960
    lora = 64 * 30 * (8 * 2 * 1536 + 2 * (1536 + 8960))
    assert f"student {lora / 1e6:.1f} M of LoRA, fake score in full" in out
    change = [12 * (lora - million), 4 * (lora - million), 8 * (lora - million)]
    assert (low - full).tolist() == pytest.approx(change, rel=1e-3, abs=2e6)
    assert (full - printed(lora_rank=0, phase_ends=(0.0,))[1])[0].item() == pytest.approx(4 * million, rel=1e-3)
    # with both of them a LoRA the base is there once
    _, both = printed(lora_rank=64, fake_lora_rank=64)
    assert both.tolist() == pytest.approx([2 * million + 16 * lora, 8 * lora, 16 * lora], rel=1e-3, abs=2e6)


def test_memory_of_recomputed_blocks_and_of_shards(capsys, fails):
    """Thirty blocks: what is kept of a block at 32,760 tokens, and its input of 1,536 bf16 numbers a token."""

    def printed(name, **flags):
        costs(dmd2, teacher="wan2.1-1.3b", gpus=8, gan_weight=0.0, **flags)
        return float(capsys.readouterr().out.split(f"  {name} ")[1].split()[0]) * 1024**3

    none, all_, half = (printed("activations", gradient_checkpointing=every) for every in (0, 1, 2))
    kept = 32760 * 1536 * 2
    assert all_ == pytest.approx(30 * kept + none / 30, rel=1e-3)
    assert half == pytest.approx(15 * kept + 16 * none / 30, rel=1e-3)
    assert printed("weights", shard_size=2) == pytest.approx(4 * printed("weights"), rel=1e-3)
    fails(lambda: printed("weights", shard_size=3), "--shard-size must divide the 8 GPUs, got 3")


def test_memory_of_a_causal_students_past(capsys):
    """Seven blocks of 4,680 tokens, of each of which 30 layers keep 2 x 1,536 bf16 numbers but for the last block's. A
    layer that is not recomputed also keeps what block k read, all before it.
    """
    block = 2 * 1536 * 2 * 4680
    joined = sum(block * before for before in range(7))
    for batch_size, every, by_hand in (
        (1, 1, 30 * 6 * block),
        (2, 1, 60 * 6 * block),
        (1, 0, 30 * (6 * block + joined)),
    ):
        flags = {"gan_weight": 0.0, "frame_block": 3, "batch_size": batch_size, "gradient_checkpointing": every}
        costs(dmd2, teacher="wan2.1-1.3b", gpus=8, **flags)
        gib = float(capsys.readouterr().out.split("  past of the blocks ")[1].split()[0])
        assert gib * 1024**3 == pytest.approx(by_hand, rel=1e-3)


def test_two_experts_are_one_student_and_meet_where_they_do(capsys, fails):
    costs(phased_dmd, teacher="wan2.2-a14b")
    disk = float(capsys.readouterr().out.split("disk ")[1].split()[0])
    args = with_recipe(cost.args_of(phased_dmd), phased_dmd.RECIPES, teacher="wan2.2-a14b")
    run = cost.figures(phased_dmd, args)
    held = 4 * sum(run.loras.get(role, run.parameters) for role in ("student", "fake_score", "expert_0"))
    held += 8 * (run.loras["student"] + run.parameters)
    assert disk * 1024**3 == pytest.approx(held + 4 * run.parameters, rel=1e-2)  # an expert of each phase
    fails(lambda: costs(phased_dmd, teacher="wan2.2-a14b", phase_ends=(0.625, 0.0)), "experts meet at 0.875")


def test_the_tables_name_every_teacher_and_the_flags_that_fit(capsys, monkeypatch):
    monkeypatch.setattr(cost, "PRESETS", {name: cost.PRESETS[name] for name in ("wan2.1-1.3b", "wan2.1-14b")})
    cost.table()
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert [row.split("`")[1] for row in first.splitlines()[2:]] == ["wan2.1-1.3b", "wan2.1-14b"]
    small, large = (row.split(" | ")[1:] for row in second.splitlines()[2:])
    print(small, large)
    assert small[2].startswith("in full") and large[0] == "no"


@pytest.mark.parametrize("flags", [{"ema_decay": 0.9}, {"lora_rank": 4, "fake_lora_rank": 2}])
def test_disk_is_what_a_checkpoint_takes(tmp_path, flags, capsys):
    args = small_args(phased_dmd, runs_dir=tmp_path, steps=4, student_every=1, **flags)
    phased_dmd.main(args)
    folder = next(tmp_path.glob("phased_dmd__*/checkpoints/step_0000004"))
    taken = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    run = cost.figures(phased_dmd, with_recipe(cost.args_of(phased_dmd), phased_dmd.RECIPES, gpus=1, **flags))
    assert run.disk == pytest.approx(taken, rel=0.04)  # names and shapes beside the numbers
    capsys.readouterr()
    costs(phased_dmd, gpus=1, keep=0, **flags)
    assert f"{run.disk / 2**30:.3g} GiB a checkpoint; all are kept" in capsys.readouterr().out


def test_flags_are_the_scripts_and_are_checked(monkeypatch, fails):
    words = ["dmd2.py", "--teacher", "wan2.1-14b", "--gpus", "16", "--gan-weight", "0"]
    monkeypatch.setattr(sys, "argv", words)
    args = parse_args(cost.args_of(dmd2), dmd2.RECIPES)
    assert (args.gpus, args.gan_weight, args.shift) == (16, 0.0, dmd2.RECIPES["wan2.1-14b"]["shift"])
    fails(lambda: costs(dmd2, gpus=0), "--gpus must be at least 1")
    fails(lambda: costs(dmd2, student_sigmas=(0.5,)), "--student-sigmas")
    fails(lambda: costs(dmd2, teacher="wan2.1-1.3b", frames=10), "--frames")
    fails(lambda: costs(dmd, teacher="wan9.9"), "unknown teacher")
