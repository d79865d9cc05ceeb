"""Students that others publish for Wan, as --init reads them: a file of CausVid, Self-Forcing, CoDMD or FastGen, or a
LoRA. docs/import.md names the layouts and their sources.

Names become diffusers' by diffusers' own conversions. Tensors stay on disk until they are used; rank 0 reads them.
"""

import json
import pickle
import re
import zipfile
from itertools import chain

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import common
from models.adapters import Adapted
from models.folders import teacher_folder
from training.files import UserError, read_json, readable

# entries of a file, the one that is taken first: CausVid's, Self-Forcing's and CoDMD's names, then FastGen's
STUDENTS, FAKE_SCORES = ("generator_ema", "generator", "ema", "net", "model"), ("critic", "fake_score")
# what wraps a module's name, anywhere in a key, and what a key may begin with
WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
OUTER = re.compile(r"^(?:(?:model|diffusion_model|transformer|net)\.)+")
# how names in a LoRA's file end
LORA_ENDS = (*(f".lora_{half}.weight" for half in ("A", "B", "down", "up")), ".alpha", ".diff", ".diff_b", ".diff_m")
FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(path, teacher):
    """Raise one line unless the weights at --init, a file or a folder of a transformer, fit a Wan teacher.

    Runs and checkpoints are read elsewhere, and so are folders for other teachers, which load_init checks.
    """
    if path.is_file():
        opened(path, teacher)
    elif not ((path / "checkpoints").is_dir() or (path / "checkpoint.json").is_file() or why_not(teacher)):
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
        if loras := [file for file in files if "lora" in file.name]:
            raise UserError(f"--init: {folder} holds a LoRA: name the file, {loras[0]}")
        with readable(folder):
            weights = dict(chain.from_iterable(load_file(file).items() for file in files))
        if reason := files and misfit(weights, empty(teacher)):
            raise UserError(f"--init: the weights in {folder} do not fit: {reason}")


def load(path, networks, teacher):
    """Fill the student, and the fake score if there is one that fits, from a file; returns their names."""
    sources, said = opened(path, teacher), []
    if isinstance(networks.get("fake_score"), Adapted):
        sources.pop("fake_score", None)  # a LoRA on the teacher has no room for it
    for name, (what, weights) in sources.items():
        if name in networks and weights:
            full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            common.reshard(networks[name])
            set_model_state_dict(networks[name].transformer, weights() if dist.get_rank() == 0 else {}, options=full)
        said += [f"{name}: {what}"] if name in networks else []
    if dist.get_rank() == 0:
        print(f"from {path.name}, {'; '.join(said)}")
    return {name for name, (_, weights) in sources.items() if name in networks and weights}


def opened(path, teacher):
    """{"student": (what it is, a function that returns its weights), "fake_score": …}, or one line if they do not fit.

    For a fake score that does not fit the function is None.
    """
    if reason := why_not(teacher):
        raise UserError(f"--init: {path} is a file, and {teacher} {reason}: files are read for Wan with one expert")
    entries, network = entries_of(path), empty(teacher)
    student = next(entry for entry in STUDENTS if entry in entries)
    if any(re.search(r"\.(lora|lokr|hada|dora)", key) for key in entries[student]):
        change = lora_of(path, entries[student], network)
        return {"student": ("the teacher with this LoRA", lambda: merged(path, teacher, *change))}
    weights = diffusers_names(path, entries[student])
    if reason := misfit(weights, network):
        raise UserError(f"--init: the weights in {path} do not fit: {reason}")
    sources = {"student": (student, lambda: weights)}
    if entry := next((entry for entry in FAKE_SCORES if entry in entries), None):
        # names with _ are of a discriminator that reads its blocks
        critic = {k: v for k, v in diffusers_names(path, entries[entry]).items() if not k.startswith("_")}
        reason = misfit(critic, network)
        what = f"not {entry}, which does not fit ({reason})" if reason else entry
        sources["fake_score"] = (what, None if reason else lambda: critic)
    return sources


def entries_of(path):
    """{entry: {key: tensor}} of a file. Nothing is unpickled. Weights without an entry are "model"."""
    if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
        raise UserError(
            f"--init: cannot read {path}: download it again, or, if older than torch 1.6, torch.save it anew"
        )
    with readable(path):
        try:
            if path.suffix == ".safetensors":
                record = load_file(path)
            else:
                record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise UserError(f"--init: {path} holds more than tensors; it would run code, so it is not read") from None
    record = record if isinstance(record, dict) else {}
    inner = record.get("model")
    if isinstance(inner, dict) and any(isinstance(value, dict) for value in inner.values()):
        record = inner
    known = (*STUDENTS[:-1], *FAKE_SCORES)
    if record and all(isinstance(value, torch.Tensor) for value in record.values()):
        flat, record = record, {}
        for key, value in flat.items():  # safetensors hold no dict in a dict: generator.model.blocks.0.…
            entry, _, rest = key.partition(".")
            named = entry in known and entry != "net"
            record.setdefault(entry if named else "model", {})[rest if named else key] = value
    entries = {entry: record[entry] for entry in (*STUDENTS, *FAKE_SCORES) if isinstance(record.get(entry), dict)}
    if not any(entry in entries for entry in STUDENTS):
        has = ", ".join(map(str, list(record)[:5])) or "nothing by name"
        raise UserError(f"--init: no student in {path}: it holds {has}, and none of {', '.join(STUDENTS)}")
    return entries


def why_not(teacher):
    """Why files of others are not read for this teacher, or None."""
    index = read_json(teacher_folder(teacher) / "model_index.json")
    if (index.get("transformer_2") or [None])[0]:
        return "has two experts"
    kind = str((index.get("transformer") or [None])[-1])
    return None if kind == WanTransformer3DModel.__name__ else f"is no Wan (its transformer is a {kind})"


def empty(teacher):
    """The teacher's transformer, without weights."""
    folder = teacher_folder(teacher) / "transformer"
    with readable(folder), init_empty_weights():
        return WanTransformer3DModel.from_config(read_json(folder / "config.json"))


def diffusers_names(path, weights):
    """Weights by diffusers' names, from those or Wan's own, wrapped or not."""
    plain = {OUTER.sub("", WRAPPED.sub("", key)): value for key, value in weights.items()}
    if len(plain) < len(weights):
        raise UserError(f"--init: {path} has two tensors of one name, but for prefixes")
    native = any(".self_attn." in key for key in plain)
    return convert_wan_transformer_to_diffusers(plain) if native else plain


def misfit(weights, network):
    """Why weights do not fit a network, the first reason, or None."""
    wanted = network.state_dict()
    for key in sorted(weights.keys() ^ wanted.keys()):
        return f"{key} is {'missing' if key in wanted else 'unknown'}"
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in FULL:
            return f"{key} is {getattr(value, 'dtype', 'no tensor')}: get weights that were not quantised"
        if value.shape != wanted[key].shape:
            return f"{key} is {tuple(value.shape)}, this teacher's {tuple(wanted[key].shape)}"


def lora_of(path, weights, network):
    """What a LoRA's file changes, or one line: (lora, metadata, added), by diffusers' names.

    metadata: what diffusers wrote beside it, its alpha above all, or None; added: {name: difference of a parameter},
    "diff", "diff_b" and "diff_m" in files made for ComfyUI, most of which diffusers leaves out.
    """
    metadata = None
    if path.suffix == ".safetensors":
        with readable(path), safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "null"))
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    weights = {key.replace(".default.", "."): value for key, value in weights.items()}
    if any(".self_attn." in key for key in weights):  # Wan's names, as ComfyUI has them
        weights = {f"diffusion_model.{OUTER.sub('', key)}": value for key, value in weights.items()}
    for key in weights:  # diffusers' converter leaves out what it does not know
        lone = key.endswith(".alpha") and not any(k.startswith(f"{key.removesuffix('.alpha')}.lora_") for k in weights)
        if lone or not key.endswith(LORA_ENDS):
            raise UserError(f"--init: the LoRA in {path} does not fit: {key} is unknown")
    differences = {key: value for key, value in weights.items() if key.endswith((".diff", ".diff_b", ".diff_m"))}
    try:
        lora = WanPipeline.lora_state_dict({k: v for k, v in weights.items() if k not in differences})
    except Exception as error:  # its converters take out what they expect, and raise whatever comes of that
        reason = str(error).partition("original_state_dict.keys()=")[2][:100] or repr(error)[:100]
        raise UserError(f"--init: diffusers cannot convert the LoRA in {path}: {reason}") from None
    ends = {".diff_m": ".modulation", ".diff_b": ".bias", ".diff": ".weight"}
    added = {key[: key.rindex(".")] + ends[key[key.rindex(".") :]]: value for key, value in differences.items()}
    added = convert_wan_transformer_to_diffusers({OUTER.sub("", key): value for key, value in added.items()})
    lora = {f"transformer.{OUTER.sub('', key)}": value for key, value in lora.items()}
    unfit = lambda reason: UserError(f"--init: the LoRA in {path} does not fit: {reason}")
    shapes = {key: value.shape for key, value in added.items()}
    for key in lora:
        layer, _, half = key.removeprefix("transformer.").rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or f"{layer}.weight" not in wanted:
            raise unfit(f"{key} is unknown")
        halves = [f"transformer.{layer}.lora_{which}.weight" for which in "AB"]
        for other in halves:
            if other not in lora:
                raise unfit(f"{other} is missing")
        down, up = (lora[half].shape for half in halves)
        if up[1:] != down[:1]:
            raise unfit(f"{halves[0]} is {tuple(down)} and its other half {tuple(up)}")
        shapes[f"{layer}.weight"] = torch.Size((up[0], *down[1:]))
    for key, shape in shapes.items():
        if key not in wanted:
            raise unfit(f"{key} is unknown")
        if shape != wanted[key]:
            raise unfit(f"it changes {key} by {tuple(shape)}, this teacher's is {tuple(wanted[key])}")
    return lora, metadata, added


@torch.no_grad()
def merged(path, teacher, lora, metadata, added):
    """The teacher's weights, float32, with a LoRA merged by diffusers."""
    folder = teacher_folder(teacher) / "transformer"
    with readable(path):
        whole = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
        for key, value in added.items():
            whole.get_parameter(key).add_(value.to(torch.float32))
        if lora:
            whole.load_lora_adapter(lora, adapter_name="published", metadata=metadata)
            whole.fuse_lora(adapter_names=["published"])
            whole.unload_lora()
    return whole.state_dict()
