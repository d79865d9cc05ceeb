"""tools/export.py: the card's own lines, run in stock diffusers, give the student's samples; LoRAs give its network."""

import os
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from einops import rearrange
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import common
import dmd
import dmd2
import phased_dmd
from models.images import read_images, to_pil
from models.presets import PRESETS
from tests import small_teachers
from tests.conftest import only_run, same, small_args, state_of, student_weights
from tests.small_teachers import SMALL
from tools import export
from training.finished import load_run, students_of

CPU, TINY = torch.device("cpu"), PRESETS["tiny"].source
FILE = "diffusion_pytorch_model.safetensors"
FLAGS = {"steps": 2, "student_every": 1, "lr": 1e-2, "fake_score_lr": 1e-3, "ema_decay": 0.5}


class TorchsRNG:
    """SampleRNG of torch's own generator, in the order in which a stock pipeline draws. packed: Qwen-Image's renoising
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


def run_card(out, *changes):
    """Run the card's lines beside the export, with these changes made; returns its pipeline and the latents it made."""
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("a prompt", "a red circle").replace(
        "num_inference_steps", 'output_type="latent", num_inference_steps'
    )
    code = code.replace('diffusers.utils.export_to_video(out.frames[0], "student.mp4", ', "dict(")
    code = code.replace("out.images[0].save", "print")
    for old, new in changes:
        assert old in code, code
        code = code.replace(old, new)
    space = {}
    torch.manual_seed(0)
    with chdir(out.parent):
        exec(code, space)
    return space["pipe"], space["out"]


def ours(run, tmp_path, image=None, packed=False):
    """The student's latents of the same draws, sampled by its script."""
    common.init_distributed()
    script, args, checkpoint = load_run(run)
    model = common.Model(args.teacher, *args.size, student=args.student)
    cond = common.encode_text(model, ["a red circle"], tmp_path / "text", CPU).cond_of([0])
    if model.conditions:
        cond |= model.image_encoder(CPU)(image)
    students = students_of(model, CPU, script, args, checkpoint, raw=False)
    torch.manual_seed(0)
    with torch.no_grad():
        return script.sample_student(students, model.latent_shape, args, TorchsRNG(packed), cond)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that trained all weights, at levels that no scheduler's config has, and one of a LoRA."""
    common.init_distributed()
    flags = {"full": {"student_sigmas": (0.999, 0.937, 0.833, 0.624)}, "lora": {"lora_rank": 2, "lora_alpha": 3.0}}
    return {name: trained(tmp_path_factory.mktemp(name), **own) for name, own in flags.items()}


def check_card(run, tmp_path, lora):
    """The card's lines give the student's samples."""
    out = exported(run, tmp_path / "out", lora=lora)
    _, made = run_card(out)
    latents = ours(run, tmp_path)
    assert (made.frames - latents).abs().max() < 1e-4
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-to-video" and ("lora" in card.data.tags) == lora
    assert (run / "revision.txt").read_text().strip() in card.text
    return out, latents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "lora"),
    [
        (dmd, {}, False),
        (phased_dmd, {"phase_ends": (0.9, 0.0), "student_sigmas": (1.0, 0.9, 0.757, 0.522)}, False),
        (dmd2, {"student": "tiny-small", "lora_rank": 2}, True),
    ],
)
def test_cards_of_other_scripts(script, flags, lora, tmp_path):
    check_card(trained(tmp_path, script, **flags), tmp_path, lora)


def test_the_cards_lines_give_the_students_samples(runs, tmp_path):
    """And not with another noise, other levels, a scheduler that does not renoise, or the teacher's weights."""
    out, latents = check_card(runs["full"], tmp_path, lora=False)
    for old, new in (("manual_seed(0)", "manual_seed(1)"), ("0.833", "0.8"), ("stochastic_sampling=True", "")):
        assert (run_card(out, (old, new))[1].frames - latents).abs().max() > 0.01
    shutil.copy(f"{TINY}/transformer/{FILE}", out / "transformer" / FILE)
    assert (run_card(out)[1].frames - latents).abs().max() > 0.01


def test_the_folder_has_the_teachers_parts_as_links_to_files(runs, tmp_path):
    """`hf upload` follows no links to folders."""
    out = exported(runs["full"], tmp_path / "out")
    assert (out / "vae" / FILE).is_symlink() and not (out / "vae").is_symlink()
    assert (out / "vae" / FILE).read_bytes() == Path(TINY, "vae", FILE).read_bytes()
    assert (out / "transformer" / FILE).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (scheduler := FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")).set_timesteps(4)
    assert scheduler.config.stochastic_sampling and scheduler.sigmas[3].item() == pytest.approx(0.624)


def test_comfyuis_file_has_wans_names(runs, tmp_path, fails):
    """Which diffusers' own converter reads back."""
    for name in runs:
        file = exported(runs[name], tmp_path / name, comfyui=True) / f"{name}.safetensors"
        weights = convert_wan_transformer_to_diffusers(load_file(file))
        assert same(weights, student_weights(runs[name].parent, 2, dmd2))
        assert {"blocks.0.self_attn.q.weight", "head.modulation"} <= load_file(file).keys()
    fails(lambda: exported(runs["lora"], tmp_path / "no", lora=True, comfyui=True), "--comfyui")


def test_a_causal_student_is_its_transformer(tmp_path, fails):
    run = trained(tmp_path, frame_block=1)
    out = exported(run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"README.md", "transformer"}
    card = (out / "README.md").read_text()
    assert "in blocks of 1" in card and "0.75" in card and "```" not in card
    fails(lambda: exported(run, tmp_path / "no", lora=True), "--lora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    small_teachers.put_in_torchvision()
    return tmp_path_factory.mktemp("teachers")


FAMILIES = [  # each family, and every way in which LoRAs and phases meet two transformers
    ("wan_i2v", dmd2, 0), ("wan_experts", phased_dmd, 0), ("wan_experts", phased_dmd, 2), ("wan_i2v_experts", dmd2, 2),
    ("wan_5b", phased_dmd, 2), ("wan_5b_i2v", dmd2, 0), ("cosmos", dmd2, 2), ("cosmos_i2v", dmd2, 0),
    ("qwen_image", dmd2, 0),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "script", "lora_rank"), FAMILIES)
def test_every_family(name, script, lora_rank, folders, tmp_path, monkeypatch):
    """Two steps, of two experts one each: the card's lines and the script give the same latents."""
    monkeypatch.chdir(tmp_path)
    *_, frames, height, width = SMALL[name]
    flags = {"steps": 2, "preview_every": 2, "lr": 1e-2, "student_every": 1, "gan_weight": 0.0, "lora_rank": lora_rank}
    args = small_teachers.args_of(script, name, folders, runs_dir=tmp_path / "runs", **flags)
    script.main(args)
    run = only_run(tmp_path / "runs", script)
    assert (run / "previews" / "step_0000002.png").is_file()
    if name == "cosmos_i2v":
        assert "No stock pipeline" in (exported(run, tmp_path / "out") / "README.md").read_text()
        return
    out = exported(run, tmp_path / "out", lora=lora_rank > 0)
    whole = os.path.relpath(args.teacher.removesuffix(":i2v"), tmp_path) if lora_rank else out.name
    checker = f'"{whole}", safety_checker=__import__("tests").small_teachers.NoSafetyChecker()'
    to_pil(torch.rand(3, 1, height, width)).save("first_frame.png")
    pipe, made = run_card(out, *[(f'"{whole}"', checker)] * ("cosmos" in name))
    image, qwen = read_images(["first_frame.png"], height, width) if "i2v" in name else None, "qwen" in name
    latents = ours(run, tmp_path, image, packed=qwen)
    theirs = pipe._unpack_latents(made.images, height, width, 8) if qwen else made.frames
    assert (theirs - latents).abs().max() < (1e-4 if lora_rank else 2e-5) and latents.std() > 0.1


def test_the_lora_is_the_one_that_was_trained(runs, tmp_path):
    run = runs["lora"]
    lora, _ = check_card(run, tmp_path, lora=True)
    merged = WanTransformer3DModel.from_pretrained(exported(run, tmp_path / "whole") / "transformer")
    state = load_file(lora / "pytorch_lora_weights.safetensors")
    kept, key = state_of(run.parent, 2, dmd2), "ema.lora.transformer/blocks/1/ffn/net/2/lora_"
    assert torch.equal(state["diffusion_model.blocks.1.ffn.2.lora_A.weight"], kept[f"{key}A"])  # ComfyUI's names
    torch.testing.assert_close(state["diffusion_model.blocks.1.ffn.2.lora_B.weight"], 1.5 * kept[f"{key}B"])
    pipe = WanPipeline.from_pretrained(TINY)
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 8, 3, 4, 4, generator=g), torch.tensor([900.0]), torch.randn(1, 16, 32, generator=g)
    with torch.no_grad():
        before = pipe.transformer(*inputs).sample
        pipe.load_lora_weights(lora)
        after, wanted = pipe.transformer(*inputs).sample, merged(*inputs).sample
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_mistakes_leave_nothing(runs, tmp_path, fails, monkeypatch):
    run, out = runs["full"], tmp_path / "out"
    fails(lambda: exported(run, run), "is there already")
    fails(lambda: exported(run, out, lora=True), "--lora")
    fails(lambda: exported(run, out, teacher=str(tmp_path / "moved")), "moved")
    monkeypatch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        exported(run, out)
    assert not list(tmp_path.iterdir())
