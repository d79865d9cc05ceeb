"""The causal student: its network against stock ones, its rollout's gradient, whole runs of the scripts on it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import codmd
import common
import dfd
import dmd
import dmd2
import eval_vbench
import phased_dmd
from experiments import evidence
from models.wan import Wan
from models.wan_causal import CausalWan
from tests.conftest import on_ranks, only_run, same, small_args, student_weights
from tests.ranks import train_all
from tests.small_teachers import awake
from tiny import measures, world
from tools import ode_init
from training.finished import load_run, students_of
from training.flags import parse_args, with_recipe
from training.media import read_video

CPU = torch.device("cpu")
SHAPE, FRAMES, BLOCK = (8, 9, 4, 4), 9, 3


def transformer(dtype=torch.float32, cls=WanTransformer3DModel, **more):
    torch.manual_seed(0)
    network = cls(
        num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8, text_dim=32, freq_dim=64,
        ffn_dim=64, num_layers=3, rope_max_seq_len=64, **more,
    )  # fmt: skip
    return awake(network, 0).to(dtype)


def causal(block=BLOCK, **more):
    network = CausalWan(transformer(**more))
    network.frame_block = block
    return network


@pytest.fixture
def cond():
    return {"text": 5 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))}


def videos(n, frames=FRAMES):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, SHAPE[0], frames, *SHAPE[2:], generator=generator) for _ in range(n)]


@torch.no_grad()
def test_one_block_is_the_stock_network(cond):
    """To the bit, and the weights have its names."""
    (x_t,), sigma, network = videos(1), torch.tensor([0.4, 0.9]), causal(FRAMES)
    (whole,) = network.chunks(x_t)
    assert torch.equal(network(whole, sigma, cond), Wan(transformer())(x_t, sigma, cond))
    assert network.state_dict().keys() == Wan(transformer()).state_dict().keys()


@torch.no_grad()
def test_kept_keys_and_values_are_the_masked_network(cond):
    """diffusers' SkyReels-V2 has Wan's weights, a noise level per frame and a block-causal mask."""
    stock = transformer()
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    masked = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=BLOCK)
    masked.load_state_dict(stock.state_dict())
    (clean, noisy), sigma, network = videos(2), torch.tensor([0.4, 0.9]), causal()
    blocks = network.chunks(noisy)
    assert len(blocks) == 3
    for k, x_t in enumerate(blocks):
        before = BLOCK * k
        x = torch.cat([clean[:, :, :before], noisy[:, :, before:]], dim=2)
        level = torch.cat([torch.zeros(2, before), sigma[:, None].expand(2, FRAMES - before)], dim=1)
        theirs = masked(x, 1000 * level, cond["text"], enable_diffusion_forcing=True, return_dict=False)[0]
        ours = network(x_t, sigma, cond)
        assert (ours - theirs[:, :, before : before + BLOCK]).abs().max() < 1e-5
        without = Wan(stock)(x, sigma, cond)[:, :, before : before + BLOCK]
        assert (ours - without).abs().max() > 0.01, "the mask matters"
        network.update_cache(clean[:, :, before : before + BLOCK], cond)


@torch.no_grad()
def test_kept_frames_are_the_last_ones(cond):
    """With so few kept that nothing older is seen, a changed first block changes nothing; the place in time is right:
    only distances count.
    """
    (clean, noisy), sigma = videos(2), torch.tensor([0.4, 0.9])

    def third(kept, first):
        network = causal(1, dtype=torch.float64)
        network.kept_frames, out = kept, None
        for x_t, x0 in zip(network.chunks(noisy[:, :, :4]), [first, *clean[:, :, 1:4].split(1, 2)], strict=True):
            out = network(x_t, sigma, cond)
            network.update_cache(x0, cond)
        return out, [sum(key.shape[1] for key, _ in blocks) for blocks in network.transformer.rope.past]

    first, other = clean[:, :, :1], noisy[:, :, 8:]
    every, tokens = third(0, first)
    assert tokens == [3 * 4] * 3 and not torch.equal(every, third(0, other)[0])
    few, tokens = third(1, first)
    assert tokens == [4] * 3
    # one frame back, layer by layer: three layers see at most three frames back through what was kept
    assert not torch.equal(few, every)
    network = causal(1, dtype=torch.float64)
    x_t, *_ = network.chunks(noisy[:, :, :2])
    network.update_cache(clean[:, :, 2:3], cond)
    early = network(noisy[:, :, 3:4], sigma, cond)
    network.transformer.rope.start = 1
    late = causal(1, dtype=torch.float64)
    late.chunks(noisy[:, :, :9])
    late.transformer.rope.start = 5
    late.update_cache(clean[:, :, 2:3], cond)
    torch.testing.assert_close(late(noisy[:, :, 3:4], sigma, cond), early, atol=1e-5, rtol=1e-4)


def rollout(network, cond, sigmas=(1.0, 0.9, 0.75)):
    return dmd2.rollout(network, common.SampleRNG(0, "student", range(2), CPU), cond, SHAPE, sigmas)


def test_the_gradient_is_that_of_the_exit_steps(cond, monkeypatch):
    """Autograd of a whole rollout against finite differences of its last predictions, all else held fixed: the inputs
    of those, and the kept keys and values.
    """
    # diffusers' norms would round to float32, and differences drown in that
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))
    network, held = causal(dtype=torch.float64), []
    (weight,) = (x.double() for x in videos(1))
    cond = {"text": cond["text"].double()}

    def velocity(x_t, sigma, cond):  # without the rounding to float32 of Wan.velocity
        rope = network.transformer.rope
        if torch.is_grad_enabled():
            held.append((x_t.detach(), sigma, rope.start, rope.past))
        return network.transformer(x_t.double(), 1000 * sigma, cond["text"], return_dict=False)[0]

    network.velocity = velocity
    video = rollout(network, cond)
    assert len(held) == 3 and video.shape == (2, *SHAPE)
    (second, third) = (past for *_, past in held[1:])
    assert len(third[0]) == 2 and third[0][0][0] is second[0][0][0], "what a backward keeps of the past is kept once"
    (video * weight).sum().backward()
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in network.parameters()]
    analytic = sum((p.grad * d).sum() for p, d in zip(network.parameters(), direction)).item()

    @torch.no_grad()
    def moved(step):
        for p, d in zip(network.parameters(), direction):
            p += step * d
        total, rope = 0, network.transformer.rope
        for k, (x_t, sigma, start, past) in enumerate(held):
            rope.start, rope.past = start, past
            x0 = dmd2.predict_x0(network, x_t.double(), sigma, cond)
            total += (x0 * weight[:, :, BLOCK * k : BLOCK * (k + 1)]).sum().item()
        return total

    step = 1e-5
    up, down = moved(step), moved(-2 * step)
    assert analytic == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_gradient_checkpointing_changes_nothing(cond):
    """A block that is computed again sees the past that it saw."""
    results = []
    for checkpointing in (False, True):
        network = causal().train()
        if checkpointing:
            network.transformer.enable_gradient_checkpointing()
        video = rollout(network, cond)
        (video * videos(1)[0]).sum().backward()
        results.append((video.detach(), [p.grad for p in network.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_without_blocks_the_rollout_is_that_of_all_frames(cond):
    """The loop runs once; and frames in one block are the stock student."""
    (noise,) = videos(1)
    with torch.no_grad():
        assert torch.equal(rollout(Wan(transformer()), cond), rollout(causal(FRAMES), cond))


# ------------------------------------------------------------------------------------------------------ the scripts

STUDENT = "student/transformer/diffusion_pytorch_model.safetensors"
FLAGS = {"frame_block": 1, "gan_weight": 0.0, "student_input": "simulate"}


@pytest.mark.parametrize("script", [dmd2, dfd, codmd])
def test_scripts_train_resume_and_export_it(script, tmp_path):
    more = {"init": None} if script is dfd else {}
    args = small_args(script, runs_dir=tmp_path, steps=4, save_every=2, preview_every=4, ema_decay=0.5, **FLAGS, **more)
    script.main(args)
    run = only_run(tmp_path, script)
    assert (run / "previews" / "step_0000004.png").is_file()
    ends = student_weights(tmp_path, 4, script)
    before = run / "checkpoints" / "step_0000002"
    script.main(dataclasses.replace(args, resume=str(before)))
    (again,) = set(tmp_path.glob(f"{script.__name__}__*")) - {run}
    assert same(load_file(again / "checkpoints" / "step_0000004" / STUDENT), ends)

    # its sampler knows from the run's flags that it is causal, also for videos longer than trained
    common.init_distributed()
    model = common.Model("tiny", 9, 32, 32)
    own, own_args, checkpoint = load_run(run)
    (student,) = students_of(model, CPU, own, own_args, checkpoint, raw=False)
    assert isinstance(student, CausalWan) and student.frame_block == 1
    text = common.encode_text(model, ["a red circle"], tmp_path / "cache", CPU).cond_of([0])
    student.kept_frames, shape = 4, (8, 10, 8, 8)
    with torch.no_grad():
        video = own.sample_student([student], common.SampleRNG(0, "long", [0], CPU), text, shape, own_args)
    assert video.shape == (1, *shape) and video.isfinite().all()
    assert sum(key.shape[1] for key, _ in student.transformer.rope.past[0]) == 4 * 16
    WanPipeline.from_pretrained(model.folder, transformer=WanTransformer3DModel.from_pretrained(
        checkpoint / "student" / "transformer"))  # fmt: skip


def test_two_ranks_are_one(tmp_path):
    runs = []
    for script in (dmd2, dfd, codmd):
        more = {"init": None} if script is dfd else {}
        more |= {"relation_weight": 1.0, "sample_relation": 1.0} if script is codmd else {}
        flags = {"steps": 3, "save_every": 3, "preview_every": 0, "gradient_checkpointing": 1, **FLAGS, **more}
        flags["student_every"] = 1
        script.main(small_args(script, runs_dir=tmp_path / "one", batch_size=2, **flags))
        runs.append((script.__name__, small_args(script, runs_dir=tmp_path / "two", batch_size=1, **flags)))
    on_ranks(2, train_all, runs, folders={args.runs_dir for _, args in runs})
    start = load_file(Path(common.teacher_folder("tiny")) / "transformer" / "diffusion_pytorch_model.safetensors")
    for script in (dmd2, dfd, codmd):
        one, other = (student_weights(tmp_path / world, 3, script) for world in ("one", "two"))
        apart, far = (sum((one[k] - x[k]).square().sum().item() for k in one) ** 0.5 for x in (other, start))
        assert apart < 5e-3 * far, script.__name__


def test_ode_init_regresses_each_block_on_a_clean_past(cond):
    """The loss is that of the masked network, block by block."""
    stock, network = transformer(), causal()
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    masked = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=BLOCK)
    masked.load_state_dict(stock.state_dict())
    (x0, noise), sigma, error = videos(2), torch.tensor([0.75, 1.0]), 0
    x_t = dmd2.add_noise(x0, noise, sigma)
    for before in range(0, FRAMES, BLOCK):
        x = torch.cat([x0[:, :, :before], x_t[:, :, before:]], dim=2)
        level = torch.cat([torch.zeros(2, before), sigma[:, None].expand(2, FRAMES - before)], dim=1)
        v = masked(x, 1000 * level, cond["text"], enable_diffusion_forcing=True, return_dict=False)[0]
        part = slice(before, before + BLOCK)
        error += ((x - sigma.view(2, 1, 1, 1, 1) * v - x0)[:, :, part] ** 2).mean().item() / 3
    assert ode_init.regression_loss(network, x_t, sigma, cond, x0).item() == pytest.approx(error, rel=1e-5)


def test_from_ode_init_to_an_evaluation(tmp_path, capsys, fails):
    """The start trains, resumes exactly and is found by name; a longer video is sampled from the student after it."""
    flags = {"teacher": "tiny", "runs_dir": str(tmp_path), "steps": 4, "save_every": 2, "num_samples": 4}
    flags |= {"pair_steps": 2, "batch_size": 2, "preview_every": 0, "lr": 1e-3}
    ode_init.main(with_recipe(ode_init.Args, ode_init.RECIPES, **flags))
    run = only_run(tmp_path, ode_init)
    ends = load_file(run / "checkpoints" / "step_0000004" / STUDENT)
    before = str(run / "checkpoints" / "step_0000002")
    other = flags | {"resume": before, "runs_dir": str(tmp_path / "again")}
    ode_init.main(with_recipe(ode_init.Args, ode_init.RECIPES, **other))
    (again,) = set(tmp_path.rglob("ode_init__*")) - {run}
    assert same(load_file(again / "checkpoints" / "step_0000004" / STUDENT), ends)
    capsys.readouterr()

    still = {"lr": 0.0, "weight_decay": 0.0, "ema_decay": 0.0, "init": "ode_init", "preview_every": 0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "next", steps=1, **FLAGS, **still | {"init": str(run)}))
    assert "starting from student of" in capsys.readouterr().out
    (student,) = (tmp_path / "next").glob("dmd2__*")
    raw = load_networks_of(run, "student")
    assert same(load_file(student / "checkpoints" / "step_0000001" / STUDENT), raw), "the student, not its average"

    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = {"command": "generate", "checkpoint": str(student), "samples": 1, "prompts": str(tmp_path / "prompts.txt")}
    flags["cache"] = str(tmp_path / "cache")
    eval_vbench.main(eval_vbench.Args(out=tmp_path / "long", frames=17, kept_frames=4, **flags))
    (video,) = (tmp_path / "long" / "videos").iterdir()
    assert read_video(video).shape == (3, 17, 32, 32)
    record = json.loads((tmp_path / "long" / "config.json").read_text())
    assert record["frame_block"] == 1 and record["kept_frames"] == 4

    teacher = flags | {"role": "teacher"}
    fails(lambda: eval_vbench.main(eval_vbench.Args(out=tmp_path / "no", kept_frames=4, **teacher)), "--kept-frames")


def load_networks_of(run, name):
    """The weights of a network in a run's newest training state, by the names of the export."""
    (student,) = students_of(
        common.Model("tiny", 9, 32, 32), *([CPU] if common.init_distributed() else []), *load_run(run), raw=True
    )
    return student.get_submodule("transformer").state_dict()


def test_evidence_of_twice_the_length(tmp_path):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, steps=1, **FLAGS))
    run, out = str(next(tmp_path.glob("dmd2__*"))), tmp_path / "out"
    evidence.main(evidence.Args(runs=(run,), seeds=2, repeats=1, teacher_steps=(1,), long=True, out=out))
    rows = [line.strip("|").split("|") for line in (out / "table.md").read_text().partition("\n\n")[0].splitlines()]
    head, table = [cell.strip() for cell in rows[0]], {row[0].strip(): row for row in rows[2:]}
    assert "DMD2, 4 steps, last 9 frames of twice the length" in table
    brighter = head.index("brightness, last - first")
    assert abs(float(table["data"][brighter])) < 0.02, "shapes of the world keep their colour"


def test_drift_is_read_from_the_pixels():
    clips, _ = world.batch(0, range(24), world.EXAMPLES * 2)
    fading = clips * torch.linspace(1, 0.8, world.FRAMES).view(1, 1, -1, 1, 1)
    figures = evidence.drift(fading.unflatten(0, (12, 2)))
    bright = measures.read_factors(clips)["brightness"].mean().item()
    assert figures["brighter"] == pytest.approx(-0.2 * bright, abs=0.02) and abs(figures["stronger"]) < 0.02


@pytest.mark.parametrize(("block", "words"), [(2, ["--frame-block must divide", "5 latent frames, got 2"])])
def test_a_block_that_cannot_be(block, words, tmp_path, fails):
    fails(lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, frame_block=block)), *words)
    assert not list(tmp_path.glob("dmd2__*"))


@pytest.mark.parametrize("script", [dmd, phased_dmd])
def test_scripts_without_it_say_so(script, fails, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--frame-block", "3"])
    fails(lambda: parse_args(script.Args, script.RECIPES), "--frame-block", "dmd2.py, dfd.py and codmd.py")
    monkeypatch.setattr(sys, "argv", ["dmd2.py", "--frame-block", "3"])
    for other in (dmd2, ode_init):
        assert parse_args(other.Args, other.RECIPES).frame_block == 3


def test_ode_init_checks_its_noise_levels(tmp_path, fails):
    args = with_recipe(ode_init.Args, ode_init.RECIPES, runs_dir=str(tmp_path), student_sigmas=(0.5, 0.9))
    fails(lambda: ode_init.main(args), "--student-sigmas must start at .99 to 1 and fall")
    for lora in ("lora_rank", "fake_lora_rank"):
        other = with_recipe(ode_init.Args, ode_init.RECIPES, runs_dir=str(tmp_path), **{lora: 2})
        fails(lambda other=other: ode_init.main(other), "trained in full: leave out --lora-rank")
    # flags of time and memory are those of the scripts
    other = with_recipe(ode_init.Args, ode_init.RECIPES, runs_dir=str(tmp_path), attention="none such")
    fails(lambda: ode_init.main(other), "--attention none such")


def test_other_families_have_none(tmp_path, fails):
    args = with_recipe(dmd2.Args, dmd2.RECIPES, teacher="tiny-i2v", runs_dir=str(tmp_path), frame_block=1)
    fails(lambda: dmd2.main(args), "--frame-block", "Wan5BI2V")
