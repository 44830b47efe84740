"""Writes docs/site/: a page to read beside each paper, a comparison of the four, and exercises.

    pip install -r docs/requirements.txt && python docs/build.py

Sentences and equations come from docs/papers/*.toml, everything else from the code: the lines that compute an equation
are those that are marked "Eq. n" in the functions that the toml file names. Sizes are counted on the meta device.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import io
import re
import sys
import tokenize
import tomllib
import typing
from functools import cache
from html import escape
from pathlib import Path

import torch
from latex2mathml.converter import convert
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

DOCS = Path(__file__).resolve().parent
ROOT, SITE = DOCS.parent, DOCS / "site"
PAPERS = dict(etris="ETRIS", dcris="DCRIS", m2ist="M2IST", shared_ris="Shared-RIS")
sys.path[:0] = [str(ROOT), str(DOCS)]

import diagrams  # noqa: E402
from common import count, load_method, parameters, writing  # noqa: E402

SHARED = ("docs/build.py", "docs/diagrams.py", "docs/style.css")
HEADS = ("CoordConv", "Neck", "DecoderLayer", "Decoder", "Projector")  # of etris.py and dcris.py


# Sources


class Mark(typing.NamedTuple):
    """"Eq. 5, line 3" in a comment: number 5, label "3"."""

    line: int
    number: int
    label: str


MARK = re.compile(r"Eq\. (\d+)(?: \((\w+)\))?(?:, lines? (\d+(?: and \d+)?)|, ([A-Za-z]\w*)$)?"
                  r"(?:(?:,| and) (\d+)\b(?: \((\w+)\))?(?! for))?")


class Source:
    """A Python file: its lines, its marks and where its functions and classes are."""

    def __init__(self, name: str):
        self.name, text = name, (ROOT / name).read_text()
        self.lines = text.split("\n")[:-1]
        tree = ast.parse(text)
        self.docstring = ast.get_docstring(tree, clean=False)
        self.scopes = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        self.scopes |= {f"{c.name}.{f.name}": f for c in tree.body if isinstance(c, ast.ClassDef)
                        for f in c.body if isinstance(f, ast.FunctionDef)}
        comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT
                    and t.start[0] > self.scopes["Config"].end_lineno]  # not those that explain settings
        self.marks = [Mark(comment.start[0], int(number), label.replace(" and ", ", "))
                      for comment in comments for m in MARK.finditer(comment.string)
                      for number, label in ((m[1], m[2] or m[3] or m[4] or ""), (m[5], m[6] or "")) if number]
        self.html = highlighted(text)

    def statement(self, scope: ast.AST, line: int) -> ast.stmt:
        """The innermost statement of a function that has this line."""
        inside = [n for n in ast.walk(scope) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
        return min(inside, key=lambda n: n.end_lineno - n.lineno)

    def body(self, name: str) -> tuple[int, int]:
        """First and last line of a function without its docstring."""
        scope = self.scopes[name]
        first = scope.body[1 if ast.get_docstring(scope) else 0]
        return first.lineno, scope.end_lineno

    def excerpt(self, name: str, number: int | None) -> tuple[list[int], dict[int, list[str]]]:
        """Lines of a function that a page shows, and the labels of those that compute equation `number`: these, the
        two before each, and gaps of up to three. All lines where the function is short, or there is no number."""
        first, last = self.body(name)
        if number is None:
            return list(range(first, last + 1)), {}
        labels: dict[int, list[str]] = {}
        for m in self.marks:
            if m.number == number and first <= m.line <= last:
                statement = self.statement(self.scopes[name], m.line)
                for line in range(statement.lineno, statement.end_lineno + 1):
                    labels.setdefault(line, [])
                labels[m.line].append(m.label)
        if last - first < 10 or not labels:
            return list(range(first, last + 1)), labels
        shown = {n for line in labels for n in range(max(first, line - 2), line + 1)}
        gaps = [range(a + 1, b) for a, b in zip(sorted(shown), sorted(shown)[1:]) if b - a <= 4]
        return sorted(shown.union(*gaps)), labels

    def deviations(self) -> tuple[list[str], list[list[str]]]:
        """The docstring's table: names of its columns, rows."""
        lines = self.docstring.partition("Deviations")[2].split("\n")
        rows = [[cell.strip() for cell in line.split("|", 3)] for line in lines if "|" in line]
        return rows[0], rows[1:]


source = cache(Source)


def highlighted(text: str) -> list[str]:
    """The lines as HTML: few kinds of tokens, short class names, no token over two lines."""
    kinds = ((Comment, "c"), (String, "s"), (Keyword, "k"), (Operator.Word, "k"), (Number, "n"), (Name.Function, "d"),
             (Name.Class, "d"), (Name.Decorator, "d"))
    out = [""]
    for kind, value in PythonLexer(stripnl=False).get_tokens(text):
        css = next((css for k, css in kinds if kind in k), "")
        for i, part in enumerate(value.split("\n")):
            if i:
                out.append("")
            out[-1] += f'<i class="{css}">{escape(part, False)}</i>' if css and part else escape(part, False)
    return out


@cache
def model(method: str, backbone: str, variant: str):
    """The paper's model on the meta device: sizes without numbers."""
    module = load_method(method)
    with torch.device("meta"):
        return module.Model(module.config(backbone, variant or module.VARIANTS[0]))


# HTML


def tex(formula: str, display: bool = False) -> str:
    math = convert(formula, display="block" if display else "inline")
    return math.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")


def text(s: str) -> str:
    """`code`, $TeX$ and [links](address) in a sentence."""
    out = []
    for part in re.split(r"(`[^`]+`|\$[^$]+\$|\[[^\]]+\]\([^)]+\))", s):
        link = re.fullmatch(r"\[([^\]]+)\]\(([^)]+)\)", part)
        if link:
            out.append(f'<a href="{escape(link[2])}">{text(link[1])}</a>')
        elif part[:1] == "`" and len(part) > 1:
            out.append(f"<code>{escape(part[1:-1])}</code>")
        elif part[:1] == "$" and len(part) > 1:
            out.append(tex(part[1:-1]))
        else:
            out.append(escape(part, False))
    return "".join(out)


def paragraph(s: str, css: str = "") -> str:
    return f"<p{f' class={css}' if css else ''}>{text(s)}</p>" if s else ""


def table(head: list[str], rows: list[list[str]], css: str = "") -> str:
    """Cells are HTML. The head's names stand before the cells where the screen is narrow."""
    names = [re.sub("<[^>]+>", "", h) for h in head]
    cells = ["".join(f'<td data-head="{h}">{cell}</td>' for h, cell in zip(names, row)) for row in rows]
    return (f'<div class="scroll"><table class="{css}"><thead><tr>' + "".join(f"<th>{h}</th>" for h in head) +
            "</tr></thead><tbody>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</tbody></table></div>")


def chip(label: str) -> str:
    return f'<b class="chip">{text(f"${label}$") if "_" in label else escape(label or "•")}</b>'


def excerpt(src: Source, name: str, e: dict) -> str:
    """Lines of a function; those that compute the equation are marked, with its line where it has several."""
    number, known = e.get("number"), {label for label, _ in e.get("tex", ())}
    lines, labels = src.excerpt(name, number)
    indent = min(len(line) - len(line.lstrip()) for n in lines if (line := src.lines[n - 1]).strip())
    out, before = [], lines[0] - 1
    for n in lines:
        if n > before + 1:
            out.append('<span class="gap">⋯</span>')
        chips = "".join(chip(x if x in known or ", " in x else "") for x in labels.get(n, []))
        css = "row hit" if n in labels else "row"
        out.append(f'<span class="{css}"><span class="mark">{chips}</span><a class="no" href="#L{n}">{n}</a>'
                   f'<code>{src.html[n - 1][indent:]}</code></span>')
        before = n
    first = src.scopes[name].lineno
    return (f'<figure class="code"><figcaption><a href="#L{first}">{name}</a>'
            f'<span>{src.name}, line {first}</span></figcaption><div class="lines">{"".join(out)}</div></figure>')


def deviation_rows(src: Source, rows: list[list[str]]) -> str:
    head = src.deviations()[0]
    return table([escape(h) for h in head], [[escape(cell, False) for cell in row] for row in rows], "deviations")


def numbers_of(where: str) -> set[int]:
    """The equations that the first cell of a deviation names."""
    m = re.search(r"Eq\. \d+(?:(?:,| and) \d+\b)*", where)
    return {int(n) for n in re.findall(r"\d+", m[0])} if m else set()


def equation(src: Source, e: dict, told: set[str]) -> str:
    """One equation, or a step without a number. `told`: the deviations that the page has told."""
    number = e.get("number")
    rows = src.deviations()[1]
    unknown = set(e.get("also", ())) - {row[0] for row in rows}
    if unknown:
        raise SystemExit(f"{src.name}: the table of deviations has no {', '.join(unknown)}.")
    rows = [row for row in rows if row[0] in e.get("also", ()) or number in numbers_of(row[0])]
    told |= {row[0] for row in rows}
    anchor = f"eq-{number}" if number else "step-" + re.sub(r"\W+", "-", e["title"].lower())
    badge = f"Eq. {number}" if number else e["name"]
    lines = "".join(f'<div class="line">{chip(label) if label else "<b></b>"}{tex(formula, display=True)}</div>'
                    for label, formula in e.get("tex", ()))
    symbols = "".join(f"<div><dt>{tex(symbol)}</dt><dd>" + (f"<code>{escape(shape)}</code> " if shape else "") +
                      f"{text(meaning)}</dd></div>" for symbol, shape, meaning in e.get("symbols", ()))
    left = (f'<div class="math">{lines}</div>' if lines else "") + (f"<dl>{symbols}</dl>" if symbols else "")
    left += paragraph(e.get("text", ""))
    right = "".join(excerpt(src, name, e) for name in e["code"])
    if number and 'class="row hit"' not in right:
        raise SystemExit(f'{src.name}: no line of {", ".join(e["code"])} is marked "Eq. {number}".')
    open_ = (f'<details class="open" open><summary>What the paper leaves open here, and what is chosen</summary>'
             f"{deviation_rows(src, rows)}</details>" if rows else "")
    return (f'<article class="eq" id="{anchor}"><h3><a href="#{anchor}"><span class="badge">{badge}</span></a> '
            f'{text(e["title"])}</h3><div class="pair"><div class="said">{left}</div><div>{right}</div></div>{open_}'
            "</article>")


def listing(src: Source) -> str:
    marks: dict[int, list[int]] = {}
    for m in src.marks:
        marks.setdefault(m.line, []).append(m.number)
    rows = []
    for n, line in enumerate(src.html[:len(src.lines)], 1):
        chips = "".join(f'<a class="chip" href="#eq-{k}">Eq. {k}</a>' for k in dict.fromkeys(marks.get(n, ())))
        rows.append(f'<span class="row{" hit" if chips else ""}" id="L{n}"><span class="mark">{chips}</span>'
                    f'<a class="no" href="#L{n}">{n}</a><code>{line}</code></span>')
    return f'<div class="code whole"><div class="lines">{"".join(rows)}</div></div>'


def legend() -> str:
    return '<ul class="legend">' + "".join(f'<li><span class="key {css}"></span>{name}</li>'
                                           for css, name in diagrams.LEGEND) + "</ul>"


def digest(sources: tuple[str, ...]) -> str:
    """Of the files that a page is made of. tests/test_site.py computes the same."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in sources)).hexdigest()[:16]


def page(name: str, title: str, body: str, sources: tuple[str, ...]) -> None:
    sources += SHARED
    files = [(f"{p.replace('_', '-')}.html", title) for p, title in PAPERS.items()]
    files += [("side-by-side.html", "Side by side"), ("exercises.html", "Exercises")]
    here = ' aria-current="page"'
    nav = "".join(f'<a href="{file}"{here if file == name else ""}>{label}</a>' for file, label in files)
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="sources" content="{' '.join(sources)}">
<meta name="digest" content="{digest(sources)}">
<title>{escape(title)}</title>
<style>
{(DOCS / "style.css").read_text()}</style>
</head>
<body>
<nav><a class="home" href="index.html"{here if name == "index.html" else ""}>Four papers, four files</a>{nav}</nav>
<main>
{body}
</main>
</body>
</html>
"""
    with writing(SITE / name) as file:
        file.write_text(html)
    print(f"docs/site/{name}: {len(html.encode()) / 1000:.0f} kB")


# Pages


@cache
def toml(name: str) -> dict:
    return tomllib.loads((DOCS / "papers" / f"{name}.toml").read_text())


def setting(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def recipe(t: dict) -> str:
    """The paper's settings beside those of config()."""
    module = load_method(t["file"][:-3])
    c = {k: setting(v) for k, v in dataclasses.asdict(module.config()).items()}
    rows = [[text(r["what"]), text(r["paper"]), text(r["ours"].format(**c)), r["where"]] for r in t["recipe"]]
    return table(["", "the paper", "here", "where"], rows, "recipe")


def sizes(t: dict) -> str:
    """Parameters by part for each of the paper's backbones, and those of the model's modules."""
    rows = []
    for backbone in t["backbones"]:
        m = model(t["file"][:-3], backbone, "")
        parts = {k: sum(p.numel() for p in ps) for k, ps in parameters(m).items()}
        rows.append([f"<code>{backbone}</code>", *(f"{parts[k]:,}" for k in ("backbone", "adapter", "head")),
                     f"{count(m, trainable=True):,}", f"{100 * parts['adapter'] / parts['backbone']:.2f} %"])
    m = model(t["file"][:-3], t["backbones"][0], "")
    modules = [[f"<code>{name}</code>", f"{type(child).__name__}", f"{count(child):,}",
                f"{count(child, trainable=True):,}"] for name, child in m.named_children() if count(child)]
    return (table(["backbone", "towers", "adapters", "head", "trained", "adapters / towers"], rows, "figures") +
            f"<p>The modules of <code>{type(m).__name__}</code> with <code>{t['backbones'][0]}</code>:</p>" +
            table(["module", "class", "parameters", "trained"], modules, "figures modules"))


def numbers(t: dict) -> list[int]:
    return [e["number"] for s in t["section"] for e in s["equation"] if "number" in e]


def paper_page(name: str) -> None:
    t = toml(name)
    src, told = source(t["file"]), set()
    index = "".join(f'<a href="#eq-{n}">{n}</a>' for n in numbers(t))
    sections = "".join(
        f'<section><h2>{text(s["title"])} <small>{s.get("where", "")}</small></h2>{paragraph(s.get("text", ""))}' +
        "".join(equation(src, e, told) for e in s["equation"]) + "</section>" for s in t["section"])
    rest = [row for row in src.deviations()[1] if row[0] not in told]
    body = f"""<header><h1>{PAPERS[name]}</h1><p class="paper">{escape(t["paper"])}</p>
<p class="authors">{text(t["authors"])}</p>{paragraph(t.get("more", ""), "authors")}
<p class="index">Equations {index} · <a href="#recipe">recipe</a> · <a href="#sizes">sizes</a> ·
<a href="#deviations">deviations</a> · <a href="#listing">listing</a></p></header>
<section class="idea"><div><h2>The idea</h2>{"".join(paragraph(s) for s in t["idea"])}</div>
<figure>{diagrams.PAGES[name]().svg()}{legend()}<figcaption>{text(t["caption"])}</figcaption></figure></section>
{sections}
<section id="recipe"><h2>Training recipe</h2><p>The column “here” is read from <code>{t["file"]}</code>.</p>
{recipe(t)}</section>
<section id="sizes"><h2>Parameters</h2>{sizes(t)}</section>
<section id="deviations"><h2>What else the paper leaves open</h2><p>The rows of the file's table that belong to no
equation above. Numbers in parentheses refer to notes <a href="#L1">in the file</a>.</p>
{deviation_rows(src, rest)}</section>
<section id="listing"><h2>{t["file"]} <small>{len(src.lines)} lines</small></h2>{listing(src)}</section>"""
    page(f"{name.replace('_', '-')}.html", f"{PAPERS[name]}, annotated", body, (t["file"], f"docs/papers/{name}.toml"))


def measured(name: str) -> str:
    """Bytes that a training image keeps, from the row of docs/costs.md that begins with `name`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in (DOCS / "costs.md").read_text().split("\n") if line.startswith("|")]
    at = next(i for i, row in enumerate(rows) if row[0] == name)
    head = next(row for row in reversed(rows[:at]) if any("saved" in cell for cell in row))
    return rows[at][next(i for i, cell in enumerate(head) if cell.startswith("saved per image"))].split(" (")[0]


def words_of(line: str) -> list[str]:
    return re.findall(r"\w+|\s+|.", line)


def changed(old: str, new: str) -> tuple[str, str]:
    """Two versions of a line as HTML, with what differs in <b>."""
    a, b = words_of(old), words_of(new)
    out = ["", ""]
    for op, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, part in enumerate(("".join(a[i:j]), "".join(b[k:n]))):
            part = escape(part, False)
            out[side] += f"<b>{part}</b>" if op != "equal" and part.strip() else part
    return out[0], out[1]


def head_diff() -> str:
    """The heads of etris.py and dcris.py, class by class."""
    files, out = (source("etris.py"), source("dcris.py")), []
    pages = ("etris.html", "dcris.html")
    for name in HEADS:
        first, texts = [], []
        for src in files:
            node = src.scopes[name]
            first.append(node.lineno)
            texts.append(src.lines[node.lineno - 1:node.end_lineno])
        rows, differ = [], 0

        def row(side: int, n: int, html: str) -> None:
            css, sign = (("del", "−"), ("add", "+"), ("", " "))[side]
            no = first[side % 2] + n
            rows.append(f'<span class="row {css}"><span class="sign">{sign}</span>'
                        f'<a class="no" href="{pages[side % 2]}#L{no}">{no}</a><code>{html}</code></span>')

        for op, i, j, k, n in difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
            if op == "equal":
                for at in range(i, j):
                    if j - i <= 5 or at < i + 2 or at >= j - 2:
                        row(2, at, files[0].html[first[0] + at - 1])
                    elif at == i + 2:
                        rows.append(f'<span class="gap">⋯ {j - i - 4} equal lines</span>')
                continue
            differ += max(j - i, n - k)
            pairs = [changed(a, b) for a, b in zip(texts[0][i:j], texts[1][k:n])] if j - i == n - k else []
            for side, (begin, end) in enumerate(((i, j), (k, n))):
                for at in range(begin, end):
                    row(side, at, pairs[at - begin][side] if pairs else escape(texts[side][at], False))
        out.append(f'<figure class="code diff"><figcaption><span>{name}</span><span>{len(texts[0])} lines, {differ} '
                   f'differ</span></figcaption><div class="lines">{"".join(rows)}</div></figure>')
    return "".join(out)


def side_by_side() -> None:
    t = toml("side_by_side")
    methods = t["method"]
    sums = []
    for m in methods:
        built = model(m["module"], m["backbone"], m.get("variant", ""))
        parts = {k: sum(p.numel() for p in ps) for k, ps in parameters(built).items()}
        sums.append([f"<code>{m['backbone']}</code>", *(f"{parts[k]:,}" for k in ("backbone", "adapter", "head")),
                     f"{count(built, trainable=True):,}", measured(m["costs"])])
    names = ("backbone", "towers", "adapters", "head", "trained in all", "kept for backward, one image")
    rows = [[text(r["what"]), *map(text, r["cells"])] for r in t["row"]]
    rows += [[name, *cells] for name, cells in zip(names, zip(*sums))]
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{draw().svg()}</figure>"
                      for name, draw in diagrams.SMALL.items())
    body = f"""<header><h1>Side by side</h1>{paragraph(t["text"])}</header>
<section><h2>Where the adapters sit</h2><div class="five">{figures}</div>{legend()}</section>
<section><h2>What they read, add and cost</h2>{table(["", *(text(m["name"]) for m in methods)], rows, "compare")}
{paragraph(t["note"])}</section>
<section id="head"><h2>From ETRIS to DCRIS: the head</h2>{paragraph(t["head"])}{head_diff()}</section>"""
    page("side-by-side.html", "Four papers, side by side", body,
         ("etris.py", "dcris.py", "m2ist.py", "shared_ris.py", "docs/papers/side_by_side.toml", "docs/costs.md"))


def exercises() -> None:
    t = toml("exercises")
    out = []
    for n, e in enumerate(t["exercise"], 1):
        commands = "".join(f"<pre><code>{escape(' '.join(c.split()), False)}</code></pre>" for c in e["commands"])
        tasks = "".join(f"<li>{text(task)}</li>" for task in e["tasks"])
        out.append(f'<article class="eq exercise" id="exercise-{n}"><h3><span class="badge">{n}</span> '
                   f'{text(e["title"])} <small>{text(e["time"])}</small></h3>{paragraph(e["text"])}'
                   f'<ol>{tasks}</ol>{commands}'
                   f'<p><strong>Look for</strong> {text(e["look"])}</p>'
                   f'<details><summary>Hint</summary>{paragraph(e["hint"])}</details></article>')
    body = f"<header><h1>Exercises</h1>{''.join(paragraph(s) for s in t['text'])}</header>{''.join(out)}"
    page("exercises.html", "Exercises", body, ("docs/papers/exercises.toml",))


def index() -> None:
    cards = []
    for name, title in PAPERS.items():
        t = toml(name)
        cards.append(f'<a class="card" href="{name.replace("_", "-")}.html">{diagrams.SMALL[title]().svg()}'
                     f'<span><strong>{title}</strong><br>{escape(t["paper"])}<br><small>{len(numbers(t))} equations, '
                     f"{len(source(t['file']).lines)} lines</small></span></a>")
    body = f"""<header><h1>Four papers, four files</h1><p class="paper">Efficient referring segmentation and
comprehension, annotated: every numbered equation beside the lines that compute it.</p></header>
<section class="cards">{"".join(cards)}</section>
<section><h2>How to read a page</h2><ul class="how">
<li>The left column is the paper: an equation, its symbols and their shapes, in our words. The right column is the code.
A chip with a number joins a line of an equation to its line of code.</li>
<li>Line numbers lead to the whole file at the end of the page. There, marks in the margin lead back to the
equations.</li>
<li>Below an equation stands what the paper leaves open and what was chosen. “Silent” means that the paper does not say,
“same” that the public code does as this code.</li></ul>{legend()}</section>
<section><h2>More</h2><ul class="how"><li><a href="side-by-side.html">Side by side</a>: what the four add to frozen
towers, what it costs, and what DCRIS changed in the head of ETRIS.</li>
<li><a href="exercises.html">Exercises</a>: six, on a laptop, with tiny models.</li></ul></section>"""
    page("index.html", "Four papers, four files", body,
         tuple(f"docs/papers/{name}.toml" for name in PAPERS) + tuple(f"{name}.py" for name in PAPERS))


def main() -> None:
    SITE.mkdir(exist_ok=True)
    for name in PAPERS:
        paper_page(name)
    side_by_side()
    exercises()
    index()


if __name__ == "__main__":
    main()
