"""Wan 2.1 text-to-video. cond = {"text": [b, l, d]}, zero beyond each prompt's end, as WanPipeline pads it."""

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from training.files import read_json, readable


class Wan(nn.Module):
    transformer_class, vae_class, text_encoder_class = WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel
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

    def velocity(self, x_t, sigma, cond):
        dtype = self.transformer.patch_embedding.weight.dtype
        timestep = 1000 * sigma.float()  # stays float32: bf16 would round 937 to 936
        embeddings = [cond[key].to(dtype) for key in ("text", "features") if key in cond]  # the second is WanI2V's
        return self.transformer(x_t.to(dtype), timestep, *embeddings, return_dict=False)[0].float()

    def chunks(self, x_t):
        """The parts of a video [b, c, f, h, w] that are denoised one after another: here it is one."""
        return [x_t]

    def update_cache(self, x0, cond):
        """A causal student's keys and values of a clean part, for the parts that follow: here there are none."""

    @staticmethod
    def conditions(config, shape):
        """Shapes of what cond holds beside the text, {name: shape}, for latents of a shape."""
        return {}

    @staticmethod
    def text_length(folder):
        """Tokens a prompt is padded to: the tokenizer's own limit, at most the 512 that WanPipeline pads to."""
        return min(read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length") or 512, 512)

    @classmethod
    def text_encoder(cls, folder, device):
        """A function: list of n prompts -> list of n embeddings [tokens, d] on the CPU, without padding."""
        dtype, length = torch.bfloat16 if device.type == "cuda" else torch.float32, cls.text_length(folder)
        encoder = cls.text_encoder_class.from_pretrained(folder / "text_encoder", dtype=dtype, device_map=device)
        with readable(folder / "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        embed = cls.text_embedder(folder, tokenizer, encoder)

        @torch.no_grad()
        def encode(prompts):
            return [row[row.any(dim=-1)][:length].cpu() for row in embed(prompts)]

        return encode

    @classmethod
    def text_embedder(cls, folder, tokenizer, encoder):
        """A function: n prompts -> embeddings [n, tokens, d], with zeros as padding, as the stock pipeline has them."""
        pipe, length = WanPipeline(tokenizer, encoder, vae=None, scheduler=None), cls.text_length(folder)
        return lambda prompts: pipe._get_t5_prompt_embeds(prompts, max_sequence_length=length)
