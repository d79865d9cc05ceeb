"""A student as a LoRA on its teacher, in the key names that diffusers' load_lora_weights and ComfyUI both read.

For Wan these are the names of Wan's own code below "diffusion_model.": ComfyUI takes the modules of its networks by
their names (comfy/lora.py, model_lora_keys_unet) with .lora_A.weight and .lora_B.weight (comfy/weight_adapter/lora.py),
and diffusers translates them (lora_conversion_utils.py). Other families have diffusers' names below "transformer.",
which ComfyUI reads for Qwen-Image. The scale alpha / rank is multiplied into B: without an alpha, both take 1.
"""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from models.wan import Wan
from training.files import UserError, opened, readable

WAN_NAMES = (  # diffusers' names of Wan's layers, and Wan's own
    ("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0", "o"), ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"),
)  # fmt: skip


def key_names(family, layer):
    """Keys of a layer's A and B."""
    prefix = "transformer."
    if family.transformer_class is Wan.transformer_class:
        prefix = "diffusion_model."
        for theirs, own in WAN_NAMES:
            layer = layer.replace(theirs, own)
    return f"{prefix}{layer}.lora_A.weight", f"{prefix}{layer}.lora_B.weight"


def of_run(student, number):
    """{layer: (A, B)} of transformer `number` of a LoRA run, as it was trained: B A is the change of its weights."""
    reader = dcp.HuggingFaceStorageReader(str(student.checkpoint / "state"))
    known = reader.read_metadata().state_dict_metadata
    role, part = "student" if student.raw or not student.args.ema_decay else "ema", student.folders[number].name
    if student.sampler == "euler":
        role = f"expert_{number}" if number < len(student.folders) - 1 else role
        part = part if part in student.model.family.parts else "transformer"
    prefix = f"{role}.lora.{part}/"
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in known.items()
        if key.startswith(prefix)
    }
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(state, storage_reader=reader, no_dist=True)
    scale = student.args.lora_alpha / student.args.lora_rank
    layers = sorted({key.removeprefix(prefix).rpartition("/")[0] for key in state})
    return {
        layer.replace("/", "."): (state[f"{prefix}{layer}/lora_A"], scale * state[f"{prefix}{layer}/lora_B"])
        for layer in layers
    }


def weights_in(folder):
    """{name: file} of the safetensors in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with readable(path), safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def linear_layers(model):
    """{name: highest rank} of the weights of a transformer's linear layers."""
    with init_empty_weights():
        modules = dict(model.family.transformer_class.from_config(model.config).named_modules())
    return {f"{name}.weight": min(m.weight.shape) for name, m in modules.items() if isinstance(m, nn.Linear)}


def of_change(teacher, student, model, rank):
    """{layer: (A, B)} of the linear layers of a transformer, nearest to the change of its weights from the folder
    `teacher` to the folder `student` (truncated SVD), and a line that says how near. Layers that have no such rank are
    kept whole, with zeros below.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    linear = linear_layers(model)
    if rank > max(linear.values()):
        raise UserError(f"--rank {rank} is higher than that of any layer: the highest is {max(linear.values())}")
    old, new = weights_in(teacher), weights_in(student)
    layers, lost, covered, total, worst = {}, 0.0, 0.0, 0.0, (0.0, "none")
    for name, path in new.items():
        after, before = (opened(file).get_tensor(name).to(device).float() for file in (path, old[name]))
        change = after - before
        size = change.double().square().sum().item()
        total += size
        if name not in linear:
            continue
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        kept, root = min(rank, len(s)), s.sqrt()
        down, up = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
        down[:kept], up[:, :kept] = root[:kept, None] * v[:kept], u[:, :kept] * root[:kept]
        layer, missed = name.removesuffix(".weight"), s[kept:].double().square().sum().item()
        layers[layer] = (down.cpu(), up.cpu())
        lost, covered = lost + missed, covered + size
        worst = max(worst, ((missed / size) ** 0.5 if size else 0.0, layer))
    if not covered:
        raise UserError(f"the linear layers in {student} are the teacher's: there is no change to make a LoRA of")
    return layers, (
        f"rank {rank}, relative error (Frobenius) {(lost / covered) ** 0.5:.3g} over all linear layers and "
        f"{worst[0]:.3g} in the worst, {worst[1]}. Left out is what is no linear layer's weight: biases, norms, "
        f"convolutions, {100 * (1 - covered / total):.3g} % of the squared change"
    )
