"""Behind `python data.py --check`: is a data set whole, and what it should be.

    python data.py --check --data-root DATA [--dataset D] [--json FILE]
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import UserError
from data import (FORMATS, MIXED, REFER_FILES, annotation_files, box_of, find_photographs, index_entries, is_id,
                  photograph, read_image)
from toolbox.cli import Parser, one_of, print_table, write_result
from toolbox.refer import decode_mask, read_annotations

PUBLISHED = {  # objects and sentences of each split; None: not printed
    "refcoco": dict(train=(42404, 120624), val=(3811, 10834), testA=(1975, 5657), testB=(1810, 5095)),
    "refcoco+": dict(train=(42278, 120191), val=(3805, 10758), testA=(1975, 5726), testB=(1798, 4889)),
    "refcocog_umd": dict(train=(42226, None), val=(2573, None), test=(5023, None)),
    "refcocog_google": dict(train=(44822, None), val=(5000, None)),
}


def check_dataset(name: str, root: Path, pictures: dict[Path, str]) -> dict:
    """What a data set has in each split, in `problems` what is wrong with it, in `notes` what to look at. `pictures`:
    what is wrong with each photograph so far, "" for a good one; data sets share them."""
    files = annotation_files(name, root)
    refs, annotations, images = read_annotations(files, REFER_FILES[name][2])
    entries = index_entries(refs, annotations, images, files)
    problems, notes = repeated_ids(refs, annotations, images) + [e["wrong"] for e in entries if "wrong" in e], []
    entries = [e for e in entries if "wrong" not in e]
    try:
        folder = find_photographs(name, root)
    except UserError as e:
        folder = problems.append(str(e))
    areas = {a["id"]: (a.get("area"), a.get("bbox")) for a in annotations}
    for e in tqdm(entries, desc=name, leave=False, disable=not sys.stderr.isatty()):
        where = f"{e['split']} ref {e['ref_id']}"
        if folder and (path := photograph(folder, e["file"])) not in pictures:
            pictures[path], note = check_photograph(path, (e["height"], e["width"]))
            problems += [f"{where}: {pictures[path]}"] if pictures[path] else []
            notes += [note] if note else []
        if not e["segmentation"]:
            continue
        try:
            mask = decode_mask(e, f"{where}, annotation {e['ann_id']}")
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{where}: {odd}" for odd in disagreements(mask, *areas[e["ann_id"]])]
    without = sum(not e["segmentation"] for e in entries)
    if without:
        notes.append(f"{without:,} of {len(entries):,} objects have a box and no mask: for --method m2ist alone")
    splits = {}
    for e in entries:
        splits.setdefault(e["split"], []).append(e)
    rows = sizes(name, splits)
    for found, more in zip((problems, notes), compare_sizes(rows, len(entries))):
        found += more
    (notes if name == "refcocog_google" else problems).extend(shared_photographs(name, splits))
    return dict(dataset=name, splits=rows, problems=problems, notes=notes)


def repeated_ids(refs: list[dict], annotations: list[dict], images: list[dict]) -> list[str]:
    lists = [r["sentences"] for r in refs if isinstance(r.get("sentences"), list)]
    sentences = [s for some in lists for s in some if isinstance(s, dict)]
    return [f"{what} {k} is there more than once"
            for what, key, things in (("ref_id", "ref_id", refs), ("sent_id", "sent_id", sentences),
                                      ("annotation id", "id", annotations), ("image id", "id", images))
            for k, n in Counter(t[key] for t in things if is_id(t.get(key))).items() if n > 1]


def check_photograph(path: Path, size: tuple[int, int]) -> tuple[str, str]:
    """(what is wrong with it, or whether its annotations may lie on the picture before its EXIF turn); "" if nothing"""
    try:
        shape = read_image(path, size).shape[:2]
    except UserError as e:
        return str(e), ""
    with Image.open(path, formats=FORMATS) as picture:
        turn = picture.getexif().get(0x0112, 1)
        if turn in range(2, 9) and shape == picture.size[::-1] and (turn < 5 or shape[0] == shape[1]):
            return "", (f"{path}: its EXIF orientation {turn} keeps its size, so whether its annotations are for the "
                        "turned picture, as it is read here, or for the stored one cannot be told; store it upright")
    return "", ""


def sizes(name: str, splits: dict[str, list[dict]]) -> list[dict]:
    rows = []
    for split in sorted({*splits, *REFER_FILES[name][2]}, key=[*REFER_FILES[name][2], *sorted(splits)].index):
        some = splits.get(split, [])
        row = dict(dataset=name, split=split, images=len({e["image_id"] for e in some}), objects=len(some),
                   sentences=sum(len(e["sentences"]) for e in some), boxes=sum(e["box"] is not None for e in some))
        rows.append(row | dict(zip(("published_objects", "published_sentences"),
                                   PUBLISHED.get(name, {}).get(split, (None, None)))))
    return rows


def compare_sizes(rows: list[dict], objects: int) -> tuple[list[str], list[str]]:
    """(problems, notes)"""
    published = sum(row["published_objects"] or 0 for row in rows)
    if 10 * objects < published:
        return [], [f"a set of one's own, {objects:,} objects of the published {published:,}: sizes not compared"]
    return [f"{row['split']} has {row[what]:,} {what}, the published set {row[f'published_{what}']:,}" for row in rows
            for what in ("objects", "sentences") if row[f"published_{what}"] not in (None, row[what])], []


def shared_photographs(name: str, splits: dict[str, list[dict]]) -> list[str]:
    found = []
    for a, b in itertools.combinations(splits, 2):
        shared = {e["image_id"] for e in splits[a]} & {e["image_id"] for e in splits[b]}
        if shared:
            by_design = ": its splits are of objects, not of photographs" if name == "refcocog_google" else ""
            found.append(f"{a} and {b} share {len(shared):,} photographs, such as {min(shared)}{by_design}")
    return found


def disagreements(mask: np.ndarray, area: float | None, box: list | None) -> list[str]:
    """Where a mask's pixels and its annotation's area and box do not fit, beyond what drawing a polygon changes."""
    x1, y1, x2, y2 = box_of(mask)
    edge, found = x2 - x1 + y2 - y1, []
    try:
        area, box = None if area is None else float(area), None if box is None else list(map(float, box))
    except (TypeError, ValueError, OverflowError):
        return ["its annotation's area or box is no number"]
    if area is not None and not abs(int(mask.sum()) - area) <= 0.05 * area + edge:
        found.append(f"its mask has {int(mask.sum())} pixels, its annotation says {area:g}")
    if box is not None:
        given = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        if max(abs(v - w) for v, w in zip(given, (x1, y1, x2, y2))) > 2 + 0.02 * max(mask.shape):
            found.append(f"its mask lies in {[int(v) for v in (x1, y1, x2, y2)]}, its annotation's box is "
                         f"{[round(v, 1) for v in given]}")
    return found


def main(argv: list[str] | None = None) -> int:
    p = Parser(__doc__)
    p.add_argument("--check", action="store_true", required=True, help="read everything and say what is wrong")
    p.add_argument("--data-root", required=True, help="folder of the data sets")
    p.add_argument("--dataset", **one_of(*REFER_FILES), help="default: all that are there")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    args = p.parse_args(argv)
    root, pictures, found = Path(args.data_root), {}, []
    there = [n for n, (folder, refs, _) in REFER_FILES.items() if (root / folder / refs).is_file()
             or n in MIXED and any((root / folder).rglob("*.parquet"))]
    names = [args.dataset] if args.dataset else there
    if not names:
        raise UserError(f"{root} holds none of {', '.join(REFER_FILES)}: no such folder has a refs file.")
    for name in names:
        try:
            found.append(check_dataset(name, root, pictures))
        except UserError as e:  # the others are still looked at
            found.append(dict(dataset=name, splits=[], problems=[str(e)], notes=[]))
    for d in found if args.json != "-" else ():
        if d["splits"]:
            print_table([{k: "" if v is None else v for k, v in row.items()} for row in d["splits"]])
        for kind in "notes", "problems":
            for line in d[kind][:20]:
                print(f"  {kind[:-1]}: {line}")
            if len(d[kind]) > 20:
                print(f"  and {len(d[kind]) - 20:,} more {kind}")
        print(f"{d['dataset']}: {len(d['problems']):,} problems\n")
    write_result(args.json, found)
    return int(any(d["problems"] for d in found))
