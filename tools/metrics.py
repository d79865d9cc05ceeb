"""Video metrics that need no pretrained weights, and two writers: mp4 and contact sheet.

A video is a float tensor [3, f, h, w] in [0, 1], RGB; an image is a video with f = 1. Every metric is a pure function
of tensors and returns Python floats. Previews and evaluation use the same functions, so their numbers compare.
"""

import math
import os
import secrets
import textwrap
import unicodedata
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

VENDI_BANDWIDTH = 0.15
CLIP_GAP, FRAME_GAP, LABEL_CHARS = 8, 1, 24  # contact sheet: pixels, pixels, characters in a line of a label


# ---------------------------------------------------------------- diversity


def pooled_distances(clips):
    """RMS differences [s, s], float64, between clips [s, 3, f, h, w] pooled to at most 8 x 8 pixels a frame.

    Pooling makes the distance about layout and colour, not texture; frames are kept, so direction of motion counts.
    """
    s, _, f, h, w = clips.shape
    pooled = F.adaptive_avg_pool3d(clips.float(), (f, min(h, 8), min(w, 8))).double()
    pooled = rearrange(pooled, "s c f h w -> s (c f h w)")
    # never through x @ y: the distance of equal clips must be exactly 0
    distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / pooled.shape[1] ** 0.5


def pairwise_rms(clips):
    """Diversity of the seeds of one prompt: mean RMS difference over pairs of pooled clips.

    clips [s, 3, f, h, w] in [0, 1] -> float in [0, 1]; 0 for one clip.
    """
    s = len(clips)
    return (pooled_distances(clips).sum() / max(s * (s - 1), 1)).item()


def vendi_score(clips, bandwidth=VENDI_BANDWIDTH):
    """Vendi score: the effective number of distinct clips among the seeds of one prompt.

    exp of the Shannon entropy of the eigenvalues of K / s (Friedman & Dieng 2022, arXiv 2210.02410, definition 3.1).
    clips [s, 3, f, h, w] in [0, 1] -> float in [1, s], NaN if a pixel is not finite. Compare only at equal s.
    """
    # A Gaussian kernel on the pooled RMS distance d. The cosine of non-negative pixels is near 1 for any two clips.
    # The bandwidth is fixed, never fitted to the clips, so scores compare over runs. At .15, eight clips all d apart
    # score 1.3, 2.2, 3.7, 5.4, 7.6 for d = .05, .1, .15, .2, .3: the range that seeds of one prompt span.
    kernel = torch.exp(-pooled_distances(clips).square() / (2 * bandwidth**2))
    if not kernel.isfinite().all():
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(kernel / len(clips)).clamp(min=0)  # rounding can leave -1e-17
    return torch.special.entr(eigenvalues).sum().exp().item()


# ---------------------------------------------------------------- colour


def saturation(clips):
    """Colour statistics per frame, averaged over frames and clips.

    clips [..., 3, f, h, w] in [0, 1]; values beyond count as clipped, then are clamped. Returns a dict of floats:
    - saturation: mean HSV S = (max - min) / max, 0 for black; in [0, 1].
    - saturated: share of pixels with S > .9. Near black S is coarse: 8-bit (1, 0, 0) has S = 1.
    - clipped: share of pixels with a channel that is 0 or 255 once rounded to 8 bits, or lies beyond. Rounding first
      gives a float video and its 8-bit copy the same share, and no 8-bit code sits on a threshold; a strict
      x <= 0 or x >= 1 would miss nearly all of a sigmoid's float output. Flat art clips by right: compare with data.
    - colourfulness: Hasler & Süsstrunk 2003, M3 on the 0..255 scale; grey is 0, "extremely colourful" above 109.
    - luma_std: standard deviation of Rec. 709 luma over the pixels of a frame; in [0, .5].
    """
    total = 0
    frames = rearrange(clips, "... c f h w -> (...) f c h w").flatten(0, 1)
    for frame in frames:  # one at a time: the temporaries of a whole 480p batch would take gigabytes
        codes = (frame.float() * 255).round()
        clipped = ((codes <= 0) | (codes >= 255)).any(0)
        red, green, blue = frame = frame.float().clamp(0, 1)
        high, low = frame.amax(0), frame.amin(0)
        s = (high - low) / high.clamp(min=1e-8)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = torch.hypot(red_green.std(correction=0), yellow_blue.std(correction=0))
        colourfulness = 255 * (spread + 0.3 * torch.hypot(red_green.mean(), yellow_blue.mean()))
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        stats = [s.mean(), (s > 0.9).float().mean(), clipped.float().mean(), colourfulness, luma.std(correction=0)]
        total = total + torch.stack(stats).double()
    names = ["saturation", "saturated", "clipped", "colourfulness", "luma_std"]
    return dict(zip(names, (total / len(frames)).tolist(), strict=True))


# ---------------------------------------------------------------- motion


def motion(clips):
    """Change between neighbouring frames, averaged over pixels, channels, frames and clips.

    clips [..., 3, f, h, w] in [0, 1]. Returns a dict of floats in [0, 1]; 0 and 1 for images (f = 1):
    - frame_difference: mean |I_t - I_t+1|.
    - temporal_flickering: 1 - mean |I_t - I_t+1| / 255 on frames rounded to 8 bits: what VBench computes from a decoded
      mp4 (vbench/temporal_flickering.py, without its optional filter for static videos), to 1e-6.
    """
    clips = rearrange(clips, "... c f h w -> (...) c f h w").float()
    if clips.shape[2] == 1:
        return {"frame_difference": 0.0, "temporal_flickering": 1.0}
    difference = flicker = 0
    for clip in clips:
        codes = (clip.clamp(0, 1) * 255).round()
        difference += clip.diff(dim=1).abs().mean(dtype=torch.float64).item() / len(clips)
        flicker += codes.diff(dim=1).abs().mean(dtype=torch.float64).item() / len(clips)
    return {"frame_difference": difference, "temporal_flickering": 1 - flicker / 255}


def smoothness(clips):
    """1 - mean |I_t - (I_t-1 + I_t+1) / 2|: 1 where every frame lies halfway between its neighbours.

    clips [..., 3, f, h, w] in [0, 1] -> float in [0, 1]; 1 for fewer than three frames. VBench's motion_smoothness asks
    a frame interpolation network for the middle frame; here it is the average, so fast motion counts as rough too.
    """
    clips = rearrange(clips, "... c f h w -> (...) c f h w").float()
    if clips.shape[2] < 3:
        return 1.0
    apart = [(c[:, 1:-1] - (c[:, :-2] + c[:, 2:]) / 2).abs().mean(dtype=torch.float64).item() for c in clips]
    return 1 - sum(apart) / len(apart)


def optical_flow(clips, fps):
    """Length of Farnebäck's optical flow at its fastest 5 % of pixels, averaged over pairs of frames and clips.

    clips [..., 3, f, h, w] in [0, 1] at `fps` frames a second -> float >= 0; 0 for images. In VBench's units for
    dynamic_degree, which takes RAFT's flow: pairs of frames 1/8 s apart, pixels of a frame whose shorter side is 256;
    VBench calls a clip dynamic when about a quarter of its pairs exceed 6. Frames larger than that are shrunk first.
    """
    import cv2  # here, so that training needs no OpenCV

    clips = rearrange(clips, "... c f h w -> (...) c f h w")[:, :, :: max(1, round(fps / 8))]
    f, h, w = clips.shape[2:]
    scale = 256 / min(h, w)
    total = 0.0
    for clip in clips if f > 1 else []:
        frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(clip)]
        if scale < 1:
            frames = [cv2.resize(x, (round(w * scale), round(h * scale)), interpolation=cv2.INTER_AREA) for x in frames]
        for before, after in zip(frames, frames[1:], strict=False):
            flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            speed = torch.from_numpy(flow).norm(dim=-1).flatten()
            fastest = speed.topk(max(1, int(0.05 * len(speed)))).values.mean().item()
            total += fastest * max(scale, 1) / (len(clips) * (f - 1))
    return total


def preview_metrics(clips_by_prompt):
    """What a preview logs: s seeds of p prompts [p, s, 3, f, h, w] in [0, 1] -> dict of floats, means over prompts."""
    colours = saturation(clips_by_prompt)
    return {
        "diversity": sum(pairwise_rms(clips) for clips in clips_by_prompt) / len(clips_by_prompt),
        "vendi": sum(vendi_score(clips) for clips in clips_by_prompt) / len(clips_by_prompt),
        "saturation": colours["saturation"],
        "saturated": colours["saturated"],
        "clipped": colours["clipped"],
        "motion": motion(clips_by_prompt)["frame_difference"],
    }


# ---------------------------------------------------------------- writers


@contextmanager
def written_aside(path):
    """Yield a hidden path beside `path`; rename it to `path` when the block succeeds, remove it when it does not.

    Nobody else has that path: processes that write the same file do not disturb each other, the last one stands.
    """
    path = Path(path)
    aside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def to_uint8(video):
    """[3, f, h, w] in [0, 1] (clamped) -> uint8 array [f, h, w, 3]. ValueError on other shapes and on NaN."""
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"expected a video [3, f, h, w], got {list(video.shape)}")
    if not video.isfinite().all():
        raise ValueError("the video has pixels that are not finite")
    return (
        rearrange((video.detach().float().clamp(0, 1) * 255).round().byte(), "c f h w -> f h w c").cpu().numpy().copy()
    )


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

    Odd sizes raise ValueError: 4:2:0 chroma needs even ones, and padding would change what is scored. The frames are
    decoded and counted before the file gets its name; RuntimeError if some are missing.
    """
    frames = to_uint8(video)
    f, h, w, _ = frames.shape
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
        with av.open(str(aside)) as container:
            count = sum(1 for _ in container.decode(video=0))
        if count != f:
            raise RuntimeError(f"{path}: {count} of {f} frames were written")


def read_mp4(path):
    """The frames of a video file as [3, f, h, w] in [0, 1]; ValueError if there are none.

    By OpenCV, as VBench reads it for temporal_flickering: decoders differ in how they upsample chroma.
    """
    import cv2

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


def contact_sheet(path, rows, frames=4, scale=None):
    """Write one PNG: a labelled row of clips for each of rows, a clip shown as evenly spaced frames side by side.

    rows: list of (label, clips), clips [n, 3, f, h, w] or a list of [3, f, h, w], in [0, 1]. A clip shows its first
    frame, its last and some between, `frames` in all or all it has. scale: a whole number enlarges by nearest neighbour
    (crisp pixels), a fraction below 1 shrinks by area averaging, None makes each clip 64 to 128 pixels high. The folder
    must exist; ValueError if there is nothing to show.
    """
    if not rows or not all(len(clips) for _, clips in rows) or frames < 1:
        raise ValueError("a contact sheet needs at least one row, one clip in each row and one frame of each clip")
    font = ImageFont.load_default(14)
    # Pillow's own font has ASCII only: é is drawn as e, other scripts are left out
    ascii_labels = [unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode() for label, _ in rows]
    labels = [textwrap.fill(label, LABEL_CHARS) for label in ascii_labels]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), label, font=font) for label in labels]
    strips = [[_strip(clip, frames, scale) for clip in clips] for _, clips in rows]
    left = math.ceil(max(box[2] for box in boxes)) + 2 * CLIP_GAP
    heights = [max(math.ceil(box[3]), *(strip.height for strip in row)) for box, row in zip(boxes, strips, strict=True)]
    width = left + max(sum(strip.width + CLIP_GAP for strip in row) for row in strips)
    sheet = Image.new("RGB", (width, CLIP_GAP + sum(height + CLIP_GAP for height in heights)), "white")
    draw, y = ImageDraw.Draw(sheet), CLIP_GAP
    for label, row, height in zip(labels, strips, heights, strict=True):
        draw.multiline_text((CLIP_GAP, y), label, fill="black", font=font)
        x = left
        for strip in row:
            sheet.paste(strip, (x, y))
            x += strip.width + CLIP_GAP
        y += height + CLIP_GAP
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")


def _strip(video, frames, scale):
    """One clip [3, f, h, w] as an image of min(frames, f) evenly spaced frames side by side."""
    pixels = to_uint8(video)
    f, h, w, _ = pixels.shape
    if scale is None:
        scale = math.ceil(64 / h) if h < 64 else min(1, 128 / h)
    if scale <= 0 or (scale > 1 and scale != int(scale)):
        raise ValueError(f"scale is a whole number, or a fraction below 1, got {scale}")
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    shown = torch.linspace(0, f - 1, min(frames, f)).round().int().tolist()
    strip = Image.new("RGB", (len(shown) * (size[0] + FRAME_GAP) - FRAME_GAP, size[1]), "white")
    for i, t in enumerate(shown):
        frame = Image.fromarray(pixels[t]).resize(
            size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        )
        strip.paste(frame, (i * (size[0] + FRAME_GAP), 0))
    return strip
