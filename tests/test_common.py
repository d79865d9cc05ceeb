"""common.py's data, and what trains on it: random draws, shards, prompts, a teacher's own samples, latents."""

import json
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

import common
import dmd
from models.latents import decode, encode
from tests.conftest import small_args
from tiny.samples import TinyWorld
from training.files import hashed, read_prompts, read_shard, stamps, write_shard, written_aside
from training.samples import samples_key, solver_settings, teacher_samples

CPU = torch.device("cpu")
MODEL = common.Model("tiny", 9, 32, 32)


def make_shard(path, latents):
    text = [torch.randn(4, MODEL.text_dim)] * len(latents)
    write_shard(path, ["a red circle"] * len(latents), text, latents=latents)


def test_draws_are_functions_of_seed_stream_and_sample():
    rng = lambda numbers, seed=3, stream="student": common.SampleRNG(seed, stream, numbers, CPU)
    assert torch.equal(rng([0, 1]).normal((2, 3)), torch.cat([rng([i]).normal((2, 3)) for i in (0, 1)]))
    others = [rng([0]), rng([0], seed=4), rng([0], stream="fake_score"), rng([1])]
    assert len({other.uniform().item() for other in others}) == 4
    others = [common.SharedRNG(seed, step).uniform(stream) for seed, step, stream in ("11a", "21a", "12a", "11b")]
    assert len(set(others)) == 4 and hashed(0, "student", 5) == 5913651658624635023, "the same on every machine"


def test_micro_batches_of_all_ranks_repeat_no_sample_and_clips_are_read_when_asked_for(tmp_path, monkeypatch):
    data, batches = TinyWorld(MODEL, tmp_path, CPU, 0), []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        batches += [batch for step in range(3) for batch in data.micro_batches("student", step, 2, 2)]
    assert sorted(i for rng, _, _ in batches for i in rng.numbers) == list(range(24))
    (_, cond, load_x0), last = batches[-1], [22, 23]
    assert torch.equal(cond["text"], data.cond(last)["text"]) and data.vae is None
    assert torch.equal(load_x0(), data.latents(last)) and load_x0() is load_x0()


def test_shards_hand_out_every_row_once_an_epoch(tmp_path):
    rows = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, *MODEL.latent_shape)
    make_shard(tmp_path / "a.safetensors", rows[:3])
    make_shard(tmp_path / "b.safetensors", rows[3:])
    data, other = (common.Shards(tmp_path, MODEL, CPU, seed, keys=("latents",)) for seed in (1, 2))
    epochs = [data.latents(range(first, first + 5))[:, 0, 0, 0, 0].tolist() for first in (5, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 1, 2, 3, 4] and epochs[0] != epochs[1]
    assert epochs[0] == [data.row(i) for i in range(5, 10)] != [other.row(i) for i in range(5, 10)]


BAD = {  # what is saved in place of what, how many prompts, words of the error
    "cut": (None, 2),
    "a sample is missing": ({}, 3, "2.text"),
    "text encoder": ({"1.text": torch.zeros(4, 33)}, 2, "1.text", "(4, 33)"),
    "VAE": ({"0.latents": torch.zeros(16, 2, 2, 2)}, 2, "0.latents", "(16, 2, 2, 2)"),
    "settings": ({"settings": torch.tensor([2.0, 1, 3])}, 2, "[2.0, 1.0, 3.0]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shard_is_named_before_training(tmp_path, fails, kind):
    make_shard(path := tmp_path / "0.safetensors", torch.randn(2, *MODEL.latent_shape))
    change, prompts, *words = BAD[kind]
    if change is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file(load_file(path) | change, path, metadata={"prompts": json.dumps(["x"] * prompts)})
    fails(lambda: common.Shards(tmp_path, MODEL, CPU, 0, ("latents",), (2.0, 1.0, 2)), str(path), *words)


def test_what_is_not_finite_is_not_written(tmp_path, fails):
    path, latents = tmp_path / "a.safetensors", torch.zeros(2, *MODEL.latent_shape)
    latents[1, 0, 0, 1, 1] = torch.nan
    fails(lambda: make_shard(path, latents), str(path), "1.latents")
    assert not list(tmp_path.iterdir())


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    """Two ranks that solve the same pairs, or two runs that fill the same cache."""
    path, before = tmp_path / "0.safetensors", os.umask(0o027)
    with written_aside(path) as first, written_aside(path) as second:
        first.touch(0o600)  # as safetensors does
        first.write_text("first")
        second.write_text("second")
    os.umask(before)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640, "as the umask asks for"
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.touch()
        raise KeyError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_stamp_is_of_what_a_file_holds_and_not_of_its_place(tmp_path):
    found = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "longer")):
        (path := tmp_path / folder / "x").parent.mkdir()
        path.write_text(text)
        found.append(hashed(stamps([path])))
    assert found[0] == found[1] and len(set(found)) == 3


def test_prompts_are_encoded_once_and_each_as_itself(tmp_path, monkeypatch, capsys):
    """17 of them, as the text encoder reads 16 at a time. Padded with zeros; one is too long."""
    prompts = ["a  blue\tsquare, école", "a red circle " * 20, *(f"{i} red circles" for i in range(15))]
    (path := tmp_path / "prompts.txt").write_text("\n".join(prompt.strip() for prompt in prompts))
    data = common.load_data(MODEL, path, None, tmp_path, CPU, 0)
    assert "17 of 17 prompts are cut" in capsys.readouterr().out, "also what the text encoder does not know is said"
    stock = WanPipeline.from_pretrained(MODEL.folder).encode_prompt
    text, _ = stock(data.prompts, do_classifier_free_guidance=False, max_sequence_length=MODEL.text_length)
    torch.testing.assert_close(data.cond(range(17))["text"], text[[data.row(i) for i in range(17)]])
    monkeypatch.setattr(MODEL.family, "text_encoder", None)  # a second encoding would fail
    assert len(common.encode_text(MODEL, [MODEL.negative_prompt], tmp_path, CPU)) == 1
    assert len(common.load_data(MODEL, path, None, tmp_path, CPU, 0)) == 17


def test_a_list_of_prompts(tmp_path, fails):
    (path := tmp_path / "a.txt").write_bytes("\ufeffa red\u2028circle\r\n{a blue square}\r\n".encode())  # of an editor
    assert read_prompts(path) == ["a red\u2028circle", "{a blue square}"]
    for name, text in (("a.txt", ""), ("a.txt", "x\n\ny\n"), ("a.csv", "x;y\n"), ("a.txt", '{"prompt": "x"}\n')):
        (tmp_path / name).write_text(text)
        fails(lambda name=name: read_prompts(tmp_path / name), str(tmp_path / name))
    (tmp_path / "a.txt").write_bytes("é".encode("latin1"))
    fails(lambda: read_prompts(tmp_path / "a.txt"), "a.txt", "utf-8")


def test_pairs_are_the_teachers_own_and_kept(tmp_path, monkeypatch):
    """What is cached is what the solver gives, prompt by prompt. A rerun reads it; any change asks for others."""
    run, args = SimpleNamespace(device=CPU, cache=tmp_path), small_args(num_samples=3)
    data = TinyWorld(MODEL, tmp_path, CPU, 0)
    settings = MODEL.load_network("teacher", CPU), data.captions.cond_of([0]), MODEL.latent_shape, args
    pairs, cond = teacher_samples(run, data, partial(dmd.sample_teacher, *settings), args), data.cond(range(3))
    assert pairs.prompts == [data.prompts[data.row(i)] for i in range(3)]
    assert torch.equal(pairs.cond_of(range(3))["text"], cond["text"])
    rng = SimpleNamespace(normal=lambda _: pairs.latents_of(range(3), "noise"))
    wanted = dmd.sample_teacher(*settings, rng, cond)
    torch.testing.assert_close(pairs.latents_of(range(3)), wanted, atol=1e-4, rtol=1e-4)
    assert {tuple(read_shard(path)[2]) for path, _ in pairs.rows} == {solver_settings(args)}
    teacher_samples(run, data, None, args)
    flags = ("guidance_scale", "shift", "teacher_steps", "num_samples", "batch_size")
    keys = {samples_key(data, args), *(samples_key(data, replace(args, **{flag: 7})) for flag in flags)}
    for owner, name in ((MODEL, "negative_prompt"), (data, "prompts"), (data, "seed")):
        monkeypatch.setattr(owner, name, "others")
        keys.add(samples_key(data, args))
    assert len(keys) == 9


def test_latents_are_the_stock_vaes_normalised():
    vae, video = MODEL.load_vae(CPU), torch.rand(2, 3, 9, 32, 32)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    stock = vae.encode(2 * video - 1).latent_dist.mode()
    torch.testing.assert_close(encode(vae, video) * std + mean, stock)
    torch.testing.assert_close(2 * decode(vae, (stock - mean) / std) - 1, vae.decode(stock).sample)


def test_a_vae_that_encodes_is_float32_on_a_gpu_too(monkeypatch):
    seen, gpu = [], torch.device("cuda")
    vae = mock.MagicMock(from_pretrained=lambda folder, dtype: seen.append(dtype) or mock.MagicMock())
    monkeypatch.setattr(MODEL.family, "vae_class", vae)
    for only_decodes in (False, True):
        MODEL.load_vae(gpu, only_decodes)
    assert seen == [torch.float32, torch.bfloat16]


def test_a_bf16_teacher_keeps_tables_and_timesteps_in_float32():
    network, seen = MODEL.load_network("teacher", CPU, dtype=torch.bfloat16), []
    assert {x.dtype for x in network.buffers()} == {torch.float32}
    float32 = {name for name, p in network.named_parameters() if p.dtype == torch.float32}
    assert float32 and float32 == {name for name, _ in network.named_parameters() if "time_embedder" in name}
    timesteps = network.transformer.condition_embedder
    timesteps.register_forward_pre_hook(lambda module, args: seen.append(args[0].item()))
    network(torch.randn(1, *MODEL.latent_shape), torch.tensor([0.937]), {"text": torch.randn(1, 16, MODEL.text_dim)})
    assert seen == [937.0]  # bf16 would have 936
