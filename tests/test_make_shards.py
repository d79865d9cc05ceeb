"""tools/make_shards.py: from videos with captions to the shards that --data reads. The videos are made here by PyAV."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import common
import dmd2
from models.images import to_pil
from models.latents import encode
from tests.conftest import only_run, small_args
from tests.ranks import on_ranks
from tiny import world as tiny
from tools import make_shards
from tools.make_shards import find_clips
from tools.video_in import read_clip
from training.files import UserError
from training.media import write_mp4


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    videos, captions = tiny.batch(0, range(3))
    for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        write_mp4(folder / f"{i}.mp4", video, tiny.FPS)
        (folder / f"{i}.txt").write_text(f"{caption}\n")
    return folder, videos, captions


def args(clips, out, **flags):
    """--frames, --height and --width are the tiny recipe's."""
    return make_shards.Args(clips, out, **{"teacher": "tiny", "shard": 2, **flags})


def shards(out):
    return common.Shards(out, common.Model("tiny", 9, 32, 32), torch.device("cpu"), keys=("latents",))


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def skipped(out):
    """{name: reason} of skipped.txt."""
    return dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())


def write_video(path, frames, codec="libx264", container=None, matrix=None, **context):
    """frames: a list of uint8 arrays [h, w, 3], shown at 8 a second; context: of the encoder."""
    frames = [av.VideoFrame.from_ndarray(x, format="rgb24") for x in frames]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.codec_context.options = {"crf": "5"} if codec == "libx264" else {}
        if matrix:
            stream.set_display_matrix(matrix)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def corners(size=64, count=9):
    """Frames whose quarters are red, green (above), blue and white (below): which corner is where shows how it lies."""
    frame = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    frame[:half, :half, 0] = frame[:half, half:, 1] = frame[half:, :half, 2] = frame[half:, half:] = 255
    return [frame] * count


def layout(clip):
    """Letters of the colours in the four quarters of the first frame, row by row."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    return "".join(names[tuple(clip[:, 0, y, x].round().int().tolist())] for y in (8, 24) for x in (8, 24))


def reason(path, frames=9):
    with pytest.raises(UserError) as stop:
        read_clip(path, frames, 32, 32, 8)
    return str(stop.value)


def test_shards_hold_the_clips_and_train(clips, tmp_path):
    folder, videos, captions = clips
    out = tmp_path / "shards"
    make_shards.main(args(folder, out))
    assert [path.name[:9] for path in sorted(out.glob("*.safetensors"))] == ["00000000_", "00000002_"]
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    made = shards(out)
    assert made.prompts == captions
    latents = encode(model.load_vae(device), videos)
    error = (made.latents_of(range(3)) - latents).square().mean().sqrt()
    assert error < 0.2 * latents.square().mean().sqrt()  # what H.264 does to a clip
    text = common.encode_text(model, captions, tmp_path / "cache", device)
    torch.testing.assert_close(made.cond_of(range(3)), text.cond_of(range(3)))
    before = files(out)
    next(out.glob("00000002*")).unlink()  # interrupted: it goes on
    make_shards.main(args(folder, out))
    assert files(out) == before
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "runs", data=str(out), steps=1))
    assert only_run(tmp_path / "runs", dmd2)


def test_frame_rate_scale_and_crop(tmp_path):
    """A 16 fps video of 48 x 64 read at 8 fps: every second frame, the middle two thirds. At 32 fps: each one twice."""
    video = torch.zeros(3, 24, 48, 64)
    video[0] = torch.linspace(0.1, 0.9, 24)[:, None, None]
    video[1, :, :, 8:56] = 0.5  # what is left of the width once 48 x 48 are cropped
    write_mp4(tmp_path / "a.mp4", video, 16)
    clip = read_clip(tmp_path / "a.mp4", 9, 32, 32, 8)
    assert clip.shape == (3, 9, 32, 32)
    torch.testing.assert_close(clip[0].mean((1, 2)), video[0, :18:2, 0, 0], atol=0.02, rtol=0)
    assert (clip[1, :, :, 2:-2].mean() - 0.5).abs() < 0.02
    clip = read_clip(tmp_path / "a.mp4", 17, 32, 32, 32)
    # frame k is the nearest to 2 k - 1 (a tie goes to the later one), 2 k
    wanted = video[0, [(k + 1) // 2 for k in range(17)], 0, 0]
    torch.testing.assert_close(clip[0].mean((1, 2)), wanted, atol=0.02, rtol=0)
    assert "it has 13 of 24 frames at 8 a second" in reason(tmp_path / "a.mp4", 24)


def test_a_bad_clip_is_skipped_and_added_when_it_is_repaired(clips, tmp_path):
    folder, _, captions = clips
    out, good = tmp_path / "shards", (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(b"no video")
    write_mp4(folder / "3.mp4", torch.zeros(3, 5, 32, 32), 8)
    (folder / "3.txt").write_text("too short")
    for name, caption in (("4", b" \n"), ("5", b"\xff")):
        write_mp4(folder / f"{name}.mp4", torch.zeros(3, 9, 32, 32), 8)
        (folder / f"{name}.txt").write_bytes(caption)
    make_shards.main(args(folder, out))
    reasons = skipped(out)
    assert list(reasons) == ["1.mp4", "3.mp4", "4.mp4", "5.mp4"]
    assert "cannot read" in reasons["1.mp4"] and "5 of 9 frames" in reasons["3.mp4"]
    assert "caption" in reasons["4.mp4"] and "caption" in reasons["5.mp4"]
    assert shards(out).prompts == [captions[0], captions[2]]
    before = files(out)
    for name in ("3.mp4", "4.mp4", "5.mp4"):
        (folder / name).unlink()
    (folder / "1.mp4").write_bytes(good)
    make_shards.main(args(folder, out))
    assert not skipped(out) and sorted(shards(out).prompts) == sorted(captions)
    assert len(files(out)) == 3 and before.items() <= files(out).items()


@pytest.mark.slow
def test_pictures_are_clips_of_a_teacher_of_images(clips, tmp_path):
    folder, videos, captions = clips
    for i, (name, format) in enumerate((("0.mp4", "png"), ("1.mp4", "webp"))):
        to_pil(videos[i]).save(
            (folder / name).with_suffix(f".{format}"), **{"webp": {"lossless": True}}.get(format, {})
        )
        (folder / name).unlink()
    (folder / "2.mp4").rename(folder / "2.jpg")  # and none
    make_shards.main(args(folder, tmp_path / "out", frames=1))
    data = common.Shards(
        tmp_path / "out", model := common.Model("tiny", 1, 32, 32), torch.device("cpu"), keys=("latents",)
    )
    first = (videos[:2, :, :1] * 255).round() / 255
    torch.testing.assert_close(data.latents_of([0, 1]), encode(model.load_vae(torch.device("cpu")), first))
    assert data.prompts == captions[:2] and list(skipped(tmp_path / "out")) == ["2.jpg"]


def test_two_processes_make_what_one_makes(clips, tmp_path):
    folder, _, _ = clips
    (folder / "1.mp4").write_bytes(b"no video")
    make_shards.main(args(folder, tmp_path / "one", shard=1))
    on_ranks(2, make_shards.main, args(folder, tmp_path / "two", shard=1))
    assert files(tmp_path / "two") == files(tmp_path / "one") and len(files(tmp_path / "one")) == 2
    assert skipped(tmp_path / "two") == skipped(tmp_path / "one")


def test_bad_input(clips, tmp_path, fails):
    folder, _, _ = clips
    out = tmp_path / "shards"
    fails(lambda: make_shards.main(args(tmp_path / "nowhere", out)), "nowhere")
    fails(lambda: make_shards.main(args(folder, out, height=33)), "--height")
    make_shards.main(args(folder, out))
    (folder / "0.mp4").write_bytes((folder / "1.mp4").read_bytes())  # the name is the same, the clip is not
    fails(lambda: make_shards.main(args(folder, out)), "other clips or settings")
    next(out.glob("00000000*")).unlink()  # as it says
    make_shards.main(args(folder, out))
    assert len(shards(out).prompts) == 3
    next(out.glob("*.safetensors")).write_bytes(b"cut")
    fails(lambda: make_shards.main(args(folder, out)), "cannot read")
    fails(lambda: make_shards.main(args(folder, tmp_path / "other", frames=17)), "no clip")


# what is no plain video


def test_a_change_of_size_and_missing_times_are_told(tmp_path):
    for size in (32, 64):
        write_video(tmp_path / f"{size}.ts", corners(size), container="mpegts")
    (tmp_path / "a.mp4").write_bytes((tmp_path / "64.ts").read_bytes() + (tmp_path / "32.ts").read_bytes())
    assert "changes midway" in reason(tmp_path / "a.mp4", 17)
    assert read_clip(tmp_path / "a.mp4", 5, 32, 32, 8).shape == (3, 5, 32, 32)  # before it changes
    assert "timestamps" in reason(write_video(tmp_path / "raw.mp4", corners(), container="h264"))


@pytest.mark.parametrize("name", ["a.MP4", "b.M4V", "c.mov", "d.mkv", "e.Avi", "f.webm"])
def test_containers(tmp_path, name):
    codec = {"e.Avi": "mpeg4", "f.webm": "libvpx-vp9"}.get(name, "libx264")
    (tmp_path / "below").mkdir()
    path = write_video(tmp_path / "below" / name, corners(), codec)
    path.with_suffix(".txt").write_text("\ufeffa caption\n", encoding="utf-8")
    assert find_clips(tmp_path) == ([(f"below/{name}", "a caption")], [])
    assert layout(read_clip(path, 9, 32, 32, 8)) == "rgbw"


# as ffplay shows it

ORIENTATIONS = {  # display matrix (a, b, c, d) -> where the quarters red green / blue white are shown
    (1, 0, 0, 1): "rgbw",
    (0, 1, -1, 0): "brwg",  # a telephone held upright: shown turned by 90 degrees, clockwise
    (-1, 0, 0, -1): "wbgr",
    (0, -1, 1, 0): "gwrb",
    (-1, 0, 0, 1): "grwb",  # mirrored: left and right
    (1, 0, 0, -1): "bwrg",  # above and below
    (0, 1, 1, 0): "rbgw",  # along the diagonal
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_orientation(tmp_path, matrix):
    a, b, c, d = (65536 * n for n in matrix)
    path = write_video(tmp_path / "a.mp4", corners(), matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    assert layout(read_clip(path, 9, 32, 32, 8)) == ORIENTATIONS[matrix]


def test_pixels_that_are_not_square(tmp_path):
    """A disc on 32 x 64 pixels, each twice as wide as high, is round on 64 x 64."""
    y, x = np.mgrid[-31.5:32, -15.5:16]
    disc = ((y**2 + (2 * x) ** 2 < 24**2)[..., None] * 255).astype(np.uint8) * np.ones(3, np.uint8)
    path = write_video(tmp_path / "a.mp4", [disc] * 9, sample_aspect_ratio=Fraction(2))
    clip = read_clip(path, 9, 64, 64, 8)[:, 0].mean(0)
    y, x = torch.meshgrid(torch.arange(-31.5, 32), torch.arange(-31.5, 32), indexing="ij")
    assert (clip - (x**2 + y**2 < 24**2).float()).abs().mean() < 0.03


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    assert f"it is HDR ({name}" in reason(write_video(tmp_path / "a.mp4", corners(), color_trc=transfer))


# tables


TABLES = {
    "a.jsonl": lambda rows: "".join(json.dumps({"id": 1, "file_name": p, "caption": c}) + "\n" for p, c in rows),
    "a.csv": lambda rows: "\ufefffile_name,caption\r\n" + "".join(f'{p},"{c}"\r\n' for p, c in rows),
}


@pytest.mark.parametrize("name", TABLES)
def test_metadata(clips, tmp_path, name):
    """Each clip and caption once, in the order of the table."""
    rows = [("0.mp4", "a circle, red"), ("gone.mp4", "gone"), ("2.mp4", "two"), ("1.mp4", ""), ("2.mp4", "two")]
    (tmp_path / name).write_text(TABLES[name]([*rows, ("2.mp4", "another")]), encoding="utf-8", newline="")
    found, bad = find_clips(clips[0], tmp_path / name)
    assert found == [("0.mp4", "a circle, red"), ("2.mp4", "two"), ("2.mp4", "another")]
    assert [name for name, _ in bad] == ["gone.mp4", "1.mp4"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file_name,title\na.mp4,x\n"),
        ("a.csv", "file_name,caption\na.mp4,a red circle, on grey\n"),
        ("a.jsonl", '{"file_name": "a.mp4", "caption": "x"}\n{"path": \n'),
        ("a.jsonl", '{"file_name": "a.mp4", "caption": "x"}\n7\n'),
    ],
)
def test_bad_metadata(tmp_path, fails, name, text):
    (tmp_path / name).write_text(text)
    fails(lambda: find_clips(tmp_path, tmp_path / name), name)
