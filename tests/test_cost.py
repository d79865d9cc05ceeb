"""tools/cost.py: its figures against a table that was checked, real runs and counts by hand."""

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from models.folders import family_of
from models.presets import PRESETS
from tests.conftest import small_args
from tools import cost
from training.flags import recipe_args

WAN = 1419.0e6  # parameters of Wan2.1-1.3B


def figures(script, gpus=8, **flags):
    return cost.figures(script, recipe_args(script.Args, **flags), gpus)


@pytest.mark.parametrize(
    ("script", "flags", "gib", "flops", "disk", "hours"),
    [  # disk and hours as commit 7233420 printed them, which had a table of each script's updates
        (dmd, {}, 13.424, 3.0908e17, 42.289, 2.5156),
        (dmd2, {"gan_weight": 0.0}, 13.424, 1.5623e17, 42.289, 0),
        (dfd, {}, 12.763, 3.0908e16, 37.003, 2.5156),
        (phased_dmd, {}, 10.984, 1.5518e17, 28.061, 0),
    ],
)
def test_known_figures(script, flags, gib, flops, disk, hours):
    run = figures(script, teacher="wan2.1-1.3b", **flags)
    found = (run.total / 2**30, run.step, run.disk / 2**30, run.hours["teacher samples"])
    assert found == pytest.approx((gib, flops, disk, hours), rel=1e-3)
    assert run.seconds == pytest.approx(flops / (8 * 4e14), rel=1e-3)


REHEARSED = [  # GiB per GPU of runs on tensors without content, at commit 2d5192d; blocks, if fewer
    ("wan2.2-a14b", 2, dmd2, 8, {"gan_weight": 0.0}, 26.3),
    ("wan2.2-5b-i2v", 2, codmd, 8, {}, 15.0),
    *(
        pytest.param(teacher, 0, dmd2, gpus, flags, gib, marks=pytest.mark.slow)
        for teacher, gpus, flags, gib in (
            ("wan2.1-1.3b", 8, {"gan_weight": 3e-3}, 18.0),
            ("wan2.1-1.3b", 1, {"gan_weight": 0.0}, 52.3),
            ("wan2.1-1.3b", 1, {"lora_rank": 64, "fake_lora_rank": 64, "gan_weight": 3e-3}, 16.8),
            ("wan2.1-1.3b", 1, {"frame_block": 3, "gan_weight": 0.0}, 57.1),
            ("wan2.1-14b", 8, {"gan_weight": 3e-3}, 104),
        )
    ),
]


@pytest.mark.parametrize(("teacher", "blocks", "script", "gpus", "flags", "gib"), REHEARSED)
def test_memory_is_that_of_the_rehearsal(monkeypatch, teacher, blocks, script, gpus, flags, gib):
    config = PRESETS[teacher].config | ({"num_layers": blocks} if blocks else {})
    monkeypatch.setitem(PRESETS, teacher, PRESETS[teacher]._replace(config=config))
    monkeypatch.setattr(cost, "described", cost.Described)
    assert figures(script, gpus, teacher=teacher, **flags).total / 2**30 == pytest.approx(gib, rel=0.1)


B = 2 + 0.5 / 2  # a backward without recomputed blocks: 2 forwards, and of attention, half of it, 2.5


@pytest.mark.parametrize(
    ("script", "flags", "work"),
    [  # a step of the fake score, and 1 / student_every of one of the student
        (dmd, {"student_every": 1}, (2 + B) + (5 + 2 * B)),
        (dmd2, {"gan_weight": 0.0}, (3.5 + B) + (5.5 + B) / 5),
        (dmd2, {"gan_weight": 0.0, "student_input": "data"}, (2 + B) + (4 + B) / 5),
        (dmd2, {"gan_weight": 0.0, "lora_rank": 4, "fake_lora_rank": 4}, (3.5 + B - 0.5) + (5.5 + B - 0.5) / 5),
        (dmd2, {"gan_weight": 0.0, "gradient_checkpointing": 3}, (3.5 + B + 1 / 3) + (5.5 + B + 1 / 3) / 5),
        (dmd2, {"gan_weight": 0.0, "gradient_checkpointing": 1, "keep_attention": True}, (4 + B) + (6 + B) / 5),
        # of five frames each attends to itself and those before: .3 of attention, without the last .2, and .4 of others
        (dmd2, {"gan_weight": 0.0, "frame_block": 1}, (2.5 * 0.8 + 0.6 + 1 + B) + (2.5 * 0.8 + 0.6 + 3 + 1.75) / 5),
        (phased_dmd, {"phase_ends": (0.5, 0.0), "student_sigmas": (1.0, 0.9, 0.75, 0.5)}, (4 + B) + (6 + B) / 5),
    ],
)
def test_what_a_step_runs(script, flags, work):
    """In forwards of a sample, half of which are attention. Rollouts of four steps take 2.5, of phases of three steps
    and one 2 and 4. A LoRA's backward lacks the gradient of the weights.
    """
    args = recipe_args(script.Args, **{"gradient_checkpointing": 0, **flags})
    steps = 2 * args.student_every * len(getattr(args, "phase_ends", (0,)))
    counts = cost.counted(script, cost.replace(args, steps=steps), steps, attention=0.5)
    assert (counts.graphs, sum(counts.each) / steps) == pytest.approx((1, work))
    assert counts.roles.count("expert_0") == len(getattr(args, "phase_ends", (0,))) - 1


@pytest.mark.slow
def test_flops_are_those_that_pytorch_counts_in_real_steps():
    """A LoRA's own products are counted by PyTorch alone; it counts no fused attention on the CPU, and cannot follow
    the discriminator's autograd.grad."""
    script, args = (
        dmd2,
        small_args(dmd2, student_every=2, steps=4, gradient_checkpointing=2, fake_lora_rank=2, gan_weight=0.0),
    )
    model, device, counted = cost.Described(*cost.size_of(args), args.compute), torch.device("cpu"), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cost.run_steps(script, args, model, device, 4, lambda: counted.append(counter.get_total_flops()))
    forward = args.batch_size * cost.one_forward(cost.described(*cost.size_of(args)))[1]
    expected = [forward * work for work in cost.counted(script, args, 4, attention=0.0).each]
    assert [b - a for a, b in zip([0, *counted], counted)] == pytest.approx(expected, rel=0.08)


def test_the_real_model_without_its_files(monkeypatch):
    """Parameters and FLOPs of Wan2.1-1.3B, against a count by hand."""
    monkeypatch.setattr(common, "teacher_folder", None)
    run = figures(dmd, teacher="wan2.1-1.3b")
    assert run.parameters == pytest.approx(WAN, rel=1e-4) and run.tokens == 32760
    n, d, ffn, text, layers = 32760, 1536, 8960, 512, 30
    block = 2 * n * (6 * d * d + 2 * d * ffn) + 4 * n * n * d + 2 * text * 2 * d * d + 4 * n * text * d
    ends = 2 * n * d * 64 * 2 + 2 * text * (4096 * d + d * d) + 2 * (256 * d + d * d + 6 * d * d)
    assert run.flops == pytest.approx(layers * block + ends, rel=0.005)


def test_a_smaller_student(monkeypatch):
    """14B scores, 1.3B learns, of two blocks here: of a step's forwards two in five are the teacher's."""
    flags = {"gan_weight": 0.0, "gradient_checkpointing": 0, "grad_accum": 8}
    monkeypatch.setattr(cost, "described", cost.Described)
    for name in ("wan2.1-14b", "wan2.1-1.3b"):
        monkeypatch.setitem(PRESETS, name, PRESETS[name]._replace(config=PRESETS[name].config | {"num_layers": 2}))
    big, small = (figures(dmd2, teacher=name, **flags) for name in ("wan2.1-14b", "wan2.1-1.3b"))
    both = figures(dmd2, teacher="wan2.1-14b", student="wan2.1-1.3b", **flags)
    of = lambda run: (run.trained, run.disk, run.memory["activations"])
    assert of(both) == of(small)
    assert both.memory["weights"] == pytest.approx((2 * big.parameters + 12 * small.parameters) / 8, rel=1e-3)
    work = small.step / small.samples / small.flops + 2 / 5 * (big.flops / small.flops - 1)
    assert both.step == pytest.approx(both.samples * small.flops * work)
    both = figures(dmd2, teacher="wan2.1-14b", student="wan2.1-1.3b", lora_rank=64, fake_lora_rank=64, **flags)
    lora = 64 * 2 * (8 * 2 * 1536 + 2 * (1536 + 8960))  # 8 attention layers and 2 of the feed-forward a block
    assert both.memory["weights"] == pytest.approx((2 * (big.parameters + small.parameters) + 12 * lora) / 8, rel=1e-3)


def test_memory_of_recomputed_blocks_and_of_a_causal_past():
    """Thirty blocks of 32,760 tokens: what is kept of a block, and its input of 1,536 bf16 numbers a token."""
    memory = lambda **flags: figures(dmd2, teacher="wan2.1-1.3b", gan_weight=0.0, **flags).memory
    none, every, half = (memory(gradient_checkpointing=n)["activations"] for n in (0, 1, 2))
    kept = 32760 * 1536 * 2
    assert every == pytest.approx(30 * kept + none / 30, rel=0.07)  # beside what is in no block
    assert half == pytest.approx(15 * kept + 16 * none / 30, rel=0.02)
    # seven turns of 4,680 tokens; a layer that is not recomputed also keeps what turn k read, all before it
    turn = 2 * 1536 * 2 * 4680
    past = lambda **flags: memory(frame_block=3, **flags)["past of the blocks"]
    assert past(batch_size=2) == pytest.approx(2 * 30 * 6 * turn, rel=1e-3)
    assert past(gradient_checkpointing=0) == pytest.approx(30 * (6 + sum(range(7))) * turn, rel=1e-3)


def test_disk_is_what_a_checkpoint_takes(tmp_path):
    flags = {"lora_rank": 4, "fake_lora_rank": 2, "ema_decay": 0.9}
    phased_dmd.main(small_args(phased_dmd, runs_dir=tmp_path, steps=2, **flags))
    folder = next(tmp_path.glob("phased_dmd__*/checkpoints/step_0000002"))
    common.init_distributed()
    taken = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert figures(phased_dmd, 1, **flags).disk == pytest.approx(taken, rel=0.04)  # names and shapes beside the numbers


SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
OWN = {"Wan": {"ffn_dim": 32}, "Cosmos": {"mlp_ratio": 2, "adaln_lora_dim": 8}, "Qwen": {"axes_dims_rope": (4, 6, 6)}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher", ["wan2.1-i2v-14b", "wan2.2-a14b", "wan2.2-5b-i2v", "cosmos2.5-2b-i2v", "qwen-image"]
)
def test_teachers_of_the_hub_are_measured_without_its_files(monkeypatch, capsys, teacher):
    """With its family's classes, small."""
    preset, losses, backward = PRESETS[teacher], [], torch.Tensor.backward
    kind = family_of(preset.family).transformer_class.__name__
    config = preset.config | SMALL | next(own for name, own in OWN.items() if kind.startswith(name))
    config |= {"added_kv_proj_dim": 32} if "added_kv_proj_dim" in config else {}
    monkeypatch.setitem(PRESETS, teacher, preset._replace(config=config))
    monkeypatch.setattr(common, "teacher_folder", None)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    flags = {"frames": 1 if "qwen" in teacher else 5, "height": 64, "width": 64, "discriminator_blocks": (0, 1)}
    flags |= {"gradient_checkpointing": 1, "lora_rank": 2, "batch_size": 1, "grad_accum": 1, "gan_weight": 0.1}
    cost.measure(dmd2, small_args(dmd2, teacher=teacher, **flags), 2)
    assert "student and that" in capsys.readouterr().out
    assert len(losses) > 5 and torch.tensor(losses).isfinite().all()


def test_the_command_line(monkeypatch, capsys, fails):
    for words, said in (
        (["dmd2", "--teacher", "wan2.1-1.3b", "--gpus", "4", "--data", "shards"], "24 GB does not fit, 48 GB fits"),
        (["dmd2", "--teacher", "wan2.1-1.3b", "--gpus", "1"], "x 1 GPUs = 8"),
        (["dmd2", "--teacher", "wan2.1-1.3b", "--gan-weight", "0"], "13.424 GiB"),
        (["phased_dmd", "--measure", "2", "--batch-size", "1"], "TFLOP/s"),
    ):
        monkeypatch.setattr(sys, "argv", ["cost.py", *words])
        cost.main()
        assert said in capsys.readouterr().out
    fails(lambda: figures(dmd2, student_sigmas=(0.5,)), "--student-sigmas")
