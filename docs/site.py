"""Build the docs as a static site that opens without a network: `make site` writes it to site/.

The pages are the repository's, at the same paths. Added are a page for each file of code, and one for each pair of
scripts that shows both side by side. The build stops at a link or an anchor that leads nowhere.
"""

import re
import shutil
import subprocess
import sys
from difflib import HtmlDiff
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [("dmd", "dmd2"), ("dmd2", "dfd"), ("dmd2", "codmd"), ("dmd2", "phased_dmd")]
PARTS = ("docstring and flags", "schedule and sampler", "losses", "main")
RULER = re.compile(r"^# -+ .+\n", re.MULTILINE)  # between the parts of every script
CODE_LINK = re.compile(r"(\]\([^)#:]+\.(py|sh))\)")
UNUSED = re.compile(r'</?colgroup>|<td class="diff_(next|header)".*?</td>| (id|rules|cell\w+|nowrap)="[^"]*"')


def diff_table(old, new):
    """Two texts side by side, changed lines with three lines around them."""
    html = HtmlDiff().make_table(old.splitlines(), new.splitlines(), context=True, numlines=3)
    return UNUSED.sub("", html).replace("&nbsp;", " ")


def pair_page(a, b):
    """What differs between two scripts, from the bottom up: `main` comes first; docstring and flags last, folded."""
    old, new = (RULER.split((ROOT / f"{name}.py").read_text()) for name in (a, b))
    page = f"---\nhide: [navigation, toc]\n---\n\n# {a}.py to {b}.py\n\nAbout the method: [{b}]({b}.md).\n\n"
    for part, before, after in reversed(list(zip(PARTS, old, new, strict=True))):
        if before != after:
            state = "" if part == PARTS[0] else " open"
            page += f"<details{state}><summary>{part}</summary>{diff_table(before, after)}</details>\n\n"
    return page


def write_pages(folder):
    """Everything that the site is built from."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for path in map(Path, files):
        if path.parts[0] == "tests":
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".py", ".sh"):
            code = f"# {path}\n\n```{path.suffix[1:]}\n{(ROOT / path).read_text()}```\n"
            (folder / f"{path}.md").write_text(code)
        elif path.suffix == ".md":
            (folder / path).write_text(CODE_LINK.sub(r"\1.md)", (ROOT / path).read_text()))
        elif path.suffix in (".png", ".webp", ".css", ".js", ".csv"):
            shutil.copy(ROOT / path, folder / path)
    for a, b in PAIRS:
        (folder / "docs" / f"{a}-{b}.md").write_text(pair_page(a, b))


def main(work=ROOT / "runs" / "site", out=ROOT / "site"):
    for folder in (work, out):
        shutil.rmtree(folder, ignore_errors=True)
    write_pages(work / "src")
    shutil.copy(ROOT / "docs" / "site" / "mkdocs.yml", work)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work)
    if built.returncode:
        sys.exit(built.returncode)
    shutil.copytree(work / "site", out)
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    main()
