"""Checkpoints: which one is meant, whether it is whole, and all networks and optimizers out of it and into it.

state/    all networks and optimizers, sharded safetensors of torch.distributed.checkpoint
student/  the student alone in the diffusers layout: transformer/, with phases or a teacher of two experts also
          transformer_2/, …; a LoRA merged
"""

import re
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

import common
from models.adapters import Adapted
from training.files import UserError, read_json, readable, readable_by_all
from training.start import flags_of

# of an optimizer one value per parameter, by its name: safetensors hold nothing but tensors
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def latest_checkpoint(folder):
    """The newest complete checkpoint in a run folder, or None."""
    steps = sorted(Path(folder).glob(f"checkpoints/step_{'[0-9]' * 7}"), key=lambda path: path.name)
    return steps[-1] if steps else None


def run_name(script, teacher, seed=None):
    """How the folders of a script's runs on a teacher begin, those of one seed or of all."""
    name = Path(teacher).name or Path(teacher).resolve().name
    return f"{script}__{safe(name)[:100]}__{'' if seed is None else f'{seed}__'}"


def safe(name):
    """A name without what scp, docker, NTFS or Weights & Biases read otherwise."""
    return re.sub(r"[^\w.-]", "-", name)


def runs_of(runs_dir, *which):
    """Folders of the runs that `run_name` describes."""
    return sorted(path for path in Path(runs_dir).glob("*") if safe(path.name).startswith(run_name(*which)))


def find_checkpoint(runs_dir, script, teacher, seed, resume):
    """The checkpoint folder that --resume means: "latest", a run folder, or a checkpoint folder."""
    if resume == "latest":
        found = [c for run in runs_of(runs_dir, script, teacher, seed) if (c := latest_checkpoint(run))]
        if not found:
            where = f"{runs_dir}/{run_name(script, teacher, seed)}*"
            raise UserError(f"--resume latest: no checkpoint in {where}; leave --resume out to start")
        return max(found, key=lambda path: path.stat().st_mtime)
    return checkpoint_in(resume)


def checkpoint_in(path):
    """The newest checkpoint of a run folder, or a checkpoint folder itself; absolute."""
    path = Path(path).absolute()
    checkpoint = latest_checkpoint(path) or path
    if not (checkpoint / "checkpoint.json").is_file():
        raise UserError(f"{checkpoint} is no run with a checkpoint: give runs/NAME or runs/NAME/checkpoints/step_N")
    return checkpoint


def find_init(runs_dir, teacher, init, subject=None):
    """What --init means: a file or folder that fits this teacher, or a script's newest finished run of a subject."""
    if Path(init).exists():
        return import_module("training.published").check(Path(init), teacher)  # by name: --help need not wait for it
    last = lambda run: run / "checkpoints" / f"step_{read_json(run / 'args.json')['steps']:07d}"
    runs = [run for run in runs_of(runs_dir, init, subject or teacher) if latest_checkpoint(run) and last(run).is_dir()]
    if not runs:
        where = f"{runs_dir}/{run_name(init, subject or teacher)}*"
        raise UserError(f"--init: no such file or folder, nor a finished run {where}: train it first")
    return max(runs, key=lambda run: last(run).stat().st_mtime)


def flat_state(networks, optimizers):
    """{"name.parameter": tensor} of all networks, and {"name_optimizer.…": tensor} of the optimizers of the same names:
    the tensors themselves, no copies, so that dcp.load fills them.

    An optimizer's hyper-parameters come from the flags, not from here.
    """
    state = {}
    for name, network in networks.items():
        state |= {f"{name}.{key}": value for key, value in get_model_state_dict(network).items()}
    for name, optimizer in optimizers.items():
        new = not optimizer.state  # then PyTorch makes it by a step without gradient, and counts that step
        values = get_optimizer_state_dict(networks[name], optimizer, options=FLAT)
        values = {f"{name}_optimizer.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
        state |= {key: value.zero_() if new else value for key, value in values.items()}
    return state


def save_state(folder, networks, optimizers, files=32):
    """Write all networks and optimizers; a rank's in so many files of one size, of which the writer copies one."""
    state = flat_state(networks, optimizers)
    sizes = [value.numel() * value.element_size() for value in state.values()]
    numbers = {key: -(-end * files // sum(sizes)) for key, end in zip(state, accumulate(sizes))}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True))


def load_state(checkpoint, networks, optimizers):
    """Fill all networks and optimizers from a checkpoint, in place."""
    state = flat_state(networks, optimizers)
    with readable(checkpoint):
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "state"))
        known = reader.read_metadata().state_dict_metadata
        for key in [key for key in state if "_optimizer.state." in key and key not in known]:
            state.pop(key).zero_()  # of an expert that no step has trained yet
        dcp.load(state, storage_reader=reader)


def load_init(path, networks, args):
    """Start networks from a checkpoint (or the newest one of a run folder) of any script, or from a student alone.

    networks: dict of "student", "fake_score" and perhaps "ema"; args: the new run's flags, a dict. What the checkpoint
    lacks keeps the teacher's weights, and an average starts at the student; both are said.
    What only the checkpoint has is ignored. Of a run with phases one expert must be named, by its folder:
    student/transformer, student/transformer_2, …
    """
    path = latest_checkpoint(path) or path
    is_checkpoint, student = (path / "checkpoint.json").is_file(), networks["student"]
    experts = path / "student" if is_checkpoint else path
    if (experts / "transformer_2").is_dir() and ("phase_ends" in flags_of(path) or len(student.parts) == 1):
        raise UserError(f"--init: {path} has one expert per phase: name {experts / 'transformer'} or transformer_2, …")
    found = {"student"}
    if is_checkpoint:
        found = load_networks(path, networks)
    elif isinstance(student, Adapted):
        raise UserError(f"--init: with --lora-rank the base is the teacher: name a run with that rank, not {path}")
    elif path.is_file():
        teacher = args["student"] or args["teacher"]
        found = import_module("training.published").load(path, networks, teacher, args["init_strength"])
    else:
        for part in student.parts:  # of one transformer also the folder itself
            whole = len(student.parts) == 1 and not (path / part).is_dir()
            common.put_weights(student, path if whole else path / part, part)
    if "ema" in networks and "ema" not in found:
        common.ema_update(networks["ema"], networks["student"], 0)
    if dist.get_rank() == 0:
        lacking = "; it has no fake score, which starts from the teacher" * ("fake_score" in networks.keys() - found)
        print(f"starting from {', '.join(sorted(found))} of {path}{lacking}")


def load_networks(checkpoint, networks):
    """Fill those of the networks, a dict by name, that a checkpoint has, the student among them; returns their names.

    A network is there as a whole or not at all, but for a discriminator's heads, which may be new.
    """
    reader, wanted = dcp.HuggingFaceStorageReader(str(checkpoint / "state")), flat_state(networks, {})
    with readable(f"{checkpoint} into these networks"):
        known = reader.read_metadata().state_dict_metadata
        found = {"student"} | {name for name in networks if any(key.startswith(f"{name}.") for key in known)}
        for key in sorted(known.keys() ^ wanted.keys()):
            if key.split(".")[0] in found & networks.keys() and ".heads." not in key:
                raise ValueError(f"{key} is {'unknown' if key in known else 'missing'}")
        dcp.load({key: value for key, value in wanted.items() if key in known}, storage_reader=reader)
    return found


def save_weights(network, part, folder):
    """Write a transformer of a network in the diffusers layout: config.json and safetensors. A LoRA is merged."""
    transformer, lora = getattr(network, part), getattr(network, "adapter_name", None)
    weights = get_model_state_dict(transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank():
        return
    with init_empty_weights(include_buffers=False):
        whole = type(transformer).from_config(transformer.config)
        if lora:
            whole.add_adapter(transformer.peft_config[lora], lora)
    if lora:  # copies, as merging is in place, and in float32; of several LoRAs this one
        own = whole.state_dict().keys()
        weights = {key: weights.pop(key).to(torch.float32, copy=True) for key in own}
    whole.load_state_dict(weights, assign=True)
    if lora:
        whole.fuse_lora(adapter_names=[lora])
        whole.unload_lora()
    whole.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        readable_by_all(path)
