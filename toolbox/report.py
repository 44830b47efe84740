"""The page of `python evaluate.py --ckpt RUN --report FILE.html`: figures, charts and examples.

It is one file with all of its pictures and needs no network. Everything in it that comes from data (sentences, file
names, settings) passes through html.escape. Charts are SVG.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
from common import writing
from evaluate import MAIN_METRIC, SIZES, ask, expressions
from toolbox import draw, runs
from toolbox.augment import PLACE

SIDE = 300                                                       # of an example's pictures, pixels
EXAMPLES = 60


@torch.no_grad()
def write_report(args: argparse.Namespace, model, info: dict, source, rows: list[dict], details: list) -> None:
    """--report: a page about the first split that was measured, and the figures of all."""
    protocol = rows[0]["protocol"]
    items, sentences = expressions(model, source, protocol, shuffle_text=args.shuffle_text)
    scores, sizes = ([row[n] for row in details] for n in (1, 2))
    ious = common.mask_ious(scores)[2].tolist() if model.task == "mask" else scores
    examples = []
    for k, group in tqdm(chosen(ious, EXAMPLES).items(), "pictures", leave=False, disable=None):
        record = items.record(k)
        pictures = dict(truth=record.mask if model.task == "mask" else record.box,
                        prediction=ask(model, record.image, sentences[k], protocol=protocol)[model.task])
        examples.append(dict(n=k, iou=ious[k], group=group, sentence=sentences[k],
                             id=source.describe(items.pairs[k][0]),
                             **{name: data_url(draw.overlay(record.image, [what], least=SIDE), SIDE)
                                for name, what in pictures.items()}))
    pieces = charts(ious, sizes, sentences, "object's" if model.task == "mask" else "object's box's")
    log = (Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent) / "log.jsonl"
    if log.is_file():
        url = data_url(draw.curves(log, MAIN_METRIC[model.task]))
        pieces += f'<figure><img class="fit" alt="loss and {MAIN_METRIC[model.task]} of the run" src="{url}"></figure>'
    facts = {k: v for k, v in info.items() if k != "config"} | info["config"]
    if info["dataset"] is None:  # a released file does not say how it was trained
        facts = {k: info["config"][k] for k in ("backbone", "variant", "image_size", "words")}
    facts |= {f"{k} parameters": f"{sum(p.numel() for p in ps):,}" for k, ps in common.parameters(model).items()}
    title = f"{info['method']} ({info['config']['backbone']}) on {source.name} {source.split}: {args.ckpt}"
    if args.shuffle_text:
        title += " (sentences shuffled)"
    shown = [{k: v for k, v in row.items() if k not in ("by_size", "leak")} for row in rows]
    write_page(args.report, title, shown, pieces, examples, facts | dict(measured_with=runs.versions()))


def data_url(picture: Image.Image, side: int | None = None) -> str:
    """A picture within the page: a photograph as JPEG of a longest side, a drawing as PNG."""
    out = io.BytesIO()
    if side:
        picture.thumbnail((side, side))
    picture.convert("RGB").save(out, "JPEG" if side else "PNG", quality=82)
    return f"data:image/{'jpeg' if side else 'png'};base64," + base64.b64encode(out.getvalue()).decode()


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


def by_group(title: str, groups: list[str], names: list[str], ious: list[float]) -> str:
    """Mean IoU of each group, in the order of `names`, without empty ones."""
    there = [n for n in names if n in groups]
    values = [[v for g, v in zip(groups, ious) if g == n] for n in there]
    return bars(title, there, [100 * float(np.mean(v)) for v in values], [len(v) for v in values], top=100)


def charts(ious: list[float], sizes: list[float], sentences: list[str], of_what: str = "object's") -> str:
    """Histogram of the IoU, and its mean by the object's size, the sentence's length and its words of place."""
    counts, _ = np.histogram(np.clip(ious, 0, 1), np.arange(11) / 10)
    share = [100 * c / max(1, len(ious)) for c in counts]
    names = [f"{a}–{b} %" for a, b in zip(SIZES, SIZES[1:])]
    of_size = [names[int(np.digitize(s, SIZES[1:-1]))] for s in sizes]
    lengths = ["1–2", "3–4", "5–6", "7–9", "10+"]
    of_length = [lengths[int(np.digitize(len(s.split()), (3, 5, 7, 10)))] for s in sentences]
    places = [m[0].lower() if (m := PLACE.search(s)) else "none" for s in sentences]
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
