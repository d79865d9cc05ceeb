"""Small random teachers of every family, written by diffusers' own classes in the layout of the Hub's folders."""

from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5EncoderModel,
)

from models.images import to_pil
from models.presets import PRESETS
from tests.conftest import small_args

TINY = PRESETS["tiny"].source
FLAGS = {  # short runs with everything on
    "steps": 4, "grad_accum": 1, "student_every": 2, "save_every": 2, "guidance_scale": 2.0, "shift": 3.0,
    "student_sigmas": (1.0, 0.8), "phase_ends": (0.8, 0.0), "gan_weight": 0.01, "discriminator_blocks": (0, 1),
    "gradient_checkpointing": 1, "lr": 1e-3, "fake_score_lr": 1e-3, "ema_decay": 0.5, "lora_rank": 0,
}  # fmt: skip


def put_in_torchvision():
    """The function of torchvision that Cosmos' pipeline calls: its wheel breaks beside the CPU build of torch."""
    if not hasattr(pipeline_cosmos2_5_predict, "torchvision"):
        to_tensor = lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
        functional = SimpleNamespace(to_tensor=to_tensor)
        pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=SimpleNamespace(functional=functional))


class NoSafetyChecker:
    """The pipeline refuses to run without one; the real one is another package and 10 GB."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


def awake(module, seed):
    """A module whose every parameter matters: diffusers begins gates and tables at or near zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim < 2 or parameter.abs().max() < 1e-3:
            parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return module


def wan_vae(channels=16, **more):
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=torch.linspace(0.8, 1.5, channels).tolist(), **more,
    )  # fmt: skip


def wan_transformer(seed=0, channels=(16, 16), layers=2, **more):
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=channels[0], out_channels=channels[1], text_dim=32,
        freq_dim=64, ffn_dim=64, num_layers=layers, rope_max_seq_len=64, **more,
    )  # fmt: skip
    return awake(transformer, seed)


def wan_parts():
    # the tiny text encoder's outputs are small for a network that was not trained with it
    encoder = UMT5EncoderModel.from_pretrained(f"{TINY}/text_encoder")
    encoder.encoder.final_layer_norm.weight.data *= 20
    return {
        "tokenizer": AutoTokenizer.from_pretrained(f"{TINY}/tokenizer"),
        "text_encoder": encoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def qwen_parts():
    """A byte-level tokenizer with Qwen's chat template, and a Qwen2.5-VL of two layers."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[0], eos_token=words[2], additional_special_tokens=[words[1]],
        padding_side="right", model_max_length=4096,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = dict(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, rope_parameters=rope,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=14)
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def wan_i2v():
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    torch.manual_seed(1)
    return WanImageToVideoPipeline(
        **wan_parts(), vae=wan_vae(), image_encoder=CLIPVisionModel(clip), image_processor=CLIPImageProcessor(),
        transformer=wan_transformer(1, (36, 16), image_dim=16, added_kv_proj_dim=48),
    )  # fmt: skip


def wan_experts():
    both = {"transformer": wan_transformer(3), "transformer_2": wan_transformer(4)}
    return WanPipeline(**wan_parts(), vae=wan_vae(), **both, boundary_ratio=0.875)


def wan_i2v_experts():
    both = {"transformer": wan_transformer(5, (36, 16)), "transformer_2": wan_transformer(6, (36, 16))}
    return WanImageToVideoPipeline(**wan_parts(), vae=wan_vae(), **both, boundary_ratio=0.9)


def wan_5b():
    vae = wan_vae(
        48, decoder_base_dim=8, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip
    return WanPipeline(**wan_parts(), vae=vae, transformer=wan_transformer(7, (48, 48)), expand_timesteps=True)


def cosmos():
    torch.manual_seed(8)
    transformer = CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=24, adaln_lora_dim=8, max_size=(16, 32, 32), patch_size=(1, 2, 2), rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=True, extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=32, encoder_hidden_states_channels=24,
    )  # fmt: skip
    pipe = Cosmos2_5_PredictBasePipeline(
        **qwen_parts(), vae=wan_vae(), transformer=awake(transformer, 8), safety_checker=NoSafetyChecker()
    )
    pipe.register_modules(safety_checker=None)
    return pipe


def qwen_image():
    torch.manual_seed(9)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImagePipeline(**qwen_parts(), vae=vae, transformer=awake(transformer, 9))


def wan(seed=0, layers=2):
    return WanPipeline(**wan_parts(), vae=wan_vae(), transformer=wan_transformer(seed, layers=layers))


# name: (its folder's function, suffix of --teacher, frames, height, width)
SMALL = {
    "wan": (wan, "", 9, 32, 32),
    "wan_i2v": (wan_i2v, "", 9, 32, 32),
    "wan_experts": (wan_experts, "", 9, 32, 32),
    "wan_i2v_experts": (wan_i2v_experts, "", 9, 32, 32),
    "wan_5b": (wan_5b, "", 9, 64, 64),
    "wan_5b_i2v": (wan_5b, ":i2v", 9, 64, 64),
    "cosmos": (cosmos, "", 9, 32, 32),
    "cosmos_i2v": (cosmos, ":i2v", 9, 32, 32),
    "qwen_image": (qwen_image, "", 1, 32, 48),
}


def write(name, root):
    """--teacher of a small teacher, whose folder is written below `root` unless it is there."""
    build, suffix, *_ = SMALL[name]
    folder = root / build.__name__
    if not folder.is_dir():
        build().save_pretrained(folder)
    return f"{folder}{suffix}"


def args_of(script, name, root, **flags):
    """Flags of a script's short run on a small teacher; prompts and first frames are written below `root` too."""
    (root / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    (root / "images").mkdir(exist_ok=True)
    for i in range(1, 4):
        pixels = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(i))
        to_pil(pixels).save(root / "images" / f"{i}.png")
    own = {"teacher": write(name, root), "prompts": root / "prompts.txt", "score_ends": ()}
    own |= dict(zip(("frames", "height", "width"), SMALL[name][2:])) | (
        {"images": root / "images"} if "i2v" in name else {}
    )
    own = {**FLAGS, **own, **flags}
    return small_args(script, **{key: value for key, value in own.items() if hasattr(script.Args, key)})
