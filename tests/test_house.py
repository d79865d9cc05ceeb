"""The house: who may import whom, how long a file may be, and how much a reader of one method must open."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")
# room: what it may import of this repository, beside its own room
MAY_IMPORT = {
    **dict.fromkeys(SCRIPTS, {"common", "training"}),
    "common": {"models", "training.files", "tiny.world"},
    "models": {"training.files"},
    "training": {"common", "models", "tiny.measures"},
    "tiny": set(),
    "prompts": set(),
    "tools": {"common", "models", "training", "tiny", *SCRIPTS},
    "experiments": {"common", "models", "training", "tiny", *SCRIPTS},
    "evaluation": {"common", "models", "training", "tiny", *SCRIPTS},
    "eval_vbench": {"evaluation", "common", "models", "training", "tiny", *SCRIPTS},
    "docs": set(),
}
LONGEST = {
    **dict.fromkeys(("dmd", "dmd2", "dfd"), 330),
    "codmd": 350,
    "phased_dmd": 380,
    "common": 430,
    "eval_vbench": 450,
}
# what a user starts, beside the scripts: these, and what stands in these rooms itself; all else is a library
PROGRAMS = {"eval_vbench", "tiny.train", "prompts.compose", "docs.diffs", "docs.links", "docs.site"}
PROGRAM_ROOMS = ("tools", "experiments")
FAMILY, READ, REACHED = 110, 870, 2288  # 1,400 is wanted, see issue 16
NO_FAMILY = {"adapters", "classes", "compute", "folders", "images", "latents", "presets", "text"}


@cache
def files():
    """{module name: path} of all code but the tests."""
    rooms = [room for room in MAY_IMPORT if (ROOT / room).is_dir()]
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return dict(zip(names, paths, strict=True))


@cache
def parsed(name):
    return ast.parse(files()[name].read_text())


def imports(name):
    """Local names of a module's imports from this repository, at any depth: {name: (module, definition or None)}."""
    known, found = files(), {}
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name): (a.name, None) for a in node.names if a.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for a in node.names:
                module = f"{node.module}.{a.name}"
                found[a.asname or a.name] = (module, None) if module in known else (node.module, a.name)
    return found


@pytest.mark.parametrize("name", sorted(files()))
def test_arrows_only_run_down(name):
    room = name.split(".")[0]
    for module, _ in imports(name).values():
        allowed = module.split(".")[0] == room or {module, module.split(".")[0]} & MAY_IMPORT[room]
        assert allowed, f"{name} imports {module}: {room} may import {sorted(MAY_IMPORT[room])}"


@pytest.mark.parametrize("name", sorted(files()))
def test_files_are_short(name):
    lines = len(files()[name].read_text().splitlines())
    limit = LONGEST.get(name, FAMILY if name.startswith("models.") else 500)
    assert lines <= limit, f"{name} has {lines} lines, at most {limit}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reader_opens_three_short_files(script):
    families = [name for name in files() if name.startswith("models.") and name.split(".")[1] not in NO_FAMILY]
    longest_family = max(len(files()[name].read_text().splitlines()) for name in families)
    lines = {name: len(files()[name].read_text().splitlines()) for name in (script, "common")}
    total = sum(lines.values()) + longest_family
    print(f"{script}.py {lines[script]} + common.py {lines['common']} + a family {longest_family} = {total}")
    assert total <= READ


def definitions(name):
    """{name: node} of a module's top-level functions, classes and constants."""
    found = {}
    for node in parsed(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id: node for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def reached(script):
    """{(module, definition): lines} of everything that a script's `main` leads to, followed by names.

    A class counts as a whole. The script itself counts as a whole file; of other modules, the definitions. Families are
    imported by name, so Wan's is given here.
    """
    todo, seen = [*((script, name) for name in definitions(script)), ("models.wan", "Wan")], {}
    while todo:
        module, name = todo.pop()
        node = definitions(module).get(name)
        if node is None or (module, name) in seen:
            continue
        seen[module, name] = (
            node.end_lineno - min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) + 1
        )
        own, outside = definitions(module), imports(module)
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in own:
                todo.append((module, part.id))
            elif isinstance(part, ast.Name) and part.id in outside and outside[part.id][1]:
                todo.append(outside[part.id])
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in outside:
                todo.append((outside[part.value.id][0], part.attr))
            elif isinstance(part, ast.Attribute) and ast.unparse(part).startswith("self.model.world."):
                todo.append(("tiny.world", part.attr))
    return seen


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_main_reaches_is_small(script):
    rooms = {script: len(files()[script].read_text().splitlines())}
    for (module, _), lines in reached(script).items():
        if module != script:
            rooms[module] = rooms.get(module, 0) + lines
    print(", ".join(f"{module} {lines}" for module, lines in sorted(rooms.items())), "=", sum(rooms.values()))
    assert sum(rooms.values()) <= REACHED


@pytest.mark.parametrize("name", sorted(files()))
def test_programs_stand_where_programs_are(name):
    in_room = name.rpartition(".")[0] in PROGRAM_ROOMS and files()[name].name != "__init__.py"
    wanted = name in PROGRAMS | set(SCRIPTS) or in_room
    assert ('if __name__ == "__main__":' in files()[name].read_text()) == wanted


def test_flags_are_read_before_diffusers_is_imported():
    programs = ", ".join([*SCRIPTS, "eval_vbench", "tools.make_shards", "tools.sample", "experiments.evidence"])
    code = f"import sys, {programs}; print([n for n in ('diffusers', 'transformers', 'peft') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
