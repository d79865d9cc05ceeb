"""The world with modes: clips are what their factors say, the judge counts modes, the teacher draws them."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from einops import rearrange

import dmd2
from experiments import modes
from tests.conftest import only_run, small_args
from tests.test_tiny import ghost, smear, two_shapes, vanish
from tiny.modes import measures, train, world

TEACHER = Path(world.__file__).parent / "teacher"
COUNT = 384


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


def shrink(videos):
    """From the fifth frame on, the frame at half the scale."""
    small = F.pad(F.avg_pool3d(videos[:, :, 4:], (1, 2, 2)), (8, 8, 8, 8, 0, 0), mode="replicate")
    return torch.cat([videos[:, :, :4], small], dim=2)


@pytest.mark.parametrize("damage", [vanish, two_shapes, smear, shrink, torch.rand_like, torch.zeros_like])
def test_damaged_clips_are_not_clean(clips, damage):
    assert measures.read_factors(damage(clips[0][:192]))["clean"].float().mean() < 0.02


def test_ghosts_and_colour_changes_are_not_clean(clips):
    videos, _, factors = clips
    far = (factors["y"] - 16).abs() > 4  # ghost and shape overlap less
    assert measures.read_factors(ghost(videos[far]))["clean"].float().mean() < 0.1
    turned = torch.cat([videos[:, :, :4], videos[:, :, 4:].roll(1, dims=1)], dim=2)
    assert measures.read_factors(turned)["clean"].float().mean() < 0.02


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


@pytest.mark.parametrize("length", [16, 512])
def test_stock_pipeline_draws_what_the_caption_says(pipe, length):
    captions = [caption for caption in world.EXAMPLES if length == 16 or len(world.NAMED[caption]) > 1]
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
    assert table["right"] >= 75 and table["coherence"] < 0.6  # fewer steps and few samples: see tiny/modes/README.md


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


def test_training_shows_true_captions_and_expects_the_mean_of_true_clips(tmp_path, monkeypatch):
    """At high noise the target is the mean of all clips that the caption is true of; below it is the clip itself."""
    latents = torch.randn(64, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train.teacher, "cached_latents", lambda *_: (latents, None))
    monkeypatch.setattr(train.AutoencoderKLWan, "from_pretrained", lambda _: None)
    data = train.Clips(train.Args(clips=64, seed=0, work=tmp_path))
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


def test_bad_input_is_one_line(tmp_path, capsys):
    for bad in ({"steps": 0}, {"stage": "report", "out": tmp_path}, {"stage": "teacher", "work": tmp_path}):
        with pytest.raises(SystemExit) as stop:
            train.main(train.Args(**bad))
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_counting_the_modes_of_a_run(tmp_path, capsys, fails):
    """The program on a run of one update: a row for data, teacher and each checkpoint, and other teachers refused."""
    flags = {
        "prompts": str(TEACHER.parent / "open.txt"),
        "guidance_scale": 1.0,
        "gan_weight": 0.0,
        "runs_dir": tmp_path,
    }
    flags |= {"frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE}
    dmd2.main(small_args(dmd2, teacher=str(TEACHER), steps=2, save_every=1, **flags))
    run, out = str(only_run(tmp_path, dmd2)), tmp_path / "out"
    modes.main(modes.Args(runs=(run,), seeds=2, teacher_steps=2, out=out))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "table.md").read_text().splitlines()]
    assert [row[0] for row in rows[2:]] == ["data", "teacher, 2 steps", "dmd2, after 1 steps", "dmd2, after 2 steps"]
    assert float(rows[2][1]) == 100 and 0.2 < float(rows[2][2]) < 0.55  # two samples: at most ln 2 / ln n
    assert (out / "sheet.png").stat().st_size > 10_000
    dmd2.main(small_args(dmd2, steps=1, gan_weight=0.0, runs_dir=tmp_path / "other"))
    other = (str(only_run(tmp_path / "other", dmd2)),)
    fails(lambda: modes.main(modes.Args(runs=other, out=out)), "another teacher", "tiny/modes/teacher")
    fails(lambda: modes.main(modes.Args(runs=(), out=out)), "at least one run")
