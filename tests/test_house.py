"""The house: who may import whom, how big rooms and files may be, and how much the main of dmd2.py reaches."""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")
# what a room may import of this repository, beside itself: arrows only run down
LIBRARY, PROGRAMS = {"common", "models", "training"}, ("tools", "experiments", "evaluation", "eval_vbench", "docs")
MAY_IMPORT = {
    **dict.fromkeys(PROGRAMS, {*LIBRARY, *SCRIPTS, "tiny", "evaluation"}),
    **dict.fromkeys(SCRIPTS, {"common", "training"}),
    "tiny": LIBRARY,
    "training": {"common", "models"},
    "common": {"models", "training.files"},
    "models": {"training.files"},
}
BARS = {  # of each room: lines and tokens at most
    "scripts": (1500, 12500), "common": (402, 3040), "models": (1045, 7600), "training": (1545, 11970),
    "tiny": (760, 6880), "tools": (1180, 9800), "experiments": (1015, 9700), "evaluation": (515, 4100),
    "docs": (200, 1700), "tests": (6250, 65500),
}  # fmt: skip
LONGEST = {**dict.fromkeys(SCRIPTS, 330), "codmd": 340, "phased_dmd": 370, "common": 402, "training": 270, "tests": 600}
REACHED = 1895  # issue 34 asked for 1,700
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}


@cache
def files():
    """{module name: its text} of all code."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    paths = map(Path, subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    return {".".join(p.with_suffix("").parts): (ROOT / p).read_text() for p in paths if (ROOT / p).is_file()}


CODE = [name for name in files() if not name.startswith("tests")]


@cache
def imports(name):
    """What a module imports, at any depth: {local name: dotted name}."""
    found = {}
    for node in ast.walk(ast.parse(files()[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            room = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {a.asname or a.name: room + a.name for a in node.names}
    return found


def test_arrows_only_run_down():
    for name in CODE:
        room = name.split(".")[0]
        modules = {dotted if dotted in files() else dotted.rpartition(".")[0] for dotted in imports(name).values()}
        for module in modules & files().keys():
            assert {module, module.split(".")[0]} & {room, *MAY_IMPORT[room]}, f"{name} imports {module}"


def tokens(text):
    """How many tokens a source has, without comments, layout and strings that stand alone, as docstrings do."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [tokenize.NEWLINE, *(kind for kind in kinds if kind not in LAYOUT)]
    alone = [tokenize.NEWLINE, tokenize.STRING, tokenize.NEWLINE]
    return sum(kind != tokenize.NEWLINE and kinds[i - 1 : i + 2] != alone for i, kind in enumerate(kinds))


def test_rooms_and_files_are_small():
    lines, count = Counter(), Counter()
    others = {**dict.fromkeys(SCRIPTS, "scripts"), "eval_vbench": "evaluation", "prompts": "docs"}
    for name, text in files().items():
        room = name.split(".")[0]
        lines[others.get(room, room)] += text.count("\n")
        count[others.get(room, room)] += tokens(text) if sys.version_info < (3, 12) else 0  # then f-strings are many
        assert text.count("\n") <= LONGEST.get(name, LONGEST.get(room, 400)), name
    assert lines.keys() <= BARS.keys()
    assert not {room: (lines[room], count[room]) for room, (n, t) in BARS.items() if lines[room] > n or count[room] > t}


@cache
def definitions(name):
    """{name: node} of a module's top-level functions, classes and constants."""
    found = {}
    for node in ast.parse(files()[name]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {n.id: node for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def reached(script):
    """{dotted name: lines} of all definitions that a script's `main` leads to, followed by names.

    A class counts as a whole, and so does the script. What is imported by a string is not followed: the families, of
    which Wan's is given here, and what only some runs need (tiny/, published students, a causal student).
    """
    todo, seen = [*(f"{script}.{name}" for name in definitions(script)), "models.wan.Wan"], {}
    while todo:
        module, _, name = (dotted := todo.pop()).rpartition(".")
        if dotted in seen or module not in files() or name not in definitions(module):
            continue
        node, own, outside = definitions(module)[name], definitions(module), imports(module)
        seen[dotted] = node.end_lineno - min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) + 1
        for part in ast.walk(node):
            if isinstance(part, (ast.Name, ast.Attribute)):
                first, dot, rest = ast.unparse(part).partition(".")
                todo.append((f"{module}.{first}" if first in own else outside.get(first, "")) + dot + rest)
    return seen


def test_what_main_reaches_is_small():
    lines = Counter({"dmd2": files()["dmd2"].count("\n")})
    for dotted, count in reached("dmd2").items():
        lines[dotted.rpartition(".")[0]] += count * (not dotted.startswith("dmd2."))
    print(lines.most_common())
    common, wan = (files()[name].count("\n") for name in ("common", "models.wan"))
    readme = (ROOT / "README.md").read_text()
    assert f"`common.py` ({common}:" in readme and f"(`models/wan.py`, {wan})" in readme
    assert lines.total() <= REACHED and f" {lines.total():,} lines" in readme


def test_importing_a_script_starts_nothing():
    """No thread, handler or hook; nor diffusers, so that flags are read before it is imported."""
    code = f"""import os, signal, sys, threading
state = lambda: ([*map(signal.getsignal, signal.valid_signals())], sys.excepthook, dict(os.environ), os.umask(0o022))
state(), (before := state())
import {", ".join(SCRIPTS)}, eval_vbench
print(before == state(), threading.active_count(), "diffusers" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "True 1 False\n"
