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


def definitions(name):
    """Top-level parts of a script in order, {name: text with its comments}: docstring, imports, functions, classes."""
    text = (ROOT / f"{name}.py").read_text()
    lines, parts, start = text.splitlines(), {}, 0
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            part = "imports"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            part = node.name
        elif isinstance(node, ast.Assign):
            part = node.targets[0].id
        else:
            part = "docstring" if isinstance(node, ast.Expr) else "footer"
        body = "\n".join(lines[start : node.end_lineno]).strip()
        parts[part] = parts[part] + "\n" + body if part == "imports" and part in parts else body
        start = node.end_lineno
    parts["footer"] += "\n".join(lines[start:])
    return parts


@pytest.mark.parametrize(("a", "b"), DECLARED)
def test_only_declared_definitions_differ(a, b):
    may_differ, _, _ = DECLARED[a, b]
    before, after = definitions(a), definitions(b)
    shared = [name for name in before if name in after]
    assert shared == [name for name in after if name in before], f"{b}.py orders its definitions unlike {a}.py"
    for name in before | after:
        if before.get(name) != after.get(name):
            assert name in may_differ, f"{name} differs between {a}.py and {b}.py: make the same change in both"
    idle = [name for name in may_differ if before.get(name) == after.get(name)]
    assert not idle, f"{idle} are declared to differ between {a}.py and {b}.py, and do not"


@pytest.mark.parametrize(("a", "b"), DECLARED)
def test_the_size_of_each_diff(a, b):
    """As the README has it, which names the command."""
    words = ["git", "diff", "--no-index", "--numstat", f"{a}.py", f"{b}.py"]
    numbers = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split()[:2]
    added, removed = map(int, numbers)
    assert (added, removed) == DECLARED[a, b][1:], f"the diff of {a}.py and {b}.py has another size"
    assert f"`git diff --no-index {a}.py {b}.py` | +{added} -{removed} |" in (ROOT / "README.md").read_text()


def test_scripts_do_not_import_each_other():
    names = {name for pair in DECLARED for name in pair}
    for name in names:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not names.intersection(modules), f"{name}.py imports another script"


def test_dfd_is_one_line_in_main():
    before, after = definitions("dmd2")["main"].splitlines(), definitions("dfd")["main"].splitlines()
    (new,) = [line for line in after if line not in before]
    assert [line for line in after if line != new] == before
    assert "x0_data" in new and "data_prob" in new
