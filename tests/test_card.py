"""The card's own command: with a real teacher every script runs with nothing but --teacher.

The teacher here is a small random Wan, so no part of it is taken for the tiny world; only its size is passed.
"""

import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel

import codmd
import dfd
import dmd
import dmd2
import phased_dmd
from models.presets import PRESETS
from tests.conftest import only_run
from training.flags import with_recipe

# what makes a run of Wan's recipe small, and nothing else
SIZE = {"frames": 9, "height": 32, "width": 32, "steps": 2, "grad_accum": 1, "teacher_steps": 2, "num_samples": 2}
SIZE |= {"preview_prompts": 2, "preview_seeds": 2, "discriminator_blocks": (0, 1)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "wan-small"
    shutil.copytree(PRESETS["tiny"].source, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return folder


def test_nothing_but_the_teacher(teacher, tmp_path, capsys):
    for script in (dmd2, dfd, codmd, phased_dmd, dmd):
        flags = {k: v for k, v in SIZE.items() if k in script.Args.__dataclass_fields__}
        script.main(with_recipe(script.Args, script.RECIPES, teacher=str(teacher), runs_dir=str(tmp_path), **flags))
        run = only_run(tmp_path, script)
        assert (run / "checkpoints" / "step_0000002" / "checkpoint.json").is_file()
        table = (run / "previews" / "table.md").read_text()
        assert "diversity" in table and "right" not in table
    out = capsys.readouterr().out
    assert f"starting from fake_score, student of {only_run(tmp_path, dmd2)}" in out
    said = "was trained with --student-sigmas 1.0 0.9 0.757 0.522, and this run has 0.999 0.937 0.833 0.624"
    assert said in out and out.index(said) < out.index("starting from"), (
        "DFD has its own, and says so before its samples"
    )
    # prompts that ship with the repository; clips by the teacher for dmd2.py and dfd.py, pairs for dmd.py
    made = list((tmp_path / "cache").glob("pairs_*"))
    assert len(made) == 3, "guidance and steps differ, so each has its own"
