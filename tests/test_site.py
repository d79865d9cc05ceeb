"""docs/site.py: pages of pairs have both scripts whole, notes and links are in their places, and a browser shows it."""

import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import sync_playwright

from docs import diffs, links, site
from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium")
NETWORK = ("http", "https", "mailto")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "work").mkdir()
    (folder / "work" / "a_users.txt").touch()
    site.main(site.Args(out=folder / "site", work=folder / "work"))
    assert (folder / "work" / "a_users.txt").exists(), "only what it made itself is deleted"
    return folder / "site"


@pytest.mark.parametrize(("a", "b"), diffs.PAIRS)
def test_a_pairs_page_has_both_scripts_whole(a, b):
    rows, (added, removed) = site.rows_of(a, b), diffs.counts(diffs.unified(a, b))
    texts = [(ROOT / f"{script}.py").read_text().splitlines() for script in (a, b)]
    for side, lines in enumerate(texts):
        assert [row[side] for row in rows if row[side] is not None] == list(range(len(lines)))
    assert all(texts[0][left] == texts[1][right] for left, right, changed in rows if not changed)
    changed = [row for row in rows if row[2]]
    assert sum(row[0] is not None for row in changed) == removed and sum(row[1] is not None for row in changed) == added
    cells = re.findall(r'<div class="(old|new)"><i>\d+</i><code>(.*?)</code></div>', site.pair_page(a, b, {}))
    for side, lines in zip(("old", "new"), texts):
        shown = [re.sub(r"<[^>]*>", "", code) for of_side, code in cells if of_side == side]
        plain = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in lines]
        shown = [line.replace("&quot;", '"').replace("&#39;", "'").rstrip() for line in shown]
        assert shown == [line.rstrip() for line in plain]


def test_a_note_without_a_place_is_one_line():
    with pytest.raises(SystemExit, match="0 changes of dfd.py have `no such code`; a note needs one"):
        site.pair_page("dmd2", "dfd", {"no such code": ""})
    with pytest.raises(SystemExit, match="changes of dfd.py have `:`"):
        site.pair_page("dmd2", "dfd", {":": ""})
    page = site.pair_page("dmd2", "dfd", {"data_prob: Annotated": "here"})
    assert page.count("<p>here</p>") == 1 and page.index("data_prob") < page.index("<p>here</p>")


def test_links_to_code_are_at_their_lines(tmp_path, monkeypatch, capsys):
    links.main(links.Args(check=True))
    page = tmp_path / "page.md"
    page.write_text(f"[`def main(args):`]({ROOT}/dfd.py#L1) and [dfd.py]({ROOT}/dfd.py#L1)\n")
    monkeypatch.setattr(links, "pages", lambda: [page])
    monkeypatch.setattr(links, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        links.main(links.Args(check=True))
    assert "stale: page.md; run python docs/links.py" in capsys.readouterr().err
    links.main(links.Args())
    number = (ROOT / "dfd.py").read_text().splitlines().index("def main(args):") + 1
    assert page.read_text() == f"[`def main(args):`]({ROOT}/dfd.py#L{number}) and [dfd.py]({ROOT}/dfd.py#L1)\n"
    (tmp_path / "code.py").write_text("x = 1\nx = 1\n")
    page.write_text("[`x = 1`](code.py#L1)\n")
    with pytest.raises(SystemExit, match="code.py has 2 lines with `x = 1`, and a link needs one"):
        links.main(links.Args())


class Page(HTMLParser):
    """The ids of a page and where it links to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.targets += [(tag, attrs[name]) for name in ("href", "src") if attrs.get(name)]


def test_every_link_and_anchor_is_there_and_nothing_is_fetched(built):
    pages = {path: Page(path) for path in built.rglob("*.html")}
    assert len(pages) > 80
    for path, page in pages.items():
        for tag, target in page.targets:
            url = urlsplit(target)
            if url.scheme:
                assert url.scheme in NETWORK or url.scheme == "data", target
                assert tag == "a" or url.scheme == "data", f"{path} takes {target} from the network"
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert file.is_file(), f"{path.relative_to(built)} links to {target}"
            if url.fragment and file in pages:
                assert url.fragment in pages[file].ids, f"{path.relative_to(built)} links to {target}"


# what a page's text and ground look like to a reader: contrast of the two, by WCAG's formula
CONTRAST = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const text = light(getComputedStyle(document.querySelector("article p, article code, article h1, h1")).color);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian's package): the site is not opened")
def test_in_a_browser(built):
    """No error, nothing wider than a telephone, and text that can be read, light and dark; the search finds words."""
    pages = [
        path for path in sorted(built.rglob("*.html")) if path.parent in (built, built / "docs", built / "docs/diffs")
    ]
    assert built / "docs/diffs/dmd2-dfd.html" in pages and built / "index.html" in pages
    wrong, grounds = [], set()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
            tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            # a request that the next page cut short has not failed
            tab.on("requestfailed", lambda r: None if "ABORTED" in (r.failure or "") else wrong.append(r.url))
            for path in pages:
                tab.goto(path.as_uri())
                assert tab.evaluate("document.documentElement.scrollWidth") <= 390, path
                assert tab.evaluate(CONTRAST) >= 4.5, path
                assert not wrong, f"{path}: {wrong}"
            grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            tab.close()
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.goto((built / "docs/diffs/dmd2-dfd.html").as_uri())
        old, new, note = (tab.locator(f".block {part}").last.bounding_box() for part in (".old", ".new", "aside"))
        assert old["x"] < new["x"] < note["x"], "side by side, the note in the margin"
        tab.keyboard.press("Control+k")
        tab.keyboard.type("bridge", delay=100)
        tab.get_by_text("Phased DMD").last.wait_for(timeout=20_000)
        assert tab.locator("input").last.input_value() == "bridge", "what is typed stays"
        assert not wrong
        browser.close()
    assert len(grounds) == 2, "light and dark differ"
