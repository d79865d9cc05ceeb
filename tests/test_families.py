"""Every family against its stock pipeline, on small random folders that diffusers writes itself: the same noise and
prompts give the same latents, every script trains on it and resumes, its student samples in the stock pipeline.
"""

import dataclasses
import importlib
import itertools
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from PIL import ExifTags, Image
from safetensors.torch import load_file

import codmd
import common
import dfd
import dmd
import dmd2
import eval_vbench
import models.folders
import phased_dmd
from models.classes import FAMILIES
from models.images import find_images, read_images, to_pil
from models.latents import encode
from models.presets import PRESETS, TINY_WORLD
from tests import small_teachers
from tests.conftest import ROOT, on_ranks, only_run, same
from tests.ranks import adam_eps, train_all
from tests.small_teachers import SMALL
from tools import make_shards
from tools.video_in.video import read_clip
from training.files import UserError, read_json, read_prompts
from training.finished import load_run, students_of
from training.flags import with_recipe
from training.media import read_video, write_mp4
from training.samples import samples_key

CPU, EPS = torch.device("cpu"), 1e-6
PROMPTS, NEGATIVE, STEPS, SHIFT = ["a red circle", "a blue square"], "a green triangle", 4, 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    small_teachers.put_in_torchvision()
    return tmp_path_factory.mktemp("teachers")


def stock_pipeline(teacher, steps=STEPS):
    """The stock pipeline of a small teacher for its task, with the scripts' sigmas."""
    folder, is_i2v = teacher.removesuffix(":i2v"), teacher.endswith(":i2v")
    more = {"safety_checker": small_teachers.NoSafetyChecker()} if "cosmos" in folder else {}
    kind = diffusers.WanImageToVideoPipeline if is_i2v and "wan" in folder else diffusers.DiffusionPipeline
    pipe = kind.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if "qwen" not in folder:  # which takes them as an argument
        plain, sigmas = pipe.scheduler.set_timesteps, torch.linspace(1, 0, steps + 1)[:-1].tolist()
        pipe.scheduler.set_timesteps = lambda *args, device=None, **more: plain(sigmas=sigmas, device=device)
    return pipe


def stock_latents(pipe, model, noise, guidance_scale, image=None, steps=STEPS):
    """Latents [b, c, f, h, w] that the stock pipeline makes of the noise."""
    frames, height, width = model.size
    size, image = {"height": height, "width": width}, {} if image is None else {"image": to_pil(image[0])}
    if isinstance(pipe, diffusers.QwenImagePipeline):
        packed = pipe._pack_latents(noise[:, :, 0], *noise.shape[:2], *noise.shape[3:])
        sigmas = torch.linspace(1, 0, steps + 1)[:-1].tolist()
        negative = {"negative_prompt": [NEGATIVE] * 2} if guidance_scale > 1 else {}
        out = pipe(PROMPTS, latents=packed, true_cfg_scale=guidance_scale, sigmas=sigmas, output_type="latent",
                   num_inference_steps=steps, **negative, **size).images  # fmt: skip
        return pipe._unpack_latents(out, height, width, 8)
    is_cosmos = "Cosmos" in type(pipe).__name__
    more = {} if is_cosmos else {"max_sequence_length": model.text_length}
    # its guidance is c + w (c - u)
    w = guidance_scale - 1 if is_cosmos and guidance_scale > 1 else guidance_scale
    return pipe(prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=noise, num_frames=frames, guidance_scale=w,
                num_inference_steps=steps, output_type="latent", **size, **more, **image).frames  # fmt: skip


def conditions(model, cache, image):
    texts = common.encode_text(model, [*PROMPTS, NEGATIVE], cache, CPU)
    own = model.image_encoder(CPU)(image)
    return texts.cond_of([0, 1]) | {k: x.expand(2, *x.shape[1:]) for k, x in own.items()}, texts.cond_of([2])


def small_image(model):
    """A first frame [1, 3, 1, h, w] of 8-bit pixels."""
    pixels = torch.rand(1, 3, 1, *model.size[1:], generator=torch.Generator().manual_seed(3))
    return (255 * pixels).round() / 255


@pytest.mark.parametrize("name", SMALL)
def test_the_teacher_is_the_stock_pipelines(name, folders, tmp_path):
    teacher = small_teachers.write(name, folders)
    model = common.Model(teacher, *SMALL[name][2:])
    network, pipe = model.load_network("teacher", CPU), stock_pipeline(teacher)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    image = small_image(model)
    cond, null_cond = conditions(model, tmp_path, image)
    assert bool(model.conditions) == ("i2v" in name) and {k: x.shape[1:] for k, x in cond.items() if k != "text"} == (
        model.conditions
    )
    for guidance_scale in (1.0,) if name == "qwen_image" else (1.0, 4.0):
        ours = dmd2.solve_ode(network, noise, cond, null_cond, guidance_scale, SHIFT, STEPS)
        theirs = stock_latents(pipe, model, noise, guidance_scale, image if model.conditions else None)
        assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.1
        # and what is conditioned on matters
        flipped = {**cond, "text": cond["text"].flip(0)}
        other = dmd2.solve_ode(network, noise, flipped, null_cond, guidance_scale, SHIFT, STEPS)
        assert (ours - other).abs().max() > 1e-3


def test_qwen_images_guidance_is_the_pipelines_once_rescaled(folders, tmp_path):
    """QwenImagePipeline gives each guided token the length of the conditional one; the scripts do not."""
    teacher = small_teachers.write("qwen_image", folders)
    model = common.Model(teacher, *SMALL["qwen_image"][2:])
    network, pipe = model.load_network("teacher", CPU), stock_pipeline(teacher)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, null_cond = conditions(model, tmp_path, None)
    null_cond = {"text": null_cond["text"].expand_as(cond["text"])}
    tokens = lambda v: rearrange(v, "b c 1 (h p) (w q) -> b h w (c p q)", p=2, q=2)
    x, u = noise, torch.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
    for sigma, sigma_next in pairwise(sigmas):
        with torch.no_grad():
            c, n = network(x, sigma.expand(2), cond), network(x, sigma.expand(2), null_cond)
        v = n + 4 * (c - n)
        scale = tokens(c).norm(dim=-1, keepdim=True) / tokens(v).norm(dim=-1, keepdim=True)
        x = x + (sigma_next - sigma) * rearrange(tokens(v) * scale, "b h w (c p q) -> b c 1 (h p) (w q)", p=2, q=2)
    theirs = stock_latents(pipe, model, noise, 4.0)
    assert (x - theirs).abs().max() < 1e-5
    plain = dmd2.solve_ode(network, noise, cond, {"text": null_cond["text"][:1]}, 4.0, SHIFT, STEPS)
    assert (plain - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in SMALL if name != "wan"])
def test_blocks_are_read_and_known_frames_kept(name, folders, tmp_path):
    model = common.Model(small_teachers.write(name, folders), *SMALL[name][2:])
    network = model.load_network("teacher", CPU)
    cond, _ = conditions(model, tmp_path, small_image(model))
    x_t, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.95, 0.3])  # a sample of each expert
    v, features = network(x_t, sigma, cond, (0, 1))
    tokens = math.prod(model.latent_shape[1:]) // math.prod(model.patch)
    assert [x.shape for x in features] == [(2, tokens, network.width)] * 2
    assert torch.equal(v, network(x_t, sigma, cond)) and v.dtype == torch.float32
    for i in range(2):  # one by one
        own = {key: x[i : i + 1] for key, x in cond.items()}
        alone, read = network(x_t[i : i + 1], sigma[i : i + 1], own, (1,))
        torch.testing.assert_close(v[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[1][i : i + 1], read[0], atol=1e-4, rtol=1e-4)
    if model.conditions:
        encoded = encode(model.load_vae(CPU), small_image(model))
        torch.testing.assert_close(model.family.first_latent(cond)[:1], encoded, atol=1e-5, rtol=1e-5)
    if "first" in cond:
        x0 = dmd2.predict_x0(network, x_t, sigma, cond)
        torch.testing.assert_close(x0[:, :, :1], cond["first"], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ training

SCRIPTS = (dmd, dmd2, dfd, codmd, phased_dmd)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLAGS = {
    "steps": 4, "batch_size": 2, "grad_accum": 1, "student_every": 2, "preview_prompts": 2, "preview_seeds": 2,
    "teacher_steps": 2, "num_samples": 4, "save_every": 2, "preview_every": 4, "guidance_scale": 2.0, "shift": 3.0,
    "student_sigmas": (1.0, 0.8), "gan_weight": 0.01, "discriminator_blocks": (0, 1), "gradient_checkpointing": 1,
    "lr": 1e-3, "fake_score_lr": 1e-3, "ema_decay": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def prompts(folders):
    """Prompts for every family, and their first frames."""
    (folders / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    (folders / "images").mkdir()
    for i in range(1, 4):
        pixels = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(i))
        to_pil(pixels).save(folders / "images" / f"{i:02d}.png")
    return {"prompts": str(folders / "prompts.txt"), "images": str(folders / "images")}


def args_of(script, name, folders, prompts, runs_dir, **more):
    teacher, (*_, frames, height, width) = small_teachers.write(name, folders), SMALL[name]
    flags = FLAGS | {"frames": frames, "height": height, "width": width, "teacher": teacher, "runs_dir": str(runs_dir)}
    flags |= {"pair_steps": 2} | prompts | more
    if "i2v" not in name:
        flags.pop("images")
    if script is dfd:
        flags.setdefault("init", None)
    if script is phased_dmd:
        flags |= {"phase_ends": (0.8, 0.0), "lora_rank": 2 if name != "wan_5b" else 0}
        if "experts" in name:
            flags |= {"score_ends": (0.9, 0.0)}
    known = {field.name for field in dataclasses.fields(script.Args)}
    return with_recipe(script.Args, script.RECIPES, **{key: value for key, value in flags.items() if key in known})


def exported(run, step):
    return {
        path.parent.name: load_file(path)
        for path in sorted((run / "checkpoints" / f"step_{step:07d}" / "student").glob(f"*/{WEIGHTS}"))
    }


@pytest.mark.parametrize("name", [name for name in SMALL if name != "wan"])
def test_every_script_trains_resumes_and_exports(name, folders, prompts, tmp_path):
    """With every family phased_dmd.py is resumed, and in turn one of the others: how they resume is the same text."""
    resumed = (phased_dmd, (dmd, dmd2, dfd, codmd)[list(SMALL).index(name) % 4])
    for script in SCRIPTS:
        place = tmp_path / script.__name__
        script.main(args_of(script, name, folders, prompts, place))
        run = only_run(place, script)
        ends = exported(run, 4)
        assert ends and (run / "previews" / "step_0000004.png").is_file()
        if script not in resumed:
            continue
        # from the middle, in a folder of its own: the same end, to the bit
        before = run / "checkpoints" / "step_0000002"
        script.main(args_of(script, name, folders, prompts, place, resume=str(before), preview_every=0))
        (again,) = set(place.glob(f"{script.__name__}__*")) - {run}
        for part, weights in exported(again, 4).items():
            assert same(weights, ends[part]), f"{script.__name__}, {part}"


def test_two_ranks_train_as_one(folders, prompts, tmp_path):
    """Two processes with batch b, one with 2b: the same weights, up to what Adam makes of sums in another order.

    With every family one script of five, and where there are two experts phased_dmd.py, for the suite's time; they
    agreed to 4.3e-5. With Adam's own eps it was 2.9e-3 for one pair on an older CPU (2.1e-4 on others): its first steps
    are of one size whatever the gradient, so rounding shows where that is next to nothing.
    """
    plain = {"steps": 2, "student_every": 1, "preview_every": 0, "save_every": 2, "gradient_checkpointing": 0}
    others, runs = itertools.cycle((dmd, dmd2, dfd, codmd)), []
    for name in (name for name in SMALL if name != "wan"):
        for script in (next(others), phased_dmd)[: 1 + ("experts" in name)]:
            two = args_of(script, name, folders, prompts, tmp_path / name / "two", batch_size=1, **plain)
            runs.append((script.__name__, two))
            args = args_of(script, name, folders, prompts, tmp_path / name / "one", batch_size=2, **plain)
            with adam_eps(EPS):
                script.main(args)
    on_ranks(2, train_all, runs, EPS, folders={args.runs_dir for _, args in runs})
    for script, args in runs:
        place, start = Path(args.runs_dir).parent, common.teacher_folder(args.teacher)
        one, other = (exported(next((place / world).glob(f"{script}__*")), 2) for world in ("one", "two"))
        for part, weights in one.items():
            own = part if (start / part).is_dir() else "transformer"  # phases begin with the teacher's one network
            begun, far, apart = load_file(start / own / WEIGHTS), 0, 0
            for key, weight in weights.items():
                far += (weight - begun[key]).square().sum().item()
                apart += (weight - other[part][key]).square().sum().item()
            print(f"{place}, {part}: {far**0.5:.3g}, {(apart / far) ** 0.5 if far else apart:.3g}")
            assert apart**0.5 <= 2e-4 * far**0.5, f"{place}, {part}"


@pytest.mark.parametrize("name", [name for name in SMALL if name != "wan"])
def test_students_sample_in_the_stock_pipeline(name, folders, prompts, tmp_path):
    """One Euler step of the stock pipeline from sigma 1 is the one-step student."""
    args = args_of(dmd2, name, folders, prompts, tmp_path, student_sigmas=(1.0,), preview_every=0)
    dmd2.main(args)
    common.init_distributed()
    script, run_args, checkpoint = load_run(only_run(tmp_path, dmd2))
    model = common.Model(args.teacher, args.frames, args.height, args.width)
    students = students_of(model, CPU, script, run_args, checkpoint, raw=False)
    image = small_image(model)
    cond, _ = conditions(model, tmp_path, image)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = dmd2.predict_x0(students[0], noise, torch.ones(2), cond)
    pipe = stock_pipeline(args.teacher, steps=1)
    for part in model.family.parts:
        folder = checkpoint / "student" / part
        setattr(pipe, part, model.family.transformer_class.from_pretrained(folder))
    theirs = stock_latents(pipe, model, noise, 1.0, image if model.conditions else None, steps=1)
    assert (ours - theirs).abs().max() < 1e-5
    teacher = model.load_network("teacher", CPU)
    with torch.no_grad():
        assert (ours - dmd2.predict_x0(teacher, noise, torch.ones(2), cond)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["wan_i2v", "qwen_image"])
def test_evaluation_of_images(name, folders, prompts, tmp_path, fails):
    """A teacher of images has PNGs and no figures of motion; image-to-video wants an image per prompt."""
    out = tmp_path / "out"
    args = args_of(dmd2, name, folders, prompts, tmp_path / "runs", student_sigmas=(1.0,), steps=1, preview_every=0)
    args = dataclasses.replace(args, discriminator_blocks=(), gan_weight=0.0, save_every=1)
    dmd2.main(args)
    run, list_of = str(only_run(tmp_path / "runs", dmd2)), {"prompts": prompts["prompts"], "samples": 2}
    flags = {"command": "all", "checkpoint": run, "cache": str(tmp_path / "cache"), **list_of}
    if name == "wan_i2v":
        fails(lambda: eval_vbench.main(eval_vbench.Args(out=out, **flags)), "begins with", "--images")
        flags["images"] = prompts["images"]
    else:
        wrong = {**flags, "images": prompts["images"]}
        fails(lambda: eval_vbench.main(eval_vbench.Args(out=out, **wrong)), "takes no images")
    eval_vbench.main(eval_vbench.Args(out=out, **flags))
    files = sorted(path.name for path in (out / "videos").iterdir())
    assert len(files) == 6 and {Path(file).suffix for file in files} == {".png" if name == "qwen_image" else ".mp4"}
    figures = json.dumps(read_json(out / "results.json"))
    assert "saturation" in figures and "diversity" in figures
    assert ("optical_flow" in figures) == (name != "qwen_image")
    prompt = read_prompts(prompts["prompts"])[2]
    common.init_distributed()
    model = common.Model(args.teacher, args.frames, args.height, args.width)
    images = find_images(prompts["images"], 3, *model.size[1:]) if name == "wan_i2v" else ()
    cond = common.encode_text(model, read_prompts(prompts["prompts"]), tmp_path / "own", CPU, images).cond_of
    student = students_of(model, CPU, *load_run(run), raw=False)[0]
    noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(200_001))[None]
    with torch.no_grad():
        x0 = dmd2.predict_x0(student, noise, torch.ones(1), cond([2]))
    video = common.decode(model.load_vae(CPU), x0)[0].clamp(0, 1)
    off = (video - read_video(next((out / "videos").glob(f"{prompt}-1.*")))).abs()
    assert off.max() < 0.51 / 255 if name == "qwen_image" else off.mean() < 0.03  # H.264 is between them


# ------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in TINY_WORLD])
def test_named_teachers_are_downloaded_as_asked_for(name, folders, prompts, tmp_path, monkeypatch):
    """A stand-in for the Hub's client that gives exactly the requested patterns of that revision."""
    file, cls = FAMILIES[PRESETS[name].kind]
    small = next(n for n in SMALL if n == {"WanI2VExperts": "wan_i2v_experts", "Wan5BI2V": "wan_5b_i2v",
                                           "CosmosI2V": "cosmos_i2v"}.get(cls, file))  # fmt: skip
    folder = Path(small_teachers.write(small, folders).removesuffix(":i2v"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # which an export's card takes over

    def snapshot_download(repository, revision, allow_patterns):
        assert f"{repository}{f'@{revision}' if revision else ''}" == PRESETS[name].source
        for path in folder.rglob("*"):
            part = path.relative_to(folder)
            if path.is_file() and any(part.match(pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "hub" / part)
        return str(tmp_path / "hub")

    monkeypatch.setattr(models.folders, "snapshot_download", snapshot_download)
    args = args_of(dmd, small, folders, prompts, tmp_path / "runs", teacher=name, steps=1, preview_every=0)
    dmd.main(args)
    assert (tmp_path / "hub" / "README.md").is_file() and not (tmp_path / "hub" / "scheduler").exists()
    own = with_recipe(dmd.Args, dmd.RECIPES, teacher=name)
    assert (own.frames, own.height, own.width) == PRESETS[name].size
    with torch.device("meta"):  # its config is one of that class
        config = importlib.import_module(f"models.{file}")
        transformer = getattr(config, cls).transformer_class.from_config(PRESETS[name].config)
    assert PRESETS[name].config.items() <= transformer.config.items()


def changed(folder, tmp_path, **changes):
    """A copy of a folder with another model_index.json."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | changes))
    return copy


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("wan", {"_class_name": "HunyuanVideoPipeline"}, ["holds a HunyuanVideoPipeline", "known are", "models/"]),
        (
            "wan",
            {"transformer": ["diffusers", "WanVACETransformer3DModel"]},
            ["WanVACETransformer3DModel in tran"],
        ),
        (
            "qwen_image",
            {"transformer": ["diffusers", "QwenImage21Transformer2DModel"]},
            ["QwenImage21", "QwenImage reads"],
        ),
        ("qwen_image", {"_class_name": "QwenImageEditPipeline"}, ["holds a QwenImageEditPipeline"]),
        ("wan_i2v", {"image_encoder": ["transformers", "CLIPVisionModel"], "gone": "image_encoder"}, ["image_encoder"]),
    ],
)
def test_folders_of_no_family_are_one_line(name, changes, words, folders, prompts, tmp_path, fails):
    folder = changed(small_teachers.write(name, folders), tmp_path, **changes)
    if "gone" in changes:
        shutil.rmtree(folder / changes["gone"])
    args = args_of(dmd, name, folders, prompts, tmp_path / "runs", teacher=str(folder))
    fails(lambda: dmd.main(args), *words)
    assert not list((tmp_path / "runs").glob("dmd__*"))


def test_a_first_and_last_frame_teacher_is_one_line(folders, prompts, tmp_path, fails):
    folder = changed(small_teachers.write("wan_i2v", folders), tmp_path)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"pos_embed_seq_len": 514}))
    args = args_of(dmd, "wan_i2v", folders, prompts, tmp_path / "runs", teacher=str(folder))
    fails(lambda: dmd.main(args), "a first and a last frame")


# -------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("wan_5b_i2v", {"images": None}, ["begins with an image", "--images", "--data"]),
        ("wan_5b_i2v", {"images": None, "prompts": None}, ["begins with an image"]),
        ("wan_5b_i2v", {"images": "nowhere"}, ["--images: no such file or folder nowhere"]),
        ("wan_5b_i2v", {"prompts": str(ROOT / "prompts/prompts.txt")}, ["no image of prompt 4"]),
        ("wan_5b", {"images": str(ROOT / "prompts")}, ["--images goes with"]),
        ("qwen_image", {"frames": 9}, ["--frames must be 1"]),
        ("wan", {"teacher": "wan:i2v"}, ["which has one task: leave out :i2v"]),
    ],
)
def test_images_that_cannot_be(name, flags, words, folders, prompts, tmp_path, fails):
    args = args_of(dmd2, name, folders, prompts, tmp_path)
    if "teacher" in flags:
        flags = {"teacher": f"{args.teacher}:i2v"}
    fails(lambda: dmd2.main(dataclasses.replace(args, **flags)), *words)


def test_a_turned_photo_is_turned_back(tmp_path, capsys):
    """Phones write what way is up beside pixels that lie on their side: such an image has its upright aspect."""
    pixels = torch.rand(3, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
    to_pil(pixels).save(tmp_path / "1.png", exif=exif)
    (path,) = find_images(tmp_path, 1, 40, 24)
    assert capsys.readouterr().out == ""
    upright = torch.rot90(pixels, -1, (2, 3))
    assert (read_images([path], 40, 24)[0] - upright).abs().max() < 1 / 255
    find_images(tmp_path, 1, 24, 40)
    assert "cropped in the middle" in capsys.readouterr().out


def test_pixels_of_other_kinds_of_images(tmp_path, fails):
    """16 bits would be cut off at 255, so they are refused; what is transparent is white, an opaque alpha nothing."""
    deep, clear, opaque = (tmp_path / f"{i}.png" for i in (1, 2, 3))
    Image.new("I;16", (32, 32), 40000).save(deep)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(clear)
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save(opaque)
    fails(lambda: read_images([deep], 32, 32), str(deep), "more than 8 bits")
    with pytest.raises(UserError) as stop:
        read_images([deep], 32, 32)
    assert stop.value.alone, "of the ranks only that whose share it is reads it"
    assert read_images([clear], 32, 32).min() == 1
    assert read_images([opaque], 32, 32)[0, :, 0, 16, 16].tolist() == [1, 0, 0]


def test_samples_of_the_teacher_are_those_of_their_first_frames_and_task(folders, prompts, tmp_path):
    """What is cached for some images is not found for others, nor by the text-to-video of the same weights."""
    keys = []
    for name, colour in (("wan_5b_i2v", 0), ("wan_5b_i2v", 1), ("wan_5b", None)):
        args = args_of(dmd2, name, folders, prompts, tmp_path)
        if colour is not None:
            args = dataclasses.replace(args, images=str(tmp_path / f"images_{colour}"))
            Path(args.images).mkdir()
            for line in range(1, len(read_prompts(args.prompts)) + 1):
                to_pil(torch.full((3, 1, args.height, args.width), float(colour))).save(f"{args.images}/{line}.png")
        common.init_distributed()
        model = common.Model(args.teacher, args.frames, args.height, args.width)
        (model.folder / "transformer" / ".ipynb_checkpoints").mkdir(exist_ok=True)
        for _ in range(2):
            data = common.load_data(model, args.prompts, None, tmp_path / "cache", CPU, 0, args.images)
            keys.append(samples_key(data, 4, 2, (2.0, 3.0, 2)))
    assert keys[0::2] == keys[1::2] and len(set(keys)) == 3


def test_images_are_cropped_in_the_middle_and_said_so(folders, prompts, tmp_path, fails, capsys):
    """A wide image whose middle is red; one that is no image; two of one line."""
    wide = torch.zeros(3, 1, 64, 192)
    wide[0, :, :, 64:128] = 1
    for i in range(1, 4):
        to_pil(wide).save(tmp_path / f"{i}.png")
    paths = find_images(tmp_path, 3, 64, 64)
    assert "3 of 3 images have another aspect" in capsys.readouterr().out
    video = read_images(paths, 64, 64)
    assert video.shape == (3, 3, 1, 64, 64) and torch.equal(video[0], wide[:, :, :, 64:128])
    (tmp_path / "2.png").write_bytes(b"no image")
    fails(lambda: find_images(tmp_path, 3, 64, 64), "cannot read the image", "2.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "01.png")
    fails(lambda: find_images(tmp_path, 3, 64, 64), "are both of line 1")


def test_shards_hold_what_the_family_needs(folders, tmp_path, fails, monkeypatch):
    """make_shards.py writes it, and a run on the shards has the conditions of the clips' first frames."""
    (tmp_path / "clips").mkdir()
    for i in range(3):
        video = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(i))
        write_mp4(tmp_path / "clips" / f"{i}.mp4", video, 16)
        (tmp_path / "clips" / f"{i}.txt").write_text(PROMPTS[i % 2])
    for name in ("wan_i2v", "cosmos_i2v"):
        teacher, out = small_teachers.write(name, folders), tmp_path / name
        flags = dict(frames=9, height=32, width=32, teacher=teacher)
        make_shards.main(make_shards.Args(clips=tmp_path / "clips", out=out, **flags))
        common.init_distributed()
        model = common.Model(teacher, 9, 32, 32)
        shards = common.Shards(out, model, CPU, keys=("latents",))
        cond, read = shards.cond_of([0, 1, 2]), model.image_encoder(CPU)
        files = sorted(shards.prompts)
        assert len(files) == 3
        for i in range(3):
            clip = read_clip(tmp_path / "clips" / f"{i}.mp4", 9, 32, 32, model.fps)[None]
            expected = read(clip[:, :, :1])
            latents = common.encode(model.load_vae(CPU), clip)[0]
            row = next(row for row in range(3) if torch.allclose(shards.latents_of([row])[0], latents))
            for key, value in expected.items():
                torch.testing.assert_close(cond[key][row], value[0])
        args = with_recipe(dmd2.Args, dmd2.RECIPES, data=str(out), runs_dir=str(tmp_path / "runs" / name),
                           **{**FLAGS, "steps": 2, "preview_every": 2}, **flags)  # fmt: skip
        dmd2.main(args)
        common.init_distributed()
    # shards of a text-to-video teacher are not enough
    make_shards.main(
        make_shards.Args(clips=tmp_path / "clips", out=tmp_path / "t2v", frames=9, height=32, width=32,
                         teacher=small_teachers.write("cosmos", folders))
    )  # fmt: skip
    common.init_distributed()
    model = common.Model(small_teachers.write("cosmos_i2v", folders), 9, 32, 32)
    fails(lambda: common.Shards(tmp_path / "t2v", model, CPU, keys=("latents",)), "0.first is missing")
