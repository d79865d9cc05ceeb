"""Render the diff of every declared pair of scripts into docs/diffs/, so that a paper's idea can be read as a diff.

python docs/diffs.py            # write docs/diffs/*.md, print their sizes
python docs/diffs.py --check    # exit 1 and name the stale ones, write nothing
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [("dmd", "dmd2"), ("dmd2", "dfd"), ("dmd2", "codmd"), ("dmd2", "phased_dmd")]


@dataclass
class Args:
    check: bool = False
    """Only compare the files in docs/diffs/ with what would be written."""


def unified(a, b, context=3):
    """Lines of `diff -u a.py b.py`, both names without .py; not difflib's, which are not the fewest."""
    names = [f"{a}.py", f"{b}.py"]
    words = ["diff", f"-U{context}", "--label", names[0], "--label", names[1], *names]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def counts(lines):
    """Lines added and removed in a unified diff, the two header lines left out."""
    return sum(line.startswith("+") for line in lines[2:]), sum(line.startswith("-") for line in lines[2:])


def render(a, b):
    """The Markdown page of a pair."""
    lines = unified(a, b)
    added, removed = counts(lines)
    body = "\n".join(line.rstrip() for line in lines)
    return (
        f"# {a}.py to {b}.py\n\n{added} lines added, {removed} removed. Notes on the method: [{b}](../{b}.md). "
        f"Made by `python docs/diffs.py`.\n\n```diff\n{body}\n```\n"
    )


def main(args):
    stale = []
    for a, b in PAIRS:
        added, removed = counts(unified(a, b))
        print(f"{a}.py to {b}.py: +{added} -{removed}")
        path = ROOT / "docs" / "diffs" / f"{a}-{b}.md"
        text = render(a, b)
        if not path.is_file() or path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    if stale and args.check:
        print(f"stale: {', '.join(stale)}; run python docs/diffs.py", file=sys.stderr)
        sys.exit(1)
    print(f"{len(PAIRS)} diffs, {'wrote ' + ', '.join(stale) if stale else 'all up to date'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
