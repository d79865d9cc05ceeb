"""--init with what others publish: small files of the same layouts fill the networks exactly, all else is one line."""

import re
from functools import partial

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import common
import dmd2
from models.presets import PRESETS
from tests import small_teachers
from tests.conftest import same, small_args, state_of
from tests.ranks import on_ranks, train_all
from training.checkpoints import find_init, load_init
from training.published import wan_name

FLAGS = {"teacher": "tiny", "student": None, "init_strength": 1.0}
CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
STILL = {"steps": 1, "batch_size": 1, "lr": 0.0, "fake_score_lr": 0.0, "weight_decay": 0.0, "gan_weight": 0.0}


def teacher():
    return load_file(f"{TINY}/transformer/diffusion_pytorch_model.safetensors")


def moved(by):
    """The teacher's weights, every one moved by another amount, so that no two networks or tensors are alike."""
    return {key: value + by * (1 + i / 100) for i, (key, value) in enumerate(sorted(teacher().items()))}


def in_wans_names(weights, prefix="model."):
    return {f"{prefix}{wan_name(key)}": value for key, value in weights.items()}


def wrapped(weights):
    """Names as FSDP and activation checkpointing leave them."""
    key = lambda name: name.replace("model.", "model._fsdp_wrapped_module.").replace(
        ".self_attn", "._checkpoint_wrapped_module.self_attn"
    )
    return {f"module.{key(name)}": value for name, value in weights.items()}


def filled(path, teacher="tiny", frame_block=0, **flags):
    """The weights of a run's networks after --init."""
    model = common.Model(teacher, 9, 32, 32)
    blocks = {"student": frame_block, "fake_score": 0, "ema": frame_block}
    networks = {role: model.load_network(role, CPU, block) for role, block in blocks.items()}
    load_init(find_init("runs", teacher, str(path)), networks, FLAGS | {"teacher": teacher} | flags)
    return {name: dict(network.transformer.state_dict()) for name, network in networks.items()}


# ------------------------------------------------------------------------------------------------------ whole networks


def causvid(path, student, other, critic):
    torch.save({"generator": in_wans_names(student), "critic": in_wans_names(critic)}, path)


def self_forcing(path, student, other, critic):
    heads = {"_cls_pred_branch.0.weight": torch.zeros(3), "_register_tokens.tokens": torch.zeros(3, 3)}
    record = {"generator": in_wans_names(other), "critic": in_wans_names(critic) | heads}
    torch.save(record | {"generator_ema": wrapped(in_wans_names(student))}, path)


def fastgen(path, student, other, critic):
    own = lambda weights: {f"transformer.{key}": value for key, value in weights.items()}
    nets = {"net": own(other), "ema": own(student), "fake_score": own(critic), "discriminator": {"0.w": torch.zeros(2)}}
    optimizer = {"net": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-6}]}}
    torch.save({"model": nets, "optimizer": optimizer, "callbacks": {}, "iteration": 7}, path)


@pytest.mark.parametrize("layout", [causvid, self_forcing, fastgen])
def test_student_and_fake_score_are_the_files_and_the_average_starts_at_the_student(tmp_path, capsys, layout):
    """With --frame-block the student is a causal one, whose weights have the same names."""
    path, student, critic = tmp_path / "model.pt", moved(0.01), moved(-0.02)
    layout(path, student, moved(0.5), critic)
    networks = filled(path, frame_block=layout is self_forcing)
    assert same(networks["student"], student) and same(networks["ema"], student)
    assert same(networks["fake_score"], critic)
    assert {causvid: "generator ", self_forcing: "generator_ema ", fastgen: "ema "}[layout] in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["model key", "pt", "safetensors", "ComfyUI", "diffusers", "bfloat16"])
def test_a_student_alone(tmp_path, capsys, layout):
    student, path = moved(0.01), tmp_path / f"0.{'pt' if layout in ('model key', 'pt') else 'safetensors'}"
    if layout == "bfloat16":
        student = {key: value.to(torch.bfloat16) for key, value in student.items()}
    prefix = "model.diffusion_model." if layout == "ComfyUI" else "model."
    weights = student if layout == "diffusers" else in_wans_names(student, prefix)
    save = torch.save if path.suffix == ".pt" else save_file
    save({"model": weights} if layout == "model key" else weights, path)
    networks = filled(path)
    assert same(networks["student"], {key: value.float() for key, value in student.items()})
    assert networks["student"]["proj_out.bias"].dtype == torch.float32
    assert same(networks["fake_score"], teacher()) and "no fake score" in capsys.readouterr().out


def test_a_critic_that_does_not_fit_is_left_out(tmp_path, capsys):
    critic = in_wans_names(moved(-0.02)) | {"model.patch_embedding.bias": torch.zeros(5)}
    torch.save({"generator": in_wans_names(moved(0.01)), "critic": critic}, tmp_path / "model.pt")
    networks = filled(tmp_path / "model.pt")
    assert same(networks["student"], moved(0.01)) and same(networks["fake_score"], teacher())
    assert "no fake score" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- LoRAs

LAYERS = ("blocks.0.attn1.to_q", "blocks.2.attn1.to_out.0", "blocks.1.attn2.to_v", "blocks.3.ffn.net.2")


def halves(rank=4):
    """{layer: (down, up)} of small sixteenths: products and their sums are exact in float32."""
    generator, base = torch.Generator().manual_seed(0), teacher()
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=generator) / 16
    shapes = {layer: base[f"{layer}.weight"].shape for layer in LAYERS}
    return {layer: (draw(rank, shape[1]), draw(shape[0], rank)) for layer, shape in shapes.items()}


def with_lora(scale=0.5):
    return teacher() | {f"{k}.weight": teacher()[f"{k}.weight"] + scale * (b @ a) for k, (a, b) in halves().items()}


def in_diffusers(path):
    """Written by diffusers, with an alpha that is half the rank in the header."""
    network = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
    network.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(LAYERS)), "default")
    own = {f"{k}.lora_{ab}.default.weight": x for k, pair in halves().items() for ab, x in zip("AB", pair)}
    assert not network.load_state_dict(own, strict=False).unexpected_keys
    WanPipeline.save_lora_weights(
        path.parent, {k.replace(".default", ""): x for k, x in own.items()}, weight_name=path.name,
        transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )  # fmt: skip


def in_comfyui(path, prefix="diffusion_model.", alpha=2.0, spelled=lambda name: name, halves_of=("down", "up")):
    """In Wan's own names, or others' spellings of them."""
    parts = {k: {f"lora_{w}.weight": x for w, x in zip(halves_of, pair)} for k, pair in halves().items()}
    parts = {k: own | ({"alpha": torch.tensor(alpha)} if alpha else {}) for k, own in parts.items()}
    names = {k: prefix + spelled(wan_name(k)) for k in parts}
    save_file({f"{names[k]}.{part}": x.clone() for k, own in parts.items() for part, x in own.items()}, path)


def in_diffusers_with_alpha(path):
    weights = {f"transformer.{k}.lora_{ab}.weight": x for k, pair in halves().items() for ab, x in zip("AB", pair)}
    save_file(weights | {f"transformer.{k}.alpha": torch.tensor(2.0) for k in LAYERS}, path)


def in_peft(path):
    """A folder, as peft saves it, and alpha in its config: over the rank's root, half."""
    network = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
    network = get_peft_model(network, LoraConfig(r=4, lora_alpha=1, use_rslora=True, target_modules=list(LAYERS)))
    own = {f"base_model.model.{k}.lora_{ab}.default.weight": x for k, p in halves().items() for ab, x in zip("AB", p)}
    assert not network.load_state_dict(own, strict=False).unexpected_keys
    network.save_pretrained(path)


SPELLINGS = {
    "ComfyUI": in_comfyui,
    "DiffSynth": partial(in_comfyui, prefix="pipe.dit."),
    "peft on Wan's": partial(in_comfyui, prefix="base_model.model.", halves_of=("A.default", "B.default")),
    "some layers of musubi-tuner": partial(in_comfyui, prefix="lora_unet_", spelled=lambda k: k.replace(".", "_")),
    "diffusers": in_diffusers,
    "diffusers' names, alpha": in_diffusers_with_alpha,
    "peft": in_peft,
}


@pytest.mark.parametrize("layout", SPELLINGS)
def test_a_lora_is_merged(tmp_path, layout):
    SPELLINGS[layout](tmp_path / "lora.safetensors")
    networks = filled(tmp_path / "lora.safetensors")
    assert same(networks["student"], with_lora()) and same(networks["ema"], networks["student"])
    assert same(networks["fake_score"], teacher())


@pytest.mark.parametrize(("alpha", "strength", "scale"), [(None, 1.0, 1.0), (None, 0.125, 0.125), (2.0, 0.5, 0.25)])
def test_the_strength_of_a_lora(tmp_path, capsys, alpha, strength, scale):
    """alpha / rank, or 1 where no alpha is in the file, which is said; times --init-strength."""
    in_comfyui(tmp_path / "lora.safetensors", "", alpha)
    networks = filled(tmp_path / "lora.safetensors", init_strength=strength)
    assert same(networks["student"], with_lora(scale))
    assert ("without alpha" in capsys.readouterr().out) == (alpha is None)


def test_the_only_file_in_a_folder_is_read_by_its_keys(tmp_path):
    """Though a config.json beside it speaks of Wan's own class, and nothing is called a LoRA."""
    for name in ("whole", "lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"_class_name": "WanModel"}')
    save_file(in_wans_names(moved(0.01), ""), tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    in_comfyui(tmp_path / "lora" / "model.safetensors")
    assert same(filled(tmp_path / "whole")["student"], moved(0.01))
    assert same(filled(tmp_path / "lora")["student"], with_lora())


@pytest.mark.parametrize("name", ["wan", "wan_i2v"])
def test_wans_names_are_those_that_diffusers_reads(name):
    keys = small_teachers.SMALL[name][0]().transformer.state_dict().keys()
    assert convert_wan_transformer_to_diffusers({wan_name(key): key for key in keys}) == {key: key for key in keys}


def test_differences_beside_a_lora_are_added(tmp_path):
    """Distilled LoRAs for ComfyUI move norms, biases and the first convolution too, which diffusers would leave out."""
    in_comfyui(tmp_path / "lora.safetensors")
    moves = {"blocks.0.norm2.weight": "diff", "blocks.0.norm2.bias": "diff_b", "blocks.1.attn1.norm_q.weight": "diff"}
    moves |= {"blocks.2.scale_shift_table": "diff_m", "scale_shift_table": "diff_m"}
    moves |= {"blocks.3.ffn.net.2.bias": "diff_b", "patch_embedding.weight": "diff", "proj_out.bias": "diff_b"}
    wanted, weights = with_lora(), load_file(tmp_path / "lora.safetensors")
    for i, (key, ending) in enumerate(moves.items()):
        weights[f"diffusion_model.{wan_name(key).rpartition('.')[0]}.{ending}"] = torch.full_like(wanted[key], i + 1)
        wanted[key] = wanted[key] + (i + 1)
    save_file(weights, tmp_path / "more.safetensors")
    assert same(filled(tmp_path / "more.safetensors")["student"], wanted)


def test_it_is_what_the_stock_pipeline_makes_of_a_lora(tmp_path):
    """With every layer in it, in bf16 and of musubi-tuner's names, one alpha a layer."""
    weights, base = {}, teacher()
    torch.manual_seed(0)
    for key in (key for key in base if re.search(r"blocks.*(attn\d\.to|ffn).*weight", key)):
        name = "lora_unet_" + wan_name(key).removesuffix(".weight").replace(".", "_")
        out, into = base[key].shape
        weights |= {f"{name}.lora_down.weight": torch.randn(4, into) / 9, f"{name}.alpha": torch.tensor(3.0)}
        weights[f"{name}.lora_up.weight"] = torch.randn(out, 4) / 9
    save_file({key: value.to(torch.bfloat16) for key, value in weights.items()}, tmp_path / "lora.safetensors")
    pipe = WanPipeline.from_pretrained(TINY)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    student = filled(tmp_path / "lora.safetensors")["student"]
    for key, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(student[key], value, atol=2e-3, rtol=0)  # diffusers multiplies in bf16
    assert not same(student, base)


# ----------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    """Of a LoRA all ranks share the weights, or each holds them whole."""
    self_forcing(tmp_path / "model.pt", moved(0.01), moved(0.5), moved(-0.02))
    in_comfyui(tmp_path / "lora.safetensors")
    starts = {"model.pt": {}, "lora.safetensors": {"shard_size": 1}}.items()
    args = [
        small_args(dmd2, runs_dir=f"{tmp_path}/{name}s", init=tmp_path / name, **STILL, **own) for name, own in starts
    ]
    on_ranks(2, train_all, [("dmd2", own) for own in args])
    for own, student, fake_score in zip(args, (moved(0.01), with_lora()), (moved(-0.02), teacher()), strict=True):
        state = state_of(own.runs_dir, 1, dmd2)
        for name, wanted in {"student": student, "fake_score": fake_score, "ema": student}.items():
            own = {key: value for key, value in state.items() if key.startswith(f"{name}.transformer.")}
            assert same(own, {f"{name}.transformer.{key}": value for key, value in wanted.items()})


# ------------------------------------------------------------------------------------------------------------ bad input

KEY = "diffusion_model.blocks.0.self_attn.q"
PEFT = {f"blocks.0.attn1.to_q.lora_{half}.weight": x for half, x in zip("AB", halves()[LAYERS[0]])}
IN_DIFFUSERS = {f"transformer.{key}": x for key, x in PEFT.items()}
CHANGES = {  # what is wrong in a file, and what its error says
    "unknown": ({"model.blocks.0.self_attn.gate.weight": torch.zeros(2)}, "self_attn.gate.weight is unknown"),
    "missing": ({"model.blocks.1.self_attn.q.bias": None}, "blocks.1.attn1.to_q.bias is missing"),
    "shape": ({"model.head.head.bias": torch.zeros(7)}, "proj_out.bias is torch.float32 (7,)"),
    "twice": ({"patch_embedding.bias": torch.zeros(96)}, "two tensors"),
    "quantised": ({"model.head.head.bias": torch.zeros(32).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
    "lora half": ({f"{KEY}.lora_up.weight": None}, "blocks.0.attn1.to_q.weight"),
    "lora unknown": ({KEY.replace("q", "gate") + ".lora_down.weight": torch.zeros(4, 4)}, "blocks.0.self_attn.gate"),
    "lora ranks": ({f"{KEY}.lora_down.weight": torch.zeros(3, 96)}, "blocks.0.attn1.to_q"),
    "lora difference": ({"diffusion_model.blocks.0.norm3.diff": torch.zeros(5)}, "blocks.0.norm3.diff"),
}
LORAS = {  # whole LoRAs
    "dora": (IN_DIFFUSERS | {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(1)}, "dora_scale"),
    "block": ({key.replace("blocks.0", "blocks.9"): x for key, x in IN_DIFFUSERS.items()}, "blocks.9.attn1.to_q"),
}


@pytest.mark.parametrize("kind", [*CHANGES, *LORAS, "pickled", "damaged", "critic"])
def test_a_file_that_does_not_fit_is_one_line(tmp_path, fails, kind):
    path, weights = (
        tmp_path / ("0.safetensors" if kind in LORAS or "lora" in kind else "0.pt"),
        in_wans_names(moved(0.01)),
    )
    changes, word = CHANGES.get(kind) or LORAS.get(kind) or ({}, "missing" if kind == "critic" else "cannot read")
    if "lora" in kind:
        in_comfyui(path)
        weights = load_file(path)
    if path.suffix == ".safetensors":
        weights = changes if kind in LORAS else {k: x for k, x in (weights | changes).items() if x is not None}
        save_file({key: x.contiguous() for key, x in weights.items()}, path)
    else:
        weights = {key: x for key, x in (weights | changes).items() if x is not None}
        more = {"config": dmd2.Heads(4, (1,))} if kind == "pickled" else {}
        torch.save({"critic" if kind == "critic" else "generator": weights} | more, path)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:-1000])
    fails(lambda: find_init("runs", "tiny", str(path)), str(path), word)


def test_files_are_for_wan_with_one_expert_and_networks_that_are_no_lora(tmp_path, fails):
    path, model = tmp_path / "model.pt", common.Model("tiny", 9, 32, 32)
    causvid(path, moved(0.01), None, moved(-0.02))
    folder = small_teachers.write("wan_experts", tmp_path)
    fails(lambda: find_init(tmp_path, folder, str(path)), str(path), "one expert")
    base = model.load_network("teacher", CPU, adapters={"student": (2, 4.0), "fake_score": (2, 4.0)})
    lora, fake_score = (model.load_network(role, CPU, base=base) for role in ("student", "fake_score"))
    fails(lambda: load_init(path, {"student": lora}, FLAGS), "--lora-rank")
    student = model.load_network("student", CPU)
    load_init(path, {"student": student, "fake_score": fake_score}, FLAGS)
    assert same(dict(student.transformer.state_dict()), moved(0.01))
    assert all((x == 0).all() for key, x in fake_score.lora.items() if key.endswith("lora_B")), "as it began"
