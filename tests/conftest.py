"""Short real runs on the tiny teacher, in this process or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import common
import dmd

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "steps": 3, "batch_size": 2, "num_pairs": 4, "pair_steps": 2, "preview_every": 0, "save_every": 100,
    "preview_prompts": 2, "preview_seeds": 2, "teacher_steps": 2,
}  # fmt: skip


def small_args(**flags):
    return common.with_recipe(dmd.Args, dmd.RECIPES, **{**SMALL, **flags})


def command_line(flags):
    words = []
    for name, value in {**SMALL, **flags}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def popen(processes=1, **flags):
    """dmd.py as a user starts it; `processes` > 1 under torchrun."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, str(ROOT / "dmd.py"), *command_line(flags)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def only_run(runs_dir):
    (run,) = Path(runs_dir).glob("dmd__*")
    return run


def student_weights(runs_dir, step):
    folder = only_run(runs_dir) / "checkpoints" / f"step_{step:07d}" / "student" / "transformer"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(autouse=True)
def process_group():
    """main() makes one and takes it down; tests of parts of common.py need one too."""
    common.init_distributed()


@pytest.fixture
def fails(capsys):
    """Run the function; it must end in one `error:` line with the words, and this exit code."""

    def check(function, *words, code=2):
        with pytest.raises(SystemExit) as stop:
            function()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == code
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines

    return check
