"""Students that others publish for Wan, as --init reads them: a file of CausVid, Self-Forcing, CoDMD or FastGen, or a
LoRA. docs/import.md names the layouts and their sources. diffusers reads and converts them; nothing is unpickled.
"""

import json
import re

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.model_loading_utils import load_state_dict
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import common
from models.adapters import Adapted
from models.folders import teacher_folder
from models.presets import family_name
from training.files import UserError, read_json, readable

# entries of a file, the one that is taken first: CausVid's, Self-Forcing's and CoDMD's names, then FastGen's
STUDENTS, FAKE_SCORES = ("generator_ema", "generator", "ema", "net"), ("critic", "fake_score")
WRAPPER = r"_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\."
WRAPPERS = re.compile(rf"^(?:(?:model|diffusion_model|transformer|net|module)\.|{WRAPPER})+|(?<=\.){WRAPPER}")
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}  # beside a LoRA for ComfyUI
FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(path, teacher):
    """UserError unless the student in a file fits a teacher. A path that is no file is read elsewhere."""
    if path.is_file():
        opened(path, teacher)


def load(path, networks, teacher):
    """Fill the student, and the fake score if there is one that fits, from a file; returns their names."""
    (kind, student, critic), first = opened(path, teacher), dist.get_rank() == 0
    if kind == "LoRA" and first:
        folder = teacher_folder(teacher) / "transformer"
        student = merged(student, path, WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32))
    weights = {"student": student}
    if critic and not isinstance(networks.get("fake_score"), (Adapted, type(None))):  # a LoRA has no room for it
        weights["fake_score"] = critic
    for name, own in weights.items():
        common.reshard(networks[name])
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(networks[name].transformer, own if first else {}, options=options)
    if first:
        print(f"the student is the {kind} in {path}")
    return set(weights)


def opened(path, teacher):
    """(kind, student, fake score) of a file: weights by diffusers' names, a LoRA's by its own; {} for a fake score that
    is not there or does not fit. UserError unless the student fits.
    """
    folder = teacher_folder(teacher)
    if family_name(folder, teacher).partition(".")[0] not in ("wan", "wan_5b", "wan_i2v"):
        raise UserError(f"--init: {path} is a file, which is read for Wan with one expert, and {teacher} is none")
    with init_empty_weights():
        network = WanTransformer3DModel.from_config(read_json(folder / "transformer" / "config.json"))
    with readable(path):
        record = load_state_dict(str(path))
        record = record["model"] if isinstance(record.get("model"), dict) else record
        kind = next((entry for entry in STUDENTS if entry in record), "weights")
        student, critic = record.get(kind, record), next((record[e] for e in FAKE_SCORES if e in record), {})
        # names with _ are of a discriminator that reads the critic's blocks
        critic = {key: value for key, value in named(critic).items() if not key.startswith("_")}
        if any(".lora_" in key for key in student):
            kind = "LoRA"
            merged(student, path, network)
        elif reason := misfit(student := named(student), network):
            raise UserError(f"--init: the weights in {path} do not fit: {reason}")
    return kind, student, {} if misfit(critic, network) else critic


def named(weights):
    """Weights by diffusers' names, from those or Wan's own, wrapped or not."""
    plain = {WRAPPERS.sub("", key): value for key, value in weights.items()}
    if len(plain) < len(weights):
        raise ValueError("it has two tensors of one name, but for prefixes")
    return convert_wan_transformer_to_diffusers(plain) if any(".self_attn." in key for key in plain) else plain


def misfit(weights, network, whole=True):
    """The first reason why weights, all of a network's or some, do not fit it, or None."""
    wanted = network.state_dict()
    for key in sorted(weights.keys() ^ wanted.keys() if whole else weights.keys() - wanted.keys()):
        return f"{key} is {'missing' if key in wanted else 'unknown'}"
    for key, value in weights.items():
        if value.dtype not in FULL or value.shape != wanted[key].shape:
            return f"{key} is {value.dtype} {tuple(value.shape)}, not of full precision or {tuple(wanted[key].shape)}"


@torch.no_grad()
def merged(weights, path, network):
    """The weights of a Wan transformer with a LoRA merged by diffusers, alpha as it reads it, and with differences of
    parameters, which it would leave out. UserError if anything in the file does not fit.
    """
    # copies: diffusers scales some in place
    weights, metadata = {key.replace(".default.", "."): value.clone() for key, value in weights.items()}, None
    added = [key for key in weights if key.rpartition(".")[2] in DIFFERENCES]
    added = {WRAPPERS.sub("", key): weights.pop(key) for key in added}
    added = {re.sub(r"\w+$", lambda end: DIFFERENCES[end[0]], key): value for key, value in added.items()}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # alpha, as diffusers writes it
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "null"))
    try:
        if reason := misfit(added := convert_wan_transformer_to_diffusers(added), network, whole=False):
            raise ValueError(reason)
        for key, value in added.items():
            network.get_parameter(key).add_(value.to(network.device, torch.float32))
        if any(".self_attn." in key for key in weights):  # Wan's names, as ComfyUI has them
            weights = {f"diffusion_model.{WRAPPERS.sub('', key)}": value for key, value in weights.items()}
        if any(key.startswith(("diffusion_model.", "lora_unet_")) for key in weights):
            weights = WanPipeline.lora_state_dict(weights)
        weights = {f"transformer.{WRAPPERS.sub('', key)}": value.to(network.device) for key, value in weights.items()}
        network.load_lora_adapter(weights, adapter_name="published", metadata=metadata)
        own = {f"transformer.{key}" for key in get_peft_model_state_dict(network, adapter_name="published")}
        for key in sorted(own ^ weights.keys()):
            raise ValueError(f"{key} is {'missing' if key in own else 'unknown'}")
    except Exception as error:  # diffusers' converters raise whatever comes of names that they do not expect
        raise UserError(f"--init: the LoRA in {path} does not fit: {' '.join(str(error).split())[:300]}") from None
    network.fuse_lora(adapter_names=["published"])
    network.unload_lora()
    return network.state_dict()
