"""Behind `python data.py --check`: is a data set whole, and what it should be."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError
from data import (REFER_FILES, annotation_files, box_of, decode_mask, image_folders, index_entries, is_id, photograph,
                  read_annotations, read_image)



PUBLISHED = {  # objects and sentences of each split; None: not printed
    "refcoco": dict(train=(42404, 120624), val=(3811, 10834), testA=(1975, 5657), testB=(1810, 5095)),
    "refcoco+": dict(train=(42278, 120191), val=(3805, 10758), testA=(1975, 5726), testB=(1798, 4889)),
    "refcocog_umd": dict(train=(42226, None), val=(2573, None), test=(5023, None)),
    "refcocog_google": dict(train=(44822, None), val=(5000, None)),
}


def check_dataset(name: str, root: Path, pictures: dict[Path, str]) -> dict:
    """What a data set has in each split, and in `problems` what is wrong with it. `pictures`: what was found of each
    photograph so far, "" for a good one; data sets share them."""
    files, problems, notes = annotation_files(name, root), [], []
    refs, annotations, images = read_annotations(name, files)
    lists = [r["sentences"] for r in refs if isinstance(r.get("sentences"), list)]
    sentences = [s for some in lists for s in some if isinstance(s, dict)]
    for what, key, things in (("ref_id", "ref_id", refs), ("sent_id", "sent_id", sentences),
                              ("annotation id", "id", annotations), ("image id", "id", images)):
        twice = [k for k, n in Counter(t[key] for t in things if is_id(t.get(key))).items() if n > 1]
        problems += [f"{what} {k} is there more than once" for k in twice]
    entries = index_entries(refs, annotations, images, files)
    problems += [e["wrong"] for e in entries if "wrong" in e]
    entries = [e for e in entries if "wrong" not in e]
    areas = {a["id"]: (a.get("area"), a.get("bbox")) for a in annotations}
    folder = next((p for p in image_folders(name, root) if p.is_dir()), None)
    if folder is None:
        problems.append(f"no folder of photographs; looked for {', '.join(map(str, image_folders(name, root)))}")
    for e in tqdm(entries, desc=name, leave=False, disable=not sys.stderr.isatty()):
        where = f"{e['split']} ref {e['ref_id']}"
        if folder is not None:
            path = photograph(folder, e["file"])
            if path not in pictures:
                pictures[path] = ""
                try:
                    read_image(path, (e["height"], e["width"]))
                except UserError as error:
                    pictures[path] = str(error)
                    problems.append(f"{where}: {error}")
        try:
            mask = decode_mask(e, f"{where}, annotation {e['ann_id']}")
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{where}: {odd}" for odd in disagreements(mask, *areas[e["ann_id"]])]
    rows, splits = [], {}
    for e in entries:
        splits.setdefault(e["split"], []).append(e)
    for split in sorted({*splits, *REFER_FILES[name][2]}, key=[*REFER_FILES[name][2], *sorted(splits)].index):
        some = splits.get(split, [])
        row = dict(dataset=name, split=split, images=len({e["image_id"] for e in some}), objects=len(some),
                   sentences=sum(len(e["sentences"]) for e in some), boxes=sum(e["box"] is not None for e in some))
        rows.append(row | dict(zip(("published_objects", "published_sentences"),
                                   PUBLISHED.get(name, {}).get(split, (None, None)))))
    published = sum(row["published_objects"] or 0 for row in rows)
    if 10 * len(entries) < published:
        notes.append(f"a set of one's own, {len(entries):,} objects of the published {published:,}: sizes not compared")
    else:
        problems += [f"{row['split']} has {row[what]:,} {what}, the published set {row[f'published_{what}']:,}"
                     for row in rows for what in ("objects", "sentences")
                     if row[f"published_{what}"] not in (None, row[what])]
    for a, b in itertools.combinations(splits, 2):
        shared = {e["image_id"] for e in splits[a]} & {e["image_id"] for e in splits[b]}
        if shared:
            said = f"{a} and {b} share {len(shared):,} photographs, such as {min(shared)}"
            if name == "refcocog_google":
                notes.append(f"{said}: its splits are of objects, not of photographs")
            else:
                problems.append(said)
    return dict(dataset=name, splits=rows, problems=problems, notes=notes)


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
