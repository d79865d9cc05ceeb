"""Wan 2.1 text-to-video. cond = {"text": [b, l, d]}, zero beyond each prompt's end, as WanPipeline pads it."""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from models.latents import latent_shape
from training.files import read_json, readable


class Wan(nn.Module):
    shapes = staticmethod(latent_shape)
    transformer_class, vae_class = WanTransformer3DModel, AutoencoderKLWan
    parts = ("transformer",)
    text_dim, text_parts = "text_dim", ("text_encoder",)
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    fps = 16
    # a constant of the model: the negative prompt of diffusers' Wan examples, which is Wan's own in English
    negative_prompt = (
        "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
        "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly "
        "drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy "
        "background, three legs, many people in the background, walking backwards"
    )

    def __init__(self, transformer, index=None):
        super().__init__()
        self.transformer = transformer

    @property
    def blocks(self):
        return self.transformer.blocks

    @property
    def width(self):
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim

    def forward(self, x_t, sigma, cond, blocks=()):
        """x_t [b, c, f, h, w], sigma [b] in [0, 1] -> velocity [b, c, f, h, w], float32, and a list of features: the
        outputs [b, tokens, width] of the transformer blocks of these numbers.
        """
        features = {}  # filled by forward hooks on the blocks, which are there in this call alone
        keep = lambda i: lambda block, args, out: features.update({i: out[-1] if isinstance(out, tuple) else out})
        hooks = [self.blocks[i].register_forward_hook(keep(i)) for i in blocks]
        try:
            v = self.velocity(x_t, sigma, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return v, [features[i] for i in blocks]

    def chunks(self, x_t):
        """The parts of a video [b, c, f, h, w] that are denoised one after another: here it is one."""
        return [x_t]

    def update_cache(self, x0, cond):
        """Take note of a clean part, for those that follow."""

    def velocity(self, x_t, sigma, cond):
        dtype = self.transformer.patch_embedding.weight.dtype
        timestep = 1000 * sigma.float()  # stays float32: bf16 would round 937 to 936
        return self.transformer(x_t.to(dtype), timestep, cond["text"].to(dtype), return_dict=False)[0].float()

    @staticmethod
    def conditions(config, shape):
        """Shapes of what cond holds beside the text, {name: shape}, for latents of a shape."""
        return {}

    @staticmethod
    def text_length(folder):
        """Tokens a prompt is padded to: the tokenizer's own limit, at most the 512 that WanPipeline pads to."""
        return min(read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length") or 512, 512)

    @staticmethod
    def tokenizer(folder):
        """The text encoder's tokenizer, of transformers."""
        with readable(folder / "tokenizer"):
            return AutoTokenizer.from_pretrained(folder / "tokenizer")

    @classmethod
    def text_encoder(cls, folder, device):
        """A function: list of n prompts -> list of n embeddings [tokens, d] on the CPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with readable(folder / "text_encoder"):
            encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
        tokenizer, length = cls.tokenizer(folder), cls.text_length(folder)

        @torch.no_grad()
        def encode(prompts):
            prompts = [prompt_clean(prompt) for prompt in prompts]
            ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            mask = ids.attention_mask.to(device)
            text = encoder(ids.input_ids.to(device), mask).last_hidden_state
            return [row[: int(n)].cpu().contiguous() for row, n in zip(text, mask.sum(1), strict=True)]

        return encode
