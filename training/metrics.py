"""Video metrics that need no pretrained weights.

A video is a float tensor [3, f, h, w] in [0, 1], RGB; an image is a video with f = 1. Every metric is a pure function
of tensors and returns Python floats. Previews and evaluation use the same functions, so their numbers compare.
"""

from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from einops import rearrange

# ---------------------------------------------------------------- diversity


def pooled(clips):
    """Clips [s, 3, f, h, w] with at most 8 x 8 pixels a frame; those that are pooled stay as they are."""
    f, h, w = clips.shape[2:]
    return F.adaptive_avg_pool3d(clips.float(), (f, min(h, 8), min(w, 8)))


def pooled_distances(clips):
    """RMS differences [s, s], float64, between pooled clips [s, 3, f, h, w].

    Pooling makes the distance about layout and colour, not texture; frames are kept, so direction of motion counts.
    """
    pixels = rearrange(pooled(clips).double(), "s c f h w -> s (c f h w)")
    # never through x @ y: the distance of equal clips must be exactly 0
    distances = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / pixels.shape[1] ** 0.5


def pairwise_rms(clips):
    """Diversity of the seeds of one prompt: mean RMS difference over pairs of pooled clips.

    clips [s, 3, f, h, w] in [0, 1] -> float in [0, 1]; 0 for one clip.
    """
    s = len(clips)
    return (pooled_distances(clips).sum() / max(s * (s - 1), 1)).item()


# ---------------------------------------------------------------- colour


def saturation(clips):
    """Colour statistics per frame, averaged over frames and clips.

    clips [..., 3, f, h, w] in [0, 1]; values beyond count as clipped, then are clamped. Returns a dict of floats:
    - saturation: mean HSV S = (max - min) / max, 0 for black; in [0, 1].
    - saturated: share of pixels with S > .9. Near black S is coarse: 8-bit (1, 0, 0) has S = 1.
    - clipped: share of pixels with a channel that is 0 or 255 once rounded to 8 bits, or lies beyond. Rounding first
      gives a float video and its 8-bit copy the same share. Flat art clips by right: compare with data.
    """
    total = 0
    frames = rearrange(clips, "... c f h w -> (...) f c h w").flatten(0, 1)
    for frame in frames:  # one at a time: the temporaries of a whole 480p batch would take gigabytes
        codes = (frame.float() * 255).round()
        clipped = ((codes <= 0) | (codes >= 255)).any(0)
        frame = frame.float().clamp(0, 1)
        high, low = frame.amax(0), frame.amin(0)
        s = (high - low) / high.clamp(min=1e-8)
        total = total + torch.stack([s.mean(), (s > 0.9).float().mean(), clipped.float().mean()]).double()
    return dict(zip(["saturation", "saturated", "clipped"], (total / len(frames)).tolist(), strict=True))


# ---------------------------------------------------------------- motion


def frame_difference(clips):
    """Mean |I_t - I_t+1| over pixels, channels, frames and clips [..., 3, f, h, w] in [0, 1], f > 1."""
    frames = rearrange(clips, "... c f h w -> f (...) c h w")
    return fmean((b.float() - a.float()).abs().mean(dtype=torch.float64).item() for a, b in pairwise(frames))


def preview_metrics(clips_by_prompt):
    """What a preview logs: s seeds of p prompts [p, s, 3, f, h, w] in [0, 1] -> dict of floats, means over prompts.
    Images have no motion.
    """
    motion = {"motion": frame_difference(clips_by_prompt)} if clips_by_prompt.shape[3] > 1 else {}
    return {
        "diversity": sum(pairwise_rms(clips) for clips in clips_by_prompt) / len(clips_by_prompt),
        **saturation(clips_by_prompt),
        **motion,
    }
