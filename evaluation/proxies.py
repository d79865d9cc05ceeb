"""Metrics of the samples of one prompt that VBench has not: without weights, and the diversity of image features."""

import torch
from einops import rearrange, reduce

from training import metrics
from training.files import UserError
from training.media import to_uint8


def measure(clips, fps):
    """Metrics of the samples of one prompt [s, 3, f, h, w] in [0, 1] without weights, a dict of floats. Images have
    none of motion.
    """
    values = {**metrics.saturation(clips), **colour_spread(clips)}
    if clips.shape[2] > 1:
        values |= {"frame_difference": metrics.frame_difference(clips), "smoothness": smoothness(clips)}
        values |= {"temporal_flickering": temporal_flickering(clips), "optical_flow": optical_flow(clips, fps)}
    if len(clips) > 1:
        values |= {"diversity": metrics.pairwise_rms(clips), "vendi": metrics.vendi_score(clips)}
    return values


def colour_spread(clips):
    """Per frame, averaged over frames and clips [..., 3, f, h, w] in [0, 1] (clamped), a dict of floats:

    - colourfulness: Hasler & Süsstrunk 2003, M3 on the 0..255 scale; grey is 0, "extremely colourful" above 109.
    - luma_std: standard deviation of Rec. 709 luma over the pixels of a frame; in [0, .5].
    """
    total = 0
    frames = rearrange(clips, "... c f h w -> (...) f c h w").flatten(0, 1)
    for frame in frames:
        red, green, blue = frame.float().clamp(0, 1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = torch.hypot(red_green.std(correction=0), yellow_blue.std(correction=0))
        colourfulness = 255 * (spread + 0.3 * torch.hypot(red_green.mean(), yellow_blue.mean()))
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        total = total + torch.stack([colourfulness, luma.std(correction=0)]).double()
    return dict(zip(["colourfulness", "luma_std"], (total / len(frames)).tolist(), strict=True))


def temporal_flickering(clips):
    """1 - mean |I_t - I_t+1| / 255 on frames rounded to 8 bits, of clips [..., 3, f, h, w] in [0, 1]; 1 for images.

    What VBench computes from a decoded mp4 (vbench/temporal_flickering.py, without its optional filter for static
    videos), to 1e-6.
    """
    clips = rearrange(clips, "... c f h w -> (...) c f h w").float()
    if clips.shape[2] == 1:
        return 1.0
    codes = ((clip.clamp(0, 1) * 255).round() for clip in clips)
    return 1 - sum(c.diff(dim=1).abs().mean(dtype=torch.float64).item() / len(clips) for c in codes) / 255


def smoothness(clips):
    """1 - mean |I_t - (I_t-1 + I_t+1) / 2|: 1 where every frame lies halfway between its neighbours.

    clips [..., 3, f, h, w] in [0, 1] -> float in [0, 1]; 1 for fewer than three frames. VBench's motion_smoothness asks
    a frame interpolation network for the middle frame; here it is the average, so fast motion counts as rough too.
    """
    clips = rearrange(clips, "... c f h w -> (...) c f h w").float()
    if clips.shape[2] < 3:
        return 1.0
    apart = [(c[:, 1:-1] - (c[:, :-2] + c[:, 2:]) / 2).abs().mean(dtype=torch.float64).item() for c in clips]
    return 1 - sum(apart) / len(apart)


def optical_flow(clips, fps):
    """Length of Farnebäck's optical flow at its fastest 5 % of pixels, averaged over pairs of frames and clips.

    clips [..., 3, f, h, w] in [0, 1] at `fps` frames a second -> float >= 0; 0 for images. In VBench's units for
    dynamic_degree, which takes RAFT's flow: pairs of frames 1/8 s apart, pixels of a frame whose shorter side is 256;
    VBench calls a clip dynamic when about a quarter of its pairs exceed 6. Frames larger than that are shrunk first.
    """
    import cv2  # here, so that training needs no OpenCV

    clips = rearrange(clips, "... c f h w -> (...) c f h w")[:, :, :: max(1, round(fps / 8))]
    f, h, w = clips.shape[2:]
    scale = 256 / min(h, w)
    total = 0.0
    for clip in clips if f > 1 else []:
        frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(clip)]
        if scale < 1:
            frames = [cv2.resize(x, (round(w * scale), round(h * scale)), interpolation=cv2.INTER_AREA) for x in frames]
        for before, after in zip(frames, frames[1:], strict=False):
            flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            speed = torch.from_numpy(flow).norm(dim=-1).flatten()
            fastest = speed.topk(max(1, int(0.05 * len(speed)))).values.mean().item()
            total += fastest * max(scale, 1) / (len(clips) * (f - 1))
    return total


def feature_model(kind, folder, device):
    """A function: clips [s, 3, f, h, w] in [0, 1] -> features [s, d], of a local DINOv2 or CLIP.

    The mean over at most 16 evenly spaced frames of the normalised class token (DINOv2) or image embedding (CLIP).
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {kind} from {folder}: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def features(clips):
        shown = torch.linspace(0, clips.shape[2] - 1, min(16, clips.shape[2])).round().long()
        frames = rearrange(clips[:, :, shown], "s c f h w -> (s f) c h w")
        pixels = processor(images=list(frames), do_rescale=False, return_tensors="pt")["pixel_values"].to(device)
        if kind == "clip":
            out = network.visual_projection(network.vision_model(pixels).pooler_output)
        else:
            out = network(pixels).last_hidden_state[:, 0]
        out = torch.nn.functional.normalize(out.float(), dim=-1)
        return reduce(out, "(s f) d -> s d", "mean", s=len(clips)).cpu()

    return features


def feature_diversity(features):
    """1 - mean cosine over pairs of the samples' features [s, d], s > 1; in [0, 2]. What DFD's paper reports."""
    cosine = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine, s = cosine @ cosine.mT, len(features)
    return 1 - ((cosine.sum() - cosine.trace()) / (s * (s - 1))).item()
