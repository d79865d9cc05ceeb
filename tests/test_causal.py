"""The causal student: its network against stock ones, its rollout's gradient, whole runs of the scripts on it."""

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file

import common
import dmd2
from models.wan import Wan
from models.wan_causal import CausalWan
from tests.conftest import only_run, same, small_args, student_weights
from tests.small_teachers import awake
from tools import ode_init
from training.finished import load_run, students_of
from training.flags import recipe_args

CPU = torch.device("cpu")
SHAPE, FRAMES, BLOCK = (8, 9, 4, 4), 9, 3
COND = {"text": 5 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))}
SIGMA = torch.tensor([0.4, 0.9])


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8, text_dim=32, freq_dim=64,
        ffn_dim=64, num_layers=3, rope_max_seq_len=64,
    )  # fmt: skip
    return awake(network, 0).to(dtype)


def causal(block=BLOCK, dtype=torch.float32):
    network = CausalWan(transformer(dtype))
    network.frame_block = block
    return network


def videos(n):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, *SHAPE, generator=generator) for _ in range(n)]


def masked(clean, noisy, sigma):
    """For each block (slice of its frames, input, velocity) of diffusers' SkyReels-V2, which has Wan's weights, a noise
    level per frame and a block-causal mask.
    """
    stock = transformer()
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    network = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=BLOCK)
    network.load_state_dict(stock.state_dict())
    for k in range(0, FRAMES, BLOCK):
        x = torch.cat([clean[:, :, :k], noisy[:, :, k:]], dim=2)
        level = torch.cat([torch.zeros(2, k), sigma[:, None].expand(2, FRAMES - k)], dim=1)
        v = network(x, 1000 * level, COND["text"], enable_diffusion_forcing=True, return_dict=False)[0]
        yield slice(k, k + BLOCK), x, v


@torch.no_grad()
def test_one_block_is_the_stock_network():
    """To the bit, and the weights have its names."""
    (x_t,), network, stock = videos(1), causal(FRAMES), Wan(transformer())
    (whole,) = network.chunks(x_t)
    assert torch.equal(network(whole, SIGMA, COND)[0], stock(x_t, SIGMA, COND)[0])
    assert network.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(rollout(stock), rollout(network))


@torch.no_grad()
def test_kept_keys_and_values_are_the_masked_network():
    (clean, noisy), network = videos(2), causal()
    for x_t, (own, x, v) in zip(network.chunks(noisy), masked(clean, noisy, SIGMA), strict=True):
        ours, _ = network(x_t, SIGMA, COND)
        assert (ours - v[:, :, own]).abs().max() < 1e-5
        unmasked, _ = Wan(transformer())(x, SIGMA, COND)
        assert (ours - unmasked[:, :, own]).abs().max() > 0.01, "the mask matters"
        network.update_cache(clean[:, :, own], COND)


def test_ode_init_regresses_each_block_on_a_clean_past():
    """The loss is that of the masked network, block by block."""
    (x0, noise), sigma, error = videos(2), torch.tensor([0.75, 1.0]), 0
    x_t = dmd2.add_noise(x0, noise, sigma)
    for own, x, v in masked(x0, x_t, sigma):
        error += ((x - sigma.view(2, 1, 1, 1, 1) * v - x0)[:, :, own] ** 2).mean().item() / 3
    assert ode_init.regression_loss(causal(), x_t, sigma, COND, x0).item() == pytest.approx(error, rel=1e-5)


@torch.no_grad()
def test_kept_frames_are_the_last_ones():
    """What is older than they see changes nothing; and the place in time is right: only distances count."""
    clean, noisy = (x.double() for x in videos(2))

    def third(kept, first):
        network, outs = causal(1, torch.float64), []
        network.kept_frames = kept
        for x_t, x0 in zip(network.chunks(noisy[:, :, :4]), [first, *clean[:, :, 1:4].split(1, 2)], strict=True):
            outs.append(network(x_t, SIGMA, COND)[0])
            network.update_cache(x0, COND)
        return outs[-1], [sum(key.shape[1] for key, _ in blocks) for blocks in network.transformer.rope.past]

    every, tokens = third(0, clean[:, :, :1])
    assert tokens == [3 * 4] * 3 and not torch.equal(every, third(0, noisy[:, :, 8:])[0])
    few, tokens = third(1, clean[:, :, :1])
    assert tokens == [4] * 3 and not torch.equal(few, every)
    network = causal(2, torch.float64)
    network.kept_frames = 3
    for x0 in network.chunks(clean[:, :, :6]):
        network.update_cache(x0, COND)
    assert [sum(key.shape[1] for key, _ in blocks) for blocks in network.transformer.rope.past] == [4 * 4] * 3, "whole"
    shifted = []
    for start in (0, 5):
        network = causal(1, torch.float64)
        network.chunks(noisy)
        network.transformer.rope.start = start
        network.update_cache(clean[:, :, 2:3], COND)
        shifted.append(network(noisy[:, :, 3:4], SIGMA, COND)[0])
    torch.testing.assert_close(*shifted, atol=1e-5, rtol=1e-4)


def rollout(network):
    return dmd2.rollout(network, common.SampleRNG(0, "student", range(2), CPU), COND, SHAPE, (1.0, 0.9, 0.75))


def test_the_gradient_is_that_of_the_exit_steps():
    """Of the last prediction of each block, with its input and the kept keys and values held fixed."""
    network, held, (weight,) = causal(), [], videos(1)
    velocity, rope = network.velocity, network.transformer.rope

    def noted(x_t, sigma, cond):
        if torch.is_grad_enabled():
            held.append((x_t.detach(), sigma, rope.start, rope.past))
        return velocity(x_t, sigma, cond)

    network.velocity = noted
    (rollout(network) * weight).sum().backward()
    _, second, third = (past for *_, past in held)
    assert len(third[0]) == 2 and third[0][0][0] is second[0][0][0], "what a backward keeps of the past is kept once"
    gradients = [p.grad for p in network.parameters()]
    network.zero_grad()
    for (x_t, sigma, start, past), w in zip(list(held), weight.split(BLOCK, dim=2), strict=True):
        rope.start, rope.past = start, past
        (dmd2.predict_x0(network, x_t, sigma, COND) * w).sum().backward()
    torch.testing.assert_close([p.grad for p in network.parameters()], gradients, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    """A block that is computed again sees the past that it saw."""
    videos_, gradients = [], []
    for checkpointing in (False, True):
        network = causal().train()
        if checkpointing:
            network.transformer.enable_gradient_checkpointing()
        videos_.append(rollout(network))
        (videos_[-1] * videos(1)[0]).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert torch.equal(*videos_)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the scripts

STUDENT = "student/transformer/diffusion_pytorch_model.safetensors"
FLAGS = {"frame_block": 1, "gan_weight": 0.0, "student_input": "simulate", "init": None}


@pytest.mark.slow
def test_from_ode_init_to_a_student(tmp_path, fails):
    """The start trains, resumes exactly, and its student, not its average, is where the next run begins."""
    flags = {"teacher": "tiny", "runs_dir": str(tmp_path), "steps": 4, "save_every": 2, "num_samples": 4}
    flags |= {"pair_steps": 2, "batch_size": 2, "preview_every": 0, "lr": 1e-3}
    ode_init.main(recipe_args(ode_init.Args, **flags))
    run = only_run(tmp_path, ode_init)
    other = flags | {"resume": str(run / "checkpoints" / "step_0000002"), "runs_dir": str(tmp_path / "again")}
    ode_init.main(recipe_args(ode_init.Args, **other))
    (again,) = set(tmp_path.rglob("ode_init__*")) - {run}
    assert same(*(load_file(of / "checkpoints" / "step_0000004" / STUDENT) for of in (run, again)))

    still = {"lr": 0.0, "weight_decay": 0.0, "ema_decay": 0.0, "steps": 1, **FLAGS}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "next", **still | {"init": str(run)}))
    common.init_distributed()
    (raw,) = students_of(common.Model("tiny", 9, 32, 32), CPU, *load_run(run), raw=True)
    assert same(student_weights(tmp_path / "next", 1, dmd2), raw.transformer.state_dict())
    lora = recipe_args(ode_init.Args, runs_dir=str(tmp_path), lora_rank=2)
    fails(lambda: ode_init.main(lora), "--lora-rank")


@pytest.mark.parametrize(("teacher", "block", "word"), [("tiny", 2, "5 latent"), ("tiny-i2v", 1, "only Wan 2.1")])
def test_a_block_that_cannot_be(teacher, block, word, fails):
    model = common.Model(teacher, 9, 32, 32)
    fails(lambda: model.load_network("student", CPU, block), "--frame-block", word)
