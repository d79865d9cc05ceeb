"""Which family reads which kind of folder. common.Model imports this: --help need not wait for diffusers."""

from importlib import import_module

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from models.presets import COSMOS25, EXPERTS, I2V, TOKENS, WAN, WAN_I2V
from training.files import UserError

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

FAMILIES = {  # kind of folder (see presets.py): file and class
    WAN: ("wan", "Wan"),
    WAN + EXPERTS: ("wan_experts", "WanExperts"),
    WAN + TOKENS: ("wan_5b", "Wan5B"),
    WAN + TOKENS + I2V: ("wan_5b", "Wan5BI2V"),
    WAN_I2V: ("wan_i2v", "WanI2V"),
    WAN_I2V + EXPERTS: ("wan_experts", "WanI2VExperts"),
    COSMOS25: ("cosmos", "Cosmos"),
    COSMOS25 + I2V: ("cosmos", "CosmosI2V"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
}


def family_of(kind, folder, index=None):
    """The class that reads a folder of that kind, or one line. index: the folder's model_index.json."""
    if index and not isinstance(index.get("_class_name"), str):
        raise UserError(f"{folder}/model_index.json has no _class_name: it is not as diffusers writes it")
    if kind.endswith(I2V) and kind not in FAMILIES and kind.removesuffix(I2V) in FAMILIES:
        raise UserError(f"{folder} holds a {kind.removesuffix(I2V)}, which has one task: leave out :i2v")
    if kind not in FAMILIES:
        raise UserError(f"{folder} holds a {kind}; known are {'; '.join(FAMILIES)}. To add one: models/__init__.py")
    file, name = FAMILIES[kind]
    family = getattr(import_module(f"models.{file}"), name)
    wanted = {"vae": family.vae_class, **dict.fromkeys(family.parts, family.transformer_class)}
    for part, cls in wanted.items() if index else ():
        found = index.get(part)
        found = found[-1] if isinstance(found, list) and found else found
        if found != cls.__name__:
            raise UserError(f"{folder} has {found} in {part}/, and {name} reads {cls.__name__}")
    if index and len(family.parts) > 1 and not index.get("boundary_ratio"):
        raise UserError(f"{folder}/model_index.json has no boundary_ratio: where do its two experts meet?")
    return family


def causal(family, frames, frame_block):
    """The class of a causal student of a family that makes that many of its latent frames at a time, or one line."""
    if frames % frame_block:
        raise UserError(f"--frame-block must divide the video's {frames} latent frames, got {frame_block}")
    if family.__name__ != "Wan":
        raise UserError(f"--frame-block: only Wan 2.1 text-to-video has a causal student, {family.__name__} has none")
    return import_module("models.wan_causal").CausalWan
