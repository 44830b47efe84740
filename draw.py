"""What people look at: marked photographs, a run's curves, and the page that `evaluate.py --report FILE.html` writes.

The page is one file with all of its pictures and needs no network. Everything in it that comes from data (sentences,
file names, settings) passes through html.escape. Charts are SVG.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import writing

# magenta first: rare in photographs, and no colour of the shapes
COLORS = np.array([(235, 0, 180), (0, 170, 255), (255, 150, 0), (0, 190, 90), (140, 80, 255), (230, 40, 40)])


def overlay(image: np.ndarray, answers: list, sentences: list[str] = [], least: int = 480) -> Image.Image:
    """The photograph (H, W, 3) uint8 with masks (H, W) bool tinted and outlined, or boxes x1, y1, x2, y2 in its pixels,
    each in a colour of its own, and the sentences below.

    Small pictures are drawn larger, the longer side at least `least` pixels.
    """
    scale = max(1, -(-least // max(image.shape[:2])))
    out = np.repeat(np.repeat(image, scale, 0), scale, 1).astype(np.float32)
    colors, edge = [COLORS[n % len(COLORS)] for n in range(len(answers))], np.zeros(out.shape[:2], dtype=bool)
    for answer, color in zip(answers, colors):
        if isinstance(answer, np.ndarray):
            mask = np.repeat(np.repeat(answer, scale, 0), scale, 1)
            out[mask] = 0.55 * out[mask] + 0.45 * color
            edge |= outline(mask)
    out[edge] = 255
    picture = Image.fromarray(out.round().astype(np.uint8))
    width, pen = max(2, max(picture.size) // 200), ImageDraw.Draw(picture)
    for answer, color in zip(answers, colors):
        if not isinstance(answer, np.ndarray) and answer is not None:
            x1, y1, x2, y2 = (round(v * scale) for v in answer)
            frame = x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)
            pen.rectangle(frame, outline="white", width=2 * width)  # seen on dark and light ground alike
            pen.rectangle(frame, outline=tuple(color.tolist()), width=width)
    return captioned(picture, sentences, colors) if sentences else picture


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) at its edge; the picture's border is no edge."""
    edge = np.zeros_like(mask)
    for axis in 0, 1:
        for step in range(1, max(1, max(mask.shape) // 300) + 1):
            for s in step, -step:
                index = np.clip(np.arange(mask.shape[axis]) - s, 0, mask.shape[axis] - 1)
                edge |= mask & ~np.take(mask, index, axis)
    return edge


def captioned(picture: Image.Image, captions: list[str], colors: list) -> Image.Image:
    """The picture with the captions under it, each in as many lines as it takes; several have their colours."""
    font, mark = ImageFont.load_default(max(14, picture.width // 34)), len(captions) > 1
    height = sum(font.getmetrics())
    left = 8 + (height + 4) * mark
    lines = [(text, n == 0, color) for caption, color in zip(captions, colors)
             for n, text in enumerate(wrapped(caption, font, picture.width - left - 8))]
    sheet = Image.new("RGB", (picture.width, picture.height + height * len(lines) + 12), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for n, (text, first, color) in enumerate(lines):
        y = picture.height + 6 + n * height
        pen.text((left, y), text, "black", font)
        if mark and first:
            pen.rectangle((8, y + 3, 8 + height - 6, y + height - 3), tuple(color.tolist()))
    return sheet


def wrapped(text: str, font, width: int) -> list[str]:
    """Lines of words; a word that is wider than all is cut."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-1]
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines, line = lines + [line], word
        else:
            line = longer
    return lines + [line]


def heat_sheet(image: np.ndarray, maps: dict[str, np.ndarray], answer, sentence: str) -> Image.Image:
    """A sheet of the answer and of maps (H, W) over the photograph, each from dark, its least value, to bright."""
    pictures = [overlay(image, [answer], [sentence], least=320)]
    for name, values in maps.items():
        low, high = float(values.min()), float(values.max())
        heat = ((values - low) / (high - low or 1))[..., None]     # (H, W, 1) in 0..1
        color = 255 * np.concatenate([heat, np.clip(2 * heat - 1, 0, 1), np.clip(1.2 * heat - 0.2, 0, 0.35)], 2)
        mixed = (0.45 * image.mean(2, keepdims=True) + 0.55 * color).astype(np.uint8)
        pictures.append(overlay(mixed, [None], [f"{name}: {low:.3g} to {high:.3g}"], least=320))
    for picture in pictures:
        picture.thumbnail((480, 560))
    return grid(pictures, columns=4)


def grid(pictures: list[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures side by side, `columns` to a row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for n, p in enumerate(pictures):
        sheet.paste(p, (n % columns * width, n // columns * height))
    return sheet


# The page

SIDE = 300  # of an example's pictures, pixels
GROUPS = ("best", "median", "worst")


def data_url(picture: Image.Image) -> str:
    """A picture as JPEG within the page."""
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.convert("RGB").save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def chosen(ious: list[float], count: int) -> dict[int, str]:
    """Numbers of the expressions to show: the worst IoUs, the best, and those around the median -> which."""
    order, count = [int(k) for k in np.argsort(ious, kind="stable")], min(count, len(ious))
    worst, best = (count + 2) // 3, (count + 1) // 3
    rest, middle = order[worst:len(order) - best], count - worst - best
    first = (len(rest) - middle) // 2
    groups = dict(worst=order[:worst], best=order[len(order) - best:], median=rest[first:first + middle])
    return {k: group for group, part in groups.items() for k in part}


def table(rows: list[dict]) -> str:
    """Dicts as an HTML table, under the names of the first."""
    def cell(v) -> str:
        text = "–".join(f"{x:.1f}" for x in v) if isinstance(v, list) else f"{v:.2f}" if isinstance(v, float) else v
        return f"<td>{html.escape(str(text))}</td>"

    head = "".join(f"<th>{html.escape(k)}</th>" for k in rows[0])
    body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(title: str, names: list[str], heights: list[float], counts: list[int], top: float) -> str:
    """A bar for each name, from 0 to `top`, with its number above and how many it is of below."""
    w, h = 62, 130
    parts = []
    for n, (name, height, count) in enumerate(zip(names, heights, counts)):
        y, x = h * (1 - height / top), n * w
        parts.append(f'<rect x="{x + 8}" y="{y + 18:.1f}" width="{w - 16}" height="{h - y:.1f}"/>'
                     f'<text x="{x + w / 2}" y="{y + 13:.1f}">{height:.0f}</text>'
                     f'<text x="{x + w / 2}" y="{h + 34}">{html.escape(name)}</text>'
                     f'<text class="faint" x="{x + w / 2}" y="{h + 50}">n {count}</text>')
    width = w * len(names)
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><div class="wide"><svg width="{width}" '
            f'height="{h + 56}" role="img">{"".join(parts)}</svg></div></figure>')


def line(title: str, points: list[tuple[float, float]]) -> str:
    """A curve through (step, value)."""
    if len(points) < 2:
        return ""
    w, h = 420, 150
    (xs, ys) = zip(*points)
    low, high, last = min(ys), max(ys), max(xs)
    at = " ".join(f"{x / last * w:.1f},{h - (y - low) / (high - low or 1) * h:.1f}" for x, y in points)
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg class="fit" width="{w + 70}" height="{h + 40}" '
            f'viewBox="-50 -12 {w + 70} {h + 40}" role="img"><path d="M0 0V{h}H{w}"/><polyline points="{at}"/>'
            f'<text class="end" x="-6" y="4">{high:.3g}</text><text class="end" x="-6" y="{h + 4}">{low:.3g}</text>'
            f'<text x="{w - 20}" y="{h + 20}">step {last:,}</text></svg></figure>')


def by_group(title: str, groups: list[str], names: list[str], ious: list[float]) -> str:
    """Mean IoU of each group, in the order of `names`, without empty ones."""
    there = [n for n in names if n in groups]
    values = [[v for g, v in zip(groups, ious) if g == n] for n in there]
    return bars(title, there, [100 * float(np.mean(v)) for v in values], [len(v) for v in values], top=100)


def read_curves(log: Path, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Of a run's log.jsonl, (step, value) of the loss and of the metric on val; empty without one."""
    entries = []
    for text in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        try:
            entries.append(json.loads(text))
        except ValueError:  # half a line, where a run was killed
            break
    return {"loss in training": [(e["step"], e["loss"]) for e in entries if "loss" in e],
            f"val {metric}": [(e["step"], e["val"][metric]) for e in entries if metric in e.get("val", {})]}


def curves(log: Path, metric: str) -> str:
    return "".join(line(title, points) for title, points in read_curves(log, metric).items())


def draw_curves(log: Path, metric: str, file: Path) -> None:
    """The same as a picture."""
    w, h, pad = 460, 220, 56
    sheet = Image.new("RGB", (2 * w, h), "white")
    font, draw, color = ImageFont.load_default(13), ImageDraw.Draw(sheet), tuple(COLORS[0].tolist())
    for n, (title, points) in enumerate(read_curves(log, metric).items()):
        left, right, top, bottom = n * w + pad, (n + 1) * w - 16, 34, h - 34
        draw.text((left, 8), title, "black", font)
        draw.line([(left, top), (left, bottom), (right, bottom)], "#c8c8d0")
        if not points:
            continue
        xs, ys = zip(*points)
        low, high, last = min(ys), max(ys), max(xs)
        at = [(left + x / last * (right - left), bottom - (y - low) / (high - low or 1) * (bottom - top))
              for x, y in points]
        draw.line(at, color, 2) if len(at) > 1 else draw.circle(at[0], 2, color)
        for y, value in (top, high), (bottom, low):
            draw.text((left - 6, y), f"{value:.3g}", "black", font, anchor="rm")
        draw.text((right, bottom + 6), f"step {last:,}", "black", font, anchor="ra")
    with writing(file) as temporary:
        sheet.save(temporary, format="PNG")


def charts(ious: list[float], sizes: list[float], sentences: list[str], places: list[str], size_edges: tuple,
           of_what: str = "object's") -> str:
    """Histogram of the IoU, and its mean by the object's size, the sentence's length and its words of place."""
    counts, _ = np.histogram(np.clip(ious, 0, 1), np.arange(11) / 10)
    share = [100 * c / max(1, len(ious)) for c in counts]
    names = [f"{a}–{b} %" for a, b in zip(size_edges, size_edges[1:])]
    of_size = [names[int(np.digitize(s, size_edges[1:-1]))] for s in sizes]
    lengths = ["1–2", "3–4", "5–6", "7–9", "10+"]
    of_length = [lengths[int(np.digitize(len(s.split()), (3, 5, 7, 10)))] for s in sentences]
    return "".join((
        bars("share of expressions by IoU, %", [f".{k}–" for k in range(10)], share, counts.tolist(), max(share)),
        by_group(f"mean IoU by the {of_what} share of the photograph", of_size, names, ious),
        by_group("mean IoU by the sentence's words", of_length, lengths, ious),
        by_group("mean IoU by words of place", places, ["none", *sorted(set(places) - {"none"})], ious)))


def card(example: dict) -> str:
    """One example: photograph with the truth and with the prediction, sentence, IoU."""
    sentence = html.escape(example["sentence"])
    pictures = "".join(f'<div><img alt="{what}" loading="lazy" src="{example[what]}"><span>{what}</span></div>'
                       for what in ("truth", "prediction"))
    return (f'<article data-iou="{example["iou"]:.4f}" data-n="{example["n"]}" data-text="{sentence.lower()}">'
            f'<div class="pair">{pictures}</div><p><b>{100 * example["iou"]:.0f}</b> <q>{sentence}</q></p>'
            f'<p class="faint">{example["group"]} · {html.escape(example["id"])}</p></article>')


def write_page(file: str, title: str, rows: list[dict], pieces: str, examples: list[dict], facts: dict) -> None:
    """The page. `pieces`: charts as HTML; `facts`: settings, versions, counts."""
    about = table([{"setting": k, "value": json.dumps(v) if isinstance(v, (list, dict)) else str(v)}
                   for k, v in facts.items()])
    page = PAGE
    for name, value in dict(TITLE=html.escape(title), SUMMARY=table(rows), CHARTS=pieces,
                            CARDS="".join(map(card, examples)), FACTS=about).items():
        page = page.replace(f"<!--{name}-->", value)
    with writing(file) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title><!--TITLE--></title>
<style>
:root { color-scheme: light dark; --ink: #1c1c20; --paper: #fff; --line: #d8d8de; --faint: #6c6c78; --mark: #b3008c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171b; --line: #3b3b44; --faint: #a0a0ac; --mark: #ff6adf } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 16px; max-width: 1280px }
h1 { font-size: 22px; overflow-wrap: anywhere } h2 { font-size: 17px; margin: 28px 0 8px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
#facts td, #facts th { text-align: left; white-space: normal; overflow-wrap: anywhere }
.charts { display: flex; flex-wrap: wrap; gap: 12px 32px } figure { margin: 0; max-width: 100% }
figcaption { font-weight: 600; font-size: 14px } svg { fill: var(--mark) } .fit { max-width: 100%; height: auto }
svg text { fill: var(--ink); font-size: 11px; text-anchor: middle }
svg .faint, .faint { fill: var(--faint); color: var(--faint) }
svg .end { text-anchor: end } svg path, svg polyline { fill: none; stroke: var(--line) }
svg polyline { stroke: var(--mark); stroke-width: 1.6 }
.tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; position: sticky; top: 0; padding: 8px 0;
  background: var(--paper); z-index: 1 }
input, select { font: inherit; padding: 6px 8px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--paper); color: var(--ink) } input { flex: 1 1 180px; min-width: 0 }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 16px }
article { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0 }
article[hidden] { display: none }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px } .pair img { width: 100%; display: block }
.pair span { font-size: 12px; color: var(--faint) } article p { margin: 6px 0 0; overflow-wrap: anywhere }
article b { color: var(--mark) } p.faint { font-size: 12px }
</style>
<h1><!--TITLE--></h1>
<!--SUMMARY-->
<h2>Where it is right and wrong</h2>
<div class="charts"><!--CHARTS--></div>
<h2>Examples</h2>
<div class="tools">
<input id="find" type="search" placeholder="words of a sentence" aria-label="words of a sentence">
<select id="order" aria-label="order"><option value="worst">worst first</option><option value="best">best first</option>
<option value="n">as in the split</option></select>
<span id="shown" class="faint" role="status"></span>
</div>
<div id="cards"><!--CARDS--></div>
<h2>The run</h2>
<div id="facts"><!--FACTS--></div>
<script>
const [cards, find, order, shown] = ["cards", "find", "order", "shown"].map(id => document.getElementById(id));
function show() {
  const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean), all = [...cards.children];
  const by = {worst: (a, b) => a.dataset.iou - b.dataset.iou, best: (a, b) => b.dataset.iou - a.dataset.iou,
    n: (a, b) => a.dataset.n - b.dataset.n}[order.value];
  for (const c of all) c.hidden = !words.every(w => c.dataset.text.includes(w));
  cards.append(...all.sort(by));
  shown.textContent = all.filter(c => !c.hidden).length + " of " + all.length;
}
find.addEventListener("input", show);
order.addEventListener("change", show);
show();
</script>
</html>
"""
