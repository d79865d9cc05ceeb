"""Exact cases for training/metrics.py and the writers in training/media.py."""

import colorsys
import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.proxies import colour_spread, temporal_flickering
from tiny import world as tiny
from training.media import CLIP_GAP, FRAME_GAP, contact_sheet, draw_sheet, write_mp4
from training.metrics import frame_difference, pairwise_rms, preview_metrics, saturation, vendi_score


def plain(*rgb, f=3, size=16):
    return torch.tensor(rgb).view(3, 1, 1, 1).expand(3, f, size, size).contiguous()


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def moving_square(speed, f=5, size=32):
    video = torch.full((3, f, size, size), 0.2)
    for t in range(f):
        video[0, t, 8:16, 4 + speed * t : 12 + speed * t] = 0.8
    return video


# ---------------------------------------------------------------- diversity


def test_pairwise_rms_of_constant_clips():
    clips = torch.stack([plain(0.2, 0.2, 0.2), plain(0.3, 0.3, 0.3), plain(0.5, 0.5, 0.5)])
    assert pairwise_rms(clips[:2]) == pytest.approx(0.1, abs=1e-6)
    assert pairwise_rms(clips) == pytest.approx((0.1 + 0.2 + 0.3) / 3, abs=1e-6)
    red = torch.stack([plain(0.2, 0.2, 0.2), plain(0.5, 0.2, 0.2)])
    assert pairwise_rms(red) == pytest.approx(0.3 / math.sqrt(3), abs=1e-6)  # root of the mean square, not a mean
    assert pairwise_rms(clips[:1]) == 0
    assert pairwise_rms(clips[:1].expand(4, -1, -1, -1, -1)) == 0


def test_pooling_drops_texture_and_keeps_time():
    stripes = (torch.arange(32) % 2).float().expand(3, 4, 32, 32)
    for texture in (stripes, stripes.mT):
        assert pairwise_rms(torch.stack([texture, 1 - texture])) == pytest.approx(0, abs=1e-6)
    video = moving_square(4)
    assert pairwise_rms(torch.stack([video, video.flip(1)])) > 0.05  # the same frames, the other direction


def test_vendi_score_runs_from_one_to_the_number_of_clips():
    clip = noise(3, 3, 16, 16)
    assert vendi_score(torch.stack([clip] * 5)) == pytest.approx(1, abs=1e-6)
    corners = torch.stack([plain(*(float(i >> k & 1) for k in range(3))) for i in range(8)])
    assert vendi_score(corners) == pytest.approx(8, abs=0.01)
    assert vendi_score(corners[[0, 0, 0, 7, 7, 7]]) == pytest.approx(2, abs=1e-3)  # two modes, three copies each
    assert vendi_score(corners[:1]) == pytest.approx(1, abs=1e-9)


def test_vendi_score_of_two_clips_by_hand():
    clips = torch.stack([plain(0.3, 0.3, 0.3), plain(0.45, 0.45, 0.45)])
    k = math.exp(-0.5)  # one bandwidth apart
    high, low = (1 + k) / 2, (1 - k) / 2
    assert vendi_score(clips) == pytest.approx(math.exp(-high * math.log(high) - low * math.log(low)), abs=1e-5)


def test_vendi_score_discriminates_at_the_distances_seeds_have():
    scores = [vendi_score(torch.stack([plain(0.1, 0.1, 0.1), plain(*[0.1 + d] * 3)])) for d in (0.05, 0.1, 0.2, 0.3)]
    assert scores[0] < 1.2 and scores[3] > 1.9
    assert all(b - a > 0.1 for a, b in zip(scores, scores[1:], strict=False))


def test_vendi_score_of_nan_is_nan():
    assert math.isnan(vendi_score(torch.full((2, 3, 1, 8, 8), math.nan)))


# ---------------------------------------------------------------- colour


def test_saturation_of_plain_colours():
    red = saturation(plain(1.0, 0.0, 0.0))
    assert red["saturation"] == red["saturated"] == red["clipped"] == 1
    # Hasler & Süsstrunk by hand: rg = 255, yb = 127.5, no spread
    assert colour_spread(plain(1.0, 0.0, 0.0))["colourfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-6)
    grey = saturation(plain(0.4, 0.4, 0.4))
    grey |= colour_spread(plain(0.4, 0.4, 0.4))
    assert grey == pytest.approx(dict.fromkeys(grey, 0), abs=1e-6)
    black = saturation(plain(0.0, 0.0, 0.0))
    assert black["saturation"] == 0 and black["clipped"] == 1


def test_saturation_against_colorsys():
    clip = noise(2, 3, 2, 4, 4)
    s = np.array([colorsys.rgb_to_hsv(*pixel)[1] for pixel in clip.double().movedim(1, -1).reshape(-1, 3).tolist()])
    assert saturation(clip)["saturation"] == pytest.approx(s.mean(), abs=1e-6)
    assert 0 < saturation(clip)["saturated"] == pytest.approx((s > 0.9).mean(), abs=1e-6)


def test_colourfulness_and_luma_against_numpy():
    clip = noise(3, 2, 6, 6)
    colourfulness, luma_std = [], []
    for r, g, b in clip.double().numpy().swapaxes(0, 1):
        rg, yb = 255 * (r - g), 255 * (0.5 * (r + g) - b)
        colourfulness.append(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
        luma_std.append((0.2126 * r + 0.7152 * g + 0.0722 * b).std())
    assert colour_spread(clip)["colourfulness"] == pytest.approx(np.mean(colourfulness), rel=1e-5)
    assert colour_spread(clip)["luma_std"] == pytest.approx(np.mean(luma_std), rel=1e-5)


@pytest.mark.parametrize("code, clipped", [(-9, 1), (0, 1), (0.4, 1), (1, 0), (128, 0), (254, 0), (254.6, 1), (280, 1)])
def test_clipped_means_code_0_or_255(code, clipped):
    clip = plain(0.5, code / 255, 0.5)
    assert saturation(clip)["clipped"] == clipped
    half = torch.cat([clip, plain(0.5, 0.5, 0.5)], dim=1)
    assert saturation(half)["clipped"] == clipped / 2


def test_clipped_is_the_same_for_a_float_video_and_its_8_bit_copy():
    clip = (3 * noise(3, 2, 32, 32)).sub(1)
    copy = (clip.clamp(0, 1) * 255).round() / 255
    assert 0.5 < saturation(clip)["clipped"] == saturation(copy)["clipped"] < 1


# ---------------------------------------------------------------- motion


def test_a_moving_square_moves_more_than_a_still_one():
    clips = [moving_square(speed) for speed in (0, 1, 4)]
    still, slow, fast = (frame_difference(clip) for clip in clips)
    # at speed v, 2 v columns of 8 pixels change by .6 in one of three channels
    assert still == 0 and slow == pytest.approx(2 * 8 * 0.6 / (3 * 32 * 32), rel=1e-5)
    assert fast == pytest.approx(4 * slow, rel=1e-5)
    still, slow, fast = (temporal_flickering(clip) for clip in clips)
    assert fast < slow < still == 1
    image = noise(2, 3, 1, 8, 8)
    assert frame_difference(image) == 0 and temporal_flickering(image) == 1


def test_temporal_flickering_is_vbenchs():
    clips = noise(2, 3, 4, 7, 9)
    scores = []
    for clip in clips.double().numpy():  # VBench: 8-bit frames, mean over pairs, then over videos
        frames = np.rint(clip * 255).astype(np.uint8).astype(np.float64).swapaxes(0, 1)
        mae = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
        scores.append((255 - np.mean(mae)) / 255)
    assert temporal_flickering(clips) == pytest.approx(np.mean(scores), abs=1e-9)
    below_half_a_code = torch.cat([plain(0.5, 0.5, 0.5, f=1), plain(0.5005, 0.5005, 0.5005, f=1)], dim=1)
    assert temporal_flickering(below_half_a_code) == 1


def test_preview_metrics_are_means_over_prompts():
    still = torch.stack([moving_square(0)] * 2)
    varied = torch.stack([moving_square(2), plain(1.0, 0.0, 0.0, f=5, size=32)])
    got = preview_metrics(torch.stack([still, varied]))
    assert list(got) == ["diversity", "saturation", "saturated", "clipped", "motion"]
    assert got["diversity"] == pytest.approx(pairwise_rms(varied) / 2) and got["diversity"] > 0
    assert got["saturation"] == pytest.approx((saturation(still)["saturation"] + saturation(varied)["saturation"]) / 2)
    assert got["clipped"] == got["saturated"] == 1 / 4
    assert got["motion"] == pytest.approx(frame_difference(moving_square(2)) / 4)
    assert all(type(value) is float for value in got.values())


# ---------------------------------------------------------------- writers


@pytest.mark.parametrize("f, fps", [(1, 8), (9, 8), (17, 23.976)])
def test_mp4_round_trip(tmp_path, f, fps):
    row, column = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    time = torch.linspace(0.2, 0.8, f).view(f, 1, 1).expand(f, 32, 48)
    video = torch.stack([time, row.expand(f, -1, -1), column.expand(f, -1, -1)])  # red is time: order matters
    write_mp4(tmp_path / "a b é.mp4", video, fps)
    with av.open(str(tmp_path / "a b é.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (f, 32, 48, 3)
    assert np.abs(frames / 255 - video.movedim(0, -1).numpy()).mean() < 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["a b é.mp4"]


def test_mp4_is_a_function_of_its_frames(tmp_path):
    video = noise(3, 9, 64, 64)
    write_mp4(tmp_path / "a.mp4", video, 8)
    write_mp4(tmp_path / "b.mp4", video, 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_mp4_of_tiny_frames_is_always_the_same(tmp_path):
    """x264's macroblock tree is not, at 32 x 32: without mbtree=0 this fails (see h264_options)."""
    clips, files = tiny.batch(0, range(8))[0], set()
    faint = [0.25 + 0.1 * clip for clip in clips]  # little texture: where the tree has most to say
    for time in range(30):
        memory = [np.full(4000 + 64 * time, time / 7) for _ in range(5)]  # what a fresh buffer may hold
        for i, clip in enumerate(faint):
            del memory[:1]
            write_mp4(tmp_path / "a.mp4", clip, 8)
            files.add((i, (tmp_path / "a.mp4").read_bytes()))
    assert len(files) == len(clips)


@pytest.mark.parametrize(
    "video, message",
    [
        (torch.zeros(3, 2, 33, 32), "33 x 32"),
        (torch.zeros(2, 3, 32, 32), r"\[3, f, h, w\]"),
        (torch.full((3, 2, 32, 32), math.nan), "finite"),
    ],
)
def test_mp4_refuses_and_keeps_what_was_there(tmp_path, video, message):
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "a.mp4", video, 8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.mp4", "old")]


def test_contact_sheet_dimensions_and_pixels(tmp_path):
    def sheet(rows, **options):
        contact_sheet(tmp_path / "sheet.png", rows, **options)
        return np.array(Image.open(tmp_path / "sheet.png"))

    video = noise(3, 9, 32, 32)
    one, two = sheet([("red", [video])]), sheet([("red", torch.stack([video, video]))])
    strip = 4 * 64 + 3 * FRAME_GAP
    assert one.shape[0] == two.shape[0] == 64 + 2 * CLIP_GAP
    assert two.shape[1] - one.shape[1] == strip + CLIP_GAP
    assert sheet([("red", [video]), ("blue", [video])]).shape[0] == 2 * 64 + 3 * CLIP_GAP
    # the last frame is the last one of the clip, each pixel an exact 2 x 2 block
    last = one[CLIP_GAP : CLIP_GAP + 64, -CLIP_GAP - 64 : -CLIP_GAP]
    expected = (video[:, -1] * 255).round().byte().movedim(0, -1).numpy()
    assert (last == expected.repeat(2, axis=0).repeat(2, axis=1)).all()
    # text on the left, and only there
    left = one.shape[1] - strip - CLIP_GAP
    assert one[:, :left].min() < 100 and (one[:, left - CLIP_GAP : left] == 255).all()
    # shrunk, fewer frames than asked for, tall labels, an image beside a clip
    assert sheet([("", [torch.zeros(3, 2, 480, 832)])]).shape[0] == 128 + 2 * CLIP_GAP
    assert sheet([("", [video[:, :2]])], frames=8).shape[1] == 2 * 64 + FRAME_GAP + 3 * CLIP_GAP
    assert sheet([("a very long prompt, café " * 9, [video[:, :1], video])]).shape[0] > 64 + 2 * CLIP_GAP
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("rows", [[], [("empty", [])], [("one dimension short", noise(3, 2, 8, 8))]])
def test_contact_sheet_refuses(tmp_path, rows):
    with pytest.raises(ValueError):
        contact_sheet(tmp_path / "sheet.png", rows)
    assert not list(tmp_path.iterdir())


def test_a_sheet_stays_of_a_size_to_look_at():
    """36 rows of two clips, and one row of five with eight frames each."""
    video = noise(3, 9, 32, 32)
    many = draw_sheet([("a yellow triangle: step_0000250", [video] * 2)] * 36)
    long = draw_sheet([("a red circle: student", [video] * 5)], frames=8)
    assert max(many.size) < 1500 and long.width < 1300
    assert draw_sheet([("student: " + "word " * 200, [video] * 2)]).height < 200
    clip = np.array(draw_sheet([("", [video])], frames=8))[CLIP_GAP:-CLIP_GAP, -CLIP_GAP - 8 * 65 + 1 : -CLIP_GAP]
    pixels, (high, wide) = np.array(long), clip.shape[:2]
    shown = sum(
        (pixels[y : y + high, x : x + wide] == clip).all()
        for x in (long.width - CLIP_GAP - wide, long.width - 2 * (CLIP_GAP + wide))
        for y in (CLIP_GAP + i * (high + CLIP_GAP) for i in range(3))
        if pixels[y : y + high, x : x + wide].shape == clip.shape
    )
    assert shown == 5
