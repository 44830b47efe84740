"""Files in REFER's layout as they come from the internet: refs, annotations and segmentations are read with distrust.

Nothing in them is run, memory is taken in proportion to the file whatever it says, and every error is one sentence.
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
import pickletools
from contextlib import suppress
from pathlib import Path

import numpy as np

from common import UserError, first_line

STARTS = {  # of files that stand where others are wanted -> what they are, and what to do
    b"version https://git-lfs": "it is a pointer of git-lfs: `git lfs pull` fetches the file itself",
    b"<!doctype html": "it is a web page, as a failed download leaves it: download it again",
    b"<html": "it is a web page, as a failed download leaves it: download it again",
    b"PK\3\4": "it is a zip archive: unpack it", b"\x1f\x8b": "it is compressed by gzip: unpack it"}


def what_it_is(path: str | Path) -> str:
    """What a file is that cannot be read, to end a message with; "" where its first bytes do not tell."""
    start = None
    with suppress(OSError), open(path, "rb") as f:
        start = f.read(64)
    if start is None:
        return ""
    if not start:
        return "; it is empty: download it again"
    if start[4:8] == b"ftyp":  # ISO base media, whose brand follows
        return "; it is a picture in AVIF or HEIC, or a film: save it as JPEG or PNG"
    start = start.lstrip().lower()
    return next((f"; {what}" for begin, what in STARTS.items() if start.startswith(begin.lower())), "")


class PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers; anything that could run code is refused."""

    def find_class(self, module: str, name: str):
        raise UserError(f"asks for {module}.{name}; a refs file holds plain lists, strings and numbers only, so this "
                        "one is not read")

    def persistent_load(self, pid):
        raise UserError("asks for an object outside itself, so it is not read")


ARGUMENTS = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}  # bytes behind each opcode
LENGTHS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,  # or bytes of their number
           pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}


def check_sizes(content: bytes) -> None:
    """Raises ValueError where a pickle names a length or a place in its memo beyond its own size: pickle takes so much
    memory before it looks further."""
    at = 0
    while at < len(content):
        code, start = content[at], at + 1
        kind, size = ARGUMENTS[code], 0
        if kind == pickletools.UP_TO_NEWLINE:
            at = content.index(b"\n", start) + 1
        elif kind < 0:
            size = int.from_bytes(content[start:start + LENGTHS[kind]], "little")
            at = start + LENGTHS[kind] + size
        else:
            at = start + kind
        if code in b"r\x95":  # LONG_BINPUT, FRAME
            size = int.from_bytes(content[start:at], "little")
        elif code == ord("p"):  # PUT
            size = int(content[start:at])
        elif code in b".ci":  # the end, or a class, which is not read
            return
        if size > len(content):
            raise ValueError(f"its byte {start} asks for {size:,}, the file has {len(content):,}")


# text that Python 2 wrote: UTF-8, and byte by byte latin1 where it is none
codecs.register_error("refs-latin1", lambda e: (e.object[e.start:e.end].decode("latin1"), e.end))


def read_refs(path: Path) -> list[dict]:
    try:
        content = path.read_bytes()
        check_sizes(content)
        file = io.BufferedReader(io.BytesIO(content))  # as fast as a file
        refs = PlainUnpickler(file, encoding="utf-8", errors="refs-latin1").load()
    except UserError as e:
        raise UserError(f"{path} {e}.") from None
    except Exception as e:  # a damaged pickle fails in any way it likes
        raise UserError(f"{path} is not a whole pickle file: {first_line(e)}{what_it_is(path)}.") from None
    if not isinstance(refs, list) or not all(isinstance(r, dict) for r in refs):
        raise UserError(f"{path} is no list of refs.")
    return refs


def read_annotations(files: list[Path], splits: tuple[str, ...]) -> tuple[list[dict], list[dict], list[dict]]:
    """Refs, annotations and photographs, as REFER's two files have them, from these or from parquet files."""
    if files[0].suffix == ".parquet":
        return read_parquet(files, splits)
    refs = read_refs(files[0])
    try:
        instances = json.loads(files[1].read_bytes())  # in UTF-8 or UTF-16, with or without a BOM
        annotations, images = instances["annotations"], instances["images"]
        {i["id"] for i in [*annotations, *images]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        why = e.reason if isinstance(e, UnicodeDecodeError) else first_line(e)  # without the whole file
        raise UserError(f"{files[1]} is not COCO's JSON of images and annotations: {type(e).__name__}: {why}"
                        f"{what_it_is(files[1])}.") from None
    return refs, annotations, images


def read_parquet(files: list[Path], splits: tuple[str, ...]) -> tuple[list[dict], list[dict], list[dict]]:
    """The mirror jxu124/refcoco of the Hugging Face hub: a row for each ref, with annotation and photograph as JSON."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{files[0]}: parquet files need pyarrow: pip install pyarrow.") from None
    columns = ["ref_id", "ann_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info"]
    other = dict(validation="val", test="testA" if "testA" in splits else "test")  # the mirror's names
    refs, annotations, images = [], {}, {}
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            if table.metadata.num_rows > file.stat().st_size:
                raise ValueError(f"it says that it has {table.metadata.num_rows:,} rows, more than bytes")
            # few at a time: a value that all rows share is in the file once, and in memory for each
            for row in (row for batch in table.iter_batches(100, columns=columns) for row in batch.to_pylist()):
                annotation, image = json.loads(row.pop("raw_anns")), json.loads(row.pop("raw_image_info"))
                annotations[annotation["id"]], images[image["id"]] = annotation, image
                refs.append(row | dict(split=other.get(row["split"], row["split"])))
        except Exception as e:  # whatever a damaged file makes the reader say
            raise UserError(f"{file} is not a parquet file of the mirror: {first_line(e)}.") from None
    return refs, list(annotations.values()), list(images.values())


def decode_mask(entry: dict, where: str) -> np.ndarray:
    """Polygons, by pycocotools as in every published figure, compressed or uncompressed RLE -> (H, W) bool."""
    from pycocotools import mask as coco

    h, w, segmentation = entry["height"], entry["width"], entry["segmentation"]
    try:
        runs = []
        for s in segmentation if isinstance(segmentation, list) else [segmentation]:  # parts of one object
            if isinstance(s, (int, float)):
                raise ValueError("it is a flat list of numbers; COCO has a list of polygons, [[x, y, ...], ...]")
            # pycocotools trusts its input: what does not fit is read from anywhere, or fills the memory
            if isinstance(s, dict):
                counts = s["counts"] if isinstance(s["counts"], list) else rle_counts(s["counts"])
                if list(s["size"]) != [h, w] or sum(counts) != h * w or not all(
                        type(n) is int and n >= 0 for n in counts):
                    raise ValueError(f"its runs do not add up to the photograph's {[h, w]}")
                runs.append(coco.frPyObjects(dict(size=[h, w], counts=counts), h, w))
                continue
            points = np.array(s, dtype=float).reshape(-1, 2)
            if not (np.abs(points) < 3 * (h + w)).all():
                raise ValueError("a polygon is no list of x, y near the photograph")
            outline = np.abs(np.diff(points, axis=0, append=points[:1])).max(1).sum()
            if outline > (h + 4) * (w + 4):
                raise ValueError("a polygon's outline is longer than the photograph has pixels")
            if len(points) >= 3:  # fewer have no area
                runs += coco.frPyObjects([points.ravel().tolist()], h, w)
        mask = coco.decode(coco.merge(runs)).astype(bool)
    except Exception as e:  # pycocotools raises all sorts for what is no segmentation
        raise UserError(f"{where}: its segmentation cannot be read ({first_line(e)}).") from None
    if not mask.any():
        raise UserError(f"{where}: its mask has no pixel; remove the object or mend its segmentation.")
    return mask


def rle_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed RLE. (pycocotools.decode gives what lay in memory behind runs that end early.)

    A run is groups of five bits and a bit that says whether more follow, offset by 48, the lowest first; from the
    fourth on, it is a difference to the run before the last.
    """
    counts, value, shift = [], 0, 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            if shift > 60:
                raise ValueError("a run length has no end")
            continue
        value -= (code - 48 & 16) << shift - 4  # the sign: the highest of its bits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
