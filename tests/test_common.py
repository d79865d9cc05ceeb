"""common.py's data: random draws, shards, prompts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import common
import dmd
from tests.conftest import small_args
from tests.test_runs import make_shard
from training.files import UserError, hashed, write_shard, written_aside
from training.flags import one_line_errors
from training.samples import teacher_samples

CPU = torch.device("cpu")


def test_draws_are_functions_of_seed_stream_and_sample():
    whole = common.SampleRNG(3, "student", range(6), CPU)
    parts = [common.SampleRNG(3, "student", range(i, i + 2), CPU) for i in (0, 2, 4)]
    assert torch.equal(whole.normal((2, 3)), torch.cat([part.normal((2, 3)) for part in parts]))
    assert torch.equal(whole.uniform(), torch.cat([part.uniform() for part in parts]))
    first = common.SampleRNG(3, "student", [0], CPU).normal((4,))
    for other in (
        common.SampleRNG(4, "student", [0], CPU),
        common.SampleRNG(3, "fake_score", [0], CPU),
        common.SampleRNG(3, "student", [1], CPU),
    ):
        assert not torch.equal(first, other.normal((4,)))


def test_draws_are_standard_normal_and_uniform():
    rng = common.SampleRNG(0, "x", range(2000), CPU)
    z, u = rng.normal((50,)), rng.uniform()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert abs(torch.corrcoef(z[:, :2].T)[0, 1]) < 0.1 and abs(torch.corrcoef(z[:2])[0, 1]) < 0.5
    assert abs(u.mean() - 0.5) < 0.03 and abs(u.std() - 12**-0.5) < 0.02


def test_a_seed_is_the_same_on_every_machine():
    assert hashed(0, "student", 5) == 5913651658624635023


def test_shards_hand_out_every_row_once_an_epoch(tmp_path):
    model = common.Model("tiny", 9, 32, 32)
    rows = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, *model.latent_shape)
    make_shard(tmp_path / "a.safetensors", model, n=3, latents=rows[:3])
    make_shard(tmp_path / "b.safetensors", model, n=2, latents=rows[3:])
    data = common.Shards(tmp_path, model, CPU, 1, keys=("latents",))
    epochs = [data.latents(range(first, first + 5))[:, 0, 0, 0, 0].tolist() for first in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data.latents([7])[0, 0, 0, 0, 0] == epochs[1][2], "random access does not depend on what was read before"


def test_embeddings_are_padded_with_zeros(tmp_path):
    model = common.Model("tiny", 9, 32, 32)
    texts = [torch.randn(n, model.text_dim) for n in (2, 40, 3)]
    write_shard(tmp_path / "0.safetensors", ["x"] * 3, texts)
    text = common.Shards(tmp_path, model, CPU).cond_of([2, 0, 1])["text"]
    assert text.shape == (3, model.text_length, model.text_dim)
    assert torch.equal(text[0, :3], texts[2]) and text[0, 3:].abs().sum() == 0
    assert torch.equal(text[1, :2], texts[0]) and text[1, 2:].abs().sum() == 0
    assert torch.equal(text[2], texts[1][: model.text_length]), "a longer prompt is cut"


def test_prompts_are_encoded_once(tmp_path, monkeypatch):
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square, école, \N{SNOWMAN}\n", encoding="utf-8")
    first = common.load_data(model, str(path), None, tmp_path, device, 0)
    assert first.prompts == ["a red circle", "a blue square, école, \N{SNOWMAN}"]
    monkeypatch.setattr(model.family, "text_encoder", None)  # a second encoding would fail
    again = common.load_data(model, str(path), None, tmp_path, device, 0)
    assert torch.equal(first.cond([0, 1])["text"], again.cond([0, 1])["text"])


def test_pairs_are_the_teachers_own(tmp_path):
    """What is cached is what the solver gives, prompt by prompt, and a rerun reads the cache."""
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    run = SimpleNamespace(device=device, cache=tmp_path, max_hours=1.0)
    data = common.load_data(model, None, None, tmp_path, device, 0)
    null_cond = common.encode_text(model, [""], tmp_path, device).cond_of([0])
    teacher = model.load_network("teacher", device)
    solve = lambda noise, cond: dmd.solve_ode(teacher, noise, cond, null_cond, 2.0, 1.0, 2)
    pairs = teacher_samples(run, data, solve, 3, 2, (2.0, 1.0, 2))
    assert pairs.prompts == [data.prompt(number) for number in range(3)]
    cond = data.cond(range(3))
    assert torch.equal(pairs.cond_of(range(3))["text"], cond["text"])
    noise = pairs.latents_of(range(3), "noise")
    torch.testing.assert_close(pairs.latents_of(range(3)), solve(noise, cond), atol=1e-4, rtol=1e-4)
    cached = teacher_samples(run, data, None, 3, 2, (2.0, 1.0, 2))
    assert torch.equal(cached.latents_of(range(3)), pairs.latents_of(range(3)))
    with pytest.raises(TypeError):  # other settings are other samples
        teacher_samples(run, data, None, 3, 2, (2.5, 1.0, 2))


def test_pairs_of_other_settings_are_refused(tmp_path, fails):
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    folder = tmp_path / "pairs"
    data = common.load_data(model, None, None, tmp_path, device, 0)
    run = SimpleNamespace(device=device, cache=tmp_path, max_hours=1.0)
    teacher_samples(run, data, lambda noise, cond: noise, 2, 2, (2.0, 1.0, 2), folder=folder)
    flags = {"pairs": str(folder), "runs_dir": str(tmp_path), "steps": 1, "pair_steps": 2}
    dmd.main(small_args(**flags, guidance_scale=2.0, shift=1.0))
    fails(
        lambda: dmd.main(small_args(**flags, guidance_scale=3.0, shift=1.0)),
        "made with [2.0, 1.0, 2.0]",
        "[3.0, 1.0, 2]",
    )


def test_what_is_not_finite_is_not_written(tmp_path, fails):
    latents = torch.zeros(2, 1, 1, 2, 2)
    latents[1, 0, 0, 1, 1] = float("nan")
    write = lambda: write_shard(tmp_path / "a.safetensors", ["x", "y"], [torch.zeros(1, 2)] * 2, latents=latents)
    fails(write, "1.latents of 'y' is not finite", code=1)
    assert not list(tmp_path.iterdir())


def test_few_of_many_shards_are_open(tmp_path):
    model = common.Model("tiny", 9, 32, 32)
    for i in range(300):
        write_shard(tmp_path / f"{i:04d}.safetensors", [f"prompt {i}"], [torch.full((1, 32), float(i))])
    data = common.Shards(tmp_path, model, CPU)
    text = data.cond_of(range(300))["text"]
    assert text[:, 0, 0].tolist() == list(range(300)) and data.prompts[299] == "prompt 299"
    with open("/proc/self/maps") as maps:
        assert 0 < sum(str(tmp_path) in line for line in maps) <= 256


def test_a_bf16_teacher_keeps_its_rotary_tables_in_float32():
    model = common.Model("tiny", 9, 32, 32)
    networks = [model.load_network("teacher", CPU, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    low, high = (dict(network.named_buffers()) for network in networks)
    assert low and all(torch.equal(low[name], high[name]) and low[name].dtype == torch.float32 for name in high)
    assert {p.dtype for p in networks[0].parameters()} == {torch.bfloat16}


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    """Two ranks that solve the same pairs, or two runs that fill the same cache."""
    with written_aside(tmp_path / "0.safetensors") as first:
        first.write_text("first")
        with written_aside(tmp_path / "0.safetensors") as second:
            second.write_text("second")
    assert (tmp_path / "0.safetensors").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_line_is_printed_once_a_machine_unless_one_rank_alone_meets_it(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for error, line in ((UserError("everybody's"), ""), (UserError("mine", code=1, alone=True), "error: mine\n")):
        assert not capsys.readouterr().err, "making an error prints nothing"
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
        assert stop.value.code == error.code and capsys.readouterr().err == line


def test_clips_are_made_ready_in_a_thread_once_their_stream_is_read(tmp_path, monkeypatch):
    """Whoever reads them, and whenever, they are those of the numbers; what nobody asks for is not made."""
    model = common.Model("tiny", 9, 32, 32)
    data, made = common.TinyWorld(model, tmp_path, CPU, 3), []
    plain = data.latents(range(4, 8))
    latents = data.latents
    monkeypatch.setattr(
        data, "latents", lambda numbers: made.append((threading.get_ident(), numbers)) or latents(numbers)
    )
    for step in range(4):
        for _ in data.micro_batches("student", step, 2, 2):
            pass
        assert not made
    for step in (0, 1):
        for micro, (rng, _, x0_data) in enumerate(data.micro_batches("fake_score", step, 2, 2)):
            assert torch.equal(x0_data(), latents(rng.numbers)) and x0_data() is x0_data()
            assert [numbers for _, numbers in made] == [range(i, i + 2) for i in range(0, 4 * step + 2 * micro + 2, 2)]
    assert threading.get_ident() not in {ident for ident, _ in made}
    torch.testing.assert_close(torch.cat([latents(range(4, 6)), latents(range(6, 8))]), plain)


def test_every_row_once_an_epoch_from_two_threads(tmp_path):
    model = common.Model("tiny", 9, 32, 32)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    data = common.load_data(model, tmp_path / "prompts.txt", None, tmp_path, CPU, 0)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(data.row, range(500)))
    assert all(sorted(rows[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 500, 5))
    assert rows == [data.row(number) for number in range(500)] and rows[:5] != rows[5:10]
