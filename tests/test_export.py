"""tools/export.py: the card's own lines, run in stock diffusers, give the student's samples; LoRAs give its network."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from einops import rearrange
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import common
import dmd
import dmd2
import phased_dmd
from models.images import read_images, to_pil
from models.presets import PRESETS
from tests import small_teachers
from tests.conftest import only_run, same, small_args, state_of
from tests.small_teachers import SMALL
from tools import export
from tools.hub.levels import distance, made_by, nearest_scheduler
from tools.hub.lora import linear_layers
from training.finished import load_run, students_of
from training.flags import with_recipe

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
FILE = "diffusion_pytorch_model.safetensors"
FLAGS = {"steps": 2, "student_every": 1, "lr": 1e-3, "fake_score_lr": 1e-3, "ema_decay": 0.5}


class Torchs:
    """SampleRNG of torch's own generator, in the order in which a stock pipeline draws them. packed: Qwen-Image's renoising
    draws for its tokens.
    """

    def __init__(self, packed=False):
        self.packed, self.drawn = packed, 0

    def __len__(self):
        return 1

    def normal(self, shape):
        self.drawn += 1
        if self.packed and self.drawn > 1:
            c, _, h, w = shape
            tokens = torch.randn(1, h * w // 4, c * 4)
            return rearrange(tokens, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=h // 2, p=2, q=2)
        return torch.randn(1, *shape)


def trained(tmp_path, script=dmd2, **flags):
    flags = FLAGS | ({"gan_weight": 0.0} if script is dmd2 else {}) | flags
    script.main(small_args(script, runs_dir=tmp_path / "runs", **flags))
    return only_run(tmp_path / "runs", script)


def exported(run, out, **flags):
    export.main(export.Args(run=str(run), out=Path(out), **flags))
    return Path(out)


def lines_of(card):
    return card.read_text().split("```python\n")[1].split("```")[0]


def run_card(out, *changes):
    """Run the card's lines, with these changes made; returns its pipeline and what that made."""
    code = lines_of(out / "README.md").replace(f'"{out.name}"', f'"{out}"').replace("a prompt", "a red circle")
    for old, new in changes:
        assert old in code, code
        code = code.replace(old, new)
    space = {}
    torch.manual_seed(0)
    exec(code, space)
    return space["pipe"], space["out"]


LATENT = ("num_inference_steps", 'output_type="latent", num_inference_steps')
NO_VIDEO = ('export_to_video(out.frames[0], "student.mp4", ', "dict(")


def ours(run, tmp_path, image=None, packed=False):
    """The student's latents of the same draws, sampled by its script, and its model."""
    common.init_distributed()
    script, args, checkpoint = load_run(run)
    model = common.Model(args.teacher, args.frames, args.height, args.width)
    cond = common.encode_text(model, ["a red circle"], tmp_path / "text", CPU).cond_of([0])
    if model.conditions:
        cond |= model.image_encoder(CPU)(image)
    students = students_of(model, CPU, script, args, checkpoint, raw=str(run).endswith(":raw"))
    torch.manual_seed(0)
    with torch.no_grad():
        return script.sample_student(students, Torchs(packed), cond, model.latent_shape, args), model


# ---------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.8), (1.0, 0.9, 0.5), (1.0, 0.9, 0.75, 0.5)])
def test_levels_that_a_stock_scheduler_takes_exactly(levels):
    scheduler = nearest_scheduler(levels, renoise=True)
    assert distance(scheduler, levels) < 1e-7 and scheduler.config.stochastic_sampling


@pytest.mark.parametrize(
    ("levels", "off"),
    [
        ((1.0, 0.9, 0.757, 0.522), 0.0011),
        ((0.999, 0.937, 0.833, 0.624), 0.00101),
        ((1.0, 0.938, 0.833, 0.625), 0.0005),
    ],
)
def test_levels_of_the_recipes_that_it_only_comes_close_to(levels, off):
    scheduler = nearest_scheduler(levels, renoise=False)
    assert 1e-4 < distance(scheduler, levels) < off and not scheduler.config.stochastic_sampling
    assert made_by(scheduler, len(levels))[0] == 1


# --------------------------------------------------------------------------------------------- folders, on Wan


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (dmd, {}),
        (dmd2, {}),
        (dmd2, {"student_sigmas": (1.0, 0.9, 0.757, 0.522)}),
        (dmd2, {"student_sigmas": (0.999, 0.937, 0.833, 0.624)}),
        (phased_dmd, {"phase_ends": (0.75, 0.0)}),
        (phased_dmd, {"phase_ends": (0.9, 0.0), "student_sigmas": (1.0, 0.9, 0.757, 0.522)}),
        (phased_dmd, {"phase_ends": (0.0,)}),
    ],
)
def test_the_cards_lines_give_the_students_video(script, flags, tmp_path, monkeypatch):
    """To the rounding of its scheduler's levels, which are float32: 1e-5 of pixels in [0, 1]."""
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path, script, **flags)
    out = exported(run, tmp_path / "out")
    pipe, made = run_card(out)
    latents, model = ours(run, tmp_path)
    wanted = rearrange(common.decode(model.load_vae(CPU), latents)[0].clamp(0, 1), "c f h w -> f h w c")
    assert (torch.from_numpy(made.frames[0]) - wanted).abs().max() < 1e-5
    assert Path("student.mp4").is_file()
    # and the scheduler in the folder is that student's or near it: no other line is needed where it is exact
    stock = DiffusionPipeline.from_pretrained(out)
    _, args, _ = load_run(run)
    levels = getattr(args, "student_sigmas", (1.0,))
    near = distance(stock.scheduler, levels) > 1e-6
    assert near == ("partial" in lines_of(out / "README.md")) == (levels not in ((1.0,), (1.0, 0.9, 0.75, 0.5)))
    assert (stock.config.boundary_ratio is not None) == (len(flags.get("phase_ends", ())) == 2)


def test_a_wrong_scheduler_or_student_would_show(tmp_path, monkeypatch):
    """The comparison above can fail: by the noise, by the order of steps, by the weights."""
    run = trained(tmp_path)
    out = exported(run, tmp_path / "out")
    latents, _ = ours(run, tmp_path)
    latent = (LATENT, NO_VIDEO)
    _, made = run_card(out, *latent)
    assert (made.frames - latents).abs().max() < 1e-5
    for old, new in (("manual_seed(0)", "manual_seed(1)"), ("steps=4", "steps=3")):
        _, other = run_card(out, *latent, (old, new))
        assert (other.frames - latents).abs().max() > 0.01
    shutil.rmtree(out / "transformer")
    shutil.copytree(f"{TINY}/transformer", out / "transformer")
    _, other = run_card(out, *latent)
    assert (other.frames - latents).abs().max() > 0.01


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_average_or_the_student_itself(tmp_path, lora_rank):
    run = trained(tmp_path, lora_rank=lora_rank)
    averaged = load_file(exported(run, tmp_path / "averaged") / "transformer" / FILE)
    assert same(averaged, load_file(run / "checkpoints" / "step_0000002" / "student" / "transformer" / FILE))
    out = exported(f"{run}:raw", tmp_path / "raw")
    raw = load_file(out / "transformer" / FILE)
    assert not same(raw, averaged) and raw.keys() == averaged.keys()
    common.init_distributed()
    _, args, checkpoint = load_run(run)
    model = common.Model("tiny", 9, 32, 32)
    (student,) = students_of(model, CPU, dmd2, args, checkpoint, raw=True)
    x_t, text = torch.randn(1, *model.latent_shape), torch.randn(1, 16, 32)
    stock = WanTransformer3DModel.from_pretrained(out / "transformer")
    with torch.no_grad():
        wanted, _ = student(x_t, torch.ones(1), {"text": text})
        torch.testing.assert_close(stock(x_t, torch.tensor([1000.0]), text).sample, wanted)
    assert "| weights | the student itself |" in (out / "README.md").read_text()


def test_phases_themselves(tmp_path):
    run = trained(tmp_path, phased_dmd)
    averaged, raw = exported(run, tmp_path / "averaged"), exported(f"{run}:raw", tmp_path / "raw")
    first, second = ([load_file(out / part / FILE) for out in (averaged, raw)] for part in PARTS)
    assert same(*first) and not same(*second)


PARTS = ("transformer", "transformer_2")


def test_links_copies_and_the_transformer_alone(tmp_path):
    run = trained(tmp_path)
    linked, copied = exported(run, tmp_path / "linked"), exported(run, tmp_path / "copied", copy=True)
    weights = Path("vae", FILE)
    assert (linked / weights).is_symlink() and not (linked / "vae").is_symlink(), "`hf upload` follows links to files"
    assert not any(path.is_symlink() for path in copied.rglob("*"))
    assert (copied / weights).read_bytes() == Path(TINY, weights).read_bytes()
    alone = exported(run, tmp_path / "alone", transformer_only=True)
    assert {path.name for path in alone.iterdir()} == {"README.md", "transformer"}
    WanTransformer3DModel.from_pretrained(alone, subfolder="transformer")
    assert {path.stat().st_mode & 0o777 for path in copied.rglob("*.safetensors")} == {0o644}


def test_the_card_and_what_servers_read(tmp_path):
    run = trained(tmp_path)
    out = exported(run, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    head = card.data.to_dict()
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-video"
    assert (
        head["license"] == "apache-2.0" and {"distillation", "dmd2"} <= set(head["tags"]) and "base_model" not in head
    )
    for words in ("arXiv 2405.14867", "dmd2.py, 2 steps", (run / "revision.txt").read_text().strip(), "1.0, 0.9, 0.75"):
        assert words in card.text
    index = json.loads((out / "model_index.json").read_text())
    assert index["dmd2_config"] == {
        "num_inference_steps": 4, "denoising_timesteps": [1000, 900, 750, 500], "solver": "sde", "guidance_scale": 1.0,
    }  # fmt: skip
    assert ModelCard.load(exported(run, tmp_path / "other", license="mit") / "README.md").data.license == "mit"


# --------------------------------------------------------------------------------------------- other students


def test_a_causal_student_is_its_transformer_and_the_card_says_so(tmp_path, capsys, fails):
    run = trained(tmp_path, frame_block=1)
    out = exported(run, tmp_path / "out")
    assert "no stock pipeline samples this student" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"README.md", "transformer"}
    card = (out / "README.md").read_text()
    assert "makes its latent frames in blocks of 1" in card and "1.0, 0.9, 0.75, 0.5" in card and "```" not in card
    fails(lambda: exported(run, tmp_path / "no", lora=True), "--lora", "it is autoregressive")


def test_three_phases_are_their_transformers(tmp_path, fails):
    run = trained(tmp_path, phased_dmd, steps=3, phase_ends=(0.9, 0.75, 0.0))
    out = exported(run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"README.md", *PARTS, "transformer_3"}
    assert "it has 3 transformers" in (out / "README.md").read_text()
    fails(lambda: exported(run, tmp_path / "no", lora=True), "--lora", "it has 3 transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    small_teachers.put_in_torchvision()
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.parametrize("script", [dmd2, phased_dmd])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "wan"])
def test_every_family(name, script, folders, tmp_path, monkeypatch):
    """Two steps, of two experts one each: the card's lines and the script give the same latents."""
    monkeypatch.chdir(tmp_path)
    (*_, frames, height, width), teacher = SMALL[name], small_teachers.write(name, folders)
    Path("prompts.txt").write_text("a red circle\n")
    Path("images").mkdir()
    to_pil(torch.rand(3, 1, height, width)).save("images/1.png")
    shutil.copy("images/1.png", "first_frame.png")
    flags = FLAGS | {"batch_size": 2, "grad_accum": 1, "preview_every": 0, "save_every": 2, "teacher_steps": 2}
    flags |= {"frames": frames, "height": height, "width": width, "prompts": "prompts.txt", "gan_weight": 0.0}
    flags |= {"student_sigmas": (1.0, 0.8), "runs_dir": "runs", "guidance_scale": 2.0, "discriminator_blocks": (0, 1)}
    flags |= {"phase_ends": (0.8, 0.0), "score_ends": (), "lora_rank": 0} if script is phased_dmd else {}
    flags |= {"images": "images"} if "i2v" in name else {}
    script.main(with_recipe(script.Args, script.RECIPES, teacher=teacher, **flags))
    run = only_run(tmp_path / "runs", script)
    out = exported(run, tmp_path / "out")
    refused = script is phased_dmd and ("cosmos" in name or "qwen" in name) or name == "cosmos_i2v"
    assert (out / "model_index.json").exists() != refused
    if refused:
        assert "No stock pipeline samples it" in (out / "README.md").read_text()
        return
    changes = [LATENT]
    if "cosmos" in name:
        checker = "safety_checker=__import__('tests').small_teachers.NoSafetyChecker()"
        changes += [(f'from_pretrained("{out}"', f'from_pretrained("{out}", {checker}')]
    qwen = "qwen" in name
    changes += [('out.images[0].save("student.png")', "")] if qwen else [NO_VIDEO]
    pipe, made = run_card(out, *changes)
    image = read_images(["first_frame.png"], height, width) if "i2v" in name else None
    latents, model = ours(run, tmp_path, image, packed=qwen and script is dmd2)
    theirs = pipe._unpack_latents(made.images, height, width, 8) if qwen else made.frames
    assert (theirs - latents).abs().max() < 2e-5 and latents.std() > 0.1
    assert ModelCard.load(out / "README.md").data.pipeline_tag == (
        "text-to-image" if qwen else "image-to-video" if "i2v" in name else "text-to-video"
    )


# --------------------------------------------------------------------------------------------------------- LoRA


def outputs(transformer, count=2):
    g = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(count, 8, 3, 4, 4, generator=g), torch.randn(count, 16, 32, generator=g)
    with torch.no_grad():
        return transformer(x_t, torch.tensor([1000.0, 500.0]), text).sample


def with_lora(out, **kwargs):
    pipe = WanPipeline.from_pretrained(TINY)
    before = outputs(pipe.transformer)
    pipe.load_lora_weights(out, **kwargs)
    after = outputs(pipe.transformer)
    assert (after - before).abs().max() > 1e-3
    return after, pipe


def test_the_lora_of_a_lora_run_is_the_one_that_was_trained(tmp_path, fails):
    run = trained(tmp_path, lora_rank=2, lora_alpha=3.0, lr=1e-2)
    for which in ("", ":raw"):
        whole = exported(f"{run}{which}", tmp_path / f"whole{which}", transformer_only=True)
        merged = outputs(WanTransformer3DModel.from_pretrained(whole, subfolder="transformer"))
        lora = exported(f"{run}{which}", tmp_path / f"lora{which}", lora=True)
        torch.testing.assert_close(with_lora(lora)[0], merged, atol=1e-5, rtol=1e-5)
        state = load_file(lora / "pytorch_lora_weights.safetensors")
        trained_as = state_of(tmp_path / "runs", 2, dmd2)
        key = f"{'student' if which else 'ema'}.lora.transformer/blocks/1/ffn/net/2/lora_"
        assert torch.equal(state["diffusion_model.blocks.1.ffn.2.lora_A.weight"], trained_as[f"{key}A"])
        torch.testing.assert_close(state["diffusion_model.blocks.1.ffn.2.lora_B.weight"], 1.5 * trained_as[f"{key}B"])
    fails(lambda: exported(run, tmp_path / "no", lora=True, rank=2), "--rank", "a LoRA of rank 2")


def test_a_full_run_as_a_lora(tmp_path, capsys, fails):
    """At full rank it is every linear layer's change; at less, the nearest by the error that is told."""
    run = trained(tmp_path, ema_decay=0.0)
    student = load_file(run / "checkpoints" / "step_0000002" / "student" / "transformer" / FILE)
    teacher = load_file(f"{TINY}/transformer/{FILE}")
    lora = exported(run, tmp_path / "full", lora=True, rank=96)
    assert "relative error (Frobenius)" in capsys.readouterr().out
    got, pipe = with_lora(lora)
    names = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")}
    plain = WanTransformer3DModel.from_pretrained(f"{TINY}/transformer")
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == linear, "every linear layer has one"
    plain.load_state_dict({k: student[k] if k.removesuffix(".weight") in linear else teacher[k] for k in teacher})
    torch.testing.assert_close(got, outputs(plain), atol=1e-5, rtol=1e-5)

    raw = exported(f"{run}:raw", tmp_path / "raw", lora=True, rank=96)  # no average here, so the same weights
    assert {path.name for path in raw.iterdir()} == {path.name for path in lora.iterdir()}
    assert same(*(load_file(out / "pytorch_lora_weights.safetensors") for out in (lora, raw)))
    capsys.readouterr()

    told = tmp_path / "eight"
    exported(run, told, lora=True, rank=8)
    line = capsys.readouterr().out.splitlines()[0]
    _, pipe = with_lora(told)
    pipe.fuse_lora()
    fused = {key.replace(".base_layer.", "."): value for key, value in pipe.transformer.state_dict().items()}
    norms = {k: ((fused[k] - student[k]).norm(), (student[k] - teacher[k]).norm()) for k in student}
    covered = [k for k in norms if k.removesuffix(".weight") in linear and k.endswith(".weight")]
    root = lambda which, keys: sum(norms[k][which].item() ** 2 for k in keys) ** 0.5
    left_out = 100 * (1 - (root(1, covered) / root(1, norms)) ** 2)
    worst = max(covered, key=lambda k: norms[k][0] / norms[k][1])
    assert f"(Frobenius) {root(0, covered) / root(1, covered):.2g}"[:-1] in line
    assert f"the worst, {worst.removesuffix('.weight')}." in line and f"{left_out:.2g}"[:-1] in line
    assert line.removeprefix("transformer: ") in (told / "README.md").read_text()
    fails(lambda: exported(run, tmp_path / "no", lora=True, rank=97), "--rank 97", "the highest is 96")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "full", "raw", "eight"}


def test_the_cards_lines_load_the_lora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path, lora_rank=2, lr=1e-2)
    lora = exported(run, tmp_path / "lora", lora=True)
    changes = (('"tiny/teacher"', f'"{TINY}"'), LATENT, NO_VIDEO)
    _, made = run_card(lora, *changes)
    latents, _ = ours(run, tmp_path)
    assert (made.frames - latents).abs().max() < 1e-4
    head = ModelCard.load(lora / "README.md").data
    assert "lora" in head.tags


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_phases_are_two_loras(tmp_path, monkeypatch, lora_rank):
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path, phased_dmd, lora_rank=lora_rank, steps=4, lr=1e-2 if lora_rank else 1e-3)
    if not lora_rank:  # then all of the change must be in linear layers, to compare
        teacher = load_file(f"{TINY}/transformer/{FILE}")
        plain = WanTransformer3DModel.from_pretrained(f"{TINY}/transformer")
        linear = {f"{name}.weight" for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
        for path in run.glob(f"checkpoints/step_0000004/student/*/{FILE}"):
            weights = load_file(path)
            save_file({k: weights[k] if k in linear else teacher[k] for k in teacher}, path, {"format": "pt"})
    lora = exported(run, tmp_path / "lora", lora=True, **({} if lora_rank else {"rank": 96}))
    assert {path.name for path in lora.glob("*.safetensors")} == {
        "pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors",
    }  # fmt: skip
    changes = (('"tiny/teacher"', f'"{TINY}"'), LATENT, NO_VIDEO)
    _, made = run_card(lora, *changes)
    latents, _ = ours(run, tmp_path)
    assert (made.frames - latents).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["wan_i2v", "wan_experts", "cosmos", "qwen_image"])
def test_loras_of_other_families_load(name, folders, tmp_path, monkeypatch):
    """The student is the teacher's weights with noise in its linear layers, so at full rank nothing is left out."""
    run = trained(tmp_path, lr=0.0, ema_decay=0.0)
    (*_, frames, height, width), teacher = SMALL[name], small_teachers.write(name, folders)
    checkpoint = run / "checkpoints" / "step_0000002"
    record = json.loads((checkpoint / "args.json").read_text())
    record |= {"teacher": teacher, "frames": frames, "height": height, "width": width}
    (checkpoint / "args.json").write_text(json.dumps(record))
    more = {"safety_checker": small_teachers.NoSafetyChecker()} if name == "cosmos" else {}
    pipe = DiffusionPipeline.from_pretrained(teacher, **more)
    wanted = {}
    shutil.rmtree(checkpoint / "student")
    for part in ("transformer", "transformer_2") if name == "wan_experts" else ("transformer",):
        student = type(getattr(pipe, part)).from_pretrained(teacher, subfolder=part)
        for module in student.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data += 0.1 * torch.randn_like(module.weight)
        student.save_pretrained(checkpoint / "student" / part)
        wanted[part] = student.state_dict()
    path = checkpoint / "checkpoint.json"
    record = json.loads(path.read_text())
    found = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != path)
    record["files"] = {str(p.relative_to(checkpoint)): p.stat().st_size for p in found}
    path.write_text(json.dumps(record))
    common.init_distributed()
    highest = max(linear_layers(common.Model(teacher, frames, height, width)).values())
    lora = exported(run, tmp_path / "lora", lora=True, rank=highest)
    for part, second in (("transformer", False), ("transformer_2", True)):
        if part in wanted:
            name_of_file = f"pytorch_lora_weights{'_2' if second else ''}.safetensors"
            pipe.load_lora_weights(
                lora, weight_name=name_of_file, **({"load_into_transformer_2": True} if second else {})
            )
            network = getattr(pipe, part)
            network.fuse_lora()
            fused = {
                key.replace(".base_layer.", "."): x for key, x in network.state_dict().items() if "lora" not in key
            }
            assert fused.keys() == wanted[part].keys()
            for key, value in wanted[part].items():
                torch.testing.assert_close(fused[key], value, atol=1e-5, rtol=1e-5, msg=key)


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, fails, monkeypatch):
    run, out = trained(tmp_path), tmp_path / "out"
    before = {path.name for path in tmp_path.iterdir()}
    fails(lambda: exported(tmp_path / "nowhere", out), "no such folder", "nowhere")
    fails(lambda: exported(tmp_path / "runs", out), "is no run: give runs/NAME")
    fails(lambda: exported(run, tmp_path / "runs"), "is there already")
    fails(lambda: exported(run, run / "args.json"), "is there already")
    fails(lambda: exported(run, out, rank=4), "--rank", "give --lora")
    fails(lambda: exported(run, out, lora=True, rank=0), "--rank must be at least 1")
    fails(lambda: exported(run, out, lora=True, copy=True), "--lora goes without")
    other = shutil.copytree(TINY, tmp_path / "runs" / "wider")
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"ffn_dim": 1}))
    fails(lambda: exported(run, out, teacher=str(other)), "no student of", "wider", "differ")
    fails(lambda: exported(run, out, teacher=str(tmp_path / "gone")), "is gone", "--teacher")
    still = trained(tmp_path / "still", lr=0.0, ema_decay=0.0, weight_decay=0.0)
    fails(lambda: exported(still, out, lora=True), "there is no change")
    shutil.rmtree(tmp_path / "still")
    monkeypatch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    fails(lambda: exported(run, out), "cannot write", "No space left", code=1)
    weights = run / "checkpoints" / "step_0000002" / "student" / "transformer" / FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    fails(lambda: exported(run, out), "is incomplete")
    assert {path.name for path in tmp_path.iterdir()} == before and not list(tmp_path.glob(".*"))


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C while the folder is written: what was written goes, and the handler is what it was before."""
    run, deaf = trained(tmp_path), lambda *_: None
    before = signal.signal(signal.SIGINT, deaf)
    monkeypatch.setattr(shutil, "copytree", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(SystemExit) as stop:
            exported(run, tmp_path / "out")
        assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) == deaf
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_phases_that_are_not_trained_yet(tmp_path, fails):
    run = trained(tmp_path, phased_dmd, steps=4, save_every=1, keep=0)
    fails(lambda: exported(run / "checkpoints" / "step_0000001", tmp_path / "out"), "1 of 2 phases", "finish the run")


def test_a_teacher_that_moved(tmp_path, fails):
    shutil.copytree(TINY, tmp_path / "teacher")
    run = trained(tmp_path, teacher=str(tmp_path / "teacher"))
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    fails(lambda: exported(run, tmp_path / "out"), "is gone", str(tmp_path / "teacher"), "--teacher")
    (tmp_path / "moved" / "README.md").write_text("---\nlicense: mit\ntags:\n- video\n---\nlicense: none\n")
    (tmp_path / "moved" / "transformer" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "moved" / "transformer" / "config.json").read_text()) | {"eps": 1e-6})
    )
    out = exported(run, tmp_path / "out", teacher=str(tmp_path / "moved"))
    assert (out / "vae" / FILE).resolve() == (tmp_path / "moved" / "vae" / FILE).resolve()
