"""The diffs are the product: what may differ between two scripts, to the line, and that all else is the same text."""

import ast
import subprocess

import pytest

from tests.conftest import ROOT

# pair: (definitions that may differ or be new or gone, lines added, lines removed)
DECLARED = {
    ("dmd", "dmd2"): (
        {"docstring", "imports", "Args", "RECIPES", "check", "needs_clips", "rollout", "sample_student",
         "regression_loss", "Heads", "gan_student_loss", "discriminator_loss", "main"}, 124, 55,
    ),
    ("dmd2", "codmd"): (
        {"docstring", "Args", "RECIPES", "relation_matrix", "relation_kl", "relation_loss", "main"}, 40, 14,
    ),
    ("dmd2", "phased_dmd"): (
        {"docstring", "Args", "RECIPES", "check", "bridge", "renoise", "sample_sigma", "rollout",
         "sample_student", "flow_loss", "main"}, 113, 63,
    ),
    ("dmd2", "dfd"): ({"docstring", "Args", "RECIPES", "needs_clips", "main"}, 26, 24),
}  # fmt: skip


def lines_of(name):
    return (ROOT / f"{name}.py").read_text().splitlines()


def definitions(name):
    """Top-level parts of a script in order, {name: text with its comments}: docstring, imports, functions, classes."""
    lines, parts, start = lines_of(name), {}, 0
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            part = "imports"
        elif isinstance(node, ast.Expr):
            part = "docstring"
        else:
            part = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else "footer")
        parts[part] = parts.get(part, "") + "\n".join(lines[start : node.end_lineno]).strip() + "\n"
        start = node.end_lineno
    return parts


@pytest.mark.parametrize(("a", "b"), DECLARED)
def test_only_declared_definitions_differ(a, b):
    may_differ, before, after = DECLARED[a, b][0], definitions(a), definitions(b)
    shared = [name for name in before if name in after]
    assert shared == [name for name in after if name in before], f"{b}.py orders its definitions unlike {a}.py"
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert differ == may_differ, "make the same change in both, or declare it"


@pytest.mark.parametrize(("a", "b"), DECLARED)
def test_the_size_of_each_diff_and_readmes_table(a, b):
    diff = subprocess.run(["diff", f"{a}.py", f"{b}.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    added, removed = (sum(line[0] == sign for line in diff.splitlines()) for sign in "><")
    assert (added, removed) == DECLARED[a, b][1:], f"the diff of {a}.py and {b}.py has another size"
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"[{a}.py to {b}.py]" in line)
    assert f"| +{added} -{removed} |" in row, "README's table of diffs is stale"


def test_dfd_is_one_line_in_main():
    before, after = definitions("dmd2")["main"].splitlines(), definitions("dfd")["main"].splitlines()
    (new,) = [line for line in after if line not in before]
    assert [line for line in after if line != new] == before
    assert "x0_data" in new and "data_prob" in new
