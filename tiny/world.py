"""The tiny world: one coloured shape slides over a grey background that grows lighter or darker.

A clip is 9 frames of 32 x 32 pixels at 8 frames per second, float32 in [0, 1], laid out `c f h w`. A caption names its
colour, kind and direction, or some of them, or none: "a red circle moving left", "a red circle", "a circle",
"a red shape", "a shape". What it leaves open are its modes: 1, 4, 16, 12 and 48 of them. Everything else is always
free. A clip is a function of (seed, index). tiny/measures.py reads the factors back from the pixels.

Positions are in pixels from the top-left corner of the frame (pixel j covers [j, j + 1]), speeds in pixels per frame.
`size` is the radius of the circle that has the shape's area, `background` the mean grey level over the clip and `ramp`
the level of its last frame less that of its first.

    videos, captions = batch(seed=0, indices=range(64))
"""

import math
from itertools import product

import numpy as np
import torch
from einops import rearrange

FRAMES, SIZE, FPS = 9, 32, 8
COLORS = ["red", "green", "blue", "yellow"]
KINDS = ["circle", "square", "triangle"]
DIRECTIONS = ["left", "right", "up", "down"]

# ranges of the factors that no caption names, each uniform
RANGES = {
    "speed": (0.8, 1.6),
    "size": (5.0, 7.0),
    "brightness": (0.6, 0.9),
    "saturation": (0.65, 0.95),
    "background": (0.2, 0.4),
    "ramp": (-0.25, 0.25),
}

# what each level of detail names, and how it reads; clips have a level with equal chances
LEVELS = {
    "a shape": (),
    "a circle": ("kind",),
    "a red shape": ("color",),
    "a red circle": ("color", "kind"),
    "a red circle moving left": ("color", "kind", "direction"),
}
MODES = {"color": COLORS, "kind": KINDS, "direction": DIRECTIONS}


def caption_of(named):
    """The caption that names these modes: a dict of indices of some of `color`, `kind` and `direction`."""
    words = [MODES[name][named[name]] if name in named else "" for name in MODES]
    moving = f"moving {words[2]}" if words[2] else ""
    return " ".join(word for word in ("a", words[0], words[1] or "shape", moving) if word)


# what previews and tables show: every look is left open somewhere, and every direction
EXAMPLES = [
    "a shape", "a circle", "a red shape", "a yellow circle moving up", "a square", "a triangle", "a green shape",
    "a blue shape", "a yellow shape", "a red circle", "a green square", "a blue triangle moving left",
]  # fmt: skip
# {caption: the modes it names}, the examples first
NAMED = dict.fromkeys(EXAMPLES)
for names in LEVELS.values():
    for indices in product(*(range(len(MODES[name])) for name in names)):
        named = dict(zip(names, indices))
        NAMED[caption_of(named)] = named
CAPTIONS = list(NAMED)

# how x and y change in each of DIRECTIONS; y points down
STEPS = [(-1, 0), (1, 0), (0, -1), (0, 1)]
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
    """Factors of clip `index` of the stream `seed` (integers >= 0), as a dict: floats, color, kind and direction as
    indices, caption as an index into CAPTIONS.

    A given caption changes what it names and nothing else. The mid-point of the track is uniform over all places that
    keep the whole shape inside the frame, so the direction stays independent of every other factor.
    """
    rng = np.random.default_rng([seed, index])
    f = {name: int(rng.integers(len(values))) for name, values in MODES.items()}
    names = list(LEVELS.values())[rng.integers(len(LEVELS))]  # drawn in any case, so that later draws stay the same
    if caption is None:
        caption = caption_of({name: f[name] for name in names})
    elif caption not in NAMED:
        raise ValueError(f"unknown caption {caption!r}; captions read like {CAPTIONS[-1]!r}")
    f |= NAMED[caption] | {"caption": CAPTIONS.index(caption)}
    f |= {name: float(rng.uniform(low, high)) for name, (low, high) in RANGES.items()}
    left, right, up, down = (f["size"] * reach for reach in REACH[KINDS[f["kind"]]])
    half_x, half_y = (f["speed"] * step * (FRAMES - 1) / 2 for step in STEPS[f["direction"]])
    mid_x = rng.uniform(left + abs(half_x), SIZE - right - abs(half_x))
    mid_y = rng.uniform(up + abs(half_y), SIZE - down - abs(half_y))
    return f | {"x": float(mid_x - half_x), "y": float(mid_y - half_y)}


def coverage(x, y, size, edge=1.0):
    """Share of each pixel that each kind covers. x, y: [b, f] centroids, size: [b]. Returns [b, kind, f, h, w].

    Analytic antialiasing: the share falls from 1 to 0 with the signed distance of a pixel's centre to the outline, over
    `edge` pixels. With edge 1 the square is exact; more draws a soft outline.
    """
    grid = torch.arange(SIZE, dtype=x.dtype, device=x.device) + 0.5
    dx = grid - rearrange(x, "b f -> b f 1 1")
    dy = grid[:, None] - rearrange(y, "b f -> b f 1 1")
    r = rearrange(size, "b -> b 1 1 1")

    def soft(distance):
        return (distance / edge + 0.5).clamp(0, 1)

    circle = soft(r - torch.sqrt(dx**2 + dy**2))
    square = soft(HALF_SIDE * r - dx.abs()) * soft(HALF_SIDE * r - dy.abs())
    slanted = INRADIUS * r + dy / 2 - math.sqrt(3) / 2 * dx.abs()
    triangle = soft(slanted) * soft(INRADIUS * r - dy)
    return torch.stack([circle, square, triangle], dim=1)


def render(factors):
    """Videos [b, 3, f, h, w] of a dict of [b] tensors, see `draw_factors`."""
    f = {name: torch.as_tensor(value) for name, value in factors.items()}
    time, step = torch.arange(FRAMES), f["speed"][:, None] * torch.tensor(STEPS)[f["direction"]]
    x, y = f["x"][:, None] + step[:, :1] * time, f["y"][:, None] + step[:, 1:] * time
    alpha = coverage(x, y, f["size"])[torch.arange(len(x)), f["kind"]]
    color = f["brightness"][:, None] * (1 - f["saturation"][:, None] * (1 - TINTS[f["color"]]))
    alpha, color = rearrange(alpha, "b f h w -> b 1 f h w"), rearrange(color, "b c -> b c 1 1 1")
    background = f["background"][:, None] + f["ramp"][:, None] * (time / (FRAMES - 1) - 0.5)
    background = rearrange(background, "b f -> b 1 f 1 1")
    return background + alpha * (color - background)


def batch(seed, indices, captions=None):
    """Videos [b, 3, f, h, w] of these clips and their captions; a list `captions` fixes what each names."""
    captions = captions or [None] * len(indices)
    rows = [draw_factors(seed, int(index), caption) for index, caption in zip(indices, captions, strict=True)]
    factors = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return render(factors), [CAPTIONS[row["caption"]] for row in rows]


def others(seed, index, caption, count, draw=0):
    """Factors, a dict of [count] tensors, of other clips that begin with the first frame of this one.

    Exact by importance sampling among 4,096 tries: speed, ramp and direction are uniform, weighed by how likely the
    world puts the shape where it is and the grey where it is. A direction that the caption names stays.
    """
    tries = 4096
    f, rng = draw_factors(seed, index, caption), np.random.default_rng([seed, index, 1, draw])
    speed, ramp = rng.uniform(*RANGES["speed"], tries), rng.uniform(*RANGES["ramp"], tries)
    direction = rng.integers(len(DIRECTIONS), size=tries)
    if "direction" in NAMED[CAPTIONS[f["caption"]]]:
        direction[:] = f["direction"]
    background, (lowest, highest) = f["background"] + (ramp - f["ramp"]) / 2, RANGES["background"]
    weight = 1.0 * (lowest <= background) * (background <= highest)
    left, right, up, down = (f["size"] * reach for reach in REACH[KINDS[f["kind"]]])
    half_x, half_y = speed * np.array(STEPS)[direction].T * (FRAMES - 1) / 2
    for start, half, before, after in ((f["x"], half_x, left, right), (f["y"], half_y, up, down)):
        low, high = before + abs(half), SIZE - after - abs(half)  # of the middle of the track, see draw_factors
        weight *= (low <= start + half) * (start + half <= high) / (high - low)
    picked = rng.choice(tries, count, p=weight / weight.sum())
    new = {"speed": speed, "direction": direction, "ramp": ramp, "background": background}
    same = {name: torch.tensor([x] * count) for name, x in f.items()}
    return same | {name: torch.from_numpy(x[picked]).to(same[name].dtype) for name, x in new.items()}


def continuations(seed, index, caption, count, draw=0):
    """Videos [count, 3, f, h, w] of other clips that begin with the first frame of clip (seed, index, caption)."""
    return render(others(seed, index, caption, count, draw))
