"""tools/make_shards.py: from mp4s with captions to the shards that --data reads."""

import pytest
import torch

import common
import dmd2
from harness.media import write_mp4
from tests.conftest import only_run, small_args
from tiny import world as tiny
from tools import make_shards


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


def test_shards_hold_the_clips_and_train(clips, tmp_path, capsys):
    folder, videos, captions = clips
    make_shards.main(args(folder, tmp_path / "shards"))
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors")) == [
        "00000000.safetensors", "00000002.safetensors",
    ]  # fmt: skip
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    shards = common.Shards(tmp_path / "shards", model, device, keys=("latents",))
    assert shards.prompts == captions
    latents = common.encode(model.load_vae(device), videos)
    error = (shards.latents_of(range(3)) - latents).square().mean().sqrt()
    assert error < 0.2 * latents.square().mean().sqrt()  # what H.264 does to a clip
    text = common.encode_text(model, captions, tmp_path / "cache", device)
    torch.testing.assert_close(shards.cond_of(range(3)), text.cond_of(range(3)))
    before = (tmp_path / "shards" / "00000000.safetensors").stat().st_mtime_ns
    make_shards.main(args(folder, tmp_path / "shards"))
    assert (tmp_path / "shards" / "00000000.safetensors").stat().st_mtime_ns == before
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "runs", data=str(tmp_path / "shards"), steps=1))
    assert only_run(tmp_path / "runs", dmd2)


def test_frame_rate_scale_and_crop(tmp_path):
    """A 16 fps video of 48 x 64 read at 8 fps: every second frame, the middle two thirds."""
    video = torch.zeros(3, 24, 48, 64)
    video[0] = torch.linspace(0.1, 0.9, 24)[:, None, None]
    video[1, :, :, 8:56] = 0.5  # what is left of the width once 48 x 48 are cropped
    write_mp4(tmp_path / "a.mp4", video, 16)
    clip = make_shards.read_clip(tmp_path / "a.mp4", 9, 32, 32, 8)
    assert clip.shape == (3, 9, 32, 32)
    torch.testing.assert_close(clip[0].mean((1, 2)), video[0, :18:2, 0, 0], atol=0.02, rtol=0)
    assert (clip[1, :, :, 2:-2].mean() - 0.5).abs() < 0.02


def test_bad_input(clips, tmp_path, fails):
    folder, _, _ = clips
    out = tmp_path / "shards"
    fails(lambda: make_shards.main(args(tmp_path / "nowhere", out)), "no such folder")
    fails(lambda: make_shards.main(args(folder, out, shard=0)), "--shard must be at least 1")
    fails(lambda: make_shards.main(args(folder, out, frames=0)), "--frames must be at least 1")
    fails(lambda: make_shards.main(args(folder, out, height=480)), "tiny world", "--height")
    fails(lambda: make_shards.read_clip(folder / "0.mp4", 17, 32, 32, 8), "0.mp4", "9 of 17 frames")
    (tmp_path / "empty").mkdir()
    fails(lambda: make_shards.main(args(tmp_path / "empty", out)), "no videos")
    make_shards.main(args(folder, tmp_path / "good"))
    fails(lambda: make_shards.main(args(folder, tmp_path / "good", shard=3)), "other clips or settings")
    (folder / "0.mp4").write_bytes((folder / "1.mp4").read_bytes())  # the name is the same, the clip is not
    fails(lambda: make_shards.main(args(folder, tmp_path / "good")), "other clips or settings")
    (folder / "1.txt").write_text(" \n")
    fails(lambda: make_shards.main(args(folder, out)), "1.txt is empty")
    (folder / "1.txt").unlink()
    fails(lambda: make_shards.main(args(folder, out)), "1.mp4 has no caption")
    (folder / "1.txt").write_text("a red circle")
    (folder / "1.mp4").write_bytes(b"no video")
    fails(lambda: make_shards.main(args(folder, tmp_path / "other")), "cannot read", "1.mp4")
    for suffix in (".mp4", ".txt"):  # left out: the same folder will do
        (folder / f"1{suffix}").unlink()
    make_shards.main(args(folder, tmp_path / "other"))
