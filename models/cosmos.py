"""Cosmos-Predict2.5, text- and image-to-video. Its network takes sigma itself as the time.

cond["text"] is what the network's own projection, which is never trained, makes of an embedding: 512 rows of 1,024
numbers for 100,352, all layers of the text encoder side by side, 100 MB a prompt. For image-to-video cond holds also
"first" [b, c, 1, h, w], as wan_5b.py has it, but at level 1e-4. The pipeline's guidance w is our w + 1, and its safety
checker is not run.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT, Cosmos2_5_PredictBasePipeline
from transformers import Qwen2_5_VLForConditionalGeneration

from models.wan import Wan
from models.wan_5b import FirstFrame
from training.files import opened

if not hasattr(transformer_cosmos, "transforms"):  # all that the network needs of torchvision
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size)),
        InterpolationMode=SimpleNamespace(NEAREST=None),
    )


class Cosmos(Wan):
    transformer_class, text_encoder_class = CosmosTransformer3DModel, Qwen2_5_VLForConditionalGeneration
    text_dim, text_parts = "encoder_hidden_states_channels", ("text_encoder", "transformer")
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    negative_prompt = DEFAULT_NEGATIVE_PROMPT

    def __init__(self, transformer, index=None):
        super().__init__(transformer)
        transformer.crossattn_proj.forward = lambda text: text  # done by text_embedder

    @property
    def blocks(self):
        return self.transformer.transformer_blocks

    def velocity(self, x_t, sigma, cond):
        dtype, (b, _, f, h, w) = self.transformer.patch_embed.proj.weight.dtype, x_t.shape
        first = cond.get("first", x_t[:, :, :0])
        known, mask = first.shape[2], x_t.new_zeros(b, 1, f, h, w, dtype=dtype)
        level = sigma.float().view(b, 1, 1, 1, 1).repeat(1, 1, f, 1, 1)
        level[:, :, :known], mask[:, :, :known] = 1e-4, 1
        x = torch.cat([first, x_t[:, :, known:]], dim=2).to(dtype)
        masks = {"condition_mask": mask, "padding_mask": mask.new_zeros(1, 1, h, w)}
        v = self.transformer(x, level, cond["text"].to(dtype), **masks, return_dict=False)[0].float()
        return torch.cat([(x_t[:, :, :known] - first) / sigma.view(b, 1, 1, 1, 1), v[:, :, known:]], dim=2)

    @classmethod
    def text_embedder(cls, folder, tokenizer, encoder):
        """A function: n prompts -> projected embeddings [n, 512, d]: the network reads the padding too."""
        parts, projection = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder), {}
        for path in (folder / "transformer").glob("*.safetensors"):
            file = opened(path)
            for name in {"crossattn_proj.0.weight", "crossattn_proj.0.bias"} & set(file.keys()):
                projection[name.rpartition(".")[2]] = file.get_tensor(name).to(encoder.device, encoder.dtype)

        def embed(prompts):
            text = Cosmos2_5_PredictBasePipeline._get_prompt_embeds(parts, prompts, device=encoder.device)
            return F.gelu(F.linear(text, **projection))

        return embed


class CosmosI2V(FirstFrame, Cosmos):
    """Reads the first frame as Wan 2.2 5B does."""
