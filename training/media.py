"""Writers of what a person looks at: mp4, contact sheet, and one whose clips move.

A video is a float tensor [3, f, h, w] in [0, 1], RGB; an image is a video with f = 1.
"""

import math
import textwrap
import unicodedata
from fractions import Fraction

import av
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps

from training.files import written_aside

# contact sheet: pixels between clips and between frames, characters in a line of a label, pixels of a row's clips
CLIP_GAP, FRAME_GAP, LABEL_CHARS, ROW_WIDTH = 8, 1, 24, 1100


def to_uint8(video):
    """[3, f, h, w] in [0, 1] (clamped) -> uint8 array [f, h, w, 3]. ValueError on other shapes and on NaN."""
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"expected a video [3, f, h, w], got {list(video.shape)}")
    if not video.isfinite().all():
        raise ValueError("the video has pixels that are not finite")
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
    """Write video [3, f, h, w] in [0, 1] as H.264 (libx264, crf 12, yuv420p); the folder must exist.

    Odd sizes raise ValueError: 4:2:0 chroma needs even ones, and padding would change what is scored.
    """
    frames = to_uint8(video)
    h, w = frames.shape[1:3]
    if h % 2 or w % 2:
        raise ValueError(f"yuv420p needs an even height and width, got {h} x {w}")
    with written_aside(path) as aside:
        with av.open(str(aside), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
            stream.codec_context.thread_type = "FRAME"  # PyAV's default cuts each picture into a slice per thread
            stream.options = h264_options(h, w)
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
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
        try:
            with Image.open(path) as image:
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                return rearrange(pixels.view(1, image.height, image.width, 3), "f h w c -> c f h w").float() / 255
        except (OSError, SyntaxError) as error:
            raise ValueError(f"cannot read {path} ({error})") from None

    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    capture.release()
    if not frames:
        raise ValueError(f"no frames in {path}")
    return rearrange(torch.stack(frames), "f h w c -> c f h w").float() / 255


def contact_sheet(path, rows, frames=4):
    """Write the picture of `draw_sheet` as a PNG and return it. The folder must exist."""
    sheet = draw_sheet(rows, frames)
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")
    return sheet


def moving_sheet(path, rows, fps):
    """Write `draw_sheet` of clips of one length as an animated WebP, in which they move. The folder must exist."""
    length = rows[0][1][0].shape[1]
    at = lambda t: draw_sheet([(label, [clip[:, t : t + 1] for clip in clips]) for label, clips in rows])
    first, *others = [at(t) for t in range(length)]
    with written_aside(path) as aside:
        first.save(aside, "WebP", save_all=True, append_images=others, duration=1000 // fps, loop=0, quality=90)


def draw_sheet(rows, frames=4):
    """A picture with a labelled row for each of rows, a list of (label, clips); ValueError if there is none to show.

    clips [n, 3, f, h, w] or a list of [3, f, h, w], in [0, 1]; each shows `frames` of its frames, the first and last
    among them, 64 to 128 pixels high. Rows that would make the sheet too high stand in columns, and so do wide clips.
    """
    if not rows or not all(len(clips) for _, clips in rows) or frames < 1:
        raise ValueError("a contact sheet needs at least one row, one clip in each row and one frame of each clip")
    font = ImageFont.load_default(14)
    # Pillow's own font has ASCII only: é is drawn as e, other scripts are left out
    ascii_labels = [unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode() for label, _ in rows]
    labels = [textwrap.fill(label, LABEL_CHARS, max_lines=6, placeholder=" ...") for label in ascii_labels]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), label, font=font) for label in labels]
    left, drawn = math.ceil(max(box[2] for box in boxes)) + CLIP_GAP, []
    for label, box, (_, clips) in zip(labels, boxes, rows, strict=True):
        strips = [_strip(clip, frames) for clip in clips]
        clips = _columns(strips, ROW_WIDTH // max(strip.width + CLIP_GAP for strip in strips))
        row = Image.new("RGB", (left + clips.width, max(math.ceil(box[3]), clips.height)), "white")
        ImageDraw.Draw(row).multiline_text((0, 0), label, fill="black", font=font)
        row.paste(clips, (left, 0))
        drawn.append(row)
    total, widest = sum(row.height for row in drawn), max(row.width for row in drawn)
    return ImageOps.expand(_columns(drawn, round(math.sqrt(total / widest))), CLIP_GAP, "white")


def _columns(pictures, most, gap=CLIP_GAP):
    """One picture of all, in cells of one size, below each other in `most` columns or fewer, or in one."""
    down = math.ceil(len(pictures) / max(most, 1))
    w, h = (max(sizes) + gap for sizes in zip(*(picture.size for picture in pictures)))
    whole = Image.new("RGB", (math.ceil(len(pictures) / down) * w - gap, down * h - gap), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i // down * w, i % down * h))
    return whole


def _strip(video, frames):
    """One clip [3, f, h, w] as an image of min(frames, f) evenly spaced frames side by side."""
    pixels = to_uint8(video)
    f, h, w, _ = pixels.shape
    scale = math.ceil(64 / h) if h < 64 else min(1, 128 / h)  # whole pixels where it enlarges
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    shown = torch.linspace(0, f - 1, min(frames, f)).round().int().tolist()
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return _columns([Image.fromarray(pixels[t]).resize(size, method) for t in shown], len(shown), FRAME_GAP)
