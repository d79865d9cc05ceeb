"""The pages' links, and docs/site.py: a pair's page has every changed line, `main` first; nothing needs a network."""

import html
import re

import pytest

from docs import site
from tests.conftest import ROOT


def test_every_link_leads_to_a_file():
    for page in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_test_that_a_derivation_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "derivations.md").read_text())
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
    assert len(named) > 9


def test_the_line_of_dfd_is_on_its_page():
    (line,) = (line for line in (ROOT / "docs" / "dfd.md").read_text().splitlines() if line.endswith("# eq. 9"))
    assert f"{line.strip()}\n" in (ROOT / "dfd.py").read_text()


def test_every_program_of_the_course_is_there():
    for path in re.findall(r"python (\S+\.py)", (ROOT / "docs" / "course.md").read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(("a", "b"), site.PAIRS)
def test_a_pairs_page_has_every_changed_line(a, b):
    page = html.unescape(re.sub("<[^>]*>", "", site.pair_page(a, b)))
    old, new = ((ROOT / f"{name}.py").read_text().splitlines() for name in (a, b))
    for line in {*old} ^ {*new}:
        assert line.rstrip() in page


def test_a_pairs_page_opens_at_main():
    page = site.pair_page("dmd2", "dfd")
    parts = page.index("<details open><summary>main"), page.index("<details><summary>docstring and flags")
    assert parts[0] < page.index("dmd_gradient(x0, x0_teacher") < parts[1] < page.index("data_prob: ")


def test_the_site_is_built_and_takes_nothing_from_a_network(tmp_path):
    site.main(tmp_path / "work", tmp_path / "site")  # it stops at an anchor that is not there
    pages = {page: page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    assert tmp_path / "site" / "docs" / "dmd2-dfd.html" in pages
    for page, text in pages.items():
        assert not re.search(r'<(link|script|img)[^>]*(href|src)="?(https?:)?//', text), page
