"""--student: another model's weights learn, the teacher scores. Which network does what: test_mains.py."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import common
import dfd
import dmd2
from models.presets import PRESETS
from tests import small_teachers
from tests.conftest import only_run, small_args
from training.flags import recipe_args

SMALL = PRESETS["tiny-small"].source


def test_what_cannot_go_together_is_one_line(tmp_path, fails):
    student = lambda name: common.Model("tiny", 9, 32, 32, student=str(name)).student
    for name, word in (("tiny-i2v", "conditions"), (small_teachers.write("wan", tmp_path), "latents")):
        fails(lambda name=name: student(name), "--student", word)
    far = small_args(dmd2, teacher="wan2.1-14b", student="cosmos2.5-2b", runs_dir=tmp_path)
    fails(lambda: dmd2.main(far), "--student cosmos2.5-2b")  # and not for want of a network or a GPU
    other = shutil.copytree(SMALL, tmp_path / "other")
    path = other / "text_encoder" / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    assert student(other).folder == other  # a copy in bf16 is no other
    save_file({key: value + 0.1 for key, value in load_file(path).items()}, path)
    fails(lambda: student(other), "--student", "text")
    fails(
        lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, student="tiny-small", discriminator_blocks=(3,))), "(3,)"
    )


def test_the_weights_of_a_deeper_student_are_not_cut(tmp_path, fails):
    """Its first blocks are of the same names and shapes."""
    flags = {"runs_dir": tmp_path, "steps": 1, "gan_weight": 0.0}
    dmd2.main(small_args(dmd2, **flags))
    init = str(only_run(tmp_path, dmd2))
    fails(lambda: dfd.main(small_args(dfd, student="tiny-small", **flags | {"init": init})), init, "blocks.3")


@pytest.mark.parametrize(
    ("teacher", "student", "blocks"),
    [
        ("tiny", "tiny-small", (0, 1, 2)),
        ("wan2.1-14b", "wan2.1-1.3b", (15, 22, 29)),
        ("wan2.1-1.3b", "wan2.1-14b", (21, 30, 39)),
    ],
)
def test_the_discriminators_blocks_are_the_students_and_all_else_the_teachers(teacher, student, blocks):
    own, both = (recipe_args(dmd2.Args, teacher=teacher, student=name) for name in (None, student))
    assert both.discriminator_blocks == blocks and (both.lr, both.student_sigmas) == (own.lr, own.student_sigmas)
