"""Metrics of the samples of one prompt that are not VBench's."""

import torch

from training.media import to_uint8
from training.metrics import pooled_distances, preview_metrics

VENDI_BANDWIDTH = 0.15


def measure(clips, fps):
    """Metrics of the samples of one prompt [s, 3, f, h, w] in [0, 1], a dict of floats: those of previews and more.
    Images have none of motion, a single sample none of diversity.
    """
    values = preview_metrics(clips[None]) | {"vendi": vendi_score(clips)}
    if len(clips) == 1:
        del values["diversity"], values["vendi"]
    return values | ({"optical_flow": optical_flow(clips, fps)} if clips.shape[2] > 1 else {})


def vendi_score(clips):
    """Vendi score: the effective number of distinct clips among the seeds of one prompt.

    exp of the Shannon entropy of the eigenvalues of K / s (Friedman & Dieng 2022, arXiv 2210.02410, definition 3.1).
    clips [s, 3, f, h, w] in [0, 1] -> float in [1, s]. Compare only at equal s.
    """
    # A Gaussian kernel on the pooled RMS distance d. The cosine of non-negative pixels is near 1 for any two clips.
    # The bandwidth is fixed, never fitted to the clips, so scores compare over runs. At .15, eight clips all d apart
    # score 1.3, 2.2, 3.7, 5.4, 7.6 for d = .05, .1, .15, .2, .3: the range that seeds of one prompt span.
    kernel = torch.exp(-pooled_distances(clips).square() / (2 * VENDI_BANDWIDTH**2))
    eigenvalues = torch.linalg.eigvalsh(kernel / len(clips)).clamp(min=0)  # rounding can leave -1e-17
    return torch.special.entr(eigenvalues).sum().exp().item()


def optical_flow(clips, fps):
    """Length of Farnebäck's optical flow at its fastest 5 % of pixels, averaged over pairs of frames and clips.

    clips [s, 3, f, h, w] in [0, 1] at `fps` frames a second -> float >= 0. In VBench's units for dynamic_degree, which
    takes RAFT's flow: pairs of frames 1/8 s apart, pixels of a frame whose shorter side is 256; VBench calls a clip
    dynamic when about a quarter of its pairs exceed 6. Larger frames are shrunk first.
    """
    import cv2  # here, so that training needs no OpenCV

    clips = clips[:, :, :: max(1, round(fps / 8))]
    f, h, w = clips.shape[2:]
    scale, total = 256 / min(h, w), 0.0
    for clip in clips:
        frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(clip)]
        if scale < 1:
            frames = [cv2.resize(x, (round(w * scale), round(h * scale)), interpolation=cv2.INTER_AREA) for x in frames]
        for before, after in zip(frames, frames[1:]):
            flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            speed = torch.from_numpy(flow).norm(dim=-1).flatten()
            total += speed.topk(max(1, int(0.05 * len(speed)))).values.mean().item()
    return total * max(scale, 1) / (len(clips) * (f - 1))
