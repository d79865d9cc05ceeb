"""The tiny world: one coloured shape moves in a straight line over a plain grey background.

A clip is 9 frames of 32 x 32 pixels at 8 frames per second, float32 in [0, 1], laid out `c f h w`. Its caption
("a red circle") fixes the colour and the kind; everything else is free. A clip is a function of (seed, index), so there
is no state and no last clip. tiny/measures.py goes the other way, from pixels back to the factors.

Positions are in pixels from the top-left corner of the frame (pixel j covers [j, j + 1]), directions in radians with
y pointing down, speeds in pixels per frame. `size` is the radius of the circle that has the shape's area.

    video, caption, factors = clip(seed=0, index=7)
    videos, captions = batch(seed=0, indices=range(64))
"""

import math

import numpy as np
import torch
from einops import rearrange

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

# fully saturated RGB, in the order of COLORS
TINTS = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])

# equal areas: half the square's side and the triangle's inscribed radius, for a circle of radius 1
HALF_SIDE = math.sqrt(math.pi) / 2
INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
# how far each kind reaches from its centroid: left, right, up, down (an upright triangle's tip is 2 inradii up)
REACH = {
    "circle": (1, 1, 1, 1),
    "square": (HALF_SIDE,) * 4,
    "triangle": (math.sqrt(3) * INRADIUS, math.sqrt(3) * INRADIUS, 2 * INRADIUS, INRADIUS),
}


def draw_factors(seed, index, caption=None):
    """Factors of clip `index` of the stream `seed` (integers >= 0), as a dict of floats, color and kind as indices.

    A given caption changes color and kind only. The mid-point of the track is uniform over all places that keep the
    whole shape inside the frame, so the direction stays independent of every other factor.
    """
    rng = np.random.default_rng([seed, index])
    number = int(rng.integers(len(CAPTIONS)))  # drawn in any case, so that the later draws stay the same
    if caption is not None:
        if caption not in CAPTIONS:
            raise ValueError(f"unknown caption {caption!r}; captions read like {CAPTIONS[0]!r}")
        number = CAPTIONS.index(caption)
    color, kind = divmod(number, len(KINDS))
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

    Analytic antialiasing: the share falls from 1 to 0 with the signed distance of a pixel's centre to the outline, over
    `edge` pixels. With edge 1 the square is exact; more draws a soft outline.
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
    videos, captions = batch(seed, [index], caption)
    return videos[0], captions[0], draw_factors(seed, index, caption)


def other_motions(seed, index, caption, count, draw=0):
    """Speeds and directions, two tensors [count], of other clips that begin with the first frame of a clip.

    They are drawn from what the world gives a shape that is there: uniform, weighed by how likely each puts it there
    (the middle of a track is uniform where the whole shape stays inside), among 4,096 tries.
    """
    f, rng = draw_factors(seed, index, caption), np.random.default_rng([seed, index, 1, draw])
    speed, direction = rng.uniform(*RANGES["speed"], 4096), rng.uniform(-math.pi, math.pi, 4096)
    weight = np.ones(4096)
    reach = [f["size"] * reach for reach in REACH[KINDS[f["kind"]]]]
    for start, step, (before, after) in (("x", np.cos(direction), reach[:2]), ("y", np.sin(direction), reach[2:])):
        half = speed * step * (FRAMES - 1) / 2
        low, high = before + abs(half), SIZE - after - abs(half)
        weight *= (low <= f[start] + half) * (f[start] + half <= high) / (high - low)
    picked = rng.choice(4096, count, p=weight / weight.sum())
    return torch.from_numpy(speed[picked]).float(), torch.from_numpy(direction[picked]).float()


def continuations(seed, index, caption, count, draw=0):
    """Videos [count, 3, f, h, w] of other clips that begin with the first frame of clip (seed, index, caption)."""
    speed, direction = other_motions(seed, index, caption, count, draw)
    same = {name: torch.tensor([x] * count) for name, x in draw_factors(seed, index, caption).items()}
    return render(same | {"speed": speed, "direction": direction})
