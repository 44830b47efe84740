"""Data sets, pictures and batches.

`shapes` and `shapes-shift` are drawn here; `refcoco`, `refcoco+`, `refcocog_umd`, `refcocog_google`, `refclef` and
`refclef_unc` (ReferItGame) are read in REFER's layout (any folder in that layout works):

    DATA_ROOT/refcoco/refs(unc).p        DATA_ROOT/refcoco/instances.json        (refcoco+, refcocog, refclef likewise)
    DATA_ROOT/refcoco/*.parquet          (in their place: the Hugging Face mirror jxu124/refcoco, refcocoplus, refcocog)
    DATA_ROOT/images/mscoco/images/train2014/COCO_train2014_000000581857.jpg
    (also DATA_ROOT/images/train2014 and DATA_ROOT/train2014; refclef: DATA_ROOT/images/saiapr_tc-12)

`mixed` is RefCOCO, RefCOCO+ and G-Ref (umd) together, without the photographs of their val and test splits in train.

A source (Shapes, Refer, Mixed) knows objects and reads one as a Record; TrainSet and EvalSet turn records into tensors.

    python data.py --check --data-root DATA [--dataset D]      # is it whole, and what it is said to be
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from common import Preprocess, UserError, first_line, run_command, writing
from toolbox.cli import Parser, one_of, print_table, write_result
from toolbox.released import warped

REFER_FILES = {  # data set -> folder, refs file, splits
    "refcoco": ("refcoco", "refs(unc).p", ("train", "val", "testA", "testB")),
    "refcoco+": ("refcoco+", "refs(unc).p", ("train", "val", "testA", "testB")),
    "refcocog_umd": ("refcocog", "refs(umd).p", ("train", "val", "test")),
    "refcocog_google": ("refcocog", "refs(google).p", ("train", "val")),
    "refclef": ("refclef", "refs(berkeley).p", ("train", "val", "test")),
    "refclef_unc": ("refclef", "refs(unc).p", ("train", "val", "testA", "testB", "testC")),
}
SHAPE_SETS = ("shapes", "shapes-shift")
MIXED = ("refcoco", "refcoco+", "refcocog_umd")
SPLITS = {name: ("train", "val", "testA", "testB") for name in SHAPE_SETS} | {k: v[2] for k, v in REFER_FILES.items()}
SPLITS["mixed"] = ("train", "val")
DATASETS = tuple(SPLITS)


@dataclass
class Record:
    """One object of one picture, with every sentence that refers to it."""

    image: np.ndarray             # (H, W, 3) uint8, RGB
    mask: np.ndarray              # (H, W) bool
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels: the annotation's or else the mask's
    sentences: tuple[str, ...]
    image_id: int
    ref_id: int
    file: str


class Source(Protocol):
    """A split of a data set: objects, numbered from 0."""

    name: str
    split: str

    def __len__(self) -> int: ...
    def sentences(self, i: int) -> tuple[str, ...]: ...
    def count(self, i: int) -> int: ...                      # of its sentences
    def picture(self, i: int): ...                           # the same for objects of one photograph
    def shape(self, i: int) -> tuple[int, int]: ...          # (H, W) of the photograph
    def box(self, i: int) -> tuple[float, float, float, float]: ...
    def read(self, i: int) -> Record: ...
    def describe(self, i: int) -> str: ...                   # for messages
    def identity(self) -> str: ...                           # what its photographs depend on


def open_dataset(name: str, split: str, data_root: str | None = None, seed: int = 0) -> Source:
    """The source of a split. Raises UserError for a name or a split that does not exist, and for missing files."""
    if name == "refcocog":
        raise UserError("refcocog has two sets of splits: say refcocog_umd (train, val, test) or refcocog_google.")
    if name not in SPLITS:
        raise UserError(f"data set {name!r} is unknown; there are {', '.join(DATASETS)}.")
    if split not in SPLITS[name]:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(SPLITS[name])}.")
    if name in SHAPE_SETS:
        from toolbox.shapes import Shapes  # which draws Records of this module

        return Shapes(name, split, seed)
    if not data_root:
        raise UserError(f"{name} is read from files: --data-root DATA says where they are (docs/data.md has the layout).")
    return Mixed(split, data_root) if name == "mixed" else Refer(name, split, data_root)


def check_sentence(sentence: str) -> str:
    """The sentence without outer blanks. Raises UserError if nothing is left, or bytes that are no text."""
    if not sentence.strip():
        raise UserError("the sentence is empty; say what to look for, such as \"left dog\".")
    if not sentence.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in sentence):
        raise UserError(f"the sentence {sentence!a} holds bytes that are no text in UTF-8.")
    return sentence.strip()


# Pictures

FORMATS = "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"  # no program is run for these, as it is for EPS


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Any picture that Pillow reads, as (H, W, 3) uint8 RGB: upright (EXIF), transparency over white, 16-bit scaled.

    `size` (H, W) is what an annotation file says: the EXIF turn is left out where only the stored pixels have that
    size. Raises UserError for a file that is missing, no picture, cut off, or of another size.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} cannot be read: it is no file.")
        with Image.open(path, formats=FORMATS) as picture:
            other = size and UserError(f"{path} has {picture.size[0]} x {picture.size[1]} pixels, its annotations are "
                                       f"for {size[1]} x {size[0]}.")
            if size is not None and sorted(picture.size) != sorted(size):  # before anything large is decoded
                raise other
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            if size is not None and upright.size[::-1] != tuple(size):
                if picture.size[::-1] != tuple(size):
                    raise other
                upright = picture
            return to_rgb(upright)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture.") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not a picture that Pillow can read.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # what broken files raise
        raise UserError(f"{path} cannot be read: {first_line(e)}.") from None


def to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits of grey: scaled, where convert() would clip
        grey = np.asarray(picture, dtype=np.float64)
        top = 65535 if picture.mode.startswith("I") else max(1.0, grey.max())
        grey = (grey * (255 / top)).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, 2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def content_box(size: tuple[int, int], pre: Preprocess) -> tuple[int, int, int, int]:
    """Where a picture of (H, W) pixels lies on the canvas: top, left, height, width."""
    if pre.fit == "stretch":
        return 0, 0, pre.size, pre.size
    scale = min(pre.size / size[0], pre.size / size[1])
    h, w = (max(1, round(s * scale)) for s in size)
    return (pre.size - h) // 2, (pre.size - w) // 2, h, w


Place = tuple[int, int, int, int]  # top, left, height and width of a picture on the canvas


def to_canvas(image: np.ndarray, pre: Preprocess, place: Place | None = None) -> Tensor:
    """(H, W, 3) uint8 -> (3, S, S) float32, normalised; (4, S, S) with the padding as a channel."""
    if pre.fit == "warp":
        return warped(image, pre)
    top, left, h, w = place or content_box(image.shape[:2], pre)
    if image.shape[:2] != (h, w):
        how = Image.Resampling.BICUBIC if pre.interpolation == "bicubic" else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((w, h), how))
    mean, std = (np.array(v, dtype=np.float32) for v in (pre.mean, pre.std))
    canvas = np.zeros((pre.size, pre.size, 4 if pre.pad_channel else 3), dtype=np.float32)  # 0 is the mean colour
    canvas[:, :, 3:] = 1
    canvas[top:top + h, left:left + w, :3] = (image / np.float32(255) - mean) / std
    canvas[top:top + h, left:left + w, 3:] = 0
    return torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1)))


def mask_to_canvas(mask: np.ndarray, pre: Preprocess, place: Place | None = None) -> Tensor:
    """(H, W) bool -> (S, S) float32 of 0 and 1."""
    top, left, h, w = place or content_box(mask.shape, pre)
    if mask.shape != (h, w):
        mask = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST))
    canvas = torch.zeros(pre.size, pre.size)
    canvas[top:top + h, left:left + w] = torch.from_numpy(mask.astype(np.float32))
    return canvas


def from_canvas(logits: Tensor, size: tuple[int, int], pre: Preprocess) -> Tensor:
    """(h, w), of any resolution, over the canvas -> (H, W) at the photograph's own resolution.

    The one way back, for validation, evaluation and prediction: bilinear to the canvas, the letterbox cut off, bilinear
    to the photograph (with antialiasing where that is smaller).
    """
    top, left, h, w = content_box(size, pre)
    x = F.interpolate(logits[None, None].float(), (pre.size, pre.size), mode="bilinear", align_corners=False)
    x = x[:, :, top:top + h, left:left + w]
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def box_to_canvas(box: Sequence[float], size: tuple[int, int], pre: Preprocess, place: Place | None = None) -> Tensor:
    """x1, y1, x2, y2 in pixels of (H, W) -> centre x, centre y, width and height in sides of the canvas (4,)."""
    top, left, h, w = place or content_box(size, pre)
    (x1, x2), (y1, y2) = ([start + v * side / full for v in vs] for start, side, full, vs in
                          ((left, w, size[1], box[::2]), (top, h, size[0], box[1::2])))
    return torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dtype=torch.float32) / pre.size


def box_from_canvas(box: Tensor, size: tuple[int, int], pre: Preprocess,
                    cut: bool = True) -> tuple[float, float, float, float]:
    """The way back: (4,) in sides of the canvas -> x1, y1, x2, y2 in pixels of the picture, and inside it."""
    top, left, h, w = content_box(size, pre)
    x, y, bw, bh = (box.double() * pre.size).tolist()
    corners = ((x - bw / 2 - left) * size[1] / w, (y - bh / 2 - top) * size[0] / h,
               (x + bw / 2 - left) * size[1] / w, (y + bh / 2 - top) * size[0] / h)
    return tuple(min(max(v, 0.0), float(size[1 - k % 2])) for k, v in enumerate(corners)) if cut else corners


# Augmentation, as TransVG (Deng et al., ICCV 2021), in sides of the canvas

SCALES = tuple(k / 20 for k in range(14, 21))  # of the longer side
SHORT_SIDES, CROP_SIDES = (0.625, 0.78125, 0.9375), (0.6, 0.9375)
PLACE = re.compile(r"\b((left|right|top|bottom|upper|lower)(most|hand|side|wards?)?|middle|cent(er|re)|highest|lowest|"
                   r"corner|edge)\b", re.IGNORECASE)
SIDE = re.compile(r"\b(left|right)(?=(most|hand|side|wards?)?\b)", re.IGNORECASE)


def mirrored(sentence: str) -> str:
    """The sentence with left and right swapped, as words ("bright", "copyright" and "lefty" stay)."""
    def other(m: re.Match) -> str:
        word = "right" if m[1].lower() == "left" else "left"
        return word.upper() if m[1].isupper() else word.capitalize() if m[1][0].isupper() else word

    return SIDE.sub(other, sentence)


def crop_window(size: tuple[int, int], box: Sequence[float], side: int, rng: np.random.Generator) -> Place:
    """A window (top, left, height, width) of a picture (H, W) that has the centre of the box inside; the whole picture
    after 20 failures. Its sides are 0.6 to 0.9375 of the canvas where the picture's shorter is one of SHORT_SIDES."""
    h, w = size
    scale = rng.choice(SHORT_SIDES) * side / min(h, w)
    low, high = (s * side / scale for s in CROP_SIDES)
    for _ in range(20):
        ch, cw = (min(n, max(1, round(rng.uniform(low, min(n, high))))) for n in (h, w))
        top, left = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
        if left < (box[0] + box[2]) / 2 < left + cw and top < (box[1] + box[3]) / 2 < top + ch:
            return top, left, ch, cw
    return 0, 0, h, w


def jittered(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation, each times 0.6 to 1.4, in any order; 4 of 5 pictures."""
    if rng.random() < 0.2:
        return image
    picture = Image.fromarray(image)
    for k in rng.permutation(3):
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k]
        picture = kind(picture).enhance(rng.uniform(0.6, 1.4))
    return np.asarray(picture)


def augment(image: np.ndarray, mask: np.ndarray, box: Sequence[float], sentence: str, pre: Preprocess,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple, str, Place]:
    """Another picture of the same object: (image, mask, box, sentence, place on the canvas).

    It is cropped only where the sentence has no word for a place in the picture, and mirrored along with the sentence.
    """
    if rng.random() < 0.5 and not PLACE.search(sentence):
        top, left, h, w = crop_window(image.shape[:2], box, pre.size, rng)
        image, mask = (a[top:top + h, left:left + w] for a in (image, mask))
        box = (max(box[0] - left, 0), max(box[1] - top, 0), min(box[2] - left, w), min(box[3] - top, h))
    image = jittered(np.ascontiguousarray(image), rng)
    h, w = image.shape[:2]
    if rng.random() < 0.5:
        image, mask, box = image[:, ::-1].copy(), mask[:, ::-1], (w - box[2], box[1], w - box[0], box[3])
        sentence = mirrored(sentence)
    scale = rng.choice(SCALES) * pre.size / max(h, w)
    h, w = (min(pre.size, max(1, round(n * scale))) for n in (h, w))
    place = int(rng.integers(pre.size - h + 1)), int(rng.integers(pre.size - w + 1)), h, w
    return image, np.ascontiguousarray(mask), box, sentence, place


# Batches


class TrainSet(Dataset):
    """Items for training. An index is (epoch, number): what is drawn depends on both, the seed and nothing else, so
    neither the number of workers nor an interruption changes what is learnt.

    An item is an object with one of its sentences, or with `every_sentence` an object and a sentence. `features` has
    what a frozen encoder gives for a picture, in the picture's place.
    """

    def __init__(self, source: Source, preprocess: Preprocess, seed: int = 0, every_sentence: bool = False,
                 features=None):
        self.source, self.preprocess, self.seed, self.features = source, preprocess, seed, features
        self.pairs = [(i, j) for i in range(len(source)) for j in (
            range(source.count(i)) if every_sentence else [None])]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: tuple[int, int]) -> dict:
        epoch, n = index
        (i, which), pre, place = self.pairs[n], self.preprocess, None
        rng, sentences = np.random.default_rng([self.seed, epoch, n]), self.source.sentences(i)
        if which is None:
            which = int(rng.integers(len(sentences))) if len(sentences) > 1 else 0
        about = dict(sentence=sentences[which], id=self.source.describe(i))
        if self.features is not None:
            box = box_to_canvas(self.source.box(i), self.source.shape(i), pre)
            return about | dict(image=self.features[self.source.picture(i)], box=box)
        record = self.source.read(i)
        image, mask, box = record.image, record.mask, record.box
        if pre.augment:
            image, mask, box, about["sentence"], place = augment(image, mask, box, about["sentence"], pre, rng)
        return about | dict(image=to_canvas(image, pre, place), mask=mask_to_canvas(mask, pre, place),
                            box=box_to_canvas(box, image.shape[:2], pre, place))


class EvalSet(Dataset):
    """Items for evaluation: every sentence of every object (or the `first` of each), or the first `most` of these, the
    mask at the photograph's own size."""

    def __init__(self, source: Source, preprocess: Preprocess, most: int | None = None, first: bool = False):
        self.source, self.preprocess = source, preprocess
        self.pairs = [(i, j) for i in range(len(source)) for j in range(1 if first else source.count(i))][:most]

    def __len__(self) -> int:
        return len(self.pairs)

    def record(self, k: int) -> Record:
        return self.source.read(self.pairs[k][0])

    def sentences(self) -> list[str]:
        return [self.source.sentences(i)[j] for i, j in self.pairs]

    def __getitem__(self, k: int) -> dict:
        i, j = self.pairs[k]
        record = self.source.read(i)
        return dict(image=to_canvas(record.image, self.preprocess), truth=torch.from_numpy(record.mask),
                    sentence=record.sentences[j], index=k, id=self.source.describe(i))


class PictureSet(Dataset):
    """The same for evaluation where a picture is encoded once: every picture with all of its expressions."""

    def __init__(self, items: EvalSet):
        self.source, self.preprocess, self.pairs, pictures = items.source, items.preprocess, items.pairs, {}
        for k, (i, _) in enumerate(items.pairs):
            pictures.setdefault(self.source.picture(i), []).append(k)
        self.pictures = list(pictures.values())  # the expressions of each

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, n: int) -> dict:
        objects = [self.pairs[k][0] for k in self.pictures[n]]
        image = self.source.read(objects[0]).image
        return dict(image=to_canvas(image, self.preprocess), size=image.shape[:2], index=self.pictures[n],
                    boxes=[self.source.box(i) for i in objects])


def collate(items: list[dict]) -> dict:
    """Tensors of one size, and tuples of such tensors, are stacked; everything else is a list."""
    def stacked(values: list):
        if isinstance(values[0], Tensor):
            return torch.stack(values)
        return type(values[0])(*map(torch.stack, zip(*values)))

    return {k: stacked([item[k] for item in items]) if k in ("image", "mask", "box") else [item[k] for item in items]
            for k in items[0]}


# Shapes


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 in pixels of a mask that is not empty; x2 and y2 are one past the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# REFER


class Refer:
    """One split of a data set in REFER's layout, one entry for each object (ref) with all its sentences.

    Raises UserError, with the file and the record, for files that are missing, broken or contradict each other.
    """

    def __init__(self, name: str, split: str, data_root: str | Path):
        self.name, self.split = name, split
        root = Path(data_root)
        if not root.is_dir():
            raise UserError(f"--data-root {root}: no such folder.")
        self.files = annotation_files(name, root)
        tried = image_folders(name, root)
        self.image_folder = next((p for p in tried if p.is_dir()), None)
        if self.image_folder is None:
            raise UserError(f"{name}: no folder of photographs; looked for {', '.join(map(str, tried))}.")
        self.entries = [e for e in build_index(name, self.files) if e["split"] == split]
        if not self.entries:
            raise UserError(f"{self.files[0]} has no object in the split {split!r}.")
        for e in self.entries:
            if "wrong" in e:
                raise UserError(e["wrong"])

    def __len__(self) -> int:
        return len(self.entries)

    def sentences(self, i: int) -> tuple[str, ...]:
        return tuple(self.entries[i]["sentences"])

    def count(self, i: int) -> int:
        return len(self.entries[i]["sentences"])

    def picture(self, i: int) -> int:
        return self.entries[i]["image_id"]

    def shape(self, i: int) -> tuple[int, int]:
        return self.entries[i]["height"], self.entries[i]["width"]

    def box(self, i: int) -> tuple[float, float, float, float]:
        return tuple(self.entries[i]["box"] or box_of(self.mask(i)))

    def mask(self, i: int) -> np.ndarray:
        e = self.entries[i]
        return decode_mask(e, f"{self.files[-1]}: annotation {e['ann_id']} of ref {e['ref_id']}")

    def identity(self) -> str:
        """What its pictures are."""
        return f"{self.name} {self.split} {self.image_folder.resolve()} {[e['file'] for e in self.entries]}"

    def describe(self, i: int) -> str:
        e = self.entries[i]
        return f"{self.name}/{self.split} ref {e['ref_id']} ({e['file']})"

    def read(self, i: int) -> Record:
        e = self.entries[i]
        try:
            image = read_image(photograph(self.image_folder, e["file"]), (e["height"], e["width"]))
        except UserError as error:
            raise UserError(f"{self.name}/{self.split} ref {e['ref_id']}: {error}") from None
        mask = self.mask(i)
        return Record(image, mask, tuple(e["box"] or box_of(mask)), tuple(e["sentences"]), e["image_id"], e["ref_id"],
                      e["file"])


def image_folders(name: str, root: Path) -> list[Path]:
    """Where a data set's photographs may lie."""
    mscoco = "mscoco/images/train2014", "train2014", "train2017"
    under = ("saiapr_tc-12",) if name.startswith("refclef") else mscoco
    return [root / p for u in under for p in (f"images/{u}", u)]


def photograph(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file() and name.startswith("COCO_train2014_"):  # train2017 holds the same photographs
        other = path.with_name(name.removeprefix("COCO_train2014_"))
        path = other if other.is_file() else path
    return path


class Mixed:
    """RefCOCO, RefCOCO+ and G-Ref (umd) together: their val splits, or their train splits without every photograph
    that is in any val or test split of any of them. `note` says how many are left out."""

    def __init__(self, split: str, data_root: str | Path):
        self.name, self.split, self.note = "mixed", split, ""
        parts = [Refer(name, split, data_root) for name in MIXED]
        self.where = [(part, i) for part in parts for i in range(len(part))]  # of object i: data set and number there
        if split == "train":
            held = [e for part in parts for e in build_index(part.name, part.files) if e["split"] != "train"]
            for e in held:
                if "wrong" in e:  # what it shows is not known, so neither is what must be left out
                    raise UserError(e["wrong"])
            held_ids, held_files = {e["image_id"] for e in held}, {e["file"] for e in held}
            kept = [(part, i) for part, i in self.where if part.picture(i) not in held_ids
                    and part.entries[i]["file"] not in held_files]
            photos = [len({part.picture(i) for part, i in where}) for where in (self.where, kept)]
            self.note = (f"mixed: {len(self.where) - len(kept):,} of {len(self.where):,} train objects, "
                         f"{photos[0] - photos[1]:,} of {photos[0]:,} photographs, are left out: val or test splits of "
                         f"{', '.join(MIXED)} have these photographs too")
            self.where = kept
            if not kept:
                raise UserError(f"{self.note}: nothing is left to train on.")

    def __len__(self) -> int:
        return len(self.where)

    def of(self, i: int, what: Callable):
        part, n = self.where[i]
        return what(part, n)

    def sentences(self, i: int) -> tuple[str, ...]:
        return self.of(i, Refer.sentences)

    def count(self, i: int) -> int:
        return self.of(i, Refer.count)

    def picture(self, i: int) -> int:
        return self.of(i, Refer.picture)

    def shape(self, i: int) -> tuple[int, int]:
        return self.of(i, Refer.shape)

    def box(self, i: int) -> tuple[float, float, float, float]:
        return self.of(i, Refer.box)

    def describe(self, i: int) -> str:
        return self.of(i, Refer.describe)

    def read(self, i: int) -> Record:
        return self.of(i, Refer.read)

    def identity(self) -> str:
        return " ".join(f"{part.name} {part.entries[i]['file']}" for part, i in self.where)


def decode_mask(entry: dict, where: str) -> np.ndarray:
    """Polygons, compressed or uncompressed RLE -> (H, W) bool, by pycocotools as in every published figure."""
    from pycocotools import mask as coco

    h, w, segmentation = entry["height"], entry["width"], entry["segmentation"]
    try:
        runs = []
        for s in segmentation if isinstance(segmentation, list) else [segmentation]:  # parts of one object
            # pycocotools trusts its input: what is out of bounds would be read from anywhere in memory
            if isinstance(s, list):
                if len(s) % 2 or not all(-2 * (h + w) < float(v) < 3 * (h + w) for v in s):
                    raise ValueError("a polygon is no list of x, y near the photograph")
                if len(s) >= 6:  # fewer than three points have no area
                    runs += coco.frPyObjects([s], h, w)
            elif isinstance(s["counts"], list):
                if list(s["size"]) != [h, w] or min(s["counts"], default=-1) < 0 or sum(s["counts"]) != h * w:
                    raise ValueError(f"its runs do not add up to the photograph's {[h, w]}")
                runs.append(coco.frPyObjects(s, h, w))
            else:
                if rle_pixels(s["counts"]) != h * w:
                    raise ValueError(f"its runs do not add up to the photograph's {[h, w]}")
                runs.append(dict(size=s["size"], counts=s["counts"].encode()))
        if any(list(r["size"]) != [h, w] for r in runs):
            raise ValueError(f"its size is {runs[0]['size']}, the photograph's {[h, w]}")
        mask = coco.decode(coco.merge(runs)).astype(bool)
    except Exception as e:  # pycocotools raises all sorts for what is no segmentation
        raise UserError(f"{where}: its segmentation cannot be read ({e}).") from None
    if not mask.any():
        raise UserError(f"{where}: its mask has no pixel; remove the object or mend its segmentation.")
    return mask


def rle_pixels(text: str) -> int:
    """How many pixels COCO's compressed RLE covers. Raises ValueError for what is none.

    Each run is groups of five bits plus a continuation bit, offset by 48; from the fourth on, a difference to the run
    before the last.
    """
    counts, position = [], 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            if position >= len(text):
                raise ValueError("its run lengths are cut off")
            code = ord(text[position]) - 48
            if not 0 <= code < 64:
                raise ValueError("its run lengths hold other characters than COCO's")
            value |= (code & 31) << shift
            more, position, shift = bool(code & 32), position + 1, shift + 5
            if not more and code & 16:
                value |= -1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if counts[-1] < 0:
            raise ValueError("a run length is negative")
    return sum(counts)


class PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers; anything that could run code is refused."""

    def find_class(self, module: str, name: str):
        raise UserError(f"asks for {module}.{name}; a refs file holds plain lists, strings and numbers only, so this "
                        "one is not read")

    def persistent_load(self, pid):
        raise UserError("asks for an object outside itself, so it is not read")


def read_refs(path: Path) -> list[dict]:
    try:
        with open(path, "rb") as f:
            refs = PlainUnpickler(f, encoding="latin1").load()  # Python 2 wrote the published ones
    except UserError as e:
        raise UserError(f"{path} {e}.") from None
    except Exception as e:  # a damaged pickle fails in any way it likes
        raise UserError(f"{path} is not a whole pickle file: {first_line(e)}.") from None
    if not isinstance(refs, list) or not all(isinstance(r, dict) for r in refs):
        raise UserError(f"{path} is no list of refs.")
    return refs


def annotation_files(name: str, root: Path) -> list[Path]:
    """The refs file and instances.json of a data set, or the parquet files that hold both. Raises UserError without."""
    folder, refs_name, _ = REFER_FILES[name]
    files = [root / folder / refs_name, root / folder / "instances.json"]
    missing = [f for f in files if not f.is_file()]
    parquet = sorted((root / folder).rglob("*.parquet")) if missing and name in MIXED else []
    if missing and not parquet:
        raise UserError(f"{missing[0]} is missing: {name} needs {folder}/{refs_name} and {folder}/instances.json"
                        + (f", or the mirror's parquet files in {folder}." if name in MIXED else "."))
    return parquet or files


def build_index(name: str, files: list[Path]) -> list[dict]:
    """One plain dict for each ref. Kept in a cache folder of ours until a source file changes."""
    stamp = [3, *(n for f in files for n in (f.stat().st_size, f.stat().st_mtime_ns))]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refpapers"
    key = hashlib.sha256("\n".join(str(f.resolve()) for f in files).encode()).hexdigest()[:16]
    cache = folder / f"{name}-{key}.json"
    try:
        saved = json.loads(cache.read_text())
        if saved["stamp"] == stamp:
            return saved["entries"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours to trust: it is made anew
    entries = index_entries(*read_annotations(name, files), files)
    with suppress(UserError):  # a cache that cannot be written costs seconds, nothing else
        with writing(cache) as temporary:
            temporary.write_text(json.dumps(dict(stamp=stamp, entries=entries)))
    return entries


def read_annotations(name: str, files: list[Path]) -> tuple[list[dict], list[dict], list[dict]]:
    """Refs, annotations and photographs, as REFER's two files have them, from these or from parquet files."""
    if files[0].suffix == ".parquet":
        return read_parquet(files, REFER_FILES[name][2])
    refs = read_refs(files[0])
    try:
        instances = json.loads(files[1].read_text())
        annotations, images = instances["annotations"], instances["images"]
        {i["id"] for i in [*annotations, *images]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        why = e.reason if isinstance(e, UnicodeDecodeError) else e  # without the whole file
        raise UserError(f"{files[1]} is not COCO's JSON of images and annotations: {type(e).__name__}: {why}."
                        ) from None
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
            for row in parquet.read_table(file, columns=columns).to_pylist():
                annotation, image = json.loads(row.pop("raw_anns")), json.loads(row.pop("raw_image_info"))
                annotations[annotation["id"]], images[image["id"]] = annotation, image
                refs.append(row | dict(split=other.get(row["split"], row["split"])))
        except Exception as e:  # whatever a damaged file makes the reader say
            raise UserError(f"{file} is not a parquet file of the mirror: {first_line(e)}.") from None
    return refs, list(annotations.values()), list(images.values())


def index_entries(refs: list[dict], annotations: list[dict], images: list[dict], files: list[Path]) -> list[dict]:
    """Joins refs, annotations and photographs, and checks each."""
    annotations, images = ({i["id"]: i for i in items} for items in (annotations, images))
    refs_file, instances_file, entries = files[0], files[-1], []
    for n, ref in enumerate(refs):
        where = f"{refs_file}: ref {ref['ref_id'] if is_id(ref.get('ref_id')) else f'number {n}'}"
        if not isinstance(ref.get("split"), str) or not ref["split"].isprintable() or len(ref["split"]) > 50:
            raise UserError(f"{where} is incomplete: it names no split.")
        try:
            entries.append(index_entry(ref, annotations, images, where, instances_file))
        except Exception as e:  # values of any kind may stand there
            # told when its split is opened, so that it does not keep the others from being read
            wrong = str(e) if isinstance(e, UserError) else f"{where} is incomplete: {e!r}."
            entries.append(dict(split=ref["split"], wrong=wrong))
    return entries


def is_id(value) -> bool:
    return type(value) is int and abs(value) < 2**63


def index_entry(ref: dict, annotations: dict, images: dict, where: str, instances_file: Path) -> dict:
    for name in "ref_id", "ann_id", "image_id":
        if not is_id(ref[name]):
            raise UserError(f"{where}: its {name} is no whole number.")
    annotation, photo = annotations.get(ref["ann_id"]), images.get(ref["image_id"])
    if annotation is None:
        raise UserError(f"{where}: its annotation {ref['ann_id']} is not in {instances_file}.")
    if photo is None:
        raise UserError(f"{where}: its photograph {ref['image_id']} is not in {instances_file}.")
    if annotation["image_id"] != ref["image_id"]:
        raise UserError(f"{where}: its photograph is {ref['image_id']}, that of its annotation {ref['ann_id']} is "
                        f"{annotation['image_id'] if is_id(annotation['image_id']) else 'another'}.")
    file, sentences = photo["file_name"], [s["sent"] for s in ref["sentences"]]
    if not isinstance(file, str) or set(file) & set("/\\\0") or file in ("", ".", "..") or len(file) > 200 \
            or not file.isprintable():
        raise UserError(f"{instances_file}: image {ref['image_id']}: {file!r:.100} is not a bare file name.")
    if not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
        raise UserError(f"{where}: a sentence is empty; remove it or write it.")
    if not 0 < photo["height"] * photo["width"] <= 2 * Image.MAX_IMAGE_PIXELS or photo["height"] < 0:  # Pillow's limit
        raise UserError(f"{where}: its photograph cannot have {photo['width']!r:.20} x {photo['height']!r:.20} pixels.")
    box = annotation.get("bbox")  # x, y, width, height
    if box is not None:
        x, y, w, h = map(float, box)
        box = [max(x, 0.0), max(y, 0.0), min(x + w, float(photo["width"])), min(y + h, float(photo["height"]))]
        if not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{where}: its box {annotation['bbox']} has no area on the photograph; mend or remove it.")
    return dict(ref_id=int(ref["ref_id"]), ann_id=int(ref["ann_id"]), image_id=int(ref["image_id"]), file=file,
                split=ref["split"], sentences=[s.strip() for s in sentences], height=int(photo["height"]),
                width=int(photo["width"]), segmentation=annotation["segmentation"], box=box)


# python data.py --check


def main(argv: list[str] | None = None) -> int:
    from toolbox.check import check_dataset

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


if __name__ == "__main__":
    run_command(main)
