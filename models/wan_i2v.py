"""Wan 2.1 and 2.2 image-to-video. Beside the text, cond holds of the first frame

    image      [b, 4 + c, f, h, w]   a mask of the frames that are known, and the latents of [image, grey, grey, …]
    features   [b, 257, d]           its CLIP features, if the network reads them (2.1)

as WanImageToVideoPipeline makes them. The network reads both; nothing holds its first frame to the image.
"""

import torch
from transformers import AutoImageProcessor, CLIPVisionModel

from models.images import to_pil
from models.latents import encode
from models.wan import Wan


class WanI2V(Wan):
    def velocity(self, x_t, sigma, cond):
        return super().velocity(torch.cat([x_t, cond["image"]], dim=1), sigma, cond)

    @staticmethod
    def conditions(config, shape):
        features = {"features": (257, config["image_dim"])} if config.get("image_dim") else {}
        return {"image": (shape[0] + 4, *shape[1:]), **features}

    @staticmethod
    def image_encoder(folder, vae, frames):
        """A function: first frames [b, 3, 1, h, w] in [0, 1] -> what cond holds of them, for clips of that length."""
        if clip := (folder / "image_encoder").is_dir():
            clip = CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=vae.dtype).to(vae.device)
            processor = AutoImageProcessor.from_pretrained(folder / "image_processor")

        @torch.no_grad()
        def encoder(images):
            grey = images.new_full((*images.shape[:2], frames - 1, *images.shape[3:]), 0.5)
            latents = encode(vae, torch.cat([images, grey], dim=2))
            mask = torch.zeros_like(latents[:, :4])
            mask[:, :, 0] = 1
            cond = {"image": torch.cat([mask, latents], dim=1)}
            if clip:
                pixels = processor(images=[to_pil(image) for image in images], return_tensors="pt").pixel_values
                cond["features"] = clip(pixels.to(clip.device, clip.dtype), output_hidden_states=True).hidden_states[-2]
            return cond

        return encoder

    @staticmethod
    def text_length(folder):
        """512: the network takes the last 512 tokens for the text and all before for the image, without a word."""
        return 512
