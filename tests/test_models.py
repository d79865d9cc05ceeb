"""Every family against its stock pipeline, on small random folders that diffusers writes itself: the same noise and
prompts give the same latents, every script trains on it and resumes, its student samples in the stock pipeline. The
pipeline's scheduler is replaced by Euler steps at our noise levels: it is the network's inputs that are compared.
"""

import dataclasses
import inspect
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

import common
import dmd2
import models.folders
from models.folders import family_of, teacher_folder
from models.images import find_images, read_images, to_pil
from models.latents import encode
from models.presets import PRESETS, TINY_WORLD, name_of
from tests import small_teachers
from tests.conftest import checkpoint_of, same, small_args, state_of
from tests.small_teachers import SMALL, args_of
from tools import make_shards
from tools.video_in import read_clip
from training.checkpoints import load_init
from training.media import write_mp4
from training.samples import samples_key

CPU = torch.device("cpu")
PROMPTS, NEGATIVE, STEPS, SHIFT = ["a red circle", "a blue square"], "a green triangle", 4, 3.0
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where small teachers are written."""
    small_teachers.put_in_torchvision()
    return tmp_path_factory.mktemp("teachers")


def model_of(name, folders):
    common.init_distributed()
    return common.Model(small_teachers.write(name, folders), *SMALL[name][2:])


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


def stock_latents(pipe, model, noise, guidance_scale, image, steps=STEPS):
    """Latents [b, c, f, h, w] that the stock pipeline makes of the noise."""
    frames, height, width = model.size
    own = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
    if isinstance(pipe, diffusers.QwenImagePipeline):  # without guidance: it would rescale the prediction, we do not
        packed = pipe._pack_latents(noise[:, :, 0], *noise.shape[:2], *noise.shape[3:])
        sigmas = torch.linspace(1, 0, steps + 1)[:-1].tolist()
        out = pipe(PROMPTS, latents=packed, true_cfg_scale=1.0, sigmas=sigmas, **own).images
        return pipe._unpack_latents(out, height, width, 8)
    own |= {"image": to_pil(image[0])} if model.conditions else {}
    if "Cosmos" not in type(pipe).__name__:
        own |= {"max_sequence_length": model.text_length}
    elif guidance_scale > 1:
        guidance_scale -= 1  # its guidance is c + w (c - u)
    negative = [NEGATIVE] * 2
    return pipe(prompt=PROMPTS, negative_prompt=negative, latents=noise, num_frames=frames,
                guidance_scale=guidance_scale, **own).frames  # fmt: skip


def inputs(model, cache):
    """Noise, conditions, the negative prompt's, and a first frame [1, 3, 1, h, w] of 8-bit pixels."""
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, 1, *model.size[1:], generator=torch.Generator().manual_seed(3))
    image = (255 * image).round() / 255
    texts = common.encode_text(model, [*PROMPTS, NEGATIVE], cache, CPU)
    own = {key: x.expand(2, *x.shape[1:]) for key, x in model.image_encoder(CPU)(image).items()}
    return noise, texts.cond_of([0, 1]) | own, texts.cond_of([2]), image


def solve_ode(network, noise, cond, null_cond, guidance_scale):
    """The scripts' own sampler of the teacher, from this noise."""
    args = SimpleNamespace(guidance_scale=guidance_scale, shift=SHIFT, teacher_steps=STEPS)
    rng = SimpleNamespace(normal=lambda shape: noise)
    return dmd2.sample_teacher(network, null_cond, noise.shape[1:], args, rng, cond)


@pytest.mark.parametrize("name", SMALL)
def test_the_teacher_is_the_stock_pipelines(name, folders, tmp_path):
    model = model_of(name, folders)
    network, pipe = model.load_network("teacher", CPU), stock_pipeline(model.name)
    noise, cond, null_cond, image = inputs(model, tmp_path)
    assert bool(model.conditions) == ("i2v" in name)
    assert {key: x.shape[1:] for key, x in cond.items() if key != "text"} == model.conditions
    for guidance_scale in (1.0,) if name == "qwen_image" else (1.0, 4.0):
        ours = solve_ode(network, noise, cond, null_cond, guidance_scale)
        theirs = stock_latents(pipe, model, noise, guidance_scale, image)
        assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.1
    for key, x in cond.items():
        changed = {**cond, key: x.flip(0 if key == "text" else -1)}
        other = solve_ode(network, noise, changed, null_cond, guidance_scale)
        assert (ours - other).abs().max() > 1e-3, f"{key} matters"

    # features; and each sample of a batch is as it is alone, of two experts each by its own
    sigma, tokens = torch.tensor([0.95, 0.3]), math.prod(model.latent_shape[1:]) // math.prod(model.patch)
    v, features = network(noise, sigma, cond, (0, 1))
    assert [x.shape for x in features] == [(2, tokens, network.width)] * 2 and v.dtype == torch.float32
    for i in range(2):
        own = {key: x[i : i + 1] for key, x in cond.items()}
        alone, (feature,) = network(noise[i : i + 1], sigma[i : i + 1], own, (1,))
        torch.testing.assert_close(v[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[1][i : i + 1], feature, atol=1e-4, rtol=1e-4)
    linear = [name for name, part in network.blocks[0].named_modules() if isinstance(part, torch.nn.Linear)]
    for name in linear:  # what has no LoRA: modulation, and projections of the image's features
        own = name.endswith(tuple(model.family.lora_layers))
        assert own != ("norm" in name or "_mod" in name or "add_" in name and "wan" in model.name), name
    if "first" in cond:
        first = encode(model.load_vae(CPU), image).expand(2, -1, -1, -1, -1)
        x0 = dmd2.predict_x0(network, noise, sigma, cond)
        torch.testing.assert_close(x0[:, :, :1], first, atol=1e-5, rtol=1e-5)


PIPELINES = {
    "wan": (pipeline_wan, diffusers.WanPipeline),
    "i2v": (pipeline_wan_i2v, diffusers.WanImageToVideoPipeline),
    "cosmos": (pipeline_cosmos2_5_predict, diffusers.Cosmos2_5_PredictBasePipeline),
}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in TINY_WORLD])
def test_sizes_frame_rates_and_negative_prompts_are_the_pipelines(name):
    """Its defaults and its example's; where it has none, those of the authors' code."""
    family, size = family_of(PRESETS[name].family), PRESETS[name].size
    module, pipeline = PIPELINES["cosmos" if "cosmos" in name else "i2v" if "i2v" in name else "wan"]
    if "5b" in name:  # wan/configs/wan_ti2v_5B.py of Wan 2.2
        assert (size, family.fps) == ((121, 704, 1280), 24)
    elif "qwen" in name:  # the pipeline's default_sample_size * vae_scale_factor; Qwen-Image's README
        assert (size, family.fps, family.negative_prompt) == ((1, 128 * 8, 128 * 8), 1, " ")
        return
    else:
        defaults = inspect.signature(pipeline.__call__).parameters
        assert size == tuple(defaults[key].default for key in ("num_frames", "height", "width"))
        assert f"fps={family.fps}" in module.EXAMPLE_DOC_STRING
    if "cosmos" not in name:  # whose default it is by name
        assert f'"{family.negative_prompt}"' in module.EXAMPLE_DOC_STRING


# ------------------------------------------------------------------------------------------------------ training


def test_both_experts_are_saved_and_a_run_starts_from_both(folders, tmp_path):
    """That the stock pipeline samples with them: test_export.py."""
    dmd2.main(args_of(dmd2, "wan_i2v_experts", folders, runs_dir=tmp_path, steps=1, gan_weight=0.0))
    state, student = state_of(tmp_path, 1, dmd2), checkpoint_of(tmp_path, 1, dmd2) / "student"
    network = model_of("wan_i2v_experts", folders).load_network("student", CPU)
    for parameter in network.parameters():
        parameter.data.zero_()
    load_init(student, {"student": network}, {})
    for part in network.parts:
        weights = load_file(student / part / WEIGHTS)
        assert same(weights, network.get_submodule(part).state_dict())
        assert all(torch.equal(x, state[f"ema.{part}.{key}"]) for key, x in weights.items())


# ------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in TINY_WORLD])
def test_named_teachers_are_downloaded_as_asked_for(name, folders, tmp_path, monkeypatch):
    """A stand-in for the Hub's client that gives exactly the requested patterns of that revision."""
    preset = PRESETS[name]
    small = next(
        n for n, (build, suffix, *_) in SMALL.items() if n.replace("_", "") == preset.family.partition(".")[2].lower()
    )
    folder = Path(small_teachers.write(small, folders).removesuffix(":i2v"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # which an export's card takes over

    def snapshot_download(repository, revision, allow_patterns):
        assert f"{repository}{f'@{revision}' if revision else ''}" == preset.source
        for path in folder.rglob("*"):
            part = path.relative_to(folder)
            if path.is_file() and any(part.match(pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "hub" / part)
        return str(tmp_path / "hub")

    monkeypatch.setattr(models.folders, "snapshot_download", snapshot_download)
    model = common.Model(name, *SMALL[small][2:])
    model.load_network("teacher", CPU)
    assert (model.folder / "README.md").is_file() and not (model.folder / "scheduler").exists()
    cls = family_of(preset.family).transformer_class
    with torch.device("meta"):
        config = cls.from_config(preset.config).config
    assert preset.config.items() <= config.items()
    # a folder of that family and config has its name
    (tmp_path / "hub/transformer/config.json").write_text(json.dumps(preset.config))
    assert name_of(f"{tmp_path}/hub{SMALL[small][1]}") == name


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("wan", {"_class_name": "HunyuanVideoPipeline"}, "HunyuanVideoPipeline"),
        ("wan", {"transformer": ["diffusers", "WanVACETransformer3DModel"]}, "WanVACETransformer3DModel"),
        ("wan_i2v", {"vae": ["diffusers", "AutoencoderKL"]}, "AutoencoderKL"),
        ("wan", {":i2v": 1}, "one task"),
        ("wan_i2v", {"gone": "image_encoder"}, "image_encoder"),
    ],
)
def test_folders_of_no_family_are_one_line(name, changes, word, folders, tmp_path, fails):
    folder = shutil.copytree(small_teachers.write(name, folders), tmp_path / "changed")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    if "gone" in changes:
        shutil.rmtree(folder / changes["gone"])
    fails(lambda: teacher_folder(f"{folder}{':i2v' * (':i2v' in changes)}"), str(folder), word)


def half(folder, part):
    (path := folder / part / WEIGHTS).rename(path.with_suffix(".fp16.safetensors"))


def quantised(folder, part):
    path = folder / part / WEIGHTS
    save_file({key: x.to(torch.float8_e4m3fn) for key, x in load_file(path).items()}, path)


def no_mean(folder, part):
    (path := folder / part / "config.json").write_text(path.read_text().replace("latents_mean", "mean"))


@pytest.mark.parametrize(("change", "part"), [(half, "transformer"), (quantised, "text_encoder"), (no_mean, "vae")])
def test_weights_that_would_be_read_as_others_are_one_line(change, part, folders, tmp_path, fails):
    folder = shutil.copytree(small_teachers.write("wan", folders), tmp_path / "changed")
    if part == "text_encoder":
        (folder / part / "model.safetensors").rename(folder / part / WEIGHTS)
    change(folder, part)
    fails(lambda: teacher_folder(str(folder)), f"{folder}/{part}")


# -------------------------------------------------------------------------------------------------------- images


def test_image_to_video_needs_images_and_only_it(folders, tmp_path, fails):
    for name, images, word in (
        ("wan_5b_i2v", None, "begins with an image"),
        ("wan_5b", str(folders / "images"), "--images"),
    ):
        args = dataclasses.replace(args_of(dmd2, name, folders, runs_dir=str(tmp_path)), images=images)
        fails(lambda args=args: dmd2.main(args), word)
    tiny = common.Model("tiny-i2v", 9, 32, 32)
    fails(lambda: common.load_data(tiny, None, None, tmp_path, CPU, 0, images=tmp_path), "--prompts")


def test_images_are_read_as_they_are_seen(tmp_path, fails):
    """Upright and cropped in the middle; 16 bits would be cut off at 255."""
    exif, pixels = Image.Exif(), torch.rand(3, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    exif[ExifTags.Base.Orientation] = 6  # lies on its side, to be turned by a quarter, clockwise
    to_pil(pixels).save(tmp_path / "1.png", exif=exif)
    wide = torch.zeros(3, 1, 24, 120)
    wide[0, :, :, 40:80] = 1  # red in its middle
    to_pil(wide).save(tmp_path / "02.png")
    Image.new("I;16", (32, 32), 40000).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    model = SimpleNamespace(name="i2v", conditions=True)
    first, second, *others = find_images(model, tmp_path, 4)
    assert (read_images([first], 40, 24)[0] - torch.rot90(pixels, -1, (2, 3))).abs().max() < 1 / 255
    assert torch.equal(read_images([second], 24, 40)[0], wide[:, :, :, 40:80])
    to_pil(torch.rand(3, 1, 256, 256)).save(tmp_path / "noise.png")
    assert read_images([tmp_path / "noise.png"], 64, 64).std() < 0.15, "pixels are averaged, not picked: those have .29"
    assert find_images(model, str(first), 2) == [first] * 2  # a file is for all
    for path in others:
        fails(lambda path=path: read_images([path], 32, 32), str(path))
    fails(lambda: find_images(model, tmp_path, 5), "5")
    shutil.copy(first, tmp_path / "01.png")
    fails(lambda: find_images(model, tmp_path, 1), "1")


def test_samples_of_the_teacher_are_those_of_their_first_frames_and_task(folders, tmp_path):
    """What is cached for some images is not found for others, nor by the text-to-video of the same weights. Images are
    read 16 at a time, and each goes with its own prompt.
    """
    keys, prompts = [], tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a red circle"] * 17))
    for name, colour in (("wan_5b_i2v", 0.0), ("wan_5b_i2v", 1.0), ("wan_5b", None)):
        model, images = model_of(name, folders), None
        if colour is not None:
            images = tmp_path / f"images_{colour}"
            images.mkdir()
            for line in range(1, 18):
                to_pil(torch.full((3, 1, 64, 64), colour / line)).save(images / f"{line}.png")
        for _ in range(2):
            data = common.load_data(model, prompts, None, tmp_path / "cache", CPU, 0, images)
            keys.append(samples_key(data, small_args(dmd2)))
        if colour:
            first, last = (data.cond_of([row])["first"] for row in (0, 16))
            assert not torch.equal(first, last)
    assert keys[0::2] == keys[1::2] and len(set(keys)) == 3


def test_shards_hold_what_the_family_needs(folders, tmp_path, fails):
    """make_shards.py writes it, and a run on the shards has the conditions of the clips' first frames."""
    (tmp_path / "clips").mkdir()
    for i in range(3):
        clip = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(i))
        write_mp4(tmp_path / "clips" / f"{i}.mp4", clip, 16)
        (tmp_path / "clips" / f"{i}.txt").write_text(PROMPTS[i % 2])
    for name in ("wan_i2v", "cosmos"):
        flags = {"frames": 9, "height": 32, "width": 32, "teacher": small_teachers.write(name, folders)}
        make_shards.main(make_shards.Args(clips=tmp_path / "clips", out=tmp_path / name, **flags))
    model = model_of("wan_i2v", folders)
    shards, vae = common.Shards(tmp_path / "wan_i2v", model, CPU, keys=("latents",)), model.load_vae(CPU)
    cond, latents, read = shards.cond_of([0, 1, 2]), shards.latents_of([0, 1, 2]), model.image_encoder(CPU)
    for i in range(3):
        clip = read_clip(tmp_path / "clips" / f"{i}.mp4", 9, 32, 32, model.fps)[None]
        row = next(row for row in range(3) if torch.allclose(latents[row], encode(vae, clip)[0]))
        for key, value in read(clip[:, :, :1]).items():
            torch.testing.assert_close(cond[key][row], value[0])
    # shards of a text-to-video teacher are not enough
    own = model_of("cosmos_i2v", folders)
    fails(lambda: common.Shards(tmp_path / "cosmos", own, CPU, keys=("latents",)), "0.first is missing")
