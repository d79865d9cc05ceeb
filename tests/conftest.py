"""Short real runs on the tiny teacher, in this process or on several ranks."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import common
import dmd
from training.files import MISTAKES, one_line
from training.flags import recipe_args

# sums in another order are other bits: one thread, here and in what the tests start
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "steps": 3, "batch_size": 2, "preview_every": 0, "save_every": 100, "preview_prompts": 2, "preview_seeds": 2,
    "teacher_steps": 2, "pair_steps": 2, "num_samples": 4, "init": None,
}  # fmt: skip


def small(script, flags):
    return {name: value for name, value in SMALL.items() if hasattr(script.Args, name)} | flags


def small_args(script=dmd, **flags):
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return recipe_args(script.Args, **small(script, flags))


def only_run(runs_dir, script=dmd):
    (run,) = Path(runs_dir).glob(f"{script.__name__.split('.')[-1]}__*")
    return run


def checkpoint_of(runs_dir, step, script=dmd):
    return only_run(runs_dir, script) / "checkpoints" / f"step_{step:07d}"


def student_weights(runs_dir, step, script=dmd):
    """Weights of the exported (averaged) student."""
    folder = checkpoint_of(runs_dir, step, script) / "student" / "transformer"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def state_of(runs_dir, step, script=dmd):
    """All that a checkpoint holds of networks and optimizers, whole, by its name."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint_of(runs_dir, step, script) / "state"))
    known = reader.read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in known.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a, b):
    return sum((a[key] - b[key]).square().sum().item() for key in a) ** 0.5


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_searched():
    """Garbage collection looks at all that the imports made, again and again: a third of a short run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_group():
    """main() makes one and takes it down; tests of parts of common.py need one too."""
    common.init_distributed()


@pytest.fixture
def fails():
    """Run the function; it must end in an error that is printed in one line, with these words."""

    def check(function, *words):
        with pytest.raises(MISTAKES) as stop:
            function()
        line = one_line(stop.value)
        assert "\n" not in line and all(word in line for word in words), line

    return check
