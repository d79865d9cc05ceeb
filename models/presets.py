"""Teachers by name: where they are, what kind of folder that is, and the size that they are made for."""

from pathlib import Path
from typing import NamedTuple

from training.files import read_json


class Preset(NamedTuple):
    """A teacher by name.

    source   Hub repository, with @ and a revision if it is not main; or a local folder
    kind     see `kind_of`
    size     frames, height and width that it is made for
    config   what its transformer's config holds, beside its class's defaults
    like     the teacher whose recipe it takes where a script has none for it
    """

    source: str
    kind: str
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
I2V, EXPERTS, TOKENS = ", image to video", ", two experts", ", a timestep per token"
WAN, WAN_I2V, COSMOS25 = "WanPipeline", "WanImageToVideoPipeline", "Cosmos2_5_PredictBasePipeline"

P480, P704 = (81, 480, 832), (121, 704, 1280)
A14B, W14B = wan(40, 40, 13824), "wan2.1-14b"
W5B, C2B = wan(24, 30, 14336, (48, 48)), "nvidia/Cosmos-Predict2.5-2B@diffusers/base/post-trained"
I2V14B = wan(40, 40, 13824, (36, 16), image_dim=1280, added_kv_proj_dim=5120)

PRESETS = {
    "wan2.1-1.3b": Preset("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", WAN, P480, wan(12, 30, 8960), None),
    "wan2.1-14b": Preset("Wan-AI/Wan2.1-T2V-14B-Diffusers", WAN, P480, A14B),
    "wan2.1-i2v-14b": Preset("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", WAN_I2V, P480, I2V14B, W14B),
    "wan2.2-a14b": Preset("Wan-AI/Wan2.2-T2V-A14B-Diffusers", WAN + EXPERTS, P480, A14B, W14B),
    "wan2.2-i2v-a14b": Preset(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", WAN_I2V + EXPERTS, P480, wan(40, 40, 13824, (36, 16)), "wan2.2-a14b"
    ),
    "wan2.2-5b": Preset("Wan-AI/Wan2.2-TI2V-5B-Diffusers", WAN + TOKENS, P704, W5B),
    "wan2.2-5b-i2v": Preset("Wan-AI/Wan2.2-TI2V-5B-Diffusers", WAN + TOKENS + I2V, P704, W5B, "wan2.2-5b"),
    "cosmos2.5-2b": Preset(C2B, COSMOS25, (93, 704, 1280), COSMOS),
    "cosmos2.5-2b-i2v": Preset(C2B, COSMOS25 + I2V, (93, 704, 1280), COSMOS, "cosmos2.5-2b"),
    "qwen-image": Preset("Qwen/Qwen-Image", "QwenImagePipeline", (1, 1024, 1024), QWEN, W14B),
    "tiny": Preset(str(TINY / "teacher"), WAN, TINY_SIZE, TINY_CONFIG),
    "tiny-i2v": Preset(str(TINY / "teacher_i2v"), WAN + TOKENS + I2V, TINY_SIZE, TINY_CONFIG, "tiny"),
}
TINY_WORLD, TINY_FPS = ("tiny", "tiny-i2v"), 8


def kind_of(folder, teacher):
    """What a folder in the diffusers layout holds, as classes.py names it: its pipeline, and what its index or the name
    that the teacher was given by says beside that.
    """
    if teacher in PRESETS:
        return PRESETS[teacher].kind
    index = read_json(folder / "model_index.json")
    pipeline, per_token, experts = (index.get(key) for key in ("_class_name", "expand_timesteps", "transformer_2"))
    asked = teacher.endswith(":i2v") or (per_token and pipeline == WAN_I2V)
    traits = (TOKENS if per_token else EXPERTS if experts and experts[0] else "") + (I2V if asked else "")
    return (WAN if per_token and pipeline == WAN_I2V else str(pipeline)) + traits


def name_of(teacher):
    """The name in PRESETS of a teacher, also for a folder of that kind with its config (a copy, a tiny one trained
    again); another folder keeps its path.
    """
    folder = Path(teacher.removesuffix(":i2v"))
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"
    if teacher in PRESETS or not (index.is_file() and config.is_file()):
        return teacher
    kind, config = kind_of(folder, teacher), read_json(config)
    own = [name for name, p in PRESETS.items() if p.kind == kind and p.config.items() <= config.items()]
    return own[0] if own else teacher


def most_like(teacher):
    """The name in PRESETS of a teacher, or of the first one of its kind, or of the first of all."""
    name, folder = name_of(teacher), Path(teacher.removesuffix(":i2v"))
    kind = kind_of(folder, teacher) if (folder / "model_index.json").is_file() else None
    alike = [other for other, preset in PRESETS.items() if preset.kind == kind and other not in TINY_WORLD]
    return name if name in PRESETS else next(iter([*alike, *PRESETS]))
