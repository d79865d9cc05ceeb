"""tools/make_shards.py: from videos with captions to the shards that --data reads. The videos are made here by PyAV."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import common
import dmd2
from tests.conftest import ROOT, only_run, small_args
from tiny import world as tiny
from tools import make_shards
from tools.video_in.clips import find_clips, read_table
from tools.video_in.video import Unreadable, read_clip
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


def prompts(out):
    return common.Shards(out, common.Model("tiny", 9, 32, 32), torch.device("cpu"), keys=("latents",)).prompts


def skipped(out):
    """{name: reason} of skipped.txt."""
    return dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())


def write_video(path, frames, codec="libx264", container=None, matrix=None, aspect=None, **context):
    """frames: a list of av.VideoFrame, or of uint8 arrays [h, w, 3], shown at 8 a second; context: of the encoder."""
    frames = [x if isinstance(x, av.VideoFrame) else av.VideoFrame.from_ndarray(x, format="rgb24") for x in frames]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.codec_context.options = {"crf": "5"} if codec == "libx264" else {}
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
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
    with pytest.raises(Unreadable) as stop:
        read_clip(path, frames, 32, 32, 8)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_shards_hold_the_clips_and_train(clips, tmp_path):
    folder, videos, captions = clips
    out = tmp_path / "shards"
    make_shards.main(args(folder, out))
    assert [path.name[:9] for path in sorted(out.glob("*.safetensors"))] == ["00000000_", "00000002_"]
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    shards = common.Shards(out, model, device, keys=("latents",))
    assert shards.prompts == captions
    latents = common.encode(model.load_vae(device), videos)
    error = (shards.latents_of(range(3)) - latents).square().mean().sqrt()
    assert error < 0.2 * latents.square().mean().sqrt()  # what H.264 does to a clip
    text = common.encode_text(model, captions, tmp_path / "cache", device)
    torch.testing.assert_close(shards.cond_of(range(3)), text.cond_of(range(3)))
    times = lambda: {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    before = times()
    make_shards.main(args(folder, out))
    assert times() == before
    next(out.glob("00000002*")).unlink()
    make_shards.main(args(folder, out))
    assert times().keys() == before.keys() and sum(times()[name] == time for name, time in before.items()) == 1
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


def test_a_bad_clip_is_skipped_and_leaving_it_out_voids_nothing(clips, tmp_path, capsys):
    folder, _, captions = clips
    out = tmp_path / "shards"
    good = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(b"no video")
    write_mp4(folder / "3.mp4", torch.zeros(3, 5, 32, 32), 8)
    (folder / "3.txt").write_text("too short")
    write_mp4(folder / "4.mp4", torch.zeros(3, 9, 32, 32), 8)
    (folder / "4.txt").write_text(" \n")
    write_mp4(folder / "5.mp4", torch.zeros(3, 9, 32, 32), 8)
    make_shards.main(args(folder, out))
    reasons = skipped(out)
    assert list(reasons) == ["1.mp4", "3.mp4", "4.mp4", "5.mp4"]
    assert "cannot be decoded" in reasons["1.mp4"] and "5 of 9 frames" in reasons["3.mp4"]
    assert "4.txt is empty" in reasons["4.mp4"] and "no caption 5.txt" in reasons["5.mp4"]
    said = capsys.readouterr().out
    assert "2 clips in 2 shards" in said and "4 skipped" in said and "skipped 3.mp4: it has 5 of 9" in said
    assert prompts(out) == [captions[0], captions[2]]
    shards = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    for name in ("1.txt", "1.mp4", "3.mp4", "4.mp4", "5.mp4"):
        (folder / name).unlink()
    make_shards.main(args(folder, out))
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == shards
    assert not (out / "skipped.txt").exists()
    (folder / "1.mp4").write_bytes(good)  # repaired: it is added, alone
    (folder / "1.txt").write_text(captions[1])
    make_shards.main(args(folder, out))
    assert len(list(out.glob("*.safetensors"))) == 3 and sorted(prompts(out)) == sorted(captions)
    assert all((out / name).read_bytes() == content for name, content in shards.items())


def test_two_processes_make_what_one_makes(clips, tmp_path):
    folder, _, _ = clips
    (folder / "1.mp4").write_bytes(b"no video")
    make_shards.main(args(folder, tmp_path / "one", shard=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [str(ROOT / "tools" / "make_shards.py"), str(folder), str(tmp_path / "two"), "--teacher", "tiny"]
    run = subprocess.run([*command, *program, "--shard", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("2 clips in 2 shards") == 1
    assert prompts(tmp_path / "two") == prompts(tmp_path / "one")
    assert skipped(tmp_path / "two") == skipped(tmp_path / "one")
    names = [sorted(path.name for path in (tmp_path / out).glob("*.safetensors")) for out in ("one", "two")]
    assert names[0] == names[1]


def test_bad_input(clips, tmp_path, fails):
    folder, _, _ = clips
    out = tmp_path / "shards"
    fails(lambda: make_shards.main(args(tmp_path / "nowhere", out)), "no such folder")
    fails(lambda: make_shards.main(args(folder, out, shard=0)), "--shard must be at least 1")
    fails(lambda: make_shards.main(args(folder, out, frames=0)), "--frames must be at least 1")
    fails(lambda: make_shards.main(args(folder, out, height=480)), "tiny world", "--height")
    fails(lambda: make_shards.main(args(folder, out, metadata=tmp_path / "none.csv")), "none.csv", "No such file")
    (tmp_path / "empty").mkdir()
    fails(lambda: make_shards.main(args(tmp_path / "empty", out)), "no videos")
    (tmp_path / "empty" / "a.gif").write_bytes(b"")
    fails(lambda: make_shards.main(args(tmp_path / "empty", out)), "no videos", "1 .gif")
    make_shards.main(args(folder, tmp_path / "good"))
    (folder / "0.mp4").write_bytes((folder / "1.mp4").read_bytes())  # the name is the same, the clip is not
    fails(lambda: make_shards.main(args(folder, tmp_path / "good")), "other clips or settings (00000000_")
    next((tmp_path / "good").glob("00000000*")).unlink()  # as it says
    make_shards.main(args(folder, tmp_path / "good"))
    assert len(prompts(tmp_path / "good")) == 3
    next((tmp_path / "good").glob("*.safetensors")).write_bytes(b"cut")
    fails(lambda: make_shards.main(args(folder, tmp_path / "good")), "cannot read shard", "delete it")
    for path in folder.glob("*.mp4"):
        path.write_bytes(b"no video")
    fails(lambda: make_shards.main(args(folder, out)), "not one clip can be used; 3 skipped", "skipped.txt")
    assert not list(out.glob("*.safetensors")) and len(skipped(out)) == 3


# what is no plain video


def test_a_change_of_size_and_missing_times_are_told(tmp_path):
    for size in (32, 64):
        write_video(tmp_path / f"{size}.ts", corners(size), container="mpegts")
    (tmp_path / "a.mp4").write_bytes((tmp_path / "64.ts").read_bytes() + (tmp_path / "32.ts").read_bytes())
    assert "changes midway from 64 x 64 to 32 x 32" in reason(tmp_path / "a.mp4", 17)
    assert read_clip(tmp_path / "a.mp4", 5, 32, 32, 8).shape == (3, 5, 32, 32)  # before it changes
    write_video(tmp_path / "raw.mp4", corners(), container="h264")
    assert "no timestamps" in reason(tmp_path / "raw.mp4")


def write_with_cover(path, video):
    """An mp4 with a black cover picture and a second of sound, and `corners` if video; the cover's stream is first."""
    with av.open(str(path), "w", format="mp4") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        sound = file.add_stream("aac", rate=16000)
        real = file.add_stream("libx264", rate=8) if video else None
        if real:
            real.width, real.height, real.pix_fmt = 64, 64, "yuv420p"
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            file.mux(sound.encode(frame))
        for frame in corners() if video else ():
            file.mux(real.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in filter(None, (sound, real, cover)):
            file.mux(stream.encode())
    path.write_bytes(user_data_first(path.read_bytes()))
    with av.open(str(path)) as file:
        assert file.streams[0].disposition & av.stream.Disposition.attached_pic
    return path


def boxes(data):
    """The boxes of an mp4 or of one of its boxes' contents: [(kind, bytes)]."""
    found = []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append((data[4:8], data[:size]))
        data = data[size:]
    return found


def user_data_first(data):
    """An mp4 with the user data, where the cover lies, before the tracks; it stays as long as it was."""
    moved = lambda box: box[:8] + b"".join(part for _, part in sorted(boxes(box[8:]), key=lambda x: x[0] != b"udta"))
    return b"".join(moved(box) if kind == b"moov" else box for kind, box in boxes(data))


def test_covers_and_sound_are_no_video(tmp_path):
    assert layout(read_clip(write_with_cover(tmp_path / "a.mp4", video=True), 9, 32, 32, 8)) == "rgbw"
    assert "a picture but no video" in reason(write_with_cover(tmp_path / "b.mp4", video=False))
    with av.open(str(tmp_path / "c.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert "it holds no video" in reason(tmp_path / "c.mp4")


def test_which_files_are_looked_at(clips, tmp_path, capsys):
    folder, _, captions = clips
    elsewhere, out = tmp_path / "elsewhere", folder / "shards"
    elsewhere.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)  # the same folder: once
    (elsewhere / "back").symlink_to(folder)  # a circle
    for name in ("a.MP4", "b.M4V", "c.mov", "d.mkv", "e.Avi", "f.webm"):
        codec = {"e.Avi": "mpeg4", "f.webm": "libvpx-vp9"}.get(name, "libx264")
        write_video(elsewhere / name, corners(), codec)
        (elsewhere / name).with_suffix(".txt").write_text(name)
        assert layout(read_clip(elsewhere / name, 9, 32, 32, 8)) == "rgbw"
    (folder / "._0.mp4").write_bytes(b"macOS")
    for name in ("x.jpg", "y.JPG", "z.txt"):
        (folder / name).write_bytes(b"")
    found, bad, aside = find_clips(folder, None, out)
    names = ["0.mp4", "1.mp4", "2.mp4", *(f"again/{name}" for name in ("a.MP4", "b.M4V", "c.mov", "d.mkv", "e.Avi"))]
    assert [clip.name for clip in found] == [*names, "again/f.webm"] and not bad
    assert aside == {"._ (macOS)": 1, ".jpg": 2, ".txt": 1}
    make_shards.main(args(folder, out))
    assert "left aside" in capsys.readouterr().out and len(prompts(out)) == 9
    make_shards.main(args(folder, out))  # its own shards are not counted
    assert f"left aside in {folder}: 1 ._ (macOS), 2 .jpg, 1 .txt\n" in capsys.readouterr().out


def peak_mib(function):
    """MiB by which a call raises this process's resident memory at its peak."""
    memory = lambda name: int(open("/proc/self/status").read().split(f"{name}:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_size_of_the_video(tmp_path):
    """25 frames of 1280 x 720 are 264 MiB as floats and 66 as bytes; one of them is 11."""
    frames = [np.random.default_rng(0).integers(0, 255, (720, 1280, 3), np.uint8)] * 25
    write_video(tmp_path / "a.mp4", frames, "mpeg4")
    read = lambda: read_clip(tmp_path / "a.mp4", 25, 32, 32, 8)
    read()
    assert peak_mib(read) < 60


# as ffplay shows it

ORIENTATIONS = {  # display matrix (a, b, c, d) -> where the quarters red green / blue white are shown
    (1, 0, 0, 1): "rgbw",
    (0, 1, -1, 0): "brwg",  # a telephone held upright: shown turned by 90 degrees, clockwise
    (-1, 0, 0, -1): "wbgr",
    (0, -1, 1, 0): "gwrb",
    (-1, 0, 0, 1): "grwb",  # mirrored: left and right
    (1, 0, 0, -1): "bwrg",  # above and below
    (0, 1, 1, 0): "rbgw",  # along the diagonal
    (0, -1, -1, 0): "wgbr",
}


TURNS = [("mkv", matrix) for matrix in list(ORIENTATIONS)[:4]]  # Matroska has turns only


@pytest.mark.parametrize(("suffix", "matrix"), [*(("mp4", matrix) for matrix in ORIENTATIONS), *TURNS])
def test_orientation(tmp_path, suffix, matrix):
    a, b, c, d = (65536 * n for n in matrix)
    path = write_video(tmp_path / f"a.{suffix}", corners(), matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    assert layout(read_clip(path, 9, 32, 32, 8)) == ORIENTATIONS[matrix]


def test_other_angles_are_told(tmp_path):
    path = write_video(tmp_path / "a.mp4", corners(), matrix=(46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30))
    assert "turned by 45 degrees" in reason(path)


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square(tmp_path, turned):
    """A disc on 32 x 64 pixels, each twice as wide as high, is round on 64 x 64."""
    y, x = np.mgrid[-31.5:32, -15.5:16]
    disc = ((y**2 + (2 * x) ** 2 < 24**2)[..., None] * 255).astype(np.uint8) * np.ones(3, np.uint8)
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) if turned else None
    path = write_video(tmp_path / "a.mp4", [disc] * 9, matrix=matrix, aspect=Fraction(2))
    clip = read_clip(path, 9, 64, 64, 8)[:, 0].mean(0)
    y, x = torch.meshgrid(torch.arange(-31.5, 32), torch.arange(-31.5, 32), indexing="ij")
    assert (clip - (x**2 + y**2 < 24**2).float()).abs().mean() < 0.03


# colours


def yuv_frame(rgb, red, blue, full):
    """A frame of one colour in 4:2:0, by the definition of its matrix: weights of red and blue, full range or not."""
    r, g, b = (n / 255 for n in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    values = y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    scales = (255, 255, 255) if full else (219, 224, 224)
    starts = (0, 128, 128) if full else (16, 128, 128)
    numbers = [round(value * scale + start) for value, scale, start in zip(values, scales, starts, strict=True)]
    planes = [np.full(size, n, np.uint8) for size, n in zip((64 * 64, 32 * 32, 32 * 32), numbers, strict=True)]
    return av.VideoFrame.from_ndarray(np.concatenate(planes).reshape(96, 64), format="yuv420p")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)])
def test_colours(tmp_path, matrix, red, blue, full):
    """matrix: 1 is BT.709, 6 is BT.601, 2 is not said (as 601)."""
    rgb = (200, 50, 30)
    frames = []
    for _ in range(9):
        frame = yuv_frame(rgb, red, blue, full)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frames.append(frame)
    path = write_video(tmp_path / "a.mp4", frames, colorspace=matrix, color_range=2 if full else 1)
    read = 255 * read_clip(path, 9, 32, 32, 8).mean((1, 2, 3))
    torch.testing.assert_close(read, torch.tensor(rgb).float(), atol=3, rtol=0)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    assert f"it is HDR ({name}" in reason(write_video(tmp_path / "a.mp4", corners(), color_trc=transfer))


# captions


def test_captions_that_are_too_long_are_counted(clips, tmp_path, capsys):
    folder, _, captions = clips
    make_shards.main(args(folder, tmp_path / "a"))
    assert "are cut" not in capsys.readouterr().out
    (folder / "1.txt").write_text(f"{captions[1]} " * 200)
    make_shards.main(args(folder, tmp_path / "b"))
    length = common.Model("tiny", 9, 32, 32).text_length
    said = capsys.readouterr().out
    assert f"1 of 3 prompts are cut at the text encoder's {length} tokens, the first: '{captions[1]}" in said


TABLES = {
    "a.jsonl": lambda rows: "".join(json.dumps({"id": 1, "video": p, "text": c}) + "\n" for p, c in rows),
    "a.csv": lambda rows: "\ufefffile_name,caption\r\n" + "".join(f'{p},"{c}"\r\n' for p, c in rows),
    "a.tsv": lambda rows: "prompt\tfps\tpath\n" + "".join(f"{c}\t8\t{p}\n" for p, c in rows),
}


@pytest.mark.parametrize("name", TABLES)
def test_metadata(clips, tmp_path, capsys, name):
    folder, _, captions = clips
    for path in folder.glob("*.txt"):
        path.unlink()
    rows = [("0.mp4", f"{captions[0]}, red"), ("gone.mp4", "gone"), ("2.mp4", captions[2]), ("1.mp4", "")]
    rows += [("2.mp4", captions[2]), ("2.mp4", "another caption")]
    (tmp_path / name).write_text(TABLES[name](rows), encoding="utf-8")
    write_mp4(folder / "unnamed.mp4", torch.zeros(3, 9, 32, 32), 8)
    make_shards.main(args(folder, tmp_path / "out", metadata=tmp_path / name, shard=64))
    assert prompts(tmp_path / "out") == [f"{captions[0]}, red", captions[2], "another caption"]
    reasons = skipped(tmp_path / "out")
    assert "no such file" in reasons["gone.mp4"] and f"caption in {name} is empty" in reasons["1.mp4"]
    assert "named twice" in reasons["2.mp4"]
    assert "1 videos that the table does not name" in capsys.readouterr().out


def test_bad_metadata(tmp_path, fails):
    table = tmp_path / "table"
    for text, *words in (
        ("", "it is empty"),
        ('[{"path": "a.mp4", "text": "x"}]', "JSON list", "one object per line"),
        ("file_name,title\na.mp4,x\n", "no captions", "caption, text, prompt"),
        ("name,caption\na.mp4,x\n", "line 2", "file_name, path, video, file"),
        ('{"path": "a.mp4", "text": "x"}\n{"path": \n', "cannot read", "JSONL"),
        ('{"path": "a.mp4", "text": "x"}\n7\n', "line 2: no JSON object"),
        ("path,text\na.mp4,a red circle, on grey\n", "line 2: more fields than columns", "quotes"),
    ):
        table.write_text(text)
        fails(lambda: read_table(table), *words)
    # a line separator of Unicode's is no end of a line of JSON, and a quoted line break none of CSV
    table.write_text('{"path": "a.mp4", "text": "one\u2028two"}\n', encoding="utf-8")
    assert read_table(table) == [("a.mp4", "one\u2028two")]
    table.write_text('path,text\na.mp4,"one\ntwo"\n\n')
    assert read_table(table) == [("a.mp4", "one\ntwo")]
    table.write_bytes(b"path,text\na.mp4,\xff\n")
    fails(lambda: read_table(table), "cannot read", "utf-8")
