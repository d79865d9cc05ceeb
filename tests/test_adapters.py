"""One base with LoRAs: which is on, what moves, what is saved, and that several processes train it as one does."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

import common
import dfd
import dmd2
import phased_dmd
from models.adapters import layers_with_loras, turned_on
from models.presets import PRESETS
from tests.conftest import distance, only_run, same, small_args, state_of
from training.checkpoints import save_weights

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
RANKS = {"lora_rank": 2, "fake_lora_rank": 3, "lora_alpha": 4.0}
ADAPTERS = {"student": (2, 4.0), "fake_score": (3, 4.0)}


def loaded(dtype=None, **compute):
    """The model, a base with LoRAs that are not zero, and the networks that they make of it."""
    model = common.Model("tiny", 9, 32, 32, compute)
    base = model.load_network("teacher", CPU, dtype=dtype, adapters=ADAPTERS)
    networks = [model.load_network(role, CPU, base=base) for role in ADAPTERS]
    torch.manual_seed(0)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, base, *networks


def velocity(network, model):
    """Its velocity at a fixed input, which depends on all its weights."""
    g = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, *model.latent_shape, generator=g), torch.randn(2, 16, 32, generator=g)
    return network(x_t, torch.rand(2, generator=g), {"text": text})[0]


def test_the_teacher_moves_by_no_bit_while_its_loras_train(tmp_path, monkeypatch):
    """In a real run with a discriminator: its output after the last step is that of a stock teacher."""
    networks, load = {}, common.Model.load_network

    def load_network(model, role, *args, **named):
        networks[role] = load(model, role, *args, **named)
        return networks[role]

    monkeypatch.setattr(common.Model, "load_network", load_network)
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, student_every=1, lr=1e-2, fake_score_lr=1e-2, **RANKS))
    common.init_distributed()  # main took the group down
    model = common.Model("tiny", 9, 32, 32)
    after, student, fake = (velocity(networks[role], model) for role in ("teacher", "student", "fake_score"))
    assert torch.equal(after, velocity(load(model, "teacher", CPU), model))
    assert all((a - b).abs().max() > 1e-3 for a, b in ((student, after), (fake, after), (student, fake)))


def test_each_is_stock_peft_and_what_was_on_is_on_again_after_an_exception():
    model, base, *networks = loaded()
    before = velocity(base, model)
    for network, (rank, alpha) in zip(networks, ADAPTERS.values(), strict=True):
        stock = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
        stock.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=model.family.lora_layers))
        names = {key.removeprefix("transformer/"): value for key, value in network.lora.items()}
        own = {f"{key.replace('/', '.')}.default.weight": value.detach() for key, value in names.items()}
        assert stock.load_state_dict(own, strict=False).unexpected_keys == []
        of_stock = lambda x_t, sigma, cond, stock=stock: [stock(x_t, 1000 * sigma, cond["text"]).sample]
        torch.testing.assert_close(velocity(network, model), velocity(of_stock, model))
    on = lambda: {str(layer._active_adapter) for layer in layers_with_loras(base)}
    with pytest.raises(KeyError), turned_on(base, ["fake_score"]):
        with turned_on(base, ["student"]):
            assert on() == {"['student']"}
        assert on() == {"['fake_score']"}
        raise KeyError
    assert on() == {"[]"} and torch.equal(velocity(base, model), before)


@pytest.mark.parametrize("every", [1, 2])
def test_activations_are_recomputed_with_the_lora_of_their_forward(every):
    """Other LoRAs are called before the backward, which itself runs while another is on."""
    gradients = []
    for gradient_checkpointing in (0, every):
        model, base, *networks = loaded(gradient_checkpointing=gradient_checkpointing)
        v, w, _ = (velocity(network, model) for network in (*networks, base))
        with turned_on(base, ["fake_score"]):
            (v.square().mean() + 2 * w.square().mean()).backward()
        gradients.append({name: p.grad for n in networks for name, p in n.named_parameters()})
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[-1].values())
        assert all(p.grad is None for name, p in base.named_parameters() if ".lora_" not in name)
    assert same(*gradients)


def test_a_bf16_base_stays_as_it_is_when_its_lora_is_exported_in_float32(tmp_path):
    model, base, student, _ = loaded(torch.bfloat16)
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
        value = value if ".time_embedder" in name else value.bfloat16().float()
        torch.testing.assert_close(merged[name], value + change)


@pytest.mark.slow
def test_a_run_starts_from_another_with_the_same_loras(tmp_path, fails):
    flags = {"runs_dir": tmp_path, "steps": 1, "student_every": 1, "ema_decay": 0.0, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, lr=1e-3, **flags, **RANKS))
    flags |= {"init": str(only_run(tmp_path, dmd2)), "lr": 1e-9, "fake_score_lr": 1e-9}
    dfd.main(small_args(dfd, **flags | {"gan_weight": 0.1}, **RANKS))  # whose heads are new
    sides = [state_of(tmp_path, 1, dmd2), state_of(tmp_path, 1, dfd)]
    assert distance(*({k: v for k, v in side.items() if k.startswith("student.")} for side in sides)) < 1e-6
    for ranks in ({}, {"lora_rank": 2}, RANKS | {"lora_rank": 3}):
        fails(lambda ranks=ranks: dfd.main(small_args(dfd, **flags, **ranks)), flags["init"])


@pytest.mark.parametrize(("decay", "more"), [(0.0, set()), (0.9, {"ema"})])
def test_the_average_has_a_lora_where_there_is_one(decay, more):
    assert (
        small_args(phased_dmd, ema_decay=decay, **RANKS).adapters.keys() == {"student", "expert_0", "fake_score"} | more
    )
