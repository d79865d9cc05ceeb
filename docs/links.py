"""Keep the links from the docs into the code at their lines.

A link whose text is code, [`x0_teacher = …`](../dfd.py#L200), must name the one line that has this code.

    python docs/links.py            # write the numbers of today
    python docs/links.py --check    # exit 1 and name what is stale, write nothing
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)")


@dataclass
class Args:
    check: bool = False
    """Only compare the numbers in the pages with those of the code."""


def pages():
    """Every page that may have such links."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tiny" / "README.md"]


def line_of(code, path):
    """Number of the one line of a file that holds this code; an error of one line if it is not one line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [number for number, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        raise SystemExit(f"{path.relative_to(ROOT)} has {len(found)} lines with `{code}`, and a link needs one")
    return found[0]


def renumbered(page):
    """The page's text with today's numbers."""

    def link(match):
        code, target, _ = match.groups()
        return f"[`{code}`]({target}#L{line_of(code, (page.parent / target).resolve())})"

    return LINK.sub(link, page.read_text())


def main(args):
    stale = [page for page in pages() if renumbered(page) != page.read_text()]
    names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
    if stale and args.check:
        print(f"stale: {names}; run python docs/links.py", file=sys.stderr)
        sys.exit(1)
    for page in stale:
        page.write_text(renumbered(page))
    count = sum(len(LINK.findall(page.read_text())) for page in pages())
    print(f"{count} links, {f'wrote {names}' if stale else 'all up to date'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
