"""Exact cases for training/metrics.py and the writers in training/media.py."""

import colorsys
import math

import av
import numpy as np
import pytest
import torch

from evaluation.proxies import vendi_score
from training.files import UserError
from training.media import GAP, LABEL_WIDTH, draw_sheet, write_mp4
from training.metrics import frame_difference, pairwise_rms, preview_metrics, saturation


def plain(*rgb, f=3, size=16):
    return torch.tensor(rgb).view(3, 1, 1, 1).expand(3, f, size, size).contiguous()


def grey(level):
    return plain(level, level, level)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def moving_square(speed, f=5, size=32):
    video = torch.full((3, f, size, size), 0.2)
    for t in range(f):
        video[0, t, 8:16, 4 + speed * t : 12 + speed * t] = 0.8
    return video


# ---------------------------------------------------------------- diversity


def test_pairwise_rms():
    clips = torch.stack([grey(0.2), grey(0.3), grey(0.5)])
    assert pairwise_rms(clips) == pytest.approx((0.1 + 0.2 + 0.3) / 3, abs=1e-6)
    red = torch.stack([grey(0.2), plain(0.5, 0.2, 0.2)])
    assert pairwise_rms(red) == pytest.approx(0.3 / math.sqrt(3), abs=1e-6)  # root of the mean square, not a mean
    assert pairwise_rms(clips[:1]) == pairwise_rms(clips[:1].expand(4, -1, -1, -1, -1)) == 0
    stripes = (torch.arange(32) % 2).float().expand(3, 4, 32, 32)
    assert pairwise_rms(torch.stack([stripes, 1 - stripes])) == pytest.approx(0, abs=1e-6)  # texture
    video = moving_square(4)
    assert pairwise_rms(torch.stack([video, video.flip(1)])) > 0.05  # the same frames, the other direction


def test_vendi_score_runs_from_one_to_the_number_of_clips():
    corners = torch.stack([plain(*(float(i >> k & 1) for k in range(3))) for i in range(8)])
    assert vendi_score(corners) == pytest.approx(8, abs=0.01)
    assert vendi_score(corners[[0, 0, 0, 7, 7, 7]]) == pytest.approx(2, abs=1e-3)  # two modes, three copies each
    assert vendi_score(corners[[1, 1]]) == pytest.approx(1, abs=1e-6)
    k = math.exp(-0.5)  # one bandwidth apart
    high, low = (1 + k) / 2, (1 - k) / 2
    by_hand = math.exp(-high * math.log(high) - low * math.log(low))
    assert vendi_score(torch.stack([grey(0.3), grey(0.45)])) == pytest.approx(by_hand, abs=1e-5)


# ---------------------------------------------------------------- colour and motion


def test_saturation_against_colorsys():
    clip = noise(2, 3, 2, 4, 4)
    s = np.array([colorsys.rgb_to_hsv(*pixel)[1] for pixel in clip.double().movedim(1, -1).reshape(-1, 3).tolist()])
    assert saturation(clip)["saturation"] == pytest.approx(s.mean(), abs=1e-6)
    assert 0 < saturation(clip)["saturated"] == pytest.approx((s > 0.9).mean(), abs=1e-6)
    assert saturation(grey(0.0)) == {"saturation": 0, "saturated": 0, "clipped": 1}


@pytest.mark.parametrize("code, clipped", [(-9, 1), (0.4, 1), (1, 0), (254, 0), (254.6, 1), (280, 1)])
def test_clipped_means_code_0_or_255(code, clipped):
    clip = torch.cat([plain(0.5, code / 255, 0.5), grey(0.5)], dim=1)
    assert saturation(clip)["clipped"] == clipped / 2


def test_a_moving_square_moves_more_than_a_still_one():
    still, slow, fast = (frame_difference(moving_square(speed)) for speed in (0, 1, 4))
    # at speed v, 2 v columns of 8 pixels change by .6 in one of three channels
    assert still == 0 and slow == pytest.approx(2 * 8 * 0.6 / (3 * 32 * 32), rel=1e-5)
    assert fast == pytest.approx(4 * slow, rel=1e-5)


def test_preview_metrics_are_means_over_prompts():
    still = torch.stack([moving_square(0)] * 2)
    varied = torch.stack([moving_square(2), plain(1.0, 0.0, 0.0, f=5, size=32)])
    got, own = preview_metrics(torch.stack([still, varied])), saturation(varied)["saturation"]
    wanted = {"diversity": pairwise_rms(varied) / 2, "saturation": (saturation(still)["saturation"] + own) / 2}
    wanted |= {"saturated": 1 / 4, "clipped": 1 / 4, "motion": frame_difference(moving_square(2)) / 4}
    assert got == pytest.approx(wanted) and got["diversity"] > 0


# ---------------------------------------------------------------- writers


def test_mp4_round_trip(tmp_path):
    row, column = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    time = torch.linspace(0.2, 0.8, 17).view(17, 1, 1).expand(17, 32, 48)
    video = torch.stack([time, row.expand_as(time), column.expand_as(time)])  # red is time: order matters
    write_mp4(tmp_path / "a b é.mp4", video, 23.976)
    with av.open(str(tmp_path / "a b é.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(23.976, rel=1e-4)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (17, 32, 48, 3) and np.abs(frames / 255 - video.movedim(0, -1).numpy()).mean() < 0.01


@pytest.mark.parametrize("video", [torch.zeros(3, 2, 33, 32), torch.full((3, 2, 32, 32), math.nan)])
def test_mp4_refuses_and_keeps_what_was_there(tmp_path, video):
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises((UserError, av.error.FFmpegError)):
        write_mp4(tmp_path / "a.mp4", video, 8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.mp4", "old")]


def test_contact_sheet():
    """Its last frame is the last one of the clip, each pixel an exact 2 x 2 block; large frames are shrunk."""
    video = noise(3, 9, 32, 32)
    left = LABEL_WIDTH + 3 * 2 * (32 + 1)  # after three frames with a white column each
    last = np.array(draw_sheet([("red", [video])]))[:64, left : left + 64]
    expected = (video[:, -1] * 255).round().byte().movedim(0, -1).numpy()
    assert (last == expected.repeat(2, axis=0).repeat(2, axis=1)).all()
    assert draw_sheet([("", [torch.zeros(3, 2, 480, 832)])]).height == 128 + GAP
