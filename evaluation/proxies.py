"""Metrics of the samples of one prompt that are not VBench's."""

import torch
from einops import rearrange, reduce

from training.media import to_uint8
from training.metrics import preview_metrics, vendi_score


def measure(clips, fps, features=None):
    """Metrics of the samples of one prompt [s, 3, f, h, w] in [0, 1], a dict of floats: those of previews and more.
    Images have none of motion, a single sample none of diversity. features: see `feature_model`.
    """
    values = preview_metrics(clips[None])
    if clips.shape[2] > 1:
        values["optical_flow"] = optical_flow(clips, fps)
    if len(clips) == 1:
        return {name: value for name, value in values.items() if name != "diversity"}
    values["vendi"] = vendi_score(clips)
    return values | ({"feature_diversity": feature_diversity(features(clips))} if features else {})


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


def feature_model(folder, device):
    """A function: clips [s, 3, f, h, w] in [0, 1] -> features [s, d], of a DINOv2 or CLIP in a local folder.

    The mean over at most 16 evenly spaced frames of the normalised class token (DINOv2) or image embedding (CLIP).
    """
    from transformers import AutoImageProcessor, AutoModel

    network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def features(clips):
        shown = torch.linspace(0, clips.shape[2] - 1, min(16, clips.shape[2])).round().long()
        frames = rearrange(clips[:, :, shown], "s c f h w -> (s f) c h w")
        pixels = processor(images=list(frames), do_rescale=False, return_tensors="pt")["pixel_values"].to(device)
        if network.config.model_type == "clip":
            out = network.visual_projection(network.vision_model(pixels).pooler_output)
        else:
            out = network(pixels).last_hidden_state[:, 0]
        out = torch.nn.functional.normalize(out.float(), dim=-1)
        return reduce(out, "(s f) d -> s d", "mean", s=len(clips)).cpu()

    return features


def feature_diversity(features):
    """1 - mean cosine over pairs of the samples' features [s, d], s > 1; in [0, 2]. What DFD's paper reports."""
    features = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine, s = features @ features.mT, len(features)
    return 1 - ((cosine.sum() - cosine.trace()) / (s * (s - 1))).item()
