"""Data sets, pictures and batches.

`shapes` and `shapes-shift` are drawn here; `refcoco`, `refcoco+`, `refcocog_umd`, `refcocog_google`, `refclef` and
`refclef_unc` (ReferItGame) are read in REFER's layout (any folder in that layout works):

    DATA_ROOT/refcoco/refs(unc).p        DATA_ROOT/refcoco/instances.json        (refcoco+, refcocog, refclef likewise)
    DATA_ROOT/refcoco/*.parquet          (in their place: the Hugging Face mirror jxu124/refcoco, refcocoplus, refcocog)
    DATA_ROOT/images/mscoco/images/train2014/COCO_train2014_000000581857.jpg
    (also DATA_ROOT/images/train2014 and DATA_ROOT/train2014; refclef: DATA_ROOT/images/saiapr_tc-12)

`mixed` is RefCOCO, RefCOCO+ and G-Ref (umd) together, without the photographs of their val and test splits in train.

A source (toolbox.shapes.Shapes, Refer) knows objects and reads one as a Record; TrainSet and EvalSet turn records into
tensors.

    python data.py --check --data-root DATA [--dataset D]      # is it whole, and what it is said to be
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from common import Preprocess, UserError, cache_file, first_line, run_command, writing
from toolbox.augment import Place, augment
from toolbox.refer import decode_mask, read_annotations, what_it_is
from toolbox.released import warped, warped_mask

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
    mask: np.ndarray | None       # (H, W) bool; None where only boxes are asked for
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels: the annotation's or else the mask's
    sentences: tuple[str, ...]
    image_id: int
    ref_id: int
    file: str


class Source:
    """A split of a data set: objects, numbered from 0. A subclass has __len__ and read(i); what it can tell without
    reading the photograph it overrides."""

    name: str
    split: str
    task = "mask"  # or "box": then records may have no mask
    note = ""      # what a run should print and keep about it

    def read(self, i: int) -> Record:
        raise NotImplementedError

    def sentences(self, i: int) -> tuple[str, ...]:
        return self.read(i).sentences

    def count(self, i: int) -> int:
        """How many sentences it has."""
        return len(self.sentences(i))

    def picture(self, i: int) -> int:
        """The same for objects of one photograph."""
        return self.read(i).image_id

    def shape(self, i: int) -> tuple[int, int]:
        """(H, W) of the photograph."""
        return self.read(i).image.shape[:2]

    def box(self, i: int) -> tuple[float, float, float, float]:
        return self.read(i).box

    def describe(self, i: int) -> str:
        """For messages."""
        return f"{self.name}/{self.split} object {i}"

    def identity(self) -> str:
        """What its photographs depend on."""
        return f"{self.name} {self.split}"


def open_dataset(name: str, split: str, data_root: str | None = None, seed: int = 0, task: str = "mask") -> Source:
    """The source of a split, for a model that predicts masks or boxes (`task`). Raises UserError for a name or a split
    that does not exist, for missing files, and for objects without a mask where masks are predicted."""
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
        raise UserError(f"{name} is read from files: --data-root DATA says where they are (the layout: docs/data.md).")
    return Refer(name, split, data_root, task)


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
            raise UserError(f"{path} cannot be read: it is {'a folder' if os.path.isdir(path) else 'no file'}; give "
                            "the file of one picture.")
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
        raise UserError(f"{path} is not a picture that Pillow can read{what_it_is(path)}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # what broken files raise
        raise UserError(f"{path} cannot be read: {first_line(e)}.") from None


def to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits of grey: scaled, where convert() would clip
        grey = np.array(picture, dtype=np.float32)  # in place from here on: it may be large
        top = 65535 if picture.mode.startswith("I") else max(1.0, grey.max())
        grey *= 255 / top
        return np.repeat(grey.round(out=grey).clip(0, 255, out=grey).astype(np.uint8)[:, :, None], 3, 2)
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


def to_canvas(image: np.ndarray, pre: Preprocess, place: Place | None = None) -> Tensor:
    """(H, W, 3) uint8 -> (4, S, S) uint8: RGB, and 1 in the padding, else 0. See normalise()."""
    if pre.fit == "warp":  # what lies outside is a colour there
        return F.pad(warped(image, pre), (0, 0, 0, 0, 0, 1))
    top, left, h, w = place or content_box(image.shape[:2], pre)
    if image.shape[:2] != (h, w):
        how = Image.Resampling.BICUBIC if pre.interpolation == "bicubic" else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((w, h), how))
    canvas = np.zeros((4, pre.size, pre.size), dtype=np.uint8)
    canvas[3] = 1
    canvas[:3, top:top + h, left:left + w] = image.transpose(2, 0, 1)
    canvas[3, top:top + h, left:left + w] = 0
    return torch.from_numpy(canvas)


def normalise(canvases: Tensor, pre: Preprocess) -> Tensor:
    """(B, 4, S, S) uint8, as to_canvas() makes them -> (B, 3, S, S) float32, what a model reads: the padding has the
    mean colour, 0; (B, 4, S, S) with pre.pad_channel. Done on the model's device, as 8 bits travel faster."""
    mean, std = (torch.tensor(v, device=canvases.device)[:, None, None] for v in (pre.mean, pre.std))
    padding = canvases[:, 3:]
    images = (canvases[:, :3] / 255).sub_(mean).div_(std).masked_fill_(padding.bool(), 0)
    return torch.cat([images, padding], 1) if pre.pad_channel else images


def mask_to_canvas(mask: np.ndarray, pre: Preprocess, place: Place | None = None) -> Tensor:
    """(H, W) bool -> (S, S) float32 in 0..1: a pixel has the share that the object has of it, by the same antialiased
    interpolation as pictures, so that the object's place and area stay."""
    if pre.fit == "warp":
        return warped_mask(mask, pre)
    top, left, h, w = place or content_box(mask.shape, pre)
    mask = Image.fromarray(mask.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)
    canvas = torch.zeros(pre.size, pre.size)
    canvas[top:top + h, left:left + w] = torch.from_numpy(np.array(mask))
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
        if self.source.task == "mask":
            about["mask"] = mask_to_canvas(mask, pre, place)
        return about | dict(image=to_canvas(image, pre, place), box=box_to_canvas(box, image.shape[:2], pre, place))


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


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 in pixels of a mask that is not empty; x2 and y2 are one past the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# REFER


class Refer(Source):
    """One split of a data set in REFER's layout, one entry for each object (ref) with all its sentences.

    `mixed` has the entries of several: of their val splits, or of their train splits without every photograph that is
    in any val or test split of any of them; `note` says how many are left out. Raises UserError, with the file and the
    record, for files that are missing, broken or contradict each other.
    """

    def __init__(self, name: str, split: str, data_root: str | Path, task: str = "mask"):
        self.name, self.split, self.task, self.entries, held = name, split, task, [], []
        for part in MIXED if name == "mixed" else (name,):
            entries = read_entries(part, Path(data_root))
            here = [e for e in entries if e["split"] == split]
            if not here:
                raise UserError(f"{part} in {data_root} has no object in the split {split!r}.")
            self.entries += here
            held += [e for e in entries if e["split"] != "train"] if (name, split) == ("mixed", "train") else []
        for e in self.entries + held:  # what a wrong one shows is not known, so neither is what must be left out
            if "wrong" in e:
                raise UserError(e["wrong"])
        if held:
            self.leave_out(held)
        for i, e in enumerate(self.entries if task == "mask" else ()):
            if not e["segmentation"]:
                raise UserError(f"{self.describe(i)}: its annotation {e['ann_id']} has no segmentation, so there is no "
                                "mask to learn or to compare with; --method m2ist, which predicts boxes, needs none.")

    def leave_out(self, held: list[dict]) -> None:
        pictures, files = {e["image_id"] for e in held}, {e["file"] for e in held}
        kept = [e for e in self.entries if e["image_id"] not in pictures and e["file"] not in files]
        before, after = (len({e["image_id"] for e in some}) for some in (self.entries, kept))
        self.note = (f"mixed: {len(self.entries) - len(kept):,} of {len(self.entries):,} train objects, "
                     f"{before - after:,} of {before:,} photographs, are left out: val or test splits of "
                     f"{', '.join(MIXED)} have these photographs too")
        self.entries = kept
        if not kept:
            raise UserError(f"{self.note}: nothing is left to train on.")

    def __len__(self) -> int:
        return len(self.entries)

    def sentences(self, i: int) -> tuple[str, ...]:
        return tuple(self.entries[i]["sentences"])

    def picture(self, i: int) -> int:
        return self.entries[i]["image_id"]

    def shape(self, i: int) -> tuple[int, int]:
        return self.entries[i]["height"], self.entries[i]["width"]

    def box(self, i: int) -> tuple[float, float, float, float]:
        return tuple(self.entries[i]["box"] or box_of(self.mask(i)))

    def mask(self, i: int) -> np.ndarray:
        return decode_mask(self.entries[i], f"{self.describe(i)}: annotation {self.entries[i]['ann_id']}")

    def identity(self) -> str:
        return f"{self.name} {self.split} {[(e['folder'], e['file']) for e in self.entries]}"

    def describe(self, i: int) -> str:
        e = self.entries[i]
        return f"{e['dataset']}/{self.split} ref {e['ref_id']} ({e['file']})"

    def read(self, i: int) -> Record:
        e = self.entries[i]
        try:
            image = read_image(photograph(Path(e["folder"]), e["file"]), (e["height"], e["width"]))
        except UserError as error:
            raise UserError(f"{self.describe(i)}: {error}") from None
        mask = None if self.task == "box" and e["box"] else self.mask(i)
        return Record(image, mask, tuple(e["box"] or box_of(mask)), self.sentences(i), e["image_id"], e["ref_id"],
                      e["file"])


def read_entries(name: str, root: Path) -> list[dict]:
    """The entries of all splits of a data set, and where they come from."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder." if not root.exists() else
                        f"--data-root {root} is a file; give the folder in which {REFER_FILES[name][0]} and images "
                        "lie.")
    files, folder = annotation_files(name, root), find_photographs(name, root)
    return [e | dict(dataset=name, folder=str(folder)) for e in build_index(name, files)]


def find_photographs(name: str, root: Path) -> Path:
    """The folder of a data set's photographs. Raises UserError without."""
    mscoco = "mscoco/images/train2014", "train2014", "train2017"
    under = ("saiapr_tc-12",) if name.startswith("refclef") else mscoco
    tried = [root / p for u in under for p in (f"images/{u}", u)]
    folder = next((p for p in tried if p.is_dir()), None)
    if folder is None:
        raise UserError(f"{name}: no folder of photographs; looked for {', '.join(map(str, tried))}.")
    return folder


def photograph(folder: Path, name: str) -> Path:
    """Its file: train2017 holds the same photographs under shorter names, and some systems write accents in another way
    (NFC, NFD)."""
    names = name, name.removeprefix("COCO_train2014_"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((folder / n for n in names if os.path.isfile(folder / n)), folder / name)


def annotation_files(name: str, root: Path) -> list[Path]:
    """The refs file and instances.json of a data set, or the parquet files that hold both. Raises UserError without."""
    folder, refs_name, _ = REFER_FILES[name]
    files = [root / folder / refs_name, root / folder / "instances.json"]
    missing = [f for f in files if not f.is_file()]
    parquet = sorted((root / folder).rglob("*.parquet")) if missing and name in MIXED else []
    if missing and not parquet:
        is_what = "a folder, not a file" if missing[0].is_dir() else "missing"
        raise UserError(f"{missing[0]} is {is_what}: {name} needs {folder}/{refs_name} and {folder}/instances.json"
                        + (f", or the mirror's parquet files in {folder}." if name in MIXED else "."))
    return parquet or files


def build_index(name: str, files: list[Path]) -> list[dict]:
    """One plain dict for each ref. Kept in a cache folder of ours until a source file changes."""
    stamp = [4, *(n for f in files for n in (f.stat().st_size, f.stat().st_mtime_ns))]
    key = hashlib.sha256("\n".join(str(f.resolve()) for f in files).encode()).hexdigest()[:16]
    kept = f"{name}-{key}.json"
    try:
        saved = json.loads(cache_file(kept).read_bytes())
        if saved["stamp"] == stamp:
            return saved["entries"]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours to trust: it is made anew
    entries = index_entries(*read_annotations(files, REFER_FILES[name][2]), files)
    with suppress(UserError), writing(cache_file(kept)) as temporary:  # without a cache it takes seconds longer
        temporary.write_text(json.dumps(dict(stamp=stamp, entries=entries)))
    return entries


def index_entries(refs: list[dict], annotations: list[dict], images: list[dict], files: list[Path]) -> list[dict]:
    """Joins refs, annotations and photographs, and checks each."""
    annotations, images = ({i["id"]: i for i in items} for items in (annotations, images))
    refs_file, instances_file, entries = files[0], files[-1], []
    for n, ref in enumerate(refs):
        where = f"{refs_file}: ref {ref['ref_id'] if is_id(ref.get('ref_id')) else f'number {n}'}"
        if not isinstance(ref.get("split"), str) or not ref["split"].isprintable() or len(ref["split"]) > 50:
            raise UserError(f"{where} is incomplete: it names no split.")
        try:
            entries.append(index_entry(ref, annotations, images, instances_file))
        except Exception as e:  # values of any kind may stand there
            # told when its split is opened, so that it does not keep the others from being read
            wrong = f": {e}" if isinstance(e, UserError) else f" is incomplete: {e!r:.200}."
            entries.append(dict(split=ref["split"], wrong=where + wrong))
    return entries


def is_id(value) -> bool:
    return type(value) is int and abs(value) < 2**63


def index_entry(ref: dict, annotations: dict, images: dict, instances_file: Path) -> dict:
    if isinstance(ref["ann_id"], list):
        raise UserError("its ann_id is a list, as in gRefCOCO, whose sentences refer to any number of objects; here "
                        "each ref has one: make a ref of each object, and leave out those of none.")
    for name in "ref_id", "ann_id", "image_id":
        if not is_id(ref[name]):
            raise UserError(f"its {name} is no whole number.")
    annotation, photo = annotations.get(ref["ann_id"]), images.get(ref["image_id"])
    if annotation is None:
        raise UserError(f"its annotation {ref['ann_id']} is not in {instances_file}.")
    if photo is None:
        raise UserError(f"its photograph {ref['image_id']} is not in {instances_file}.")
    if annotation["image_id"] != ref["image_id"]:
        raise UserError(f"its photograph is {ref['image_id']}, that of its annotation {ref['ann_id']} is "
                        f"{annotation['image_id'] if is_id(annotation['image_id']) else 'another'}.")
    sentences = [s["sent"] for s in ref["sentences"]]
    if not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
        raise UserError("a sentence is empty; remove it or write it.")
    sides = photo["height"], photo["width"]
    if not all(0 < n < 2**16 for n in sides) or sides[0] * sides[1] > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow's limit
        raise UserError(f"its photograph cannot have {sides[1]!r:.20} x {sides[0]!r:.20} pixels.")
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")  # x, y, width, height
    if box is not None:
        x, y, w, h = map(float, box)
        box = [max(x, 0.0), max(y, 0.0), min(x + w, float(photo["width"])), min(y + h, float(photo["height"]))]
        if not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"its box {annotation['bbox']} has no area on the photograph; mend or remove it.")
    elif not segmentation:
        raise UserError(f"its annotation {ref['ann_id']} has neither segmentation nor bbox.")
    return dict(ref_id=int(ref["ref_id"]), ann_id=int(ref["ann_id"]), image_id=int(ref["image_id"]), box=box,
                file=check_name(photo["file_name"], instances_file), split=ref["split"], segmentation=segmentation,
                sentences=[check_sentence(s) for s in sentences],
                height=int(photo["height"]), width=int(photo["width"]))


def check_name(file: str, instances_file: Path) -> str:
    """A file name, perhaps in subfolders, that stays in the folder of photographs and in one line of a message."""
    if not isinstance(file, str) or {"", ".", ".."} & {*file.split("/")} or len(file) > 500 or "\\" in file \
            or PureWindowsPath(file).drive or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in file):
        raise UserError(f"its photograph's file_name in {instances_file}, {file!r:.100}, is no name in the folder of "
                        "photographs: it must not be absolute, nor have \"..\", backslashes or control characters.")
    return file


if __name__ == "__main__":
    from toolbox.check import main

    run_command(main)
