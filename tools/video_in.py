"""Read the first frames of a video file as ffplay shows them: upright, square pixels, the file's own colours."""

import math
import struct

import av
import torch
import torch.nn.functional as F
from einops import rearrange

from training.files import UserError, readable

HDR = {16: "PQ, SMPTE 2084", 18: "HLG, ARIB STD-B67"}  # transfer functions by their number in ISO/IEC 23091-2


def read_clip(path, frames, height, width, fps):
    """The first frames of a video at `fps`, [3, f, h, w] float32 in [0, 1], scaled to cover and cropped in the middle.

    Each frame is scaled when it is decoded, so that only one clip of the wanted size is held. UserError if there are
    too few frames, no times, another size midway, HDR, or an angle that is no multiple of 90 degrees.
    """
    clip, count = torch.empty(3, frames, height, width), 0
    with readable(path), av.open(str(path)) as container:
        stream = video_stream(container)
        for frame, times in nearest_frames(timed_frames(container, stream), frames, fps):
            picture = fit(frame, stream.sample_aspect_ratio or 1, height, width)
            clip[:, count : count + times] = picture[:, None]
            count += times
    if count < frames:
        raise UserError(f"it has {count} of {frames} frames at {fps} a second (see --frames)")
    return clip


def video_stream(container):
    """The first stream that is a video; cover pictures and thumbnails are none."""
    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    for stream in container.streams.video:
        if not stream.disposition & still:
            if stream.codec_context is None:
                raise UserError("there is no decoder for its video")
            return stream
    raise UserError("it holds a picture but no video" if container.streams.video else "it holds no video")


def timed_frames(container, stream):
    """Yield (time in seconds, a Fraction; frame) in the order of display, checked to be all of one kind.

    Times are the frames' own, or their packets' where they have none, as in avi.
    """
    kind, last = None, None
    for frame in container.decode(stream):
        transfer = {int(frame.color_trc), int(stream.codec_context.color_trc)} & HDR.keys()
        if transfer:
            raise UserError(f"it is HDR ({HDR[transfer.pop()]}), which is not read: convert it to SDR")
        own = (frame.width, frame.height, *display_matrix(frame))
        if kind not in (None, own):
            raise UserError("its size or orientation changes midway")
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None or (last is not None and stamp <= last):
            raise UserError("its frames have no timestamps that rise")
        kind, last = own, stamp
        yield stamp * frame.time_base, frame


def nearest_frames(timed, frames, fps):
    """Yield (frame, n): the frame is the nearest in time to n of the `frames` times 0, 1 / fps, 2 / fps, … after the
    first. timed: an iterable of (time, frame). The sum of all n is less than `frames` if the video is too short.
    """
    count, last = 0, None
    for time, frame in timed:
        if last is None:
            start = time
        else:  # the frame before is the nearest to every time up to half-way
            end = min(math.ceil(((last[0] + time) / 2 - start) * fps), frames)
            if end > count:
                yield last[1], end - count
                count = end
            if count == frames:
                return
        last = time, frame
    if last:
        end = min(math.floor((last[0] - start) * fps + 0.5) + 1, frames)
        if end > count:
            yield last[1], end - count


def display_matrix(frame):
    """(a, b, c, d) of a frame's display matrix: the picture's point (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = (n / 65536 for n in struct.unpack("=5i", bytes(data)[:20]))
    return a, b, c, d


def fit(frame, aspect, height, width):
    """A decoded frame as [3, height, width] float32 in [0, 1]; aspect: the width of its pixels over their height."""
    picture = rearrange(torch.from_numpy(frame.to_ndarray(format="rgb24")), "h w c -> c h w")
    shown = [picture.shape[1], picture.shape[2] * float(aspect)]
    a, b, c, d = display_matrix(frame)
    if max(abs(b), abs(c)) < 0.01 < min(abs(a), abs(d)):
        picture = picture.flip([dim for dim, sign in ((2, a), (1, d)) if sign < 0])
    elif max(abs(a), abs(d)) < 0.01 < min(abs(b), abs(c)):
        picture, shown = picture.mT.flip([dim for dim, sign in ((2, c), (1, b)) if sign < 0]), shown[::-1]
    else:
        raise UserError(f"it is turned by {math.degrees(math.atan2(b, a)):.0f} degrees, no multiple of 90")
    scale = max(height / shown[0], width / shown[1])
    size = [max(n, round(scale * old)) for n, old in zip((height, width), shown, strict=True)]
    picture = picture.float() / 255
    if size != list(picture.shape[1:]):
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    top, left = ((n - wanted) // 2 for n, wanted in zip(size, (height, width), strict=True))
    return picture[:, top : top + height, left : left + width]
