"""Programs as a user starts them, with a real teacher and nothing but --teacher."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

import codmd
import dfd
import dmd
import dmd2
import phased_dmd
from models.presets import PRESETS
from tests.conftest import ROOT, only_run
from tests.ranks import run_program
from training.flags import recipe_args

# what makes a run of Wan's recipe small, and nothing else
SIZE = {"frames": 9, "height": 32, "width": 32, "steps": 2, "grad_accum": 1, "teacher_steps": 2, "num_samples": 2}
SIZE |= {"preview_prompts": 2, "preview_seeds": 2, "discriminator_blocks": (0, 1)}


@pytest.mark.parametrize(
    "words",
    [
        ["make_shards.py", "gone", "shards"],
        ["cost.py", "dmd2", "--teacher", "gone"],
        ["export.py", "gone", "out"],
    ],
)
def test_a_mistake_is_one_line(tmp_path, words):
    code, out, err = run_program(ROOT / "tools" / words[0], words[1:], tmp_path, tmp_path / "said")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "gone" in err


@pytest.mark.slow
def test_gpu_check_rehearsed_on_the_cpu(tmp_path):
    """Every row is there, also after one that failed."""
    own = {"OUT": str(tmp_path), "TEACHER": "tiny", "ATTENTION": "sage", "STEPS": "2", "SLOW": "9"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "tools/gpu_check.sh"], cwd=ROOT, env={**os.environ, "PATH": path, **own}, check=True)
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = {name.strip(): cells for _, name, *cells, _ in (line.split("|") for line in lines[5:])}
    assert len(rows) == 7 and {len(cells) for cells in rows.values()} == {4}
    assert [name for name, cells in rows.items() if "failed" in cells[0]] == ["other attention"]
    assert all(float(cell) > 0 for name in ("as it is", "compiled") for cell in rows[name][:3])


@pytest.mark.slow
def test_nothing_but_the_teacher(tmp_path):
    """A small random Wan, so no part of it is taken for the tiny world; only its size is passed."""
    teacher = tmp_path / "wan-small"
    shutil.copytree(PRESETS["tiny"].source, teacher, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    ).save_pretrained(teacher / "transformer")  # fmt: skip
    for script in (dmd2, dfd, codmd, phased_dmd, dmd):
        flags = {k: v for k, v in SIZE.items() if k in script.Args.__dataclass_fields__}
        script.main(recipe_args(script.Args, teacher=str(teacher), runs_dir=str(tmp_path), **flags))
        run = only_run(tmp_path, script)
        table = (run / "previews" / "table.md").read_text()
        assert "diversity" in table and "right" not in table
    # clips by the teacher for dfd.py, pairs for dmd.py: guidance and steps differ, so each has its own
    assert len(list((tmp_path / "cache").glob("pairs_*"))) == 2
