"""The laptop world: clips are what their factors say, read_factors is right and honest, the shipped teacher works."""

import math
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline, WanPipeline
from einops import rearrange
from safetensors.torch import load_file

import common
from models.images import to_pil
from models.presets import PRESETS
from tiny import measures, train, world
from tiny.training import teacher, vae
from tiny.training.optim import orthogonalise

TEACHER = Path(world.__file__).parent / "teacher"
COUNT = 384
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def clips():
    videos, captions = world.batch(0, range(COUNT))
    rows = [world.draw_factors(0, i) for i in range(COUNT)]
    return videos, captions, {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_clips_depend_on_seed_and_index_only():
    video, caption, factors = world.clip(3, 10**12)
    again, _ = world.batch(3, [5, 10**12])
    assert torch.equal(video, again[1])
    assert caption in world.CAPTIONS and factors == world.draw_factors(3, 10**12)
    assert video.shape == (3, world.FRAMES, world.SIZE, world.SIZE) and video.dtype == torch.float32
    assert not torch.equal(video, world.clip(4, 10**12)[0])


def test_a_caption_fixes_what_it_names_and_nothing_else():
    free = world.draw_factors(0, 1)
    assert len(world.CAPTIONS) == 1 + 3 + 4 + 12 + 48 and set(world.EXAMPLES) | set(world.LEVELS) <= set(world.CAPTIONS)
    for i, (caption, named) in enumerate(world.NAMED.items()):
        video, said, factors = world.clip(0, 1, caption)
        assert said == caption == world.caption_of(named) and factors["caption"] == i
        assert factors == free | named | {"caption": i, "x": factors["x"], "y": factors["y"]}
        read = measures.read_factors(video[None])
        assert read["clean"] and all(read[name] == factors[name] for name in world.MODES)
    with pytest.raises(ValueError, match="unknown caption"):
        world.clip(0, 0, "a purple circle")


def test_clips_say_what_they_show_at_every_level_of_detail(clips):
    _, captions, factors = clips
    for level, names in world.LEVELS.items():
        of_level = [i for i, caption in enumerate(captions) if tuple(world.NAMED[caption]) == names]
        assert abs(len(of_level) / COUNT - 1 / 5) < 3 * math.sqrt(0.16 / COUNT), level
        for i in of_level:
            assert captions[i] == world.caption_of({name: factors[name][i].item() for name in names})


def test_shape_stays_inside(clips):
    videos, _, factors = clips
    assert videos.min() >= 0 and videos.max() <= 1
    # what the frame cut off would be missing from the shape's area
    area = (videos.amax(1) - videos.amin(1)).sum((-2, -1)) / (factors["brightness"] * factors["saturation"])[:, None]
    expected = math.pi * factors["size"][:, None] ** 2
    assert (area / expected - 1).abs().max() < 0.03


def test_factors_are_uniform_and_modes_even(clips):
    _, _, factors = clips
    for name, (low, high) in world.RANGES.items():
        assert factors[name].min() >= low and factors[name].max() <= high
        assert abs(factors[name].mean() - (low + high) / 2) < 0.05 * (high - low)
    for name, values in world.MODES.items():
        share = torch.bincount(factors[name], minlength=len(values)) / COUNT
        assert (share * len(values) - 1).abs().max() < 0.25, name


def test_the_background_ramps_around_its_mean(clips):
    videos, _, factors = clips
    corners = videos[:, :, :, [0, 0, -1, -1], [0, -1, 0, -1]].amin((1, 3))  # [b, f]; shapes seldom reach all four
    ramp = corners[:, -1] - corners[:, 0]
    assert ((ramp - factors["ramp"]).abs() < 1e-5).float().mean() > 0.9
    assert ((corners.mean(1) - factors["background"]).abs() < 1e-5).float().mean() > 0.9


def test_read_factors_recovers_what_was_rendered(clips):
    videos, captions, factors = clips
    read = measures.read_factors(videos)
    assert read["clean"].all()
    assert all(torch.equal(read[name], factors[name]) for name in world.MODES)
    tolerances = {"x": 0.2, "y": 0.2, "speed": 0.02, "size": 0.1, "brightness": 5e-3, "saturation": 5e-3}
    for name, tolerance in (tolerances | {"background": 1e-3, "ramp": 2e-3}).items():
        assert (read[name] - factors[name]).abs().max() < tolerance, name
    assert read["coherence"].max() < 0.08
    table = measures.summary(videos, captions)
    assert table["clean"] == table["right"] == 100


def blur(videos, weights):
    """Blur every frame along both axes by the same odd row of weights."""
    row = torch.tensor(weights, dtype=torch.float32)
    kernel, margin = (row[:, None] * row / row.sum() ** 2)[None, None], len(weights) // 2
    flat = F.pad(rearrange(videos, "b c f h w -> (b c f) 1 h w"), (margin,) * 4, mode="replicate")
    return rearrange(F.conv2d(flat, kernel), "(b c f) 1 h w -> b c f h w", c=3, f=world.FRAMES)


def test_read_factors_bears_a_codecs_errors(clips):
    videos, _, factors = clips
    blurred = blur(videos, [1, 2, 1])
    blurred = blurred + 0.003 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    read = measures.read_factors(blurred.clamp(0, 1))
    right = read["clean"] & (read["color"] == factors["color"]) & (read["kind"] == factors["kind"])
    assert right.float().mean() > 0.95
    assert (read["size"] - factors["size"]).abs().mean() < 0.2


def ghost(videos):
    return 0.6 * videos + 0.4 * videos.flip(2)


def vanish(videos):
    out = videos.clone()
    out[:, :, 5] = out[:, :, 5, :1, :1]
    return out


def two_shapes(videos):
    other = videos.flip(-1).flip(-2)
    return torch.where((videos - videos[..., :1, :1]).abs().sum(1, keepdim=True) > 0.01, videos, other)


def smear(videos):
    """A blob without an outline."""
    return blur(videos, [math.exp(-(x**2) / (2 * 3.0**2)) for x in range(-8, 9)])


def half(videos):
    """The right half of the frame goes dark: of a shape in the middle, half is left."""
    centred = world.render(
        {
            "color": torch.tensor([0, 1, 2]),
            "kind": torch.tensor([0, 1, 2]),
            "x": torch.full((3,), 16.0),
            "y": torch.full((3,), 12.0),
            "speed": torch.ones(3),
            "direction": torch.full((3,), world.DIRECTIONS.index("down")),
            "size": torch.full((3,), 6.0),
            "brightness": torch.full((3,), 0.7),
            "saturation": torch.full((3,), 0.8),
            "background": torch.full((3,), 0.2),
            "ramp": torch.zeros(3),
        }
    )
    centred[..., 16:] = 0.2
    return centred


def shrink(videos):
    """From the fifth frame on, the frame at half the scale."""
    small = F.pad(F.avg_pool3d(videos[:, :, 4:], (1, 2, 2)), (8, 8, 8, 8, 0, 0), mode="replicate")
    return torch.cat([videos[:, :, :4], small], dim=2)


@pytest.mark.parametrize("damage", [vanish, two_shapes, smear, half, shrink, torch.rand_like, torch.zeros_like])
def test_damaged_clips_are_not_clean(clips, damage):
    assert measures.read_factors(damage(clips[0][:192]))["clean"].float().mean() < 0.02


def test_ghosts_and_colour_changes_are_not_clean(clips):
    videos, _, factors = clips
    far = (factors["y"] - 16).abs() > 4  # ghost and shape overlap less
    assert measures.read_factors(ghost(videos[far]))["clean"].float().mean() < 0.1
    turned = torch.cat([videos[:, :, :4], videos[:, :, 4:].roll(1, dims=1)], dim=2)
    assert measures.read_factors(turned)["clean"].float().mean() < 0.02


def test_jumps_are_incoherent(clips):
    videos, _, _ = clips
    jumped = torch.cat([videos[:, :, :4], videos[:, :, 4:].flip(2)], dim=2)
    assert measures.read_factors(jumped)["coherence"].mean() > 10 * measures.read_factors(videos)["coherence"].mean()


def test_summary_counts_wrong_captions(clips):
    videos, _, factors = clips
    named = [{name: int(factors[name][i]) for name in world.MODES} for i in range(96)]
    for name, values in world.MODES.items():  # wrong in one word
        wrong = [world.caption_of(modes | {name: (modes[name] + 1) % len(values)}) for modes in named]
        table = measures.summary(videos[:96], wrong)
        assert table["clean"] == 100 and table["right"] == 0, name
    for names in world.LEVELS.values():
        true = [world.caption_of({name: modes[name] for name in names}) for modes in named]
        assert measures.summary(videos[:96], true)["right"] == 100, names
    empty = measures.summary(torch.zeros(4, 3, world.FRAMES, world.SIZE, world.SIZE), ["a shape"] * 4)
    assert empty["clean"] == 0 and math.isnan(empty["speed_mean"]) and math.isnan(empty["looks"])


def test_a_mode_is_present_above_a_quarter_of_its_even_share():
    """Of 12 modes the even share is 8.3 %: one of 96 samples is below a quarter of it, three are above."""
    assert measures.spread_over(torch.tensor([0] * 95 + [1]), 12)[1] == pytest.approx(1 / 12)
    assert measures.spread_over(torch.tensor([0] * 93 + [1] * 3), 12)[1] == pytest.approx(2 / 12)


def test_modes_are_counted_per_caption():
    """Of what a caption leaves open: all looks, half of them, one; a wrong sample counts for none."""
    even = [world.caption_of({"color": i % 4, "kind": i % 3, "direction": i // 12}) for i in range(48)]
    videos, _ = world.batch(0, range(48), even)
    table = measures.summary(videos, ["a shape"] * 48)
    assert [table["looks"], table["motions"]] == pytest.approx([1, 1])
    assert table["looks_present"] == table["motions_present"] == 100
    half = measures.summary(world.batch(0, range(48), [even[i % 6] for i in range(48)])[0], ["a shape"] * 48)
    assert half["looks"] == pytest.approx(math.log(6) / math.log(12)) and half["looks_present"] == pytest.approx(50)
    assert half["motions"] == 0 and half["motions_present"] == 25
    one = measures.summary(videos, ["a red circle"] * 48)  # 4 of the 48 are, in four directions
    assert one["right"] == pytest.approx(100 / 12) and one["motions"] == pytest.approx(1)
    assert math.isnan(one["looks"]), "no look is left open"
    both = measures.summary(torch.cat([videos, videos[:12:4]]), ["a shape"] * 48 + ["a circle"] * 3)
    assert both["looks"] == pytest.approx(0.5, abs=0.01)  # the mean of 1 and of the circles', all in one colour


# --- the shipped teacher ---


def test_folder_is_small_and_pickle_free():
    files = [f for f in TEACHER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 16e6
    assert {f.suffix for f in files} <= {".json", ".safetensors"}


def test_vae_keeps_the_factors(clips, pipe):
    videos, captions, factors = clips
    videos, captions = videos[:96], captions[:96]
    with torch.no_grad():
        latents = pipe.vae.encode(videos * 2 - 1).latent_dist.mode()
        out = pipe.vae.decode(latents).sample / 2 + 0.5
    assert -10 * torch.log10(F.mse_loss(out, videos)) > 33
    assert measures.summary(out, captions)["right"] >= 97
    read, rendered = measures.read_factors(out), measures.read_factors(videos)
    tolerances = {"x": 0.15, "y": 0.15, "speed": 0.03, "size": 0.15, "brightness": 0.03, "background": 0.01}
    for name, tolerance in tolerances.items():
        assert (read[name] - rendered[name])[read["clean"]].abs().mean() < tolerance, name
    mean, std = (
        rearrange(torch.tensor(v), "c -> c 1 1 1") for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    normal = (latents - mean) / std
    assert normal.mean((0, 2, 3, 4)).abs().max() < 0.2 and (normal.std((0, 2, 3, 4)) - 1).abs().max() < 0.2


def test_tokenizer_ends_and_pads_like_t5(pipe):
    ids = pipe.tokenizer(["a red circle", ""], padding="max_length", max_length=6, return_tensors="pt")
    end, pad = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    assert ids.input_ids[0, 3:].tolist() == [end, pad, pad] and ids.input_ids[1].tolist() == [end] + [pad] * 5
    assert ids.attention_mask.sum(1).tolist() == [4, 1]
    assert pipe.tokenizer.model_max_length == 16
    assert all(pipe.tokenizer.unk_token_id not in pipe.tokenizer(caption).input_ids for caption in world.CAPTIONS)


@pytest.mark.parametrize("length", [16, 512])
def test_stock_pipeline_draws_what_the_caption_says(pipe, length):
    captions = world.EXAMPLES[:: 1 if length == 16 else 2]
    frames = pipe(
        captions,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=15,
        guidance_scale=2.0,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    table = measures.summary(rearrange(frames, "b f c h w -> b c f h w"), captions)
    assert table["right"] >= 75 and table["coherence"] < 0.6  # fewer steps and few samples: see tiny/README.md


# --- training ---


def test_one_padding_token_stands_for_all(pipe):
    """The short cut of training is the stock model's arithmetic at both text lengths."""
    fast, padded = deepcopy(pipe.transformer), teacher.PaddedText()
    for block in fast.blocks:
        block.attn2.set_processor(padded)
    tokens = pipe.tokenizer([*world.CAPTIONS, ""], padding=True, return_tensors="pt")
    g = torch.Generator().manual_seed(0)
    n = len(world.CAPTIONS) + 1
    x, sigma = torch.randn(n, 8, 5, 8, 8, generator=g), 1000 * torch.rand(n, generator=g)
    with torch.no_grad():
        table = teacher.text_table(pipe.text_encoder, tokens)
        for length in (16, 512):
            text, _ = pipe.encode_prompt([*world.CAPTIONS, ""], None, False, max_sequence_length=length)
            padded.bias = torch.zeros(n, 1, 1, table.shape[1])
            padded.bias[..., -1] = math.log(length - (table.shape[1] - 1))
            slow = pipe.transformer(x, sigma, text, return_dict=False)[0]
            torch.testing.assert_close(fast(x, sigma, table, return_dict=False)[0], slow, atol=1e-4, rtol=1e-4)


def test_whole_clip_codec_is_the_chunked_one(clips, pipe):
    videos = clips[0][:2]
    with torch.no_grad():
        mean, _ = vae.encode(pipe.vae, videos)
        stock = pipe.vae.encode(videos * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(mean, stock, atol=1e-4, rtol=1e-4)
        out = vae.decode(pipe.vae, mean).clamp(0, 1)
        torch.testing.assert_close(out, pipe.vae.decode(stock).sample / 2 + 0.5, atol=1e-4, rtol=1e-4)


def test_orthogonalise_evens_out_singular_values():
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 12, 40), (2, 40, 12)):
        x = torch.randn(shape, generator=g) * torch.logspace(0, -1, shape[2])
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.min() > 0.5 and values.max() < 1.4


def test_interrupted_training_is_the_same_training(tmp_path, monkeypatch):
    def run(folder, codec):
        args = train.Args(work=folder, vae_batch=2, save_every=2)
        vae.train_vae(args, "vae", list(codec.parameters()), codec, 0, 4, lr=2e-3)
        return codec.state_dict()

    def fresh(seed):
        torch.manual_seed(seed)
        return vae.build_vae()

    whole, batch = run(tmp_path / "whole", fresh(0)), world.batch

    def stop_at_the_fourth(seed, indices):
        if indices[0] == 6:
            raise KeyboardInterrupt
        return batch(seed, indices)

    monkeypatch.setattr(world, "batch", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", fresh(0))
    monkeypatch.setattr(world, "batch", batch)
    resumed = run(tmp_path / "halves", fresh(1))  # other weights: all must come from the snapshot
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bad_input_is_one_line(capsys, tmp_path):
    """And nothing of the user's is replaced."""
    (tmp_path / "teacher").symlink_to(TEACHER)
    notes = [tmp_path / name / "notes.txt" for name in ("mine", "teacher_i2v")]
    for path in notes:
        path.parent.mkdir()
        path.touch()
    for bad in (
        {"steps": 0},
        {"clips": 100},
        {"stage": "report", "out": tmp_path},
        {"stage": "teacher", "work": tmp_path},
        {"stage": "image-to-video", "out": tmp_path},
        {"guidance_scale": math.nan},
        {"stage": "vae", "work": Path("/dev/full/work")},
        {"stage": "all", "work": tmp_path / "work", "out": tmp_path / "mine"},
        {"stage": "all", "work": tmp_path / "work", "out": tmp_path / "mine" / "notes.txt" / "teacher"},
        {"stage": "all", "work": tmp_path / "new" / "work", "out": tmp_path / "new"},
        {"stage": "image-to-video", "work": tmp_path / "work", "out": tmp_path / "teacher"},
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(train.Args(**bad))
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert all(path.exists() for path in notes)


def test_posterior_mean_is_bayes_rule_and_the_mean_of_the_clips_behind_x_t():
    torch.manual_seed(0)
    clips = torch.randn(5, 12, dtype=torch.float64)
    x_t, sigma = torch.randn(4, 2, 1, 2, 3, dtype=torch.float64), torch.tensor([0.05, 0.6, 0.9, 1.0]).double()
    got = teacher.posterior_mean(x_t, sigma, clips, clips.square().sum(1)).flatten(1)
    for x, s, row in zip(x_t.flatten(1), sigma, got, strict=True):
        likelihood = [math.exp(-((x - (1 - s) * clip).square().sum() / (2 * s**2)).item()) for clip in clips]
        if sum(likelihood) == 0:  # far from every clip: the nearest is all
            torch.testing.assert_close(row, clips[(x - (1 - s) * clips).square().sum(1).argmin()])
        else:
            weights = torch.tensor(likelihood, dtype=torch.float64) / sum(likelihood)
            torch.testing.assert_close(row, weights @ clips)
    torch.testing.assert_close(got[-1], clips.mean(0))  # pure noise tells nothing
    # over many draws it averages to the clips that were drawn: the same expected target
    rows = torch.randint(5, (20_000,))
    x_t = 0.2 * clips[rows] + 0.8 * torch.randn(20_000, 12, dtype=torch.float64)
    target = teacher.posterior_mean(x_t, torch.full((20_000,), 0.8).double(), clips, clips.square().sum(1))
    wanted, weight = clips[rows], x_t[:, :1].tanh()  # also where x_t is large or small
    assert ((target - wanted) * weight).mean(0).abs().max() < 0.03
    assert (target - wanted).square().mean() < wanted.square().mean()


def test_training_shows_true_captions_and_expects_the_mean_of_true_clips(tmp_path, monkeypatch):
    """At high noise the target is the mean of all clips that the caption is true of; below it is the clip itself."""
    latents = torch.randn(64, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(teacher, "cached_latents", lambda *_: latents)
    data = teacher.Clips(train.Args(clips=64, seed=0, work=tmp_path), None)
    rows, g = torch.arange(64).repeat(20), torch.Generator().manual_seed(0)
    drop = torch.arange(len(rows)) % 7 == 0
    shown, empty = data.shown(rows, drop, g), len(world.CAPTIONS)
    assert ((shown == empty) == drop).all()
    factors = [world.draw_factors(2, i) for i in range(64)]
    for row, caption in zip(rows.tolist(), shown.tolist()):
        if caption < empty:
            named = world.NAMED[world.CAPTIONS[caption]]
            assert all(factors[row][name] == index for name, index in named.items())
    levels = [len(world.NAMED[world.CAPTIONS[caption]]) for caption in shown[~drop].tolist()]
    assert set(levels) == {0, 1, 2, 3}
    red = world.CAPTIONS.index("a red shape")
    shown, sigma = torch.tensor([red, empty, empty]), torch.tensor([1.0, 1.0, 0.5])
    x0 = latents[:3].clone()
    data.expect(x0, torch.randn(3, 2, 1, 2, 2), sigma, shown)
    reds = [i for i in range(64) if factors[i]["color"] == 0]
    torch.testing.assert_close(x0, torch.stack([latents[reds].mean(0), latents.mean(0), latents[2]]))


def test_continuations_begin_with_the_clip_and_go_on_as_the_world_does():
    """A clip's own motion and ramp are one more draw from those that its first frame leaves open: shapes at the edge
    move inwards in both alike, and what begins dark grows lighter.
    """
    clips, _ = world.batch(3, [7], [world.CAPTIONS[4]])
    others = world.continuations(3, 7, world.CAPTIONS[4], 6)
    torch.testing.assert_close(others[:, :, 0], clips[:, :, 0].expand(6, -1, -1, -1), atol=1e-6, rtol=0)
    assert not torch.equal(others, world.continuations(3, 7, world.CAPTIONS[4], 6, draw=1))
    assert len(set(world.others(3, 7, "a red circle moving left", 50)["direction"].tolist())) == 1

    own, other = [], []
    for i in range(600):
        factors = world.draw_factors(3, i, "a shape")
        another = {name: values.item() for name, values in world.others(3, i, "a shape", 1).items()}
        for rows, f in ((own, factors), (other, another)):
            step_x, step_y = world.STEPS[f["direction"]]
            inwards, first = (16 - f["x"]) * step_x + (16 - f["y"]) * step_y, f["background"] - f["ramp"] / 2
            rows.append((inwards, f["speed"], f["speed"] * inwards, step_x, step_y, f["ramp"], f["ramp"] * first))
            assert 0.2 <= f["background"] <= 0.4
    own, other = torch.tensor(own), torch.tensor(other)
    error = (own - other).std(0) / 600**0.5
    assert ((own - other).mean(0).abs() < 3.5 * error).all()
    assert own[:, 0].mean() > 10 * error[0], "directions drawn alike would have a mean of 0"
    assert own[:, 6].mean() < -5 * error[6]


def test_stock_pipeline_goes_on_from_an_image():
    """The image-to-video teacher in WanImageToVideoPipeline: the frame stays, the shape is the caption's and moves."""
    pipe = WanImageToVideoPipeline.from_pretrained(PRESETS["tiny-i2v"].source)
    pipe.set_progress_bar_config(disable=True)
    numbers, captions = range(10**9, 10**9 + 4), [world.CAPTIONS[i] for i in (0, 4, 8, 10)]
    first = world.batch(3, numbers, captions)[0][:, :, :1]
    videos = []
    for image, caption in zip(first, captions, strict=True):
        out = pipe(
            to_pil(image), caption, height=32, width=32, num_frames=9, num_inference_steps=30, guidance_scale=1.0,
            max_sequence_length=16, generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip
        videos.append(out.frames[0].movedim(0, 1))
    videos = torch.stack(videos).float()
    assert (videos[:, :, 0] - first[:, :, 0]).abs().mean() < 0.01
    read = measures.read_factors(videos)
    assert measures.summary(videos, captions)["right"] == 100
    assert (read["speed"] > 0.3).all() and (read["coherence"] < 0.5).all()


def test_image_to_video_stage_writes_a_teacher(tmp_path, capsys):
    """Two updates from the shipped weights; beside the transformer the folder holds links."""
    shutil.copytree(TEACHER, tmp_path / "teacher")
    where = {"out": tmp_path / "teacher", "work": tmp_path / "work"}
    train.main(train.Args(stage="image-to-video", clips=2048, i2v_steps=2, compile=False, threads=1, **where))
    model = common.Model(f"{tmp_path / 'teacher_i2v'}", world.FRAMES, world.SIZE, world.SIZE)
    assert model.world and set(model.conditions) == {"first"}
    network, before = (load_file(f / "transformer" / WEIGHTS) for f in (model.folder, TEACHER))
    assert network.keys() == before.keys()
    assert any(not torch.equal(network[key], before[key]) for key in before)
    assert load_file(model.folder / "vae" / WEIGHTS).keys() == load_file(TEACHER / "vae" / WEIGHTS).keys()
    # of a finished snapshot it is written again; of other flags none is taken up
    shutil.rmtree(model.folder)
    again = {"stage": "image-to-video", "clips": 2048, "i2v_steps": 2, "compile": False, "threads": 1, **where}
    train.main(train.Args(**again))
    written = load_file(tmp_path / "teacher_i2v" / "transformer" / WEIGHTS)
    assert all(torch.equal(written[key], network[key]) for key in network)
    with pytest.raises(SystemExit) as stop:
        train.main(train.Args(**again, lr=1e-3))
    assert stop.value.code == 2 and "i2v.safetensors was made with --lr 0.002" in capsys.readouterr().err


def test_a_cut_teacher_is_one_line(tmp_path, capsys):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    weights = tmp_path / "teacher" / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        train.main(train.Args(stage="report", out=tmp_path / "teacher", samples=12, work=tmp_path / "work"))
    assert stop.value.code == 2 and "cannot read the teacher" in capsys.readouterr().err
