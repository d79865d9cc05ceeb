"""Factors of the tiny world's clips read back from the pixels, so that judging samples needs no pretrained network."""

import math

import torch
from einops import rearrange, reduce

from tiny.world import KINDS, MODES, NAMED, RANGES, SIZE, STEPS, coverage

HUES = torch.tensor([0.0, 120.0, 240.0, 60.0])  # degrees, in the order of COLORS
FREE = ["x", "y", *RANGES]  # the factors that no caption names
MAX_RESIDUAL, MIN_CHROMA = 0.3, 0.12  # of clean clips, see read_factors


def fit(videos, templates):
    """Least squares of videos [b, 3, f, h, w] by ground + template * (color - ground), for templates [b, k, f, h, w].

    The colour is one per clip and template, the ground one per frame: the mean where the template is 0. Returns the
    energy of template * (color - ground) [b, k, f], color [b, k, 3], ground [b, k, 3, f], and the squared error
    [b, k, f].
    """
    pixels = rearrange(videos, "b c f h w -> b 1 c f (h w)")
    t = rearrange(templates, "b k f h w -> b k 1 f (h w)")
    outside = (t == 0).float()
    ground = (outside * pixels).sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp(min=1)
    rest = pixels - ground * (1 - t)
    color = (t * rest).sum((-2, -1), keepdim=True) / (t * t).sum((-2, -1), keepdim=True).clamp(min=1e-6)
    error = reduce((rest - color * t) ** 2, "b k c f p -> b k f", "sum")
    signal = reduce(((color - ground) * t) ** 2, "b k c f p -> b k f", "sum")
    return signal, color[..., 0, 0], ground[..., 0], error


def read_factors(videos):
    """Recover the factors of videos [b, 3, f, h, w] in [0, 1]; a dict of [b] tensors.

    clean       bool: one shape of one colour and one size, on plain grey, in every frame
    color, kind, direction   indices into COLORS, KINDS and DIRECTIONS
    x, y        position at frame 0, from a straight line fitted to the centroids
    speed       that line's slope; its direction is the nearest of DIRECTIONS
    size, brightness, saturation, background, ramp   as in RANGES
    coherence   RMS distance of the centroids from that line, in pixels: 0 for straight steady motion

    The background is grey, so max - min over the channels is linear in how much of a pixel the shape covers. Area and
    centroids follow. Then each kind is drawn there and fitted to the pixels, and the one that explains them best is
    taken. Clean means that in its worst frame the RMS of what is left unexplained (`residual`) is below MAX_RESIDUAL of
    the RMS of the shape.
    """
    if len(videos) > 256:  # small enough to stay in the processor's cache
        parts = [read_factors(part) for part in videos.split(256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    videos = videos.detach().float().nan_to_num()
    chroma = videos.amax(1) - videos.amin(1)
    # the colour inside the shape, safe from its soft edge because even the smallest has 10 inner pixels
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
    # a sharp one of that kind finds the colour and the size anew: the plateau's brightest pixels overstate the colour
    tint = fit(videos, coverage(x, y, size)[rows, kind][:, None])[1][:, 0]
    size = size * torch.sqrt(plateau / (tint.amax(1) - tint.amin(1)).clamp(min=1e-4)).clamp(0.8, 1.25)
    # one of that size finds colour and background, and what is left unexplained
    signal, color, ground, error = fit(videos, coverage(x, y, size)[rows, kind][:, None])
    residual = torch.sqrt(error / signal.clamp(min=1e-6)).amax((1, 2))
    color, ground = color[:, 0], ground[:, 0].mean(1)  # grey, [b, f]

    value, low = color.amax(1), color.amin(1)
    hue = torch.atan2(math.sqrt(3) * (color[:, 1] - color[:, 2]), 2 * color[:, 0] - color[:, 1] - color[:, 2])
    away = (hue[:, None] * 180 / math.pi - HUES.to(hue) + 180) % 360 - 180
    low_size, high_size = RANGES["size"]
    clean = (residual < MAX_RESIDUAL) & (value - low > MIN_CHROMA) & (size > low_size / 2) & (size < high_size * 1.5)

    time = torch.arange(videos.shape[2], device=videos.device) - (videos.shape[2] - 1) / 2
    vx, vy, brighter = ((values * time).sum(1) / (time**2).sum() for values in (x, y, ground))
    off_x = x - x.mean(1, keepdim=True) - vx[:, None] * time
    off_y = y - y.mean(1, keepdim=True) - vy[:, None] * time
    return {
        "clean": clean,
        "color": away.abs().argmin(1),
        "kind": kind,
        "x": x.mean(1) + vx * time[0],
        "y": y.mean(1) + vy * time[0],
        "direction": (torch.stack([vx, vy], dim=1) @ torch.tensor(STEPS).to(vx).T).argmax(1),
        "speed": torch.sqrt(vx**2 + vy**2),
        "size": size,
        "brightness": value,
        "saturation": (value - low) / value.clamp(min=1e-4),
        "background": ground.mean(1),
        "ramp": brighter * (videos.shape[2] - 1),
        "coherence": torch.sqrt((off_x**2 + off_y**2).mean(1)),
        "residual": residual,
    }


def spread_over(values, count):
    """How evenly integers [n] spread over `count` modes: entropy (1 if even), and the share of modes that are present,
    with more than a quarter of an even share. Both are NaN without samples.
    """
    if not len(values):
        return math.nan, math.nan
    share = torch.bincount(values).float() / len(values)
    return torch.special.entr(share).sum().item() / math.log(count), (share > 0.25 / count).sum().item() / count


def summary(videos, captions):
    """Figures of videos [b, 3, f, h, w] against their captions, as a dict of floats.

    clean, right      percent of all samples: one clean shape; and also of the modes that the caption names
    looks, motions    entropy of the looks (colour and kind) and of the directions that a caption leaves open, among its
                      right samples: 1 if they are even, 0 if all are one. A mean over captions; compare at equal counts
    looks_present, motions_present   percent of those that are present, see spread_over
    <factor>_mean/_std, coherence    over clean samples (NaN if there are fewer than two)
    """
    f, named = read_factors(videos), [NAMED[caption] for caption in captions]
    right = f["clean"].clone()
    for name in MODES:
        wanted = torch.tensor([modes.get(name, -1) for modes in named], device=videos.device)
        right &= (wanted == f[name]) | (wanted < 0)
    out = {"clean": 100 * f["clean"].float().mean().item(), "right": 100 * right.float().mean().item()}
    look, spreads = f["color"] * len(KINDS) + f["kind"], {"looks": [], "motions": []}
    for caption in dict.fromkeys(captions):
        here = right & torch.tensor([other == caption for other in captions], device=videos.device)
        for key, values, names in (("looks", look, ("color", "kind")), ("motions", f["direction"], ("direction",))):
            count = math.prod(len(MODES[name]) for name in names if name not in NAMED[caption])
            if count > 1:
                spreads[key].append(spread_over(values[here], count))
    for key, pairs in spreads.items():
        entropies, present = torch.tensor(pairs).reshape(-1, 2).nanmean(0).tolist()
        out |= {key: entropies, f"{key}_present": 100 * present}
    for name in FREE:
        values = f[name][f["clean"]]
        out[f"{name}_mean"] = values.mean().item()
        out[f"{name}_std"] = values.std().item() if len(values) > 1 else math.nan
    out["coherence"] = f["coherence"][f["clean"]].mean().item()
    return out
