"""tools/ as a user starts them, and make_pairs.py: it goes on, and refuses to mix."""

import pytest

import dmd
from tests.conftest import ROOT, small_args
from tests.ranks import run_program
from tools import make_pairs


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["make_pairs.py", "pairs", "--pair-steps", "0"], "error: --pair-steps must be at least 1, got 0"),
        (["make_shards.py", "nowhere", "shards"], "error: no such folder nowhere"),
        (["cost.py", "dmd3"], "error: unknown script 'dmd3': use dmd, dmd2, dfd, codmd, phased_dmd, or all"),
        (["export.py", "nowhere", "out"], "error: no such folder nowhere: give a run or one of its checkpoints"),
        (["cost.py", "dmd2", "--gpus", "0"], "error: --gpus must be at least 1, got 0"),
        (["step_time.py", "dmd3"], "error: unknown script 'dmd3': use dmd, dmd2, dfd, codmd, phased_dmd"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, line):
    program, *flags = words
    (tmp_path / "folder").mkdir()
    said = run_program(ROOT / "tools" / program, flags, tmp_path / "folder", tmp_path / "said")
    assert said == (2, "", f"{line}\n")
    assert not any((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("program", ["make_pairs.py", "cost.py", "step_time.py"])
@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0)])
def test_without_its_first_word_a_tool_says_what_it_is_for(tmp_path, program, words, code):
    ended, out, err = run_program(ROOT / "tools" / program, words, tmp_path, tmp_path / "said")
    said, silent = (err, out) if code else (out, err)
    assert ended == code and f"tools/{program}" in said and not silent


def test_make_pairs_goes_on_and_refuses_to_mix(tmp_path, fails):
    out, flags = tmp_path / "pairs", {"runs_dir": str(tmp_path), "max_hours": 0.0}  # asked for, so never refused
    make_pairs.main(out, small_args(**flags))
    shards = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert len(shards) == 2
    (out / "00000002.safetensors").unlink()
    make_pairs.main(out, small_args(**flags))
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == shards
    for other in ({"pair_steps": 3}, {"guidance_scale": 3.0}, {"seed": 1}, {"num_samples": 6}):
        fails(lambda other=other: make_pairs.main(out, small_args(**flags, **other)), "other settings")
    (out / "key.txt").unlink()  # so nobody knows of what settings they are
    fails(lambda: make_pairs.main(out, small_args(**flags)), "other settings")
    assert not (out / "key.txt").exists()
    fails(lambda: make_pairs.main(next(out.glob("*.safetensors")), small_args(**flags)), "is a file")
    dmd.main(small_args(runs_dir=str(tmp_path), pairs=str(out), steps=1))
