"""The pages of docs/site/, which docs/build.py writes."""

import functools
import hashlib
import importlib
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/site"
PAGES = sorted(SITE.glob("*.html"))
EQUATIONS = {"etris.html": 11, "dcris.html": 6, "m2ist.html": 6, "shared-ris.html": 12}


class Page(HTMLParser):
    """Its ids, links and meta tags, and for each equation how often it has a formula and a line of code."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.links, self.tags, self.meta = [], [], set(), {}
        self.equations, self.within = {}, None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.tags.add(tag)
        self.ids += [a["id"]] if "id" in a else []
        self.links += [a[k] for k in ("href", "src") if k in a]
        self.meta |= {a["name"]: a["content"]} if tag == "meta" and "name" in a else {}
        if tag == "article":
            self.within = self.equations.setdefault(a["id"], dict(formulas=0, lines=0))
        if self.within is not None:
            self.within["formulas"] += tag == "math"
            self.within["lines"] += a.get("class") == "row hit"

    def handle_endtag(self, tag):
        if tag == "article":
            self.within = None


read = functools.cache(Page)


def test_all_pages_are_there():
    assert {p.name for p in PAGES} == {"index.html", "side-by-side.html", "exercises.html", *EQUATIONS}


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_numbered_equation_stands_beside_its_lines(name):
    found = read(SITE / name).equations
    assert sum(key.startswith("eq-") for key in found) == EQUATIONS[name]
    for n in range(1, EQUATIONS[name] + 1):
        assert found[f"eq-{n}"]["formulas"] and found[f"eq-{n}"]["lines"], n


def test_exercises_are_six():
    assert sum(key.startswith("exercise-") for key in read(SITE / "exercises.html").equations) == 6


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere_and_nothing_is_fetched(file):
    page = read(file)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "img", "iframe", "link"} and "url(http" not in file.read_text()
    for link in page.links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (SITE / path).resolve() if path else file
        assert target.is_file(), link
        assert not anchor or anchor in read(target).ids, link


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_pages_are_as_new_as_what_they_are_made_of(file):
    """If this fails: pip install -r docs/requirements.txt && python docs/build.py"""
    meta = read(file).meta
    sources = b"".join((ROOT / name).read_bytes() for name in meta["sources"].split())
    assert meta["digest"] == hashlib.sha256(sources).hexdigest()[:16]


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_pages_are_valid(file):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(file.read_text())  # raises at the first error


@pytest.fixture
def build(monkeypatch):
    for library in "latex2mathml", "pygments", "tomllib":
        pytest.importorskip(library)
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    return importlib.import_module("build")


def test_pages_are_what_the_build_writes(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path)
    build.main()
    for file in PAGES:
        assert (tmp_path / file.name).read_text() == file.read_text(), file.name


def test_marks_are_read_as_they_are_written(build, tmp_path, monkeypatch):
    comments = ("(B, N)  Eq. 5, lines 1 and 2", "Eq. 2 (vision), 3 (text)", "Eq. 1, (B, n_v, d)", "Eq. 4, F_f",
                "Eq. 6 for x = h_j W_j, Eq. 8 for x = z", "Eq. 10 and 11", "F_c . F_l of Eq. 6", "no equation")
    lines = ['"""A file."""', "class Config: ...", *(f"x = 1  # {c}" for c in comments), ""]
    (tmp_path / "file.py").write_text("\n".join(lines))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    marks = [(m.line - 2, m.number, m.label) for m in build.Source("file.py").marks]
    assert marks == [(1, 5, "1, 2"), (2, 2, "vision"), (2, 3, "text"), (3, 1, ""), (4, 4, "F_f"), (5, 6, ""),
                     (5, 8, ""), (6, 10, ""), (6, 11, ""), (7, 6, "")]
