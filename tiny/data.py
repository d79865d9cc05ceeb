"""The tiny world: one coloured shape moves in a straight line over a plain grey background.

A clip is 9 frames of 32 x 32 pixels at 8 frames a second, float32 in [0, 1], laid out `c f h w`. Its caption
("a red circle") fixes the colour and the kind; everything else is free. Clips are functions of (seed, index): any
index, no state, no end. `read_factors` goes the other way, from pixels back to the factors, and says when the pixels
do not show one clean shape: it is the judge of every sample in this repository, so nothing pretrained is needed.

Positions are in pixels from the top-left corner of the frame (pixel j covers [j, j + 1]), directions in radians with
y pointing down, speeds in pixels a frame. `size` is the radius of the circle that has the shape's area.

    video, caption, factors = clip(seed=0, index=7)
    videos, captions = batch(seed=0, indices=range(64))
    print(summary(videos, captions))
"""

import math

import numpy as np
import torch
from einops import rearrange, reduce, repeat

FRAMES, SIZE, FPS = 9, 32, 8
COLORS = ["red", "green", "blue", "yellow"]
KINDS = ["circle", "square", "triangle"]
CAPTIONS = [f"a {color} {kind}" for color in COLORS for kind in KINDS]

# ranges of the free factors, each uniform; the direction is uniform on the circle
RANGES = {
    "speed": (0.5, 1.5),
    "size": (4.5, 6.5),
    "brightness": (0.6, 0.9),
    "saturation": (0.65, 0.95),
    "background": (0.1, 0.4),
}

HUES = torch.tensor([0.0, 120.0, 240.0, 60.0])  # degrees, in the order of COLORS
TINTS = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])  # the same, as fully saturated RGB

# equal areas: half the square's side and the triangle's inscribed radius, for a circle of radius 1
HALF_SIDE = math.sqrt(math.pi) / 2
INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
# how far each kind reaches from its centroid: left, right, up, down (an upright triangle's tip is 2 inradii up)
REACH = {
    "circle": (1, 1, 1, 1),
    "square": (HALF_SIDE,) * 4,
    "triangle": (math.sqrt(3) * INRADIUS, math.sqrt(3) * INRADIUS, 2 * INRADIUS, INRADIUS),
}

# a sample is clean when every frame is explained by one shape up to this relative error (see read_factors)
MAX_RESIDUAL = 0.3
MIN_CHROMA = 0.12


def draw_factors(seed, index, caption=None):
    """Factors of clip `index` of the stream `seed` (integers >= 0), as a dict of floats, color and kind as indices.

    The mid-point of the track is uniform over all places that keep the whole shape inside the frame, so the direction
    stays independent of every other factor.
    """
    rng = np.random.default_rng([seed, index])
    color, kind = divmod(int(rng.integers(len(CAPTIONS))), len(KINDS))
    if caption is not None:
        if caption not in CAPTIONS:
            raise ValueError(f"unknown caption {caption!r}; captions read like {CAPTIONS[0]!r}")
        color, kind = divmod(CAPTIONS.index(caption), len(KINDS))
    f = {name: float(rng.uniform(low, high)) for name, (low, high) in RANGES.items()}
    f["direction"] = float(rng.uniform(-math.pi, math.pi))
    left, right, up, down = (f["size"] * reach for reach in REACH[KINDS[kind]])
    half_x = f["speed"] * math.cos(f["direction"]) * (FRAMES - 1) / 2
    half_y = f["speed"] * math.sin(f["direction"]) * (FRAMES - 1) / 2
    mid_x = rng.uniform(left + abs(half_x), SIZE - right - abs(half_x))
    mid_y = rng.uniform(up + abs(half_y), SIZE - down - abs(half_y))
    return f | {"color": color, "kind": kind, "x": float(mid_x - half_x), "y": float(mid_y - half_y)}


def coverage(x, y, size, edge=1.0):
    """Share of each pixel that each kind covers. x, y: [b, f] centroids, size: [b]. Returns [b, kind, f, h, w].

    Analytic antialiasing: the signed distance of a pixel's centre to the outline, clamped to one pixel's width (`edge`;
    more draws a soft outline); the square is exact.
    """
    grid = torch.arange(SIZE, dtype=x.dtype, device=x.device) + 0.5
    dx = rearrange(grid, "w -> w") - rearrange(x, "b f -> b f 1 1")
    dy = rearrange(grid, "h -> h 1") - rearrange(y, "b f -> b f 1 1")
    r = rearrange(size, "b -> b 1 1 1")
    soft = lambda distance: (distance / edge + 0.5).clamp(0, 1)  # noqa: E731
    circle = soft(r - torch.sqrt(dx**2 + dy**2))
    square = soft(HALF_SIDE * r - dx.abs()) * soft(HALF_SIDE * r - dy.abs())
    slanted = INRADIUS * r + dy / 2 - math.sqrt(3) / 2 * dx.abs()
    triangle = soft(slanted) * soft(INRADIUS * r - dy)
    return torch.stack([circle, square, triangle], dim=1)


def render(factors):
    """Videos [b, 3, f, h, w] of a dict of [b] tensors, see `draw_factors`."""
    f = {name: torch.as_tensor(value) for name, value in factors.items()}
    time = torch.arange(FRAMES)
    x = f["x"][:, None] + f["speed"][:, None] * torch.cos(f["direction"])[:, None] * time
    y = f["y"][:, None] + f["speed"][:, None] * torch.sin(f["direction"])[:, None] * time
    alpha = coverage(x, y, f["size"])[torch.arange(len(x)), f["kind"]]
    color = f["brightness"][:, None] * (1 - f["saturation"][:, None] * (1 - TINTS[f["color"]]))
    alpha, color = rearrange(alpha, "b f h w -> b 1 f h w"), rearrange(color, "b c -> b c 1 1 1")
    background = rearrange(f["background"], "b -> b 1 1 1 1")
    return background + alpha * (color - background)


def batch(seed, indices, captions=None):
    """Videos [b, 3, f, h, w] and their captions; `captions` (a list or one string) fixes them."""
    if captions is None or isinstance(captions, str):
        captions = [captions] * len(indices)
    rows = [draw_factors(seed, int(index), caption) for index, caption in zip(indices, captions, strict=True)]
    factors = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return render(factors), [f"a {COLORS[row['color']]} {KINDS[row['kind']]}" for row in rows]


def clip(seed, index, caption=None):
    """Video [3, f, h, w], its caption, and its factors as a dict; a given `caption` fixes colour and kind."""
    factors = draw_factors(seed, index, caption)
    videos, captions = batch(seed, [index], caption)
    return videos[0], captions[0], factors


def fit(videos, templates):
    """Least squares of videos [b, 3, f, h, w] by ground + template * (color - ground), for templates [b, k, f, h, w].

    Returns the template's energy [b, k, f], color and ground [b, k, 3] (one per clip), and squared errors [b, k, f].
    """
    pixels = rearrange(videos, "b c f h w -> b 1 c f (h w)")
    t = rearrange(templates, "b k f h w -> b k 1 f (h w)")
    mean_t, mean_p = t.mean((-2, -1), keepdim=True), pixels.mean((-2, -1), keepdim=True)
    covariance = (t * pixels).mean((-2, -1), keepdim=True) - mean_t * mean_p
    slope = covariance / ((t * t).mean((-2, -1), keepdim=True) - mean_t**2).clamp(min=1e-6)
    ground = mean_p - slope * mean_t
    error = reduce((pixels - ground - slope * t) ** 2, "b k c f p -> b k f", "sum")
    signal = reduce((slope * t) ** 2, "b k c f p -> b k f", "sum")
    return signal, (ground + slope)[..., 0, 0], ground[..., 0, 0], error


def read_factors(videos):
    """Recover the factors of videos [b, 3, f, h, w] in [0, 1]; a dict of [b] tensors.

    clean       bool: one shape of one colour and one size, on plain grey, in every frame
    color, kind indices into COLORS and KINDS
    x, y        position at frame 0, from a straight line fitted to the centroids; direction and speed are its slope
    size, brightness, saturation, background   as in RANGES
    coherence   RMS distance of the centroids from that line, in pixels: 0 for straight steady motion
    residual    what clean is decided by, see below

    The background is grey, so max - min over the channels is exactly linear in how much of a pixel the shape covers.
    Area and centroids follow; then each kind is drawn there and fitted to the pixels by least squares (colour and
    background), and the kind that explains them best is taken. Clean means that in its worst frame the RMS of what is
    left unexplained is below MAX_RESIDUAL of the RMS of the shape: half a shape, a second shape, a ghost, a blob or a
    change of size or colour is above it.
    """
    if len(videos) > 256:  # small enough to stay in the processor's cache
        parts = [read_factors(part) for part in videos.split(256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    videos = videos.detach().float().nan_to_num()
    b, _, frames, _, _ = videos.shape
    chroma = videos.amax(1) - videos.amin(1)
    # the plateau: colour inside the shape, safe from its soft edge because even the smallest has 10 inner pixels
    plateau = chroma.flatten(2).topk(10).values.mean(dim=(1, 2)).clamp(min=1e-4)
    alpha = chroma / rearrange(plateau, "b -> b 1 1 1")
    alpha = alpha.clamp(max=1) * (alpha > 0.12)  # the codec's noise on the background is no shape
    area = reduce(alpha, "b f h w -> b f", "sum")
    grid = torch.arange(SIZE, device=videos.device) + 0.5
    x = (alpha * grid).sum((-2, -1)) / area.clamp(min=1e-4)
    y = (alpha * grid[:, None]).sum((-2, -1)) / area.clamp(min=1e-4)
    size = torch.sqrt(area.mean(1) / math.pi)

    # the kind by soft templates, because a codec rounds corners; then by sharp ones the colour, from it the size anew
    # (the plateau's brightest pixels overstate the colour, so understate the size), and what is left unexplained
    rows, kind = torch.arange(b, device=videos.device), fit(videos, coverage(x, y, size, edge=2.0))[3].sum(-1).argmin(1)
    _, color, ground, _ = fit(videos, coverage(x, y, size)[rows, kind][:, None])
    tint = (color - ground)[:, 0]
    size = size * torch.sqrt(plateau / (tint.amax(1) - tint.amin(1)).clamp(min=1e-4)).clamp(0.8, 1.25)
    signal, color, ground, error = fit(videos, coverage(x, y, size)[rows, kind][:, None])
    residual = torch.sqrt(error / signal.clamp(min=1e-6)).amax((1, 2))
    color, ground = color[:, 0], ground[:, 0]

    value, low = color.amax(1), color.amin(1)
    hue = torch.atan2(math.sqrt(3) * (color[:, 1] - color[:, 2]), 2 * color[:, 0] - color[:, 1] - color[:, 2])
    away = (hue[:, None] * 180 / math.pi - HUES.to(hue) + 180) % 360 - 180

    time = torch.arange(frames, device=videos.device) - (frames - 1) / 2
    vx, vy = ((p * time).sum(1) / (time**2).sum() for p in (x, y))
    x0, y0 = (p.mean(1) + v * time[0] for p, v in ((x, vx), (y, vy)))
    off_x, off_y = (p - p.mean(1, keepdim=True) - v[:, None] * time for p, v in ((x, vx), (y, vy)))
    low_size, high_size = RANGES["size"]
    clean = (residual < MAX_RESIDUAL) & (value - low > MIN_CHROMA) & (size > low_size / 2) & (size < high_size * 1.5)
    return {
        "clean": clean,
        "color": away.abs().argmin(1),
        "kind": kind,
        "x": x0,
        "y": y0,
        "direction": torch.atan2(vy, vx),
        "speed": torch.sqrt(vx**2 + vy**2),
        "size": size,
        "brightness": value,
        "saturation": (value - low) / value.clamp(min=1e-4),
        "background": ground.mean(1),
        "coherence": torch.sqrt((off_x**2 + off_y**2).mean(1)),
        "residual": residual,
    }


FREE = ["x", "y", "speed", "size", "brightness", "saturation", "background"]


def summary(videos, captions):
    """Figures of videos [b, 3, f, h, w] against their captions, as a dict of floats.

    clean, right      percent of all samples: one clean shape; and also of the colour and kind that the caption says
    <factor>_mean/_std, coherence   over clean samples (NaN if there are fewer than two)
    direction_tv      total variation between the histogram of directions (8 bins) and the uniform one, 0 to 1
    direction_entropy of that histogram, 1 if uniform
    """
    f = read_factors(videos)
    wanted = torch.tensor([CAPTIONS.index(caption) for caption in captions], device=videos.device)
    right = f["clean"] & (f["color"] * len(KINDS) + f["kind"] == wanted)
    out = {"clean": 100 * f["clean"].float().mean().item(), "right": 100 * right.float().mean().item()}
    for name in FREE:
        values = f[name][f["clean"]]
        out[f"{name}_mean"] = values.mean().item()
        out[f"{name}_std"] = values.std().item() if len(values) > 1 else math.nan
    # bins are centred on the axes, so that a drift to the right or up falls into one bin, not two
    bins = torch.round(f["direction"][f["clean"]] / (math.pi / 4)).long() % 8
    share = torch.bincount(bins, minlength=8).float() / max(len(bins), 1)
    out["direction_tv"] = 0.5 * (share - 1 / 8).abs().sum().item()
    out["direction_entropy"] = torch.special.entr(share).sum().item() / math.log(8)
    out["coherence"] = f["coherence"][f["clean"]].mean().item()
    return out


def contact_sheet(rows, frames=(0, 2, 4, 6, 8), scale=2):
    """uint8 image [H, W, 3] of videos [b, 3, f, h, w], one clip under another, its frames side by side."""
    sheet = rearrange(rows[:, :, list(frames)].clamp(0, 1), "b c f h w -> (b h) (f w) c")
    return (repeat(sheet, "h w c -> (h i) (w j) c", i=scale, j=scale) * 255).round().byte().cpu().numpy()
