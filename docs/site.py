"""Build the docs as a static site that works from a folder, without a network: `make site` writes it to site/.

Pages are those of the repository, at the same paths, so that their links stay what they are. Added are a page for every
file of code, and for each pair of scripts both side by side, made from the scripts, with the notes of
docs/site/notes.toml in the margin of what changed. It exits 1 and names what is wrong if a link, an anchor or a note
has no place.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path

import tyro
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from docs.diffs import PAIRS, counts, unified

ROOT = Path(__file__).resolve().parents[1]

PARTS = ROOT / "docs" / "site"
PAGES = ("README.md", "docs/*.md", "tiny/README.md", "prompts/README.md")
MEDIA = (".png", ".webp", ".css", ".js")
SHIM = re.compile(r'<script src="https://unpkg.com/iframe-worker/shim"[^>]*></script>')
UNSEARCHED = "---\nsearch:\n  exclude: true\n{}\n---\n\n"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


@dataclass
class Args:
    out: Path = ROOT / "site"
    """Folder of the site; replaced as a whole."""
    work: Path = ROOT / "runs" / "site"
    """Folder for the pages that it is built from; may be deleted afterwards."""


def tracked():
    """Files of the repository, as git has them and also those that are new."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    lines = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [path for path in map(Path, lines) if (ROOT / path).is_file()]


def page_of(path):
    """The page that shows a file or folder of the repository, both relative to its root."""
    if path.suffix == ".md" or path.suffix in MEDIA:
        return path
    return path / "index.md" if (ROOT / path).is_dir() else path.with_name(f"{path.name}.md")


def relinked(text, page):
    """A page's text with links to code and folders turned to the pages that show them."""

    def link(match):
        opening, target, anchor, closing = match.groups()
        path = Path(os.path.normpath(page.parent / target))
        if not (ROOT / path).exists():
            return match[0]  # the builder names it
        shown = os.path.relpath(page_of(path), page.parent)
        anchor = (anchor or "").replace("#L", "#__codelineno-0-")
        return f"{opening}{shown}{anchor}{closing}"

    return LINK.sub(link, text)


def code_page(path):
    """The page of a file of code."""
    kind = {".py": "python", ".sh": "bash"}.get(path.suffix, "text")
    return (
        f"{UNSEARCHED.format('')}# {path}\n\n``` {{ .{kind} linenums=1 }}\n{(ROOT / path).read_text().rstrip()}\n```\n"
    )


def folder_page(path, files):
    """The page of a folder: what is in it."""
    inside = [file for file in files if path in file.parents and file.suffix in (".py", ".md", ".sh")]
    links = [f"- [{file.relative_to(path)}]({os.path.relpath(page_of(file), path)})" for file in inside]
    return f"# {path}/\n\n" + "\n".join(links) + "\n"


# --- both scripts of a pair side by side


def rows_of(a, b):
    """[(line of a or None, line of b or None, changed)], numbers from 0, of the whole files, by `diff`."""
    lines = unified(a, b, context=10**6)[3:]
    rows, left, right = [], 0, 0
    for same, group in groupby(lines, key=lambda line: line.startswith(" ")):
        group = list(group)
        if same:
            rows += [(left + i, right + i, False) for i in range(len(group))]
            left, right = left + len(group), right + len(group)
        else:
            removed = sum(line.startswith("-") for line in group)
            added = len(group) - removed
            pairs = zip_longest(range(left, left + removed), range(right, right + added))
            rows += [(*pair, True) for pair in pairs]
            left, right = left + removed, right + added
    return rows


def colored(script):
    """The lines of a script as HTML."""
    text = highlight((ROOT / f"{script}.py").read_text(), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return text.rstrip("\n").split("\n")


def placed(notes, blocks, script):
    """{number of a changed block: [notes]} of {code: note}: each belongs to the one block that adds this code."""
    lines, places = (ROOT / f"{script}.py").read_text().splitlines(), {}
    for code, note in notes.items():
        found = [
            i for i, block in enumerate(blocks) if any(code in lines[row[1]] for row in block if row[1] is not None)
        ]
        if len(found) != 1:
            raise SystemExit(
                f"docs/site/notes.toml: {len(found)} changes of {script}.py have `{code}`; a note needs one"
            )
        places.setdefault(found[0], []).append(note)
    return places


def pair_page(a, b, notes, context=3):
    """Two scripts side by side: what changed with notes in the margin, what did not folded but for some lines."""
    left, right = colored(a), colored(b)
    groups = [(changed, list(group)) for changed, group in groupby(rows_of(a, b), key=lambda row: row[2])]
    places = placed(notes, [group for changed, group in groups if changed], b)

    def cell(lines, number, side):
        if number is None:
            return f'<div class="{side} none"></div>'
        return f'<div class="{side}"><i>{number + 1}</i><code>{lines[number] or " "}</code></div>'

    def row(line, kind):
        return f'<div class="row {kind}">{cell(left, line[0], "old")}{cell(right, line[1], "new")}</div>'

    out, block = [], 0
    for i, (changed, group) in enumerate(groups):
        if changed:
            said = "".join(f"<p>{note}</p>" for note in places.get(block, ()))
            margin = f"<aside>{said}</aside>" if said else ""
            rows = "".join(row(line, "changed") for line in group)
            out.append(f'<div class="block"><div>{rows}</div>{margin}</div>')
            block += 1
            continue
        head, tail = (0 if i == 0 else context), (0 if i == len(groups) - 1 else context)
        if len(group) > head + tail + 2:
            folded = "".join(row(line, "same") for line in group[head : len(group) - tail])
            summary = f"<summary>{len(group) - head - tail} lines alike</summary>"
            parts = [row(line, "same") for line in group[:head]] + [f"<details>{summary}{folded}</details>"]
            out += [*parts, *(row(line, "same") for line in group[len(group) - tail :])]
        else:
            out += [row(line, "same") for line in group]
    added, removed = counts(unified(a, b))
    return (
        f"{UNSEARCHED.format('hide: [navigation, toc]')}# {a}.py to {b}.py\n\n{added} lines added, {removed} removed. "
        f"Red (left) is [{a}.py](../../{a}.py.md), green (right) [{b}.py](../../{b}.py.md); "
        f"notes on the method: [{b}](../{b}.md). "
        f'Lines that both have are folded.\n\n<div class="pair highlight">{"".join(out)}</div>\n'
    )


def write_pages(src):
    """Everything that the site is built from, into the folder src."""
    files = tracked()
    shown = {path for pattern in PAGES for path in map(lambda p: p.relative_to(ROOT), sorted(ROOT.glob(pattern)))}
    texts = {path: (ROOT / path).read_text() for path in shown}
    notes = tomllib.loads((PARTS / "notes.toml").read_text())
    code = [path for path in files if path.suffix == ".py" and path.parts[0] != "tests"]
    linked = {Path(os.path.normpath(page.parent / m[2])) for page, text in texts.items() for m in LINK.finditer(text)}
    made = {
        page_of(path): code_page(path) for path in {*code, *linked} if (ROOT / path).is_file() and page_of(path) != path
    }
    made |= {page_of(path): folder_page(path, files) for path in linked if (ROOT / path).is_dir()}
    made |= {Path(f"docs/diffs/{a}-{b}.md"): pair_page(a, b, notes.get(f"{a}-{b}", {})) for a, b in PAIRS}
    made |= {page: relinked(text, page) for page, text in texts.items()}
    for page, text in made.items():
        (src / page).parent.mkdir(parents=True, exist_ok=True)
        (src / page).write_text(text)
    for path in files:
        if path.suffix in MEDIA and path.parts[0] in ("docs", "tiny"):
            (src / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, src / path)


def main(args):
    for own in ("src", "site"):
        shutil.rmtree(args.work / own, ignore_errors=True)
    write_pages(args.work / "src")
    shutil.copy(PARTS / "mkdocs.yml", args.work / "mkdocs.yml")
    words = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(words, cwd=args.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(re.sub(r"\x1b\[[\d;]*m", "", done.stdout), file=sys.stderr)
        sys.exit(1)
    for page in (args.work / "site").rglob("*.html"):  # the builder has this from a server; worker.js does the same
        page.write_text(SHIM.sub("", page.read_text()))
    (args.work / "site" / "404.html").unlink()  # of a server
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(args.work / "site", args.out)
    print(f"open {args.out / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
