"""The judge of every sample of the world with modes, so that nothing pretrained is needed.

`read_factors` reads a clip's factors back from its pixels, and says when they do not show one clean shape.
"""

import math

import torch
from einops import rearrange, reduce

from tiny import measures
from tiny.modes.world import KINDS, MODES, NAMED, RANGES, STEPS

# the free factors whose mean and spread `summary` gives
FREE = ["x", "y", *RANGES]


def fit(videos, templates):
    """Least squares of videos [b, 3, f, h, w] by ground + template * (color - ground), for templates [b, k, f, h, w].

    The colour is one per clip and template, the ground one per frame: the mean where the template is 0. Returns the
    energy of template * (color - ground) [b, k, f], color [b, k, 3], ground as a grey [b, k, 3, f], and the squared
    error [b, k, f].
    """
    pixels = rearrange(videos, "b c f h w -> b 1 c f (h w)")
    t = rearrange(templates, "b k f h w -> b k 1 f (h w)")
    outside = (t == 0).float()
    ground = (outside * pixels).sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp(min=1)
    rest = pixels - ground * (1 - t)
    color = (t * rest).sum((-2, -1), keepdim=True) / (t * t).sum((-2, -1), keepdim=True).clamp(min=1e-6)
    error = reduce((rest - color * t) ** 2, "b k c f p -> b k f", "sum")
    signal = reduce(((color - ground) * t) ** 2, "b k c f p -> b k f", "sum")
    return signal, color[..., 0, 0], ground[..., 0].mean(2, keepdim=True).expand(-1, -1, 3, -1), error


def read_factors(videos):
    """Recover the factors of videos [b, 3, f, h, w] in [0, 1]: those of tiny.measures.read_factors, and

    direction   index into DIRECTIONS, the nearest one
    ramp        as in RANGES, from a straight line fitted to the background's level
    """
    f = measures.read_factors(videos, fit, RANGES["size"])
    moved = torch.stack([torch.cos(f["direction"]), torch.sin(f["direction"])], dim=1)
    ground, frames = f.pop("ground"), videos.shape[2]
    time = torch.arange(frames, device=videos.device) - (frames - 1) / 2
    ramp = (ground * time).sum(1) / (time**2).sum() * (frames - 1)
    return f | {"direction": (moved @ torch.tensor(STEPS).to(moved).T).argmax(1), "ramp": ramp}


def spread_over(values, count):
    """How evenly integers [n] spread over `count` modes: entropy (1 if even), and the share of modes that are present.

    A mode is present if it has more than a quarter of its even share. Both are NaN without samples.
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
    looks_present, motions_present   percent of those that have more than a quarter of their even share
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
