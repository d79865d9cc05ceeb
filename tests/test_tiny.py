"""The laptop world: clips are what their factors say, read_factors is right and honest, the shipped teacher works."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import common
from models.images import to_pil
from models.presets import PRESETS
from tests.conftest import same
from tiny import measures, train, world
from tiny.training import teacher
from tiny.training.optim import MuonAndAdamW

TEACHER = Path(world.__file__).parent / "teacher"
COUNT = 192


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


def test_clips_are_a_function_of_seed_and_index():
    """Tables and shipped weights rest on these numbers: they are the same on every machine."""
    videos, captions = world.batch(3, [5, 10**12])
    assert torch.equal(videos[1], world.batch(3, [10**12])[0][0]) and captions[1] == "a yellow circle"
    factors = world.draw_factors(3, 5)
    wanted = {"color": 0, "kind": 0, "direction": 0, "speed": 1.5188879308883667, "x": 19.341855738026936}
    assert {name: factors[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert videos.mean((2, 3, 4))[0].tolist() == pytest.approx([0.3206021, 0.2565922, 0.2565922], abs=1e-6)
    assert videos.shape == (2, 3, world.FRAMES, world.SIZE, world.SIZE) and videos.dtype == torch.float32


def test_a_caption_fixes_what_it_names_and_nothing_else():
    free = world.draw_factors(0, 1)
    assert len(world.CAPTIONS) == 1 + 3 + 4 + 12 + 48 and set(world.EXAMPLES) | set(world.LEVELS) <= set(world.CAPTIONS)
    videos, said = world.batch(0, [1] * len(world.CAPTIONS), world.CAPTIONS)
    read = measures.read_factors(videos)
    assert said == world.CAPTIONS and read["clean"].all()
    for i, (caption, named) in enumerate(world.NAMED.items()):
        factors = world.draw_factors(0, 1, caption)
        assert caption == world.caption_of(named) and all(read[name][i] == factors[name] for name in world.MODES)
        assert factors == free | named | {"caption": i, "x": factors["x"], "y": factors["y"]}
    with pytest.raises(ValueError, match="purple"):
        world.draw_factors(0, 0, "a purple circle")


def test_continuations_begin_with_the_clip_and_go_on_as_the_world_does():
    """A clip's own motion and ramp are one more draw from those that its first frame leaves open: shapes at the edge
    move inwards in both alike, and what begins dark grows lighter.
    """
    clips, _ = world.batch(3, [7], [world.CAPTIONS[4]])
    others = world.continuations(3, 7, world.CAPTIONS[4], 6)
    torch.testing.assert_close(others[:, :, 0], clips[:, :, 0].expand(6, -1, -1, -1), atol=1e-6, rtol=0)
    assert len(set(world.others(3, 7, "a red circle moving left", 50)["direction"].tolist())) == 1
    own, other = [], []
    for i in range(600):
        another = {name: values.item() for name, values in world.others(3, i, "a shape", 1).items()}
        for rows, f in ((own, world.draw_factors(3, i, "a shape")), (other, another)):
            step_x, step_y = world.STEPS[f["direction"]]
            inwards = (16 - f["x"]) * step_x + (16 - f["y"]) * step_y
            rows.append((inwards, f["speed"] * inwards, f["ramp"] * (f["background"] - f["ramp"] / 2)))
    own, other = torch.tensor(own), torch.tensor(other)
    error = (own - other).std(0) / 600**0.5
    assert ((own - other).mean(0).abs() < 3.5 * error).all()
    assert own[:, 0].mean() > 10 * error[0], "directions drawn alike would have a mean of 0"
    assert own[:, 2].mean() < -5 * error[2]


def test_read_factors_recovers_what_was_rendered(clips):
    videos, captions, factors = clips
    read = measures.read_factors(videos)
    assert read["clean"].all() and read["coherence"].max() < 0.08
    assert all(torch.equal(read[name], factors[name]) for name in world.MODES)
    tolerances = {"x": 0.2, "y": 0.2, "speed": 0.02, "size": 0.1, "brightness": 5e-3, "saturation": 5e-3}
    for name, tolerance in (tolerances | {"background": 1e-3, "ramp": 2e-3}).items():
        assert (read[name] - factors[name]).abs().max() < tolerance, name
    table = measures.summary(videos, captions)
    assert table["clean"] == table["right"] == 100
    mixed = measures.summary(torch.cat([videos, torch.rand_like(videos)]), captions * 2)  # noise is no clean clip
    for figure, wanted in (("size_std", read["size"].std()), ("coherence", read["coherence"].mean())):
        assert table[figure] == mixed[figure] == pytest.approx(wanted.item(), rel=1e-4)


def test_damaged_clips_are_not_clean(clips):
    v, factors = clips[0][:96], {name: values[:96] for name, values in clips[2].items()}
    middle = world.render(factors | {"x": torch.full((96,), 16.0), "direction": torch.full((96,), 3)})
    before, last = v[:, :, :8], v[:, :, 8:]
    small = F.pad(F.avg_pool3d(last, (1, 2, 2)), (8, 8, 8, 8, 0, 0), mode="replicate")
    damaged = {
        "two shapes": torch.where((v - v[..., :1, :1]).abs().sum(1, keepdim=True) > 0.01, v, v.flip(-1, -2)),
        "half a shape": torch.cat([middle[..., :16], middle[..., :1].expand(-1, -1, -1, -1, 16)], dim=-1),
        "smeared": F.avg_pool3d(v, (1, 11, 11), stride=1, padding=(0, 5, 5), count_include_pad=False),
        "no shape in the last frame": torch.cat([before, last[..., :1, :1].expand_as(last)], dim=2),
        "another size in the last frame": torch.cat([before, small], dim=2),
        "another colour in the last frame": torch.cat([before, last.roll(1, dims=1)], dim=2),
        "noise": torch.rand_like(v),
        "black": torch.zeros_like(v),
    }
    for name, videos in damaged.items():
        assert measures.read_factors(videos)["clean"].float().mean() < 0.02, name


def test_jumps_are_incoherent(clips):
    jumped = torch.cat([clips[0][:96, :, :4], clips[0][:96, :, 4:].flip(2)], dim=2)
    assert measures.read_factors(jumped)["coherence"].mean() > 0.5


def test_summary_counts_wrong_captions(clips):
    videos, _, factors = clips
    named = [{name: int(factors[name][i]) for name in world.MODES} for i in range(48)]
    for name, values in world.MODES.items():  # wrong in one word
        wrong = [world.caption_of(modes | {name: (modes[name] + 1) % len(values)}) for modes in named]
        table = measures.summary(videos[:48], wrong)
        assert table["clean"] == 100 and table["right"] == 0, name


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
    one = measures.summary(videos, ["a red circle"] * 48)  # 4 of the 48 are, in four directions; it leaves no look open
    assert [one["right"], one["motions"]] == pytest.approx([100 / 12, 1]) and math.isnan(one["looks"])
    # of 12 modes the even share is 8.3 %: one of 96 samples is below a quarter of it, three are above
    for rare, present in ((1, 1), (3, 2)):
        assert measures.spread_over(torch.tensor([0] * (96 - rare) + [1] * rare), 12)[1] == pytest.approx(present / 12)


# --- the shipped teachers ---


def test_vae_keeps_the_factors_and_training_sees_its_normalised_latents(pipe):
    latents, captions = teacher.encode_clips(train.Args(clips=96), pipe.vae)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.2 and (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.2
    for i, said in enumerate(captions):
        named = [world.NAMED[world.CAPTIONS[caption]] for caption in said]
        assert [tuple(modes) for modes in named] == list(world.LEVELS.values())
        assert all(modes.items() <= world.draw_factors(2, i).items() for modes in named)
    videos, spoken = world.batch(2, range(96))
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    with torch.no_grad():
        out = pipe.vae.decode(latents * std + mean).sample / 2 + 0.5
    assert -10 * torch.log10(F.mse_loss(out, videos)) > 33
    assert measures.summary(out, spoken)["right"] >= 97


def test_stock_pipeline_draws_what_the_caption_says(pipe):
    captions, size = world.EXAMPLES, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    rng = torch.Generator().manual_seed(0)
    frames = pipe(captions, **size, num_inference_steps=15, guidance_scale=2, generator=rng, output_type="pt").frames
    table = measures.summary(frames.movedim(1, 2), captions)
    assert table["right"] >= 75 and table["coherence"] < 0.6  # fewer steps and few samples: see tiny/README.md


@pytest.mark.slow
@torch.no_grad()
def test_the_smaller_teachers_loss_on_fresh_clips(pipe):
    """At the noise levels of training, of clips and captions that neither has seen: the figures of tiny/README.md."""
    small = WanTransformer3DModel.from_pretrained(PRESETS["tiny-small"].source, subfolder="transformer")
    x0, captions = teacher.encode_clips(train.Args(seed=100, clips=512), pipe.vae)
    tokens = pipe.tokenizer(list(world.CAPTIONS), padding=True, return_tensors="pt")
    said = captions[range(512), torch.arange(512) % captions.shape[1]]
    text, u = teacher.embed(pipe.text_encoder, tokens, 16)[said], torch.linspace(0.001, 0.999, 512)
    sigma, noise = 5 * u / (1 + 4 * u), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    s, losses = sigma.view(-1, 1, 1, 1, 1), []
    for transformer in (pipe.transformer, small):
        v = transformer((1 - s) * x0 + s * noise, 1000 * sigma, text).sample
        losses.append(F.mse_loss(v, noise - x0).item())
    assert losses == pytest.approx([0.356, 0.515], abs=0.002) and len(small.blocks) == 3


def test_training_embeds_text_as_the_pipeline_does(pipe):
    """One `</s>` at the end, then zeros; every word is known."""
    tokens = teacher.build_tokenizer()([*world.CAPTIONS, ""], padding=True, return_tensors="pt")
    assert tokens.input_ids[-1].tolist() == [1, 0, 0, 0, 0, 0] and not (tokens.input_ids == 2).any()
    text, _ = pipe.encode_prompt([*world.CAPTIONS, ""], None, False, max_sequence_length=16)
    torch.testing.assert_close(teacher.embed(pipe.text_encoder, tokens, 16), text)


def test_stock_pipeline_goes_on_from_an_image():
    """The image-to-video teacher: the frame stays, the shape is the caption's and moves."""
    pipe = WanImageToVideoPipeline.from_pretrained(PRESETS["tiny-i2v"].source)
    pipe.set_progress_bar_config(disable=True)
    captions = ["a shape", "a square"]
    first = world.batch(10**9, range(2), captions)[0][:, :, :1]
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "guidance_scale": 1.0}
    rng, videos = torch.Generator().manual_seed(0), []
    for image, caption in zip(first, captions):
        out = pipe(to_pil(image), caption, **size, num_inference_steps=20, generator=rng, output_type="pt")
        videos.append(out.frames[0].movedim(0, 1).float())
    videos = torch.stack(videos)
    assert (videos[:, :, 0] - first[:, :, 0]).abs().mean() < 0.01
    read = measures.summary(videos, captions)
    assert read["right"] == 100 and read["speed_mean"] > 0.3 and read["coherence"] < 0.5


# --- training ---


def test_an_update_is_orthogonal_for_matrices_and_kernels_and_adams_for_the_rest():
    torch.manual_seed(0)
    kernel, matrix, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((12, 5, 2, 2, 2), (40, 12), (7,)))
    optimizer = MuonAndAdamW([kernel, bias, matrix], [kernel, matrix])
    optimizer.step(sum((p * torch.randn_like(p)).sum() for p in (kernel, matrix, bias)), lr=0.1)
    for p in (kernel, matrix):  # 0.4 sqrt(max(m, n)) gives a matrix about the size of AdamW's step
        values = torch.linalg.svdvals(p.detach().flatten(1)) / (0.1 * 0.4 * math.sqrt(40))
        assert values.min() > 0.5 and values.max() < 1.4
    torch.testing.assert_close(bias.detach().abs(), torch.full((7,), 0.1))


def test_posterior_mean_is_bayes_rule():
    torch.manual_seed(0)
    clips, x_t = torch.randn(5, 12).double(), torch.randn(3, 2, 1, 2, 3).double()
    sigma = torch.tensor([0.6, 0.9, 1.0]).double()
    got = teacher.posterior_mean(x_t, sigma, clips, clips.square().sum(1)).flatten(1)
    for x, s, row in zip(x_t.flatten(1), sigma, got):
        likelihood = torch.exp(-(x - (1 - s) * clips).square().sum(1) / (2 * s**2))
        torch.testing.assert_close(row, likelihood @ clips / likelihood.sum())


def test_all_stages_write_teachers(tmp_path, monkeypatch):
    calls, forward = [], WanTransformer3DModel.forward

    def watched(self, x_t, timestep, text, **kwargs):
        calls.append((x_t, timestep))
        return forward(self, x_t, timestep, text, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", watched)
    small = {"vae_steps": 1, "decoder_steps": 1, "vae_batch": 2, "clips": 16, "steps": 1, "i2v_steps": 1, "batch": 4}
    small["small_steps"] = 1
    args = train.Args(out=tmp_path / "teacher", compile=False, **small)
    train.main(args)
    latents, _ = teacher.encode_clips(args, WanPipeline.from_pretrained(args.out).vae)
    x_t, timestep = calls[1]
    known = x_t[:, None, :, 0] - latents[None, :, :, 0]
    assert (known.flatten(2).abs().amax(2).amin(1) < 1e-5).all(), "the first frame is a clip's, without noise"
    assert (timestep[:, :16] == 0).all() and (timestep[:, 16:] > 0).all()
    folders = (args.out, set()), (tmp_path / "teacher_i2v", {"first"}), (tmp_path / "teacher_small", set())
    for folder, conditions in folders:
        model = common.Model(str(folder), world.FRAMES, world.SIZE, world.SIZE)
        assert model.world and set(model.conditions) == conditions
    with pytest.raises(SystemExit, match="vae"):  # nothing is replaced
        train.main(args)
    on = replace(args, stages=("teacher",), init=args.out, out=tmp_path / "on", seed=1)
    train.main(on)
    before, after = (load_file(a.out / "text_encoder" / "model.safetensors") for a in (args, on))
    assert all(torch.allclose(after[name], x, atol=1e-3) for name, x in before.items()) and not same(before, after)
