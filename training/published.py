"""Students that others publish for Wan, as --init reads them: a file of CausVid, Self-Forcing, CoDMD or FastGen, or a
LoRA. docs/import.md names the layouts and their sources. Nothing is unpickled.
"""

import json
import re
from collections import defaultdict

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.models.model_loading_utils import load_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import common
from models.adapters import Adapted
from models.folders import teacher_folder
from models.presets import family_name
from training.files import UserError, read_json, readable

# entries of a file, the one that is taken first: CausVid's, Self-Forcing's and CoDMD's names, then FastGen's
STUDENTS, FAKE_SCORES = ("generator_ema", "generator", "ema", "net"), ("critic", "fake_score")
PREFIX = r"(?:base_model|model|diffusion_model|transformer|net|module|pipe|dit)\.|lora_unet_"
WRAPPER = r"_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\."
WRAPPERS = re.compile(rf"^(?:{PREFIX}|{WRAPPER})+|(?<=\.){WRAPPER}")
# a layer's LoRA, and differences of its parameters beside one, as ComfyUI has them
LORA = re.compile(r"(.+)\.(lora_(?:A|B|down|up)|alpha|diff|diff_b|diff_m)(?:\.default)?(?:\.weight)?")
HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WAN_NAMES = (  # diffusers' names of a Wan transformer's parameters, and Wan's own
    (r"^condition_embedder\.(\w+)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(\w+)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"), (r"^condition_embedder\.image_embedder", "img_emb.proj"),
    (r"proj\.norm1", "proj.0"), (r"proj\.ff\.net\.0\.proj", "proj.1"), (r"proj\.ff\.net\.2", "proj.3"),
    (r"proj\.norm2", "proj.4"), (r"\.norm2\.", ".norm3."), (r"\.ffn\.net\.0\.proj", ".ffn.0"), (r"\.ffn\.net", ".ffn"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_out\.0", ".o"), (r"\.to_([qkv])\b", r".\1"),
    (r"\.add_([kv])_proj", r".\1_img"), ("norm_added_k", "norm_k_img"),
    ("^proj_out", "head.head"), ("^scale_shift_table", "head.modulation"), ("scale_shift_table", "modulation"),
)  # fmt: skip


def wan_name(name):
    """Wan's own name of what diffusers calls so."""
    for theirs, own in WAN_NAMES:
        name = re.sub(theirs, own, name)
    return name


def one_expert(teacher):
    return family_name(teacher).partition(".")[0] in ("wan", "wan_5b", "wan_i2v")


def check(path, teacher):
    """The path, or in place of a folder the one file of weights in it. UserError unless the student in a file fits a
    teacher; what is no file is read elsewhere.
    """
    files = list(path.glob("*.safetensors"))
    if len(files) == 1 and one_expert(teacher):
        path = files[0]
    if path.is_file():
        read_student(path, teacher)
    return path


def load(path, networks, teacher, strength):
    """Fill the student, and the fake score if there is one that fits, from a file; returns their names. strength: what
    a LoRA is multiplied with, beside its own alpha / rank.
    """
    (kind, student, critic), first = read_student(path, teacher), dist.get_rank() == 0
    if kind == "LoRA" and first:
        folder = teacher_folder(teacher) / "transformer"
        state = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        if not merge(student, path, state, strength):
            print(f"a LoRA without alpha is merged at --init-strength {strength:g}; see where you got it for another")
        student = state
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


def read_student(path, teacher):
    """(kind, student, fake score) of a file: weights by diffusers' names, a LoRA's by its own; {} for a fake score that
    is not there or does not fit. UserError unless the student fits.
    """
    folder = teacher_folder(teacher)
    if not one_expert(teacher):
        raise UserError(f"--init: {path} is a file, which is read for Wan with one expert, and {teacher} is none")
    with init_empty_weights():
        wanted = WanTransformer3DModel.from_config(read_json(folder / "transformer" / "config.json")).state_dict()
    with readable(path):
        record = load_state_dict(str(path))
        record = record["model"] if isinstance(record.get("model"), dict) else record
        kind = next((entry for entry in STUDENTS if entry in record), "weights")
        student, critic = record.get(kind, record), next((record[e] for e in FAKE_SCORES if e in record), {})
        # names with _ are of a discriminator that reads the critic's blocks
        critic = {key: value for key, value in named(critic, wanted).items() if not key.startswith("_")}
        if any(".lora_" in key for key in student):
            kind = "LoRA"
            merge(student, path, wanted)
        elif reason := misfit(student := named(student, wanted), wanted):
            raise UserError(f"--init: the weights in {path} do not fit: {reason}")
    return kind, student, {} if misfit(critic, wanted) else critic


def named(weights, wanted):
    """Weights by the names of a state dict of diffusers', from those or Wan's own, wrapped or not."""
    names, plain = {wan_name(key): key for key in wanted}, {WRAPPERS.sub("", key): x for key, x in weights.items()}
    if len(plain) < len(weights):
        raise ValueError("it has two tensors of one name, but for prefixes")
    return {names.get(key, key): x for key, x in plain.items()} if any(".self_attn." in key for key in plain) else plain


def misfit(weights, wanted):
    """The first reason why weights do not fit a state dict, or None."""
    for key in sorted(weights.keys() ^ wanted.keys()):
        return f"{key} is {'missing' if key in wanted else 'unknown'}"
    for key, value in weights.items():
        if value.dtype not in FULL or value.shape != wanted[key].shape:
            return f"{key} is {value.dtype} {tuple(value.shape)}, not of full precision or {tuple(wanted[key].shape)}"


@torch.no_grad()
def merge(weights, path, state, strength=1.0):
    """Add to the state dict of a Wan transformer, in place, a file's LoRA and the differences of parameters beside it.
    UserError if anything in it does not fit. Returns whether every layer has an alpha.
    """
    spelled = lambda name: name.replace(".", "_")  # as musubi-tuner writes names
    names = {spelled(name): key for key in state for name in (key, wan_name(key))}
    layers, config, complete = defaultdict(dict), lora_config(path), True
    try:
        for name, value in weights.items():
            layer, part = LORA.fullmatch(WRAPPERS.sub("", name)).groups()
            key = names[spelled(f"{layer}.{DIFFERENCES.get(part, 'weight')}")]
            if value.dtype not in FULL:
                raise LookupError
            value = value.to(state[key].device, torch.float32)
            if part in DIFFERENCES:
                state[key] += strength * value.view_as(state[key])
            else:
                layers[key][HALVES.get(part, part)] = value
        for name, own in layers.items():
            down, up, pattern = own["down"], own["up"], config.get("alpha_pattern") or {}
            pattern = pattern.get(get_pattern_key(pattern, name.removesuffix(".weight")), config.get("lora_alpha"))
            alpha, rank = own.get("alpha", pattern), len(down)
            complete &= alpha is not None
            scale = 1 if alpha is None else alpha / (rank**0.5 if config.get("use_rslora") else rank)
            state[name] += strength * scale * (up.flatten(1) @ down.flatten(1)).view_as(state[name])
    except (AttributeError, LookupError, RuntimeError):
        wrong = "is unknown, quantised, of another shape, or one half alone"
        raise UserError(f"--init: the LoRA in {path} does not fit: {name} {wrong}") from None
    return complete


def lora_config(path):
    """What peft writes beside a LoRA, or diffusers into its header; {} if there is neither."""
    if path.with_name("adapter_config.json").is_file():
        return read_json(path.with_name("adapter_config.json"))
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {key.removeprefix("transformer."): value for key, value in config.items()}
