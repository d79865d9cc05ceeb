"""The judge of every sample of the tiny world, so that nothing pretrained is needed.

`read_factors` reads a clip's factors back from its pixels, and says when they do not show one clean shape.
"""

import math

import torch
from einops import rearrange, reduce

from tiny.world import CAPTIONS, KINDS, RANGES, SIZE, coverage

HUES = torch.tensor([0.0, 120.0, 240.0, 60.0])  # degrees, in the order of COLORS
# the free factors whose mean and spread `summary` gives; the direction has figures of its own
FREE = ["x", "y", "speed", "size", "brightness", "saturation", "background"]

# a sample is clean when every frame is explained by one shape up to this relative error (see read_factors)
MAX_RESIDUAL = 0.3
MIN_CHROMA = 0.12


def fit(videos, templates):
    """Least squares of videos [b, 3, f, h, w] by ground + template * (color - ground), for templates [b, k, f, h, w].

    Color and ground are one per clip and template. Returns the energy of template * (color - ground) [b, k, f], color
    [b, k, 3], ground [b, k, 3, 1], and the squared error [b, k, f].
    """
    pixels = rearrange(videos, "b c f h w -> b 1 c f (h w)")
    t = rearrange(templates, "b k f h w -> b k 1 f (h w)")
    mean_t, mean_p = t.mean((-2, -1), keepdim=True), pixels.mean((-2, -1), keepdim=True)
    covariance = (t * pixels).mean((-2, -1), keepdim=True) - mean_t * mean_p
    slope = covariance / ((t * t).mean((-2, -1), keepdim=True) - mean_t**2).clamp(min=1e-6)
    ground = mean_p - slope * mean_t
    error = reduce((pixels - ground - slope * t) ** 2, "b k c f p -> b k f", "sum")
    signal = reduce((slope * t) ** 2, "b k c f p -> b k f", "sum")
    return signal, (ground + slope)[..., 0, 0], ground[..., 0], error


def read_factors(videos, fit=fit, sizes=RANGES["size"]):
    """Recover the factors of videos [b, 3, f, h, w] in [0, 1]; a dict of [b] tensors.

    clean       bool: one shape of one colour and one size, on plain grey, in every frame
    color, kind indices into COLORS and KINDS
    x, y        position at frame 0, from a straight line fitted to the centroids; direction and speed are its slope
    size, brightness, saturation, background   as in RANGES; ground: its grey as a world's `fit` has it, [b, 1 or f]
    coherence   RMS distance of the centroids from that line, in pixels: 0 for straight steady motion
    residual    what clean is decided by, see below

    The background is grey, so max - min over the channels is exactly linear in how much of a pixel the shape covers.
    Area and centroids follow. Then each kind is drawn there and fitted to the pixels, and the one that explains them
    best is taken. Clean means that in its worst frame the RMS of what is left unexplained is below MAX_RESIDUAL of the
    RMS of the shape: half a shape, a second shape, a ghost, a blob or a change of size or colour is above it.
    """
    if len(videos) > 256:  # small enough to stay in the processor's cache
        parts = [read_factors(part, fit, sizes) for part in videos.split(256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    videos = videos.detach().float().nan_to_num()
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

    # soft templates find the kind, because a codec rounds corners
    kind = fit(videos, coverage(x, y, size, edge=2.0))[3].sum(-1).argmin(1)
    rows = torch.arange(len(videos), device=videos.device)
    # a sharp one of that kind finds the colour, and from it the size anew: the plateau's brightest pixels overstate the
    # colour, so the first size is too small
    _, color, ground, _ = fit(videos, coverage(x, y, size)[rows, kind][:, None])
    tint = (color - ground.mean(-1))[:, 0]
    size = size * torch.sqrt(plateau / (tint.amax(1) - tint.amin(1)).clamp(min=1e-4)).clamp(0.8, 1.25)
    # one of that size finds colour and background, and what is left unexplained
    signal, color, ground, error = fit(videos, coverage(x, y, size)[rows, kind][:, None])
    residual = torch.sqrt(error / signal.clamp(min=1e-6)).amax((1, 2))
    color, ground = color[:, 0], ground[:, 0].mean(1)

    value, low = color.amax(1), color.amin(1)
    hue = torch.atan2(math.sqrt(3) * (color[:, 1] - color[:, 2]), 2 * color[:, 0] - color[:, 1] - color[:, 2])
    away = (hue[:, None] * 180 / math.pi - HUES.to(hue) + 180) % 360 - 180
    clean = (residual < MAX_RESIDUAL) & (value - low > MIN_CHROMA) & (size > sizes[0] / 2) & (size < sizes[1] * 1.5)

    time = torch.arange(videos.shape[2], device=videos.device) - (videos.shape[2] - 1) / 2
    vx = (x * time).sum(1) / (time**2).sum()
    vy = (y * time).sum(1) / (time**2).sum()
    off_x = x - x.mean(1, keepdim=True) - vx[:, None] * time
    off_y = y - y.mean(1, keepdim=True) - vy[:, None] * time
    return {
        "clean": clean,
        "color": away.abs().argmin(1),
        "kind": kind,
        "x": x.mean(1) + vx * time[0],
        "y": y.mean(1) + vy * time[0],
        "direction": torch.atan2(vy, vx),
        "speed": torch.sqrt(vx**2 + vy**2),
        "size": size,
        "brightness": value,
        "saturation": (value - low) / value.clamp(min=1e-4),
        "background": ground.mean(1),
        "ground": ground,
        "coherence": torch.sqrt((off_x**2 + off_y**2).mean(1)),
        "residual": residual,
    }


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
