"""--init with what others publish: small files of the same layouts fill the networks exactly, all else is one line."""

import json
import re

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import codmd
import common
import dmd2
from models.presets import PRESETS
from tests import small_teachers
from tests.conftest import only_run, same, small_args, state_of, train_on_ranks
from training.checkpoints import find_init, load_init

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
STILL = {"steps": 1, "lr": 0.0, "fake_score_lr": 0.0, "weight_decay": 0.0, "gan_weight": 0.0}
# diffusers' table for Wan, read backwards; test_native_names holds it against diffusers
NATIVE = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^scale_shift_table", "head.modulation"), (r"^proj_out", "head.head"), ("scale_shift_table", "modulation"),
    ("attn1", "self_attn"), ("attn2", "cross_attn"), (r"\.to_out\.0", ".o"), (r"\.to_([qkv])\b", r".\1"),
    (r"\.add_([kv])_proj", r".\1_img"), (r"\.norm_added_k", ".norm_k_img"), (r"\.norm(2|3)\.", r".norm_\1."),
    (r"\.norm_2\.", ".norm3."), (r"\.norm_3\.", ".norm2."), (r"ffn\.net\.0\.proj", "ffn.0"), (r"ffn\.net\.2", "ffn.2"),
)  # fmt: skip


def native(key):
    for pattern, name in NATIVE:
        key = re.sub(pattern, name, key)
    return key


def teacher():
    return load_file(f"{TINY}/transformer/diffusion_pytorch_model.safetensors")


def moved(by):
    """The teacher's weights, every one moved by another amount, so that no two networks or tensors are alike."""
    return {key: value + by * (1 + i / 100) for i, (key, value) in enumerate(sorted(teacher().items()))}


def in_wans_names(weights, prefix="model."):
    return {f"{prefix}{native(key)}": value for key, value in weights.items()}


def wrapped(weights):
    """Names as FSDP and activation checkpointing leave them."""
    key = lambda name: name.replace("model.", "model._fsdp_wrapped_module.").replace(
        ".self_attn", "._checkpoint_wrapped_module.self_attn"
    )
    return {f"module.{key(name)}": value for name, value in weights.items()}


def filled(path, teacher="tiny", size=(9, 32, 32), frame_block=0, average=True):
    """The networks of a run after --init."""
    model = common.Model(teacher, *size)
    student = model.load_network("student", CPU, frame_block)
    networks = {"student": student, "fake_score": model.load_network("fake_score", CPU)}
    networks |= {"ema": model.load_network("ema", CPU, frame_block)} if average else {}
    found = find_init("runs", teacher, str(path))
    load_init(found, networks, {"teacher": teacher})
    return {name: dict(network.transformer.state_dict()) for name, network in networks.items()}


def test_native_names():
    transformers = [WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")]
    for transformer in [*transformers, small_teachers.wan_i2v().transformer]:
        keys = transformer.state_dict().keys()
        names = [native(key) for key in keys]
        assert list(convert_wan_transformer_to_diffusers(dict.fromkeys(names))) == list(keys)
        assert not {name for name in names if "attn1" in name or "condition_embedder" in name or "to_" in name}
    assert "blocks.0.self_attn.q.weight" in names and "blocks.1.cross_attn.k_img.bias" in names


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
    torch.save({"model": nets, "optimizer": optimizer, "grad_scaler": {}, "callbacks": {}, "iteration": 7}, path)


def flat(path, student, other, critic):
    parts = {"generator.model.": other, "generator_ema.": student, "critic.model.": critic}
    save_file({k: v for prefix, part in parts.items() for k, v in in_wans_names(part, prefix).items()}, path)


LAYOUTS = [(causvid, "generator.pt"), (self_forcing, "model.pt"), (fastgen, "0.pth"), (flat, "model.safetensors")]


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
def test_student_and_fake_score_are_the_files_and_the_average_starts_at_the_student(tmp_path, capsys, layout, name):
    student, critic = moved(0.01), moved(-0.02)
    layout(tmp_path / name, student, moved(0.5), critic)
    networks = filled(tmp_path / name)
    assert same(networks["student"], student) and same(networks["ema"], student)
    assert same(networks["fake_score"], critic)
    taken = {causvid: "generator", fastgen: "ema"}.get(layout, "generator_ema")
    critics = "fake_score" if layout is fastgen else "critic"
    out = capsys.readouterr().out
    assert f"from {name}, student: {taken}; fake_score: {critics}\n" in out
    assert f"starting from fake_score, student of {tmp_path / name}\n" in out


@pytest.mark.parametrize("layout", ["model key", "bare pt", "bare safetensors", "ComfyUI", "diffusers", "bfloat16"])
def test_a_student_alone(tmp_path, capsys, layout):
    student, path = moved(0.01), tmp_path / ("0.pt" if "pt" in layout or "key" in layout else "0.safetensors")
    if layout == "bfloat16":
        student = {key: value.to(torch.bfloat16) for key, value in student.items()}
    weights = student if layout == "diffusers" else in_wans_names(student)
    if layout == "ComfyUI":
        weights = in_wans_names(student, "model.diffusion_model.")
    if path.suffix == ".pt":
        torch.save({"model": weights} if layout == "model key" else weights, path)
    else:
        save_file(weights, path)
    networks = filled(path)
    assert same(networks["student"], {key: value.float() for key, value in student.items()})
    assert networks["student"]["proj_out.bias"].dtype == torch.float32
    assert same(networks["fake_score"], teacher()) and "it has no fake score" in capsys.readouterr().out


def test_a_causal_student(tmp_path):
    self_forcing(tmp_path / "model.pt", moved(0.01), moved(0.5), moved(-0.02))
    networks = filled(tmp_path / "model.pt", frame_block=1)
    assert same(networks["student"], moved(0.01)) and same(networks["fake_score"], moved(-0.02))


def test_a_critic_of_another_size_is_left_out_and_named(tmp_path, capsys):
    critic = in_wans_names(moved(-0.02)) | {"model.patch_embedding.bias": torch.zeros(5)}
    torch.save({"generator": in_wans_names(moved(0.01)), "critic": critic}, tmp_path / "model.pt")
    networks = filled(tmp_path / "model.pt")
    assert same(networks["student"], moved(0.01)) and same(networks["fake_score"], teacher())
    out = capsys.readouterr().out
    assert "fake_score: not critic, which does not fit (patch_embedding.bias is (5,)" in out
    assert "it has no fake score" in out


def test_a_pipeline_folder(tmp_path):
    """As FastVideo publishes them: the student in transformer/, by diffusers' names."""
    pipe = WanPipeline.from_pretrained(TINY)
    pipe.transformer.load_state_dict(moved(0.01))
    pipe.save_pretrained(tmp_path / "fastwan")
    index = json.loads((tmp_path / "fastwan" / "model_index.json").read_text())
    (tmp_path / "fastwan" / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    for folder in ("fastwan", "fastwan/transformer"):
        assert same(filled(tmp_path / folder)["student"], moved(0.01))


@pytest.mark.parametrize("script", [dmd2, codmd])
def test_in_a_run(tmp_path, script):
    self_forcing(tmp_path / "model.pt", moved(0.01), moved(0.5), moved(-0.02))
    script.main(small_args(script, runs_dir=tmp_path / "runs", init=str(tmp_path / "model.pt"), **STILL))
    state = state_of(tmp_path / "runs", 1, script)
    for name, wanted in {"student": moved(0.01), "fake_score": moved(-0.02), "ema": moved(0.01)}.items():
        own = {key: value for key, value in state.items() if key.startswith(f"{name}.transformer.")}
        assert same(own, {f"{name}.transformer.{key}": value for key, value in wanted.items()})
    record = json.loads((only_run(tmp_path / "runs", script) / "args.json").read_text())
    assert record["init"] == str(tmp_path / "model.pt")


def test_image_to_video(tmp_path):
    name = small_teachers.write("wan_i2v", tmp_path)
    weights = load_file(f"{name}/transformer/diffusion_pytorch_model.safetensors")
    weights = {key: value + 0.01 for key, value in weights.items()}
    save_file(in_wans_names(weights), tmp_path / "student.safetensors")
    assert same(filled(tmp_path / "student.safetensors", name)["student"], weights)


# --------------------------------------------------------------------------------------------------------------- LoRAs

LAYERS = ("blocks.0.attn1.to_q", "blocks.2.attn1.to_out.0", "blocks.1.attn2.to_v", "blocks.3.ffn.net.2")


def halves(seed=0, rank=4):
    """{layer: (down, up)} of small sixteenths: products and their sums are exact in float32."""
    generator, base = torch.Generator().manual_seed(seed), teacher()
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=generator) / 16
    shapes = {layer: base[f"{layer}.weight"].shape for layer in LAYERS}
    return {layer: (draw(rank, shape[1]), draw(shape[0], rank)) for layer, shape in shapes.items()}


def with_lora(scale, seed=0):
    base = teacher()
    for layer, (down, up) in halves(seed).items():
        base[f"{layer}.weight"] = base[f"{layer}.weight"] + scale * (up @ down)
    return base


def in_diffusers(path):
    """Written by diffusers, with an alpha that is half the rank in the header."""
    network = WanTransformer3DModel.from_pretrained(TINY, subfolder="transformer")
    network.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(LAYERS)), "default")
    own = {f"{k}.lora_{ab}.default.weight": x for k, pair in halves().items() for ab, x in zip("AB", pair)}
    assert not network.load_state_dict(own, strict=False).unexpected_keys
    network.save_lora_adapter(path.parent, adapter_name="default", weight_name=path.name)
    weights = {f"transformer.{key.removeprefix('transformer.')}": x for key, x in load_file(path).items()}
    config = network.peft_config["default"].to_dict()
    record = {"r": 4, "lora_alpha": 2, "target_modules": sorted(config["target_modules"])}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in record.items()})}
    save_file(weights, path, header | {"format": "pt"})


def in_comfyui(path, prefix="diffusion_model."):
    words = {"down": 0, "up": 1}
    weights = {f"{k}.lora_{w}.weight": pair[i].clone() for k, pair in halves().items() for w, i in words.items()}
    weights |= {f"{k}.alpha": torch.tensor(2.0) for k in LAYERS}
    save_file({f"{prefix}{native(key)}": value for key, value in weights.items()}, path)


def in_diffsynth(path):
    in_comfyui(path, prefix="")


@pytest.mark.parametrize("layout", [in_diffusers, in_comfyui, in_diffsynth])
def test_a_lora_is_merged(tmp_path, capsys, layout):
    layout(tmp_path / "lora.safetensors")
    networks = filled(tmp_path / "lora.safetensors")
    assert same(networks["student"], with_lora(0.5)) and same(networks["ema"], networks["student"])
    assert same(networks["fake_score"], teacher())
    assert "student: the teacher with this LoRA" in capsys.readouterr().out


def test_differences_beside_a_lora_are_added(tmp_path):
    """Distilled LoRAs for ComfyUI move norms, biases and the first convolution too, which diffusers would leave out."""
    in_comfyui(tmp_path / "lora.safetensors")
    moves = {"blocks.0.norm2.weight": "diff", "blocks.0.norm2.bias": "diff_b", "blocks.1.attn1.norm_q.weight": "diff"}
    moves |= {"blocks.2.scale_shift_table": "diff_m", "scale_shift_table": "diff_m"}
    moves |= {"blocks.3.ffn.net.2.bias": "diff_b", "patch_embedding.weight": "diff", "proj_out.bias": "diff_b"}
    wanted, weights = with_lora(0.5), load_file(tmp_path / "lora.safetensors")
    for i, (key, ending) in enumerate(moves.items()):
        weights[f"diffusion_model.{native(key).rpartition('.')[0]}.{ending}"] = torch.full_like(wanted[key], i + 1)
        wanted[key] = wanted[key] + (i + 1)
    save_file(weights, tmp_path / "more.safetensors")
    assert same(filled(tmp_path / "more.safetensors")["student"], wanted)


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.dora_scale", "time_projection.1.alpha", "nonsense.different"])
def test_what_diffusers_would_leave_out_of_a_lora_is_one_line(tmp_path, fails, name):
    in_comfyui(tmp_path / "lora.safetensors")
    weights = load_file(tmp_path / "lora.safetensors") | {f"diffusion_model.{name}": torch.ones(1)}
    save_file(weights, tmp_path / "more.safetensors")
    fails(lambda: filled(tmp_path / "more.safetensors"), "does not fit", f"{name} is unknown")


def test_it_is_what_the_stock_pipeline_makes_of_a_lora(tmp_path):
    """With every layer in it, in bf16 and of musubi-tuner's names, one alpha a layer."""
    weights, base = {}, teacher()
    torch.manual_seed(0)
    for key in (key for key in base if re.search(r"blocks.*(attn\d\.to|ffn).*weight", key)):
        name = "lora_unet_" + native(key).removesuffix(".weight").replace(".", "_")
        out, into = base[key].shape
        weights |= {f"{name}.lora_down.weight": torch.randn(4, into) / 9, f"{name}.alpha": torch.tensor(3.0)}
        weights[f"{name}.lora_up.weight"] = torch.randn(out, 4) / 9
    save_file({key: value.to(torch.bfloat16) for key, value in weights.items()}, tmp_path / "lora.safetensors")
    pipe = WanPipeline.from_pretrained(TINY)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    student = filled(tmp_path / "lora.safetensors")["student"]
    assert same(student, dict(pipe.transformer.state_dict()))
    assert (student["blocks.3.attn2.to_out.0.weight"] - base["blocks.3.attn2.to_out.0.weight"]).abs().mean() > 0.01


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["file", "lora"])
def test_on_two_ranks(tmp_path, kind):
    path = tmp_path / ("model.pt" if kind == "file" else "lora.safetensors")
    self_forcing(path, moved(0.01), moved(0.5), moved(-0.02)) if kind == "file" else in_comfyui(path)
    shard_size = {} if kind == "file" else {"shard_size": 1}  # all ranks share the weights, or each holds them whole
    train_on_ranks(2, dmd2, runs_dir=tmp_path / "runs", batch_size=1, init=path, **shard_size, **STILL)
    state = state_of(tmp_path / "runs", 1, dmd2)
    student, fake_score = (moved(0.01), moved(-0.02)) if kind == "file" else (with_lora(0.5), teacher())
    for name, wanted in {"student": student, "fake_score": fake_score, "ema": student}.items():
        own = {key: value for key, value in state.items() if key.startswith(f"{name}.transformer.")}
        assert same(own, {f"{name}.transformer.{key}": value for key, value in wanted.items()})


# ------------------------------------------------------------------------------------------------------------ bad input


def a_file(tmp_path, kind):
    """A file that is wrong in one way."""
    path = tmp_path / ("model.safetensors" if "lora" in kind or "safetensors" in kind else "model.pt")
    weights = in_wans_names(moved(0.01))
    if kind == "unknown":
        weights["model.blocks.0.self_attn.gate.weight"] = torch.zeros(2)
    elif kind == "missing":
        weights.pop("model.blocks.1.self_attn.q.bias")
    elif kind == "shape":
        weights["model.head.head.bias"] = torch.zeros(7)
    elif kind == "twice":
        weights["patch_embedding.bias"] = weights["model.patch_embedding.bias"]
    elif kind == "quantised":
        weights["model.head.head.bias"] = weights["model.head.head.bias"].to(torch.float8_e4m3fn)
    if "lora" in kind:
        in_comfyui(path)
        weights, key = load_file(path), "diffusion_model.blocks.0.self_attn.q"
        if kind == "lora half":
            weights.pop(f"{key}.lora_up.weight"), weights.pop(f"{key}.alpha")
        elif kind == "lora unknown":
            weights["diffusion_model.blocks.0.self_attn.gate.lora_down.weight"] = torch.zeros(4, 4)
        elif kind == "lora block":
            weights |= {k.replace("blocks.0", "blocks.9"): v.clone() for k, v in weights.items() if "blocks.0" in k}
        elif kind == "lora shape":
            weights[f"{key}.lora_down.weight"] = torch.zeros(4, 5)
        elif kind == "lora ranks":
            weights[f"{key}.lora_down.weight"] = weights[f"{key}.lora_down.weight"][:3].clone()
        elif kind == "lora difference":
            weights["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(5)
        elif kind == "lora of peft":  # its alpha would be in another file
            weights = {f"base_model.model.{k.removeprefix('diffusion_model.')}": v for k, v in weights.items()}
            weights = {k.replace("self_attn.q", "attn1.to_q"): v for k, v in weights.items() if "attn.q.lora_" in k}
        save_file(weights, path)
    elif kind == "pickled":
        torch.save({"generator": weights, "config": dmd2.Heads(4, (1,))}, path)
    elif kind == "no entry":
        torch.save({"step": 3, "optimizer": {}}, path)
    elif kind == "critic alone":
        torch.save({"critic": weights}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif "safetensors" in kind:
        save_file(weights, path)
    elif kind == "old":
        torch.save({"generator": weights}, path, _use_new_zipfile_serialization=False)
    elif kind != "text":
        torch.save({"generator": weights}, path)
    if kind == "text":
        path.write_text("no weights")
    if kind in ("damaged", "damaged safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unknown", ["do not fit", "blocks.0.attn1.gate.weight is unknown"]),
        ("missing", ["do not fit", "blocks.1.attn1.to_q.bias is missing"]),
        ("shape", ["do not fit", "proj_out.bias is (7,), this teacher's (32,)"]),
        ("twice", ["two tensors of one name"]),
        ("quantised", ["proj_out.bias is torch.float8_e4m3fn", "not quantised"]),
        ("pickled", ["holds more than tensors", "not read"]),
        ("damaged", ["cannot read", "download it again"]),
        ("old", ["cannot read", "torch.save it anew"]),
        ("damaged safetensors", ["cannot read", "download it again"]),
        ("text", ["cannot read"]),
        ("no entry", ["no student in", "it holds step, optimizer", "generator_ema"]),
        ("critic alone", ["no student in", "it holds critic"]),
        ("a list", ["no student in"]),
        ("lora half", ["blocks.0.attn1.to_q.lora_B.weight is missing"]),
        ("lora unknown", ["cannot convert", "blocks.0.self_attn.gate"]),
        ("lora block", ["blocks.9.attn1.to_q.lora_A.weight is unknown"]),
        ("lora shape", ["it changes blocks.0.attn1.to_q.weight by (96, 5)"]),
        ("lora ranks", ["(3, 96) and its other half (96, 4)"]),
        ("lora difference", ["it changes blocks.0.norm2.weight by (5,)"]),
        ("lora of peft", ["base_model", "is unknown"]),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_before_anything_is_made(tmp_path, fails, kind, words):
    path = a_file(tmp_path, kind)
    fails(lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path / "runs", init=str(path))), str(path), *words)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_does_not_fit_is_one_line_before_anything_is_made(tmp_path, fails):
    """FastWan with sparse attention has a gate in every block that a stock Wan lacks."""
    (tmp_path / "transformer").mkdir()
    weights = moved(0.01) | {"blocks.0.to_gate_compress.weight": torch.zeros(96, 96)}
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    run = lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path / "runs", init=str(tmp_path)))
    fails(run, "--init", "do not fit", "blocks.0.to_gate_compress.weight is unknown")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "exported").mkdir()
    save_file(
        {"transformer.proj_out.lora_A.weight": torch.zeros(2, 96)}, tmp_path / "exported/student_lora.safetensors"
    )
    run = lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path / "runs", init=str(tmp_path / "exported")))
    fails(run, "exported holds a LoRA: name the file", "student_lora.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan_experts", ["has two experts"]),
        ("cosmos", ["is no Wan", "CosmosTransformer3DModel"]),
        ("qwen_image", ["is no Wan"]),
    ],
)
def test_other_teachers_refuse_files(tmp_path, fails, name, words):
    path, folder = tmp_path / "model.pt", small_teachers.write(name, tmp_path)
    causvid(path, moved(0.01), None, moved(0.01))
    fails(lambda: find_init(tmp_path, folder, str(path)), "--init", str(path), *words)
    assert find_init(tmp_path, folder, folder).is_dir(), "folders go on as before"


@pytest.mark.parametrize("layout", [in_comfyui, lambda path: save_file(moved(0.01), path)])
def test_a_lora_run_refuses_files(tmp_path, fails, layout):
    layout(tmp_path / "0.safetensors")
    flags = {"runs_dir": tmp_path / "runs", "init": str(tmp_path / "0.safetensors"), "lora_rank": 2}
    fails(lambda: dmd2.main(small_args(dmd2, gan_weight=0.0, **flags)), "--lora-rank", "name a run with that rank")


def test_a_fake_score_that_is_a_lora_keeps_the_teachers_weights(tmp_path, capsys):
    causvid(tmp_path / "model.pt", moved(0.01), None, moved(-0.02))
    flags = {"runs_dir": tmp_path / "runs", "init": str(tmp_path / "model.pt"), "fake_lora_rank": 2}
    dmd2.main(small_args(dmd2, **STILL, **flags))
    state = state_of(tmp_path / "runs", 1, dmd2)
    own = {key: value for key, value in state.items() if key.startswith("student.transformer.")}
    assert same(own, {f"student.transformer.{key}": value for key, value in moved(0.01).items()})
    assert "it has no fake score" in capsys.readouterr().out
