"""Qwen-Image: an image is a video of one frame, x_t [b, c, 1, h, w]. Its network takes sigma itself as the time.

Rows of cond["text"] that are zero are padding, and masked. QwenImagePipeline rescales its guided prediction to the
length of the conditional one; the scripts' guidance does not.
"""

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from einops import rearrange
from transformers import Qwen2_5_VLForConditionalGeneration

from models.latents import latent_shape
from models.wan import Wan
from training.files import UserError, readable


class QwenImage(Wan):
    transformer_class, vae_class = QwenImageTransformer2DModel, AutoencoderKLQwenImage
    text_dim = "joint_attention_dim"
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    lora_layers += [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
    fps = 1
    negative_prompt = " "

    @property
    def blocks(self):
        return self.transformer.transformer_blocks

    def velocity(self, x_t, sigma, cond):
        dtype, (b, _, _, h, w) = self.transformer.img_in.weight.dtype, x_t.shape
        v = self.transformer(
            rearrange(x_t, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2).to(dtype),
            cond["text"].to(dtype),
            cond["text"].any(dim=-1),
            sigma.float(),
            [[(1, h // 2, w // 2)]] * b,
            return_dict=False,
        )[0]
        return rearrange(v.float(), "b (h w) (c p q) -> b c 1 (h p) (w q)", h=h // 2, p=2, q=2)

    @staticmethod
    def shapes(config, vae, frames, height, width):
        """See latent_shape; one line unless it is an image."""
        if frames != 1:
            raise UserError(f"--frames must be 1 for this teacher of images, got {frames}")
        return latent_shape({**config, "patch_size": (1, 2, 2)}, vae, frames, height, width)

    @staticmethod
    def text_length(folder):
        """512 tokens of the 1,024 that the pipeline allows, as its default."""
        return 512

    @classmethod
    def text_encoder(cls, folder, device):
        """A function: list of n prompts -> list of n embeddings [tokens, d] on the CPU, without the template's."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with readable(folder / "text_encoder"):
            encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype)
        parts = {"text_encoder": encoder.to(device), "tokenizer": cls.tokenizer(folder)}
        pipe = QwenImagePipeline(scheduler=None, vae=None, transformer=None, **parts)

        @torch.no_grad()
        def encode(prompts):
            text, mask = pipe._get_qwen_prompt_embeds(prompts, device)
            return [row[: int(n)][:512].cpu().contiguous() for row, n in zip(text, mask.sum(1), strict=True)]

        return encode
