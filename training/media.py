"""Writers of what a person looks at: mp4, contact sheet, and one whose clips move.

A video is a float tensor [3, f, h, w] in [0, 1], RGB; an image is a video with f = 1.
"""

import math
import textwrap
from fractions import Fraction

import av
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps

from training.files import UserError, written_aside

# contact sheet: pixels between clips, characters and pixels of a label, pixels of a frame
GAP, LABEL_CHARS, LABEL_WIDTH, HIGH = 8, 24, 190, 128


def to_uint8(video):
    """[3, f, h, w] in [0, 1] (clamped) -> uint8 array [f, h, w, 3]."""
    if not video.isfinite().all():
        raise UserError("a video has pixels that are not finite: something broke before it")
    codes = (video.detach().float().clamp(0, 1) * 255).round().byte()
    return rearrange(codes, "c f h w -> f h w c").cpu().numpy().copy()


def h264_options(h, w):
    """Options of libx264 for frames of h x w pixels; written beside every number that is measured on the result."""
    options = {"crf": "12", "threads": "4"}  # fixed: x264's output depends on their number
    if min(h, w) <= 32:
        # frames of two macroblocks or fewer: x264's macroblock tree then reads memory it never wrote, and the same clip
        # gives one of several files (measured: 55 of 150 differ at 32 x 32, none of 200 at 64 x 64, none of 400 so)
        options["x264-params"] = "mbtree=0"
    return options


def write_mp4(path, video, fps):
    """Write video [3, f, h, w] in [0, 1], h and w even, as H.264 (libx264, crf 12, yuv420p)."""
    h, w = video.shape[2:]
    with written_aside(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.codec_context.thread_type = "FRAME"  # PyAV's default cuts each picture into a slice per thread
        stream.options = h264_options(h, w)
        for frame in video.split(1, dim=1):  # one at a time: a whole clip would be copied several times
            container.mux(stream.encode(av.VideoFrame.from_ndarray(to_uint8(frame)[0], format="rgb24")))
        container.mux(stream.encode())


def write_video(path, video, fps):
    """Write a video as <path>.mp4, an image as <path>.png."""
    if video.shape[1] > 1:
        write_mp4(path.with_suffix(".mp4"), video, fps)
        return
    with written_aside(path.with_suffix(".png")) as aside:
        Image.fromarray(to_uint8(video)[0]).save(aside, format="PNG")


def read_video(path):
    """The frames of a file of `write_video` as [3, f, h, w] in [0, 1]; ValueError if there are none.

    A video by OpenCV, as VBench reads it for temporal_flickering: decoders differ in how they upsample chroma.
    """
    import cv2

    if path.suffix == ".png":
        return rearrange(torch.from_numpy(cv2.imread(str(path))).flip(-1), "h w c -> c 1 h w").float() / 255
    capture, frames = cv2.VideoCapture(str(path)), []
    found, frame = capture.read()
    while found:
        frames.append(torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
        found, frame = capture.read()
    capture.release()
    if not frames:
        raise ValueError(f"no frames in {path}")
    return rearrange(torch.stack(frames), "f h w c -> c f h w").float() / 255


def thumbnail(clip):
    """What a sheet shows of a clip [3, f, h, w]: four frames, first and last among them, at most HIGH pixels high."""
    frames = clip[:, torch.linspace(0, clip.shape[1] - 1, min(4, clip.shape[1])).round().long()]
    scale = min(1, HIGH / clip.shape[2])
    return F.interpolate(frames, size=[round(n * scale) for n in clip.shape[2:]], mode="area")


def contact_sheet(path, rows):
    """Write the picture of `draw_sheet` as a PNG and return it."""
    sheet = draw_sheet(rows)
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")
    return sheet


def moving_sheet(path, rows, fps):
    """Write `draw_sheet` of clips of one length as an animated WebP, in which they move."""
    length = rows[0][1][0].shape[1]
    at = lambda t: draw_sheet([(label, [clip[:, t : t + 1] for clip in clips]) for label, clips in rows])
    first, *others = [at(t) for t in range(length)]
    with written_aside(path) as aside:
        first.save(aside, "WebP", save_all=True, append_images=others, duration=1000 // fps, loop=0, quality=90)


def draw_sheet(rows):
    """A picture with a labelled row for each of rows, a list of (label, clips), in as many columns as make it square.

    clips [n, 3, f, h, w] or a list of [3, f, h, w], in [0, 1]; each is shown as a `thumbnail`, at least 64 pixels high.
    """
    font, pictures = ImageFont.load_default(14), []
    for label, clips in rows:
        shown = torch.stack([torch.from_numpy(to_uint8(thumbnail(clip))) for clip in clips])
        strips = rearrange(F.pad(shown, (0, 0, 0, 1), value=255), "n t h w c -> n h (t w) c")
        row = Image.fromarray(rearrange(F.pad(strips, (0, 0, 0, GAP), value=255), "n h w c -> h (n w) c").numpy())
        scale = math.ceil(64 / row.height)  # whole pixels
        row = row.resize([side * scale for side in row.size], Image.Resampling.NEAREST)
        label = textwrap.fill(label, LABEL_CHARS, max_lines=4, placeholder=" ...")
        pictures.append(ImageOps.expand(row, (LABEL_WIDTH, 0, 0, GAP), "white"))
        ImageDraw.Draw(pictures[-1]).multiline_text((GAP, 0), label, fill="black", font=font)
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures)))
    columns = max(1, round(math.sqrt(len(pictures) * height / width)))
    down = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (width * columns, height * down), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i // down * width, i % down * height))
    return sheet
