"""Qwen-Image: an image is a video of one frame, x_t [b, c, 1, h, w]. Its network takes sigma itself as the time.

Rows of cond["text"] that are zero are padding, and masked. QwenImagePipeline rescales its guided prediction to the
length of the conditional one; the scripts' guidance does not.
"""

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from einops import rearrange
from transformers import Qwen2_5_VLForConditionalGeneration

from models.wan import Wan


class QwenImage(Wan):
    transformer_class, vae_class = QwenImageTransformer2DModel, AutoencoderKLQwenImage
    text_encoder_class = Qwen2_5_VLForConditionalGeneration
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

    @classmethod
    def text_embedder(cls, folder, tokenizer, encoder):
        """A function: n prompts -> embeddings [n, tokens, d], without the template's."""
        pipe = QwenImagePipeline(None, None, encoder, tokenizer, None)
        return lambda prompts: pipe._get_qwen_prompt_embeds(prompts)[0]
