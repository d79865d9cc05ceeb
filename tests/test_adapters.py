"""One base with LoRAs: which is on, what moves, what is saved, and that several processes train it as one does."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from models.adapters import layers_with_loras, turned_on
from models.presets import PRESETS
from tests.conftest import distance, only_run, same, small_args, state_of, stopped, student_weights, train_on_ranks
from training.checkpoints import save_weights

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
RANKS = {"lora_rank": 2, "fake_lora_rank": 3, "lora_alpha": 4.0}
ADAPTERS = {"student": (2, 4.0), "ema": (2, 4.0), "fake_score": (3, 4.0)}


def loaded(adapters=ADAPTERS, roles=("student", "fake_score"), dtype=None, **compute):
    """The model, a base with LoRAs that are not zero, and the networks that they make of it."""
    model = common.Model("tiny", 9, 32, 32, compute)
    base = model.load_network("teacher", CPU, dtype=dtype, adapters=adapters)
    networks = [model.load_network(role, CPU, base=base) for role in roles]
    torch.manual_seed(0)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, base, *networks


def inputs(model, count=2):
    g = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(count, *model.latent_shape, generator=g), torch.randn(count, 16, 32, generator=g)
    return x_t, torch.rand(count, generator=g), {"text": text}


def test_the_teacher_moves_by_no_bit_while_its_loras_train(tmp_path, monkeypatch):
    """In a real run with a discriminator: its output before the first step and after the last one."""
    networks, outputs, load = {}, [], common.Model.load_network

    def load_network(model, role, *args, **named):
        networks[role] = load(model, role, *args, **named)
        if role == "fake_score":
            outputs.append(networks["teacher"](*inputs(model)))
        return networks[role]

    monkeypatch.setattr(common.Model, "load_network", load_network)
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, student_every=1, lr=1e-2, fake_score_lr=1e-2, **RANKS))
    common.init_distributed()  # main took the group down
    model = common.Model("tiny", 9, 32, 32)
    after = networks["teacher"](*inputs(model))
    plain = load(model, "teacher", CPU)(*inputs(model))  # a stock one, with no LoRA on it
    assert torch.equal(after, outputs[0]) and torch.equal(after, plain)
    student, fake_score = (networks[role](*inputs(model)) for role in ("student", "fake_score"))
    assert all((a - b).abs().max() > 1e-3 for a, b in ((student, after), (fake_score, after), (student, fake_score)))


def test_it_is_stock_peft(tmp_path):
    model, base, student, fake_score = loaded()
    for network, (rank, alpha) in ((student, (2, 4.0)), (fake_score, (3, 4.0))):
        stock = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
        stock.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=model.family.lora_layers))
        names = {key.removeprefix("transformer/"): value for key, value in network.lora.items()}
        own = {f"{key.replace('/', '.')}.default.weight": value.detach() for key, value in names.items()}
        assert stock.load_state_dict(own, strict=False).unexpected_keys == []
        x_t, sigma, cond = inputs(model)
        torch.testing.assert_close(network(x_t, sigma, cond), stock(x_t, 1000 * sigma, cond["text"]).sample)


def test_what_was_on_is_on_again_after_an_exception():
    model, base, student, fake_score = loaded()
    on = lambda: {str(layer._active_adapter) for layer in layers_with_loras(base)}
    before = base(*inputs(model))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            student(torch.zeros(1, 3, 3, 4, 4), torch.ones(1), inputs(model)[2])  # three channels, and it has eight
        assert on() == {"[]"}
    with pytest.raises(KeyError), turned_on(base, ["fake_score"]):
        with turned_on(base, ["student"]):
            assert on() == {"['student']"}
        assert on() == {"['fake_score']"}
        raise KeyError
    assert on() == {"[]"} and torch.equal(base(*inputs(model)), before)


@pytest.mark.parametrize("every", [1, 2])
def test_activations_are_recomputed_with_the_lora_of_their_forward(every):
    """Other LoRAs are called before the backward, which itself runs while another is on."""
    gradients = []
    for gradient_checkpointing in (0, every):
        model, base, student, fake_score = loaded(gradient_checkpointing=gradient_checkpointing)
        v, w = student(*inputs(model)), fake_score(*inputs(model))
        base(*inputs(model))
        with turned_on(base, ["fake_score"]):
            (v.square().mean() + 2 * w.square().mean()).backward()
        gradients.append({name: p.grad for n in (student, fake_score) for name, p in n.named_parameters()})
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[-1].values())
        assert all(p.grad is None for name, p in base.named_parameters() if ".lora_" not in name)
    assert same(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_stays_as_it_is_when_its_lora_is_exported_in_float32(tmp_path, dtype):
    model, base, student = loaded({"student": (2, 4.0)}, ("student",), dtype)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    before = {name: p.clone() for name, p in base.named_parameters()}
    save_weights(student, "transformer", tmp_path)
    assert same(before, dict(base.named_parameters()))  # merged aside
    teacher = load_file(f"{TINY}/transformer/diffusion_pytorch_model.safetensors")
    merged = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == teacher.keys() and {value.dtype for value in merged.values()} == {torch.float32}
    for name, value in teacher.items():
        key, change = f"transformer/{name.removesuffix('.weight').replace('.', '/')}/lora_", 0
        if f"{key}A" in student.lora:
            change = 4.0 / 2 * student.lora[f"{key}B"] @ student.lora[f"{key}A"]
        torch.testing.assert_close(merged[name], value.to(dtype).float() + change)
    WanTransformer3DModel.from_pretrained(tmp_path)


def test_the_average_is_that_of_the_loras():
    model, base, student, ema = loaded(roles=("student", "ema"))
    a, b = ({name: p.detach().clone() for name, p in n.named_parameters()} for n in (student, ema))
    common.ema_update(ema, student, 0.9)
    for name, parameter in ema.named_parameters():
        torch.testing.assert_close(parameter.data, 0.9 * b[name] + 0.1 * a[name])
    assert same(a, dict(student.named_parameters())) and {p.requires_grad for p in ema.parameters()} == {False}


SCRIPTS = {
    dmd: {},
    dmd2: {},
    dfd: {"student_input": "simulate", "gan_weight": 0.1},
    codmd: {"relation_weight": 1.0, "sample_relation": 1.0},
    phased_dmd: {"gan_weight": 0.1, "lora_rank": 2, "ema_decay": 0.5},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_holds_loras_alone_and_resumes_exactly(tmp_path, monkeypatch, script):
    flags = {**RANKS, "steps": 4, "save_every": 2, "student_every": 1, "ema_decay": 0.5, "lr": 1e-3, **SCRIPTS[script]}
    flags |= {"gradient_checkpointing": 1}
    script.main(small_args(script, runs_dir=tmp_path / "unbroken", **flags))
    broken = small_args(script, runs_dir=tmp_path / "broken", **flags)
    stopped(monkeypatch, 3, lambda: script.main(broken))
    script.main(small_args(script, runs_dir=tmp_path / "broken", resume="latest", **flags))
    whole, again = (state_of(tmp_path / name, 4, script) for name in ("unbroken", "broken"))
    assert same(whole, again)
    assert same(*(student_weights(tmp_path / name, 4, script) for name in ("unbroken", "broken")))
    # the base is in no checkpoint, and what is in it is small: LoRAs, heads, their moments
    assert all("lora" in key or ".heads." in key for key in whole)
    assert {key.split(".")[0] for key in whole} >= {"student", "fake_score", "ema", "student_optimizer"}


@pytest.mark.parametrize("flags", [RANKS, {"fake_lora_rank": 3}, {"lora_rank": 2}], ids=["both", "fake", "student"])
def test_two_processes_train_as_one(tmp_path, flags):
    """With a discriminator, whose loss goes through the student and the fake score, which are one sharded network."""
    flags = {"steps": 3, "save_every": 3, "student_every": 1, "lr": 1e-3, "ema_decay": 0.5, **flags}
    flags |= {"gradient_checkpointing": 1}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "one", batch_size=2, **flags))
    train_on_ranks(2, dmd2, runs_dir=tmp_path / "two", batch_size=1, **flags)
    one, two = (state_of(tmp_path / name, 3, dmd2) for name in ("one", "two"))
    networks = [k for k in one if k.split(".")[0] in ("student", "fake_score", "ema")]
    teacher = load_file(f"{TINY}/transformer/diffusion_pytorch_model.safetensors")
    moved = distance(student_weights(tmp_path / "one", 3, dmd2), teacher)
    assert one.keys() == two.keys() and moved > 0.01
    assert distance(*({k: side[k] for k in networks} for side in (one, two))) < 5e-3 * moved
    assert distance(*(student_weights(tmp_path / name, 3, dmd2) for name in ("one", "two"))) < 1e-3 * moved


def test_a_run_starts_from_another_with_the_same_loras(tmp_path, capsys, fails):
    flags = {"steps": 1, "student_every": 1, "lr": 1e-3, "ema_decay": 0.0, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags, **RANKS))
    run = only_run(tmp_path, dmd2)
    dfd.main(
        small_args(dfd, runs_dir=tmp_path, **{**flags, "init": str(run), "lr": 1e-9, "fake_score_lr": 1e-9}, **RANKS)
    )
    assert "starting from fake_score, student of" in capsys.readouterr().out
    before, after = state_of(tmp_path, 1, dmd2), state_of(tmp_path, 1, dfd)
    assert distance(*({k: v for k, v in s.items() if k.startswith("student.")} for s in (before, after))) < 1e-6
    for ranks in ({}, {"lora_rank": 2}, {"fake_lora_rank": 3}):
        args = small_args(dfd, runs_dir=tmp_path, **{**flags, "init": str(run)}, **ranks)
        fails(lambda args=args: dfd.main(args), "does not fit", "give both the same --lora-rank and --fake-lora-rank")
    args = small_args(dfd, runs_dir=tmp_path, **{**flags, "init": str(run)}, **RANKS | {"lora_rank": 3})
    fails(lambda: dfd.main(args), "--init", "is (2,", "this teacher's (3,")
    weights = run / "checkpoints" / "step_0000001" / "student" / "transformer"
    args = small_args(dfd, runs_dir=tmp_path, **{**flags, "init": str(weights)}, **RANKS)
    fails(lambda: dfd.main(args), "--init", "with --lora-rank the base is the teacher")


def test_bad_ranks(tmp_path, fails, monkeypatch):
    args = small_args(dmd2, runs_dir=tmp_path, lora_rank=2, frame_block=1)
    fails(lambda: dmd2.main(args), "--lora-rank goes without --frame-block")
    fails(lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, lora_rank=-1)), "--lora-rank must be at least 0")
    monkeypatch.setattr(common.Model("tiny", 9, 32, 32).family, "lora_layers", ["to_nothing"])
    fails(
        lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, lora_rank=2)),
        "no LoRA fits on this teacher",
        "to_nothing",
    )
    assert not list(tmp_path.glob("dmd2__*"))


def test_the_fake_scores_lora_goes_with_a_causal_student(tmp_path):
    flags = {"fake_lora_rank": 2, "frame_block": 1, "steps": 2, "student_every": 1, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    keys = state_of(tmp_path, 2, dmd2)
    assert {k.split(".")[1] for k in keys if k.startswith("fake_score.")} == {"lora"}
    assert {k.split(".")[1] for k in keys if k.startswith("student.")} == {"transformer"}
    record = json.loads((only_run(tmp_path, dmd2) / "args.json").read_text())
    assert (record["lora_rank"], record["fake_lora_rank"]) == (0, 2)
