"""The diffs are the product: what may differ between two scripts, how much, and that all else is the same text; and
the papers' numbers, which the diffs show.
"""

import ast
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from models.recipes import RECIPES
from training.flags import recipe_args

ROOT = Path(__file__).resolve().parents[1]
# pair: (most lines added, most lines removed, definitions that may differ or be new or gone)
PAIRS = {
    ("dmd", "dmd2"): (
        104, 55, "docstring imports Args noise_levels rollout sample_student regression_loss Heads gan_student_loss"
        " discriminator_loss main",
    ),
    ("dmd2", "dfd"): (26, 18, "docstring Args main"),
    ("dmd2", "codmd"): (40, 8, "docstring imports Args relation_matrix relation_kl relation_loss main"),
    ("dmd2", "phased_dmd"): (
        118, 54, "docstring imports Args check_phases noise_levels phase_of bridge renoise sample_sigma rollout"
        " sample_student flow_loss main",
    ),
}  # fmt: skip
CODMD = {
    "student_every": 5, "lr": 2e-6, "fake_score_lr": 4e-7, "guidance_scale": 4.5, "shift": 8, "betas": (0.9, 0.999),
    "student_sigmas": (1, 0.9, 0.757, 0.522), "score_sigmas": (0.02, 0.98), "max_grad_norm": 10, "grad_accum": 8,
}  # fmt: skip
PAPERS = {  # for Wan2.1-1.3B, copied from the papers and their code once more
    "dmd": {"student_every": 1, "regression_weight": 0.25},
    "dmd2": CODMD | {"discriminator_weight": 1e-2, "discriminator_blocks": (15, 22, 29), "student_input": "simulate"},
    "codmd": CODMD | {
        "gan_weight": 0, "relation_weight": 0.1, "relation_temperature": 0.1, "sample_relation": 0, "frame_relation": 1,
    },
    "dfd": {
        "student_every": 5, "lr": 1e-5, "fake_score_lr": 1e-5, "guidance_scale": 5, "shift": 5, "grad_accum": 2,
        "student_sigmas": (0.999, 0.937, 0.833, 0.624), "score_sigmas": (0.001, 0.999), "student_input": "data",
        "data_prob": 0.5, "gan_weight": 0, "steps": 100,
    },
    "phased_dmd": {
        "student_every": 5, "lr": 5e-5, "fake_score_lr": 4e-7, "shift": 5, "student_sigmas": (1, 0.938, 0.833, 0.625),
        "phase_ends": (0.833, 0), "lora_rank": 64, "lora_alpha": 8, "betas": (0, 0.999), "gan_weight": 0,
    },
}  # fmt: skip


def definitions(name):
    """Top-level parts of a script in order, {name: text with its comments}: docstring, imports, functions, classes."""
    text = (ROOT / f"{name}.py").read_text()
    lines, parts, start = text.splitlines(), {}, 0
    for node in ast.parse(text).body:
        kinds = {ast.Import: "imports", ast.ImportFrom: "imports", ast.Expr: "docstring", ast.If: "footer"}
        part = kinds.get(type(node)) or node.name
        parts[part] = parts.get(part, "") + "\n".join(lines[start : node.end_lineno]).strip() + "\n"
        start = node.end_lineno
    return parts


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_declared_diff(a, b):
    most_added, most_removed, may_differ = PAIRS[a, b]
    words = ["git", "diff", "--no-index", "--numstat", f"{a}.py", f"{b}.py"]
    added, removed, *_ = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert int(added) <= most_added and int(removed) <= most_removed, f"the diff of {a}.py and {b}.py has grown"
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"{a}.py {b}.py" in line)
    assert f"+{added} -{removed}" in row, f"README: {a}.py to {b}.py is +{added} -{removed}"
    before, after = definitions(a), definitions(b)
    assert [name for name in before if name in after] == [name for name in after if name in before], "another order"
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert differ == set(may_differ.split()), f"what differs between {a}.py and {b}.py is not what is declared"


def test_dfd_is_one_line_in_main():
    before, after = (definitions(name)["main"].splitlines() for name in ("dmd2", "dfd"))
    guard = "if (args.gan_weight or from_data{}) and not data.has_clips:"
    (new,) = [line for line in after if line not in before and "has_clips" not in line]
    restored = [line.replace(guard.format(" or args.data_prob"), guard.format("")) for line in after if line != new]
    assert restored == before and "load_x0()" in new and "data_prob" in new


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_numbers(name):
    Args = import_module(name).Args
    ours = vars(recipe_args(Args, teacher="wan2.1-1.3b"))
    assert ours == ours | PAPERS[name]
    for teacher in RECIPES:  # a flag that is none, or out of its bounds, ends in an error
        recipe_args(Args, teacher=teacher)
