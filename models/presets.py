"""Teachers by name: where they are, which class of models/ runs them, and the size that they are made for."""

from pathlib import Path
from typing import NamedTuple

from training.files import UserError, read_json


class Preset(NamedTuple):
    """A teacher by name.

    source   Hub repository, with @ and a revision if it is not main; or a local folder
    family   its file and class in models/
    size     frames, height and width that it is made for
    config   what its transformer's config holds, beside its class's defaults
    like     the teacher whose recipe it takes where a script has none for it
    """

    source: str
    family: str
    size: tuple[int, int, int]
    config: dict
    like: str | None = "wan2.1-1.3b"


def wan(heads, layers, ffn, channels=(16, 16), **more):
    """The config of a Wan transformer."""
    own = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn, "text_dim": 4096}
    return own | {"in_channels": channels[0], "out_channels": channels[1]} | more


TINY, TINY_SIZE = Path(__file__).resolve().parents[1] / "tiny", (9, 32, 32)
TINY_CONFIG = wan(4, 6, 384, (8, 8), text_dim=32)
COSMOS = {
    "num_attention_heads": 16, "num_layers": 28, "in_channels": 17, "out_channels": 16, "text_embed_dim": 1024,
    "rope_scale": [1.0, 3.0, 3.0], "extra_pos_embed_type": None, "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352, "encoder_hidden_states_channels": 1024,
}  # fmt: skip
QWEN = {"num_attention_heads": 24, "num_layers": 60, "in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584}

P480, P704 = (81, 480, 832), (121, 704, 1280)
A14B, W14B = wan(40, 40, 13824), "wan2.1-14b"
W5B, C2B = wan(24, 30, 14336, (48, 48)), "nvidia/Cosmos-Predict2.5-2B@diffusers/base/post-trained"
I2VA14B, I2V14B = wan(40, 40, 13824, (36, 16)), wan(40, 40, 13824, (36, 16), image_dim=1280, added_kv_proj_dim=5120)

PRESETS = {
    "wan2.1-1.3b": Preset("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan.Wan", P480, wan(12, 30, 8960), None),
    "wan2.1-14b": Preset("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan.Wan", P480, A14B),
    "wan2.1-i2v-14b": Preset("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan_i2v.WanI2V", P480, I2V14B, W14B),
    "wan2.2-a14b": Preset("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan_experts.WanExperts", P480, A14B, W14B),
    "wan2.2-i2v-a14b": Preset(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "wan_experts.WanI2VExperts", P480, I2VA14B, "wan2.2-a14b"
    ),
    "wan2.2-5b": Preset("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan_5b.Wan5B", P704, W5B),
    "wan2.2-5b-i2v": Preset("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan_5b.Wan5BI2V", P704, W5B, "wan2.2-5b"),
    "cosmos2.5-2b": Preset(C2B, "cosmos.Cosmos", (93, 704, 1280), COSMOS),
    "cosmos2.5-2b-i2v": Preset(C2B, "cosmos.CosmosI2V", (93, 704, 1280), COSMOS, "cosmos2.5-2b"),
    "qwen-image": Preset("Qwen/Qwen-Image", "qwen_image.QwenImage", (1, 1024, 1024), QWEN, W14B),
    "tiny": Preset(str(TINY / "teacher"), "wan.Wan", TINY_SIZE, TINY_CONFIG),
    "tiny-small": Preset(str(TINY / "teacher_small"), "wan.Wan", TINY_SIZE, TINY_CONFIG | {"num_layers": 3}, "tiny"),
    "tiny-i2v": Preset(str(TINY / "teacher_i2v"), "wan_5b.Wan5BI2V", TINY_SIZE, TINY_CONFIG, "tiny"),
}
TINY_WORLD, TINY_FPS = ("tiny", "tiny-small", "tiny-i2v"), 8
PIPELINES = {
    "WanPipeline": "wan.Wan", "WanImageToVideoPipeline": "wan_i2v.WanI2V",
    "Cosmos2_5_PredictBasePipeline": "cosmos.Cosmos", "QwenImagePipeline": "qwen_image.QwenImage",
}  # fmt: skip


def needs_gpu(teacher):
    """Whether training would take weeks on a CPU: by name all but the tiny teachers, of folders those above 1 GB."""
    files = Path(teacher.removesuffix(":i2v")).glob("transformer/*.safetensors")
    return teacher in PRESETS.keys() - TINY_WORLD or sum(path.stat().st_size for path in files) > 1e9


def family_name(teacher):
    """The file and class in models/ that read a teacher, a name or a folder in the diffusers layout."""
    if teacher in PRESETS:
        return PRESETS[teacher].family
    folder = Path(teacher.removesuffix(":i2v"))
    if not (folder / "model_index.json").is_file():
        near = next((f", did you mean {name}?" for name in PRESETS if name == teacher.lower()), "")
        known = f"neither a folder with a model_index.json (the diffusers layout) nor one of {', '.join(PRESETS)}"
        raise UserError(f"unknown teacher {teacher!r}{near or f': {known}'}")
    index = read_json(folder / "model_index.json")
    pipeline, i2v = index.get("_class_name"), teacher.endswith(":i2v")
    name = PIPELINES.get(pipeline)
    if name and index.get("expand_timesteps"):  # Wan 2.2 5B, which has either of Wan's pipelines
        name, i2v = "wan_5b.Wan5B", i2v or "I2V" in name
    if not name or i2v and name not in ("wan_5b.Wan5B", "cosmos.Cosmos"):
        why = "has one task: leave out :i2v" if name else f"is none of {', '.join(PIPELINES)}; see models/__init__.py"
        raise UserError(f"{folder} holds a {pipeline}, which {why}")
    if (index.get("transformer_2") or [None])[0]:
        name = f"wan_experts.{name.partition('.')[2]}Experts"
    return name + "I2V" * i2v


def name_of(teacher):
    """The name in PRESETS of a teacher, also of a folder with its family and config (a copy, a tiny one trained again);
    another folder keeps its path.
    """
    folder = Path(teacher.removesuffix(":i2v"))
    if teacher in PRESETS or not (folder / "model_index.json").is_file():
        return teacher
    family, config = family_name(teacher), read_json(folder / "transformer" / "config.json")
    own = [name for name, p in PRESETS.items() if p.family == family and p.config.items() <= config.items()]
    return own[0] if own else teacher


def most_like(teacher):
    """The name in PRESETS of a teacher, or of the first one of its family."""
    name = name_of(teacher)
    own = [name] if name in PRESETS else [other for other, p in PRESETS.items() if p.family == family_name(teacher)]
    return own[0]
