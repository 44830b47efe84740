"""python -m pytest tests/test_data.py"""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from torch.utils.data import DataLoader

import data
from common import Preprocess, UserError
from toolbox import augment, check, features, shapes

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("REAL_REFS", ROOT.parent / "shared" / "real_refs"))
PRE = Preprocess(64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# shapes


def test_a_picture_is_a_function_of_seed_split_and_number():
    a, b = shapes.Shapes("shapes", "val", seed=3), shapes.Shapes("shapes", "val", seed=3)
    b.read(100)  # the order of reading does not matter
    for i in 0, 7, 599:
        x, y = a.read(i), b.read(i)
        assert np.array_equal(x.image, y.image) and np.array_equal(x.mask, y.mask) and x.sentences == y.sentences
    code = ("import hashlib; from toolbox import shapes; s = shapes.Shapes('shapes', 'val', seed=3); "
            "print(hashlib.sha256(b''.join(s.read(i).image.tobytes() for i in range(9))).hexdigest())")
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    import hashlib
    assert there.strip() == hashlib.sha256(b"".join(a.read(i).image.tobytes() for i in range(9))).hexdigest()
    assert shapes.Shapes("shapes", "val", seed=3, size=96).scene(5) == a.scene(5)


def test_splits_and_sets_are_different_streams():
    scenes = [str(shapes.Shapes(name, split).scene(i)[0]) for name in data.SHAPE_SETS for split in data.SPLITS[name]
              for i in range(50)]
    assert len(set(scenes)) == len(scenes)
    assert len(shapes.Shapes("shapes", "train")) == 16000 and len(shapes.Shapes("shapes", "testB")) == 600


def fits(thing, sentence, things):
    """Whether a sentence is true of a thing of a scene, from the words alone; None where it is too close to say."""
    words = sentence.split()
    relation = next((r for r in ("left of", "right of", "above", "below") if f" {r} the " in sentence), None)
    if relation:
        head, tail = sentence.split(f" {relation} ")
        anchors = [t for t in things if fits(t, tail, things)]
        assert len(anchors) == 1, sentence
        if thing is anchors[0] or not fits(thing, head, things):
            return False
        dx, dy = thing.x - anchors[0].x, thing.y - anchors[0].y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        return None if 0 <= along <= 0.15 else along > 0
    attributes = {w for w in words if w in shapes.COLOURS + shapes.SHAPES + tuple(shapes.SIZES)}
    if not attributes <= {thing.shape, thing.colour, thing.size}:
        return False
    places = {"left": "left", "leftmost": "left", "right": "right", "rightmost": "right", "top": "top",
              "highest": "top", "bottom": "bottom", "lowest": "bottom"}
    place = next((places[w] for w in words if w in places), None)
    if place is None:
        return True
    at = lambda t: {"left": -t.x, "right": t.x, "top": -t.y, "bottom": t.y}[place]
    rivals = [at(t) for t in things if t is not thing and attributes <= {t.shape, t.colour, t.size}]
    half = {"left": -0.5, "right": 0.5, "top": -0.5, "bottom": 0.5}[place]
    return at(thing) > half and at(thing) > max(rivals) + 0.15 and max(rivals) < half + 0.03


@pytest.mark.parametrize("name", data.SHAPE_SETS)
def test_every_sentence_is_true_of_one_object_alone(name):
    source, kinds, counts = shapes.Shapes(name, "testA", images=1000), Counter(), Counter()
    for i in range(1000):
        things, expressions = source.scene(i)
        counts[len(things)] += 1
        assert expressions[0].target != expressions[1].target
        for e in expressions:
            kinds[e.kind] += 1
            assert [fits(t, e.sentence, things) for t in things] == [k == e.target for k in range(len(things))], e
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 100
    assert kinds["attribute"] > 800 and kinds["position"] > 600 and kinds["relation"] > 150


@pytest.mark.parametrize("name", data.SHAPE_SETS)
def test_masks_are_the_visible_part(name):
    source = shapes.Shapes(name, "val")
    for i in range(0, 200, 2):
        a, b = source.read(i), source.read(i + 1)
        assert not (a.mask & b.mask).any() and a.mask.sum() > 40 and b.mask.sum() > 40
        x1, y1, x2, y2 = map(int, a.box)
        inside = np.zeros_like(a.mask)
        inside[y1:y2, x1:x2] = True
        assert not (a.mask & ~inside).any()
        assert all(line.any() for line in (a.mask[y1], a.mask[y2 - 1], a.mask[:, x1], a.mask[:, x2 - 1]))
        things, expressions = source.scene(i // 2)
        for k, t in enumerate(things):  # nothing is mostly hidden
            owner = shapes.draw_scene(things, 64, name, source.rng(i // 2, 1))[1]
            alone = shapes.draw_scene([t], 64, name, source.rng(i // 2, 1))[1]
            assert (owner == k).sum() > 0.6 * (alone == 0).sum()


def test_colours_mean_what_they_say_and_the_shifted_set_looks_different():
    means = {}
    for name in data.SHAPE_SETS:
        source, pixels = shapes.Shapes(name, "train"), {}
        for i in range(600):
            record = source.read(i)
            thing = source.scene(i // 2)[0][source.scene(i // 2)[1][i % 2].target]
            pixels.setdefault(thing.colour, []).append(record.image[record.mask].mean(0))
        means[name] = {c: np.mean(p, 0) for c, p in pixels.items()}
        r, g, b = means[name]["red"]
        assert r > 1.5 * g and r > 1.5 * b
        assert means[name]["blue"].argmax() == 2 and means[name]["green"].argmax() == 1
    for colour in shapes.COLOURS:
        assert np.abs(means["shapes"][colour] - means["shapes-shift"][colour]).max() > 15
    words = [{w for i in range(600) for w in shapes.Shapes(n, "train").sentences(i)[0].split()} for n in data.SHAPE_SETS]
    assert words[0] == words[1] and len(words[0]) < 40


# pictures and the canvas


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", [(37, 91), (91, 37), (64, 64), (333, 500), (1, 50), (700, 9), (480, 640)])
def test_there_and_back(size, fit):
    pre = Preprocess(128, fit)
    mask = np.zeros(size, dtype=bool)  # a block in the middle, across the whole of a very narrow side
    y1, x1 = (s // 4 if s > 10 else 0 for s in size)
    mask[y1:size[0] - y1, x1:size[1] - x1] = True
    back = data.from_canvas(data.mask_to_canvas(mask, pre) * 2 - 1, size, pre)
    assert back.shape == size
    found = (back > 0).numpy()
    iou = (found & mask).sum() / (found | mask).sum()
    assert iou > 0.94
    assert torch.allclose(data.from_canvas(torch.full((32, 32), 3.0), size, pre), torch.tensor(3.0))


def normalised(image, pre, place=None):
    return data.normalise(data.to_canvas(image, pre, place)[None], pre)[0]


@pytest.mark.parametrize("pre, augmented", [
    (Preprocess(448), False), (Preprocess(448, interpolation="bilinear"), False), (Preprocess(480, "stretch"), False),
    (Preprocess(640, interpolation="bilinear", pad_channel=True), True)])
def test_pictures_travel_in_8_bits_and_are_normalised_to_the_same_values(pre, augmented):
    image = np.random.default_rng(0).integers(0, 256, (333, 500, 3)).astype(np.uint8)
    place = (30, 100, 320, 480) if augmented else data.content_box(image.shape[:2], pre)
    top, left, h, w = place
    how = Image.Resampling.BICUBIC if pre.interpolation == "bicubic" else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(image).resize((w, h), how))
    want = np.zeros((pre.size, pre.size, 4))
    want[:, :, 3] = 1
    want[top:top + h, left:left + w] = np.dstack([(small / 255 - pre.mean) / pre.std, np.zeros((h, w))])
    canvas = data.to_canvas(image, pre, place)
    assert canvas.dtype == torch.uint8 and canvas.shape == (4, pre.size, pre.size)
    got = data.normalise(canvas[None], pre)[0]
    assert got.dtype == torch.float32 and len(got) == (4 if pre.pad_channel else 3)
    assert np.abs(got.permute(1, 2, 0).numpy() - want[:, :, :len(got)]).max() < 1e-6


def test_letterbox_by_hand():
    image = np.full((50, 100, 3), 255, dtype=np.uint8)
    canvas = normalised(image, PRE)
    assert data.content_box((50, 100), PRE) == (16, 0, 32, 64)
    assert (canvas[:, :16] == 0).all() and (canvas[:, 48:] == 0).all()
    expected = (1 - torch.tensor(PRE.mean)) / torch.tensor(PRE.std)
    assert torch.allclose(canvas[:, 30, 30], expected, atol=1e-6)
    mask = data.mask_to_canvas(np.ones((50, 100), dtype=bool), PRE)
    assert mask.sum() == 32 * 64 and mask[16:48].all()


def test_logits_come_back_to_the_right_place():
    logits = torch.full((32, 32), -9.0)
    logits[8:12, 4:8] = 9.0  # on a 64 canvas: rows 16..24, columns 8..16; the picture's rows begin at 16
    found = data.from_canvas(logits, (100, 200), PRE) > 0
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert abs(rows[0] - 0) <= 2 and abs(rows[-1] - 25) <= 2 and abs(columns[0] - 25) <= 2 and abs(columns[-1] - 50) <= 2


def drawn(size, n, seed=0):
    """Polygons of 1 to 8 % of a photograph (H, W), as masks."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < n:
        k = rng.integers(5, 11)
        angle, radius = np.sort(rng.uniform(0, 2 * np.pi, k)), rng.uniform(0.5, 1, k)
        radius = radius * np.sqrt(rng.uniform(0.01, 0.08) * size[0] * size[1] / np.pi) * 1.5
        x, y = rng.uniform(0, size[1]), rng.uniform(0, size[0])
        picture = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(picture).polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radius, angle)], fill=1)
        mask = np.array(picture)
        if 0.01 <= mask.mean() <= 0.08:
            found.append(mask)
    return found


@pytest.mark.parametrize("canvas, cells, size, fit, least", [
    (416, 104, (480, 640), "letterbox", 96.5), (416, 104, (832, 832), "letterbox", 96.5),
    (448, 128, (640, 480), "letterbox", 96.5), (448, 128, (500, 500), "letterbox", 96.5),
    (480, 120, (480, 640), "letterbox", 96.5), (480, 120, (427, 640), "stretch", 96.5),
    (480, 120, (960, 960), "stretch", 96.5), (64, 32, (64, 64), "letterbox", 95), (64, 32, (48, 64), "letterbox", 95)])
def test_the_answer_comes_back_to_where_its_target_lay(canvas, cells, size, fit, least):
    """A predictor that gives exactly its training target, the mean of the mask over a cell of the logits."""
    pre, ious, moved = Preprocess(canvas, fit), [], []
    for mask in drawn(size, 24):
        target = F.interpolate(data.mask_to_canvas(mask, pre)[None, None], (cells, cells), mode="area")[0, 0]
        assert target.min() >= 0 and target.max() <= 1 + 1e-6
        back = (data.from_canvas(target.logit(1e-4), size, pre) > 0).numpy()
        ious.append(100 * (back & mask).sum() / (back | mask).sum())
        moved.append(np.subtract(*(np.argwhere(m).mean(0) for m in (back, mask))))
    assert np.mean(ious) >= least and np.abs(np.mean(moved, 0)).max() < 0.2


@pytest.mark.parametrize("size", [(60, 81), (500, 333), (1, 50)])
def test_masks_are_warped_as_the_released_code_does(size):
    """Linear interpolation written out, at places without a shift by half a pixel, rounded to 1/32; 0 outside."""
    mask = np.random.default_rng(0).random(size) < 0.5
    pre, s = Preprocess(112, "warp"), min(112 / n for n in size)
    got = data.mask_to_canvas(mask, pre)
    padded = np.pad(mask.astype(float), 200)
    for y, x in [(0, 0), (56, 56), (111, 111), (20, 90), (1, 3), (50, 61)]:
        at = [round((v - (112 - n * s) / 2) / s * 32) / 32 for v, n in zip((y, x), size)]
        if any(not -190 < v < n + 190 for v, n in zip(at, size)):
            continue
        j, i = (int(np.floor(v)) for v in at)
        fy, fx = at[0] - j, at[1] - i
        window = padded[j + 200:j + 202, i + 200:i + 202]
        assert got[y, x] == pytest.approx(np.array([1 - fy, fy]) @ window @ [1 - fx, fx], abs=1e-3), (y, x)
    assert got.min() >= 0 and got.max() <= 1 and set(got.unique().tolist()) - {0.0, 1.0}
    items = data.TrainSet(shapes.Shapes("shapes", "val", images=1), Preprocess(48, "warp"))
    assert torch.equal(items[0, 0]["mask"], data.mask_to_canvas(items.source.read(0).mask, items.preprocess))


def test_every_kind_of_picture_is_read_right(tmp_path):
    grey = np.linspace(0, 255, 12).astype(np.uint8).reshape(3, 4)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    Image.fromarray(colour).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray((grey.astype(np.uint16) * 257)).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([colour, np.where(grey > 100, 255, 0).astype(np.uint8)])).save(tmp_path / "rgba.png")
    read = {p.name: data.read_image(p) for p in tmp_path.iterdir()}
    for name in "grey.png", "deep.png":
        assert np.array_equal(read[name], np.repeat(grey[:, :, None], 3, 2)), name
    for name, slack in ("rgb.png", 0), ("cmyk.tif", 1), ("palette.png", 2):
        assert np.abs(read[name].astype(int) - colour).max() <= slack, name
    assert np.array_equal(read["rgba.png"], np.where(grey[:, :, None] > 100, colour, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(colour, -1))
    assert np.array_equal(data.read_image(tmp_path / "turned.png", (4, 3)), np.rot90(colour, -1))
    assert np.array_equal(data.read_image(tmp_path / "turned.png", (3, 4)), colour)  # annotated as stored
    with pytest.raises(UserError, match="4 x 3 pixels|3 x 4 pixels"):
        data.read_image(tmp_path / "rgb.png", (9, 9))


def test_broken_pictures_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "web.jpg").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1")
    (tmp_path / "folder.jpg").mkdir()
    for name, word in ("lfs.jpg", "git lfs pull"), ("phone.heic", "AVIF or HEIC.*save it as JPEG"), (
            "web.jpg", "AVIF or HEIC"), ("folder.jpg", "it is a folder; give the file"), \
            ("cut.jpg", "cannot be read"), ("text.jpg", "is not a picture"), ("empty.jpg", "is not a picture"), \
            ("none.jpg", "no such picture"), ("", "cannot be read"):
        with pytest.raises(UserError, match=word) as e:
            data.read_image(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)


# boxes and augmentation


@pytest.mark.parametrize("size", [(50, 400), (400, 50), (37, 53), (64, 64)])
def test_boxes_go_to_the_canvas_and_back(size):
    h, w = size
    pre, rng = Preprocess(128), np.random.default_rng(0)
    for _ in range(20):
        x1, y1 = rng.uniform(0, w - 2), rng.uniform(0, h - 2)
        box = (x1, y1, rng.uniform(x1 + 1, w), rng.uniform(y1 + 1, h))
        assert data.box_from_canvas(data.box_to_canvas(box, size, pre), size, pre) == pytest.approx(box, abs=1e-3 * max(h, w))
    # where the picture lies on the canvas, by hand: a wide one in the middle of the height
    cx, cy, bw, bh = data.box_to_canvas((0, 0, 400, 50), (50, 400), pre).tolist()
    assert (cx, cy, bw, bh) == pytest.approx((0.5, 0.5, 1, 16 / 128))
    # what reaches into the padding is cut at the picture's border
    assert data.box_from_canvas(torch.tensor([0.5, 0.5, 3.0, 3.0]), size, pre) == (0, 0, w, h)
    outside = data.box_from_canvas(torch.tensor([-0.5, -0.5, 0.1, 0.1]), size, pre)
    assert outside == (0, 0, 0, 0)


def test_a_channel_for_the_padding():
    image = np.random.default_rng(0).integers(0, 255, (20, 40, 3)).astype(np.uint8)
    canvas = normalised(image, Preprocess(64, pad_channel=True))
    assert canvas.shape == (4, 64, 64) and torch.equal(canvas[:3], normalised(image, PRE))
    assert canvas[3, 16:48].sum() == 0 and canvas[3, :16].min() == 1 and canvas[3, 48:].min() == 1
    placed = normalised(image, Preprocess(64, pad_channel=True), (5, 7, 20, 40))
    assert placed[3, 5:25, 7:47].sum() == 0 and placed[3].sum() == 64 * 64 - 800


@pytest.mark.parametrize("sentence, mirror", [
    ("man in bright shirt", "man in bright shirt"), ("copyright sign", "copyright sign"), ("lefty", "lefty"),
    ("the left man", "the right man"), ("Right, not left!", "Left, not right!"), ("LEFT dog", "RIGHT dog"),
    ("the leftmost cross", "the rightmost cross"), ("right-hand side of the left cup", "left-hand side of the right cup"),
    ("righthand laptop", "lefthand laptop"), ("left of the brightest right", "right of the brightest left")])
def test_left_and_right_are_swapped_as_words(sentence, mirror):
    assert augment.mirrored(sentence) == mirror and augment.mirrored(mirror) == sentence


@pytest.mark.parametrize("sentence, place", [
    ("man in bright shirt", False), ("laptop", False), ("the stop sign", False), ("copyright", False), ("central", False),
    ("man on the left", True), ("Top shelf", True), ("the bottommost cup", True), ("middle one", True),
    ("far right", True), ("righthand cup", True), ("leftward dog", True), ("the highest circle", True), ("lower left", True), ("person in center", True)])
def test_only_words_for_places_keep_a_picture_from_being_cropped(sentence, place):
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    mask, cropped = np.ones((90, 120), dtype=bool), 0
    for k in range(60):
        out = augment.augment(image, mask, (40, 30, 60, 50), sentence, Preprocess(64), np.random.default_rng(k))[0]
        cropped += out.shape != image.shape
    assert cropped == 0 if place else 15 < cropped < 45


def test_augmented_pictures_keep_their_object():
    """A red rectangle is found again where the box says, wherever crop, mirror, scale and shift have put it."""
    pre, seen = Preprocess(128, pad_channel=True, augment=True), Counter()
    for k in range(300):
        rng = np.random.default_rng(k)
        h, w = rng.integers(40, 300, 2)
        x1, y1 = int(rng.integers(w - 12)), int(rng.integers(h - 12))
        x2, y2 = int(rng.integers(x1 + 10, w)), int(rng.integers(y1 + 10, h))
        image, mask = np.zeros((h, w, 3), dtype=np.uint8), np.zeros((h, w), dtype=bool)
        image[y1:y2, x1:x2, 0], mask[y1:y2, x1:x2] = 255, True
        out, m, box, sentence, place = augment.augment(image, mask, (x1, y1, x2, y2), "dog to the left of a cat" if k % 2
                                                    else "dog", pre, rng)
        top, left, ph, pw = place
        assert box[0] < box[2] and box[1] < box[3] and out.shape[:2] == m.shape
        assert 0 <= top and top + ph <= 128 and 0 <= left and left + pw <= 128 and max(ph, pw) in range(90, 129)
        assert abs(ph / pw - out.shape[0] / out.shape[1]) < 0.03 * max(ph / pw, 1) * max(out.shape) / min(out.shape)
        assert data.box_of(m) == tuple(box)  # the mask goes with the box
        red = out[:, :, 0].astype(int) - out[:, :, 1]
        assert np.array_equal(red > 30, m)
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        seen["cropped"] += out.shape != image.shape
        seen["whole box"] += (box[2] - box[0], box[3] - box[1]) == (x2 - x1, y2 - y1)
        seen["mirrored"] += "right" in sentence
        # the target's centre is inside the crop: what is left of the box is at least a quarter
        assert (box[2] - box[0]) * (box[3] - box[1]) >= 0.24 * (x2 - x1) * (y2 - y1), (cx, cy)
        c = data.box_to_canvas(box, out.shape[:2], pre, place)
        assert (c[:2] - c[2:] / 2).min() > -1e-6 and (c[:2] + c[2:] / 2).max() < 1 + 1e-6 and c[2:].min() > 0
    assert 40 < seen["cropped"] < 110 and seen["whole box"] > 200 and 40 < seen["mirrored"] < 110


def test_augmentation_depends_on_seed_epoch_and_item_alone(tmp_path):
    make_refer(tmp_path)
    source = data.open_dataset("refcoco", "train", str(tmp_path))
    pre = Preprocess(64, pad_channel=True, augment=True)
    a, b = (data.TrainSet(source, pre, seed=1, every_sentence=True) for _ in range(2))
    assert len(a) == 4 and len(data.TrainSet(source, pre, seed=1)) == 2
    assert [a[0, n]["sentence"] for n in range(4)] == ["thing 0", "other 0", "thing 4", "other 4"]
    b[3, 1]
    for n in range(4):
        x, y, z = a[5, n], b[5, n], a[6, n]
        assert torch.equal(x["image"], y["image"]) and torch.equal(x["box"], y["box"])
        assert not torch.equal(x["image"], z["image"])
    plain = data.TrainSet(source, Preprocess(64, pad_channel=True), seed=1)[0, 0]
    assert torch.equal(plain["box"], data.box_to_canvas((5, 5, 28, 20), (40, 60), PRE))  # the annotation's, not the mask's


def test_boxes_of_annotations(tmp_path):
    make_refer(tmp_path)
    def change(refs, instances):
        instances["annotations"][0]["bbox"] = [-3, 5.5, 100, 10]  # beyond the border, as some of COCO's
        del instances["annotations"][1]["bbox"]
        instances["annotations"][2]["bbox"] = [70, 5, 10, 10]
    edit(tmp_path, change)
    train, val = (data.open_dataset("refcoco", s, str(tmp_path)) for s in ("train", "val"))
    assert train.box(0) == train.read(0).box == (0, 5.5, 60, 15.5)
    assert val.box(0) == val.read(0).box == data.box_of(val.read(0).mask)
    with pytest.raises(UserError, match=r"ref 2: its box \[70, 5, 10, 10\] has no area"):
        data.open_dataset("refcoco", "testA", str(tmp_path))


def test_pictures_with_all_of_their_expressions(tmp_path):
    make_refer(tmp_path)
    edit(tmp_path, lambda refs, instances: refs.append(dict(refs[0], ref_id=77, sentences=[dict(sent="again")])))
    items = data.EvalSet(data.open_dataset("refcoco", "train", str(tmp_path)), PRE)
    assert items.sentences() == ["thing 0", "other 0", "thing 4", "other 4", "again"]
    pictures = data.PictureSet(items)
    assert [p["index"] for p in (pictures[0], pictures[1])] == [[0, 1, 4], [2, 3]] and len(pictures) == 2
    assert pictures[0]["size"] == (40, 60) and pictures[0]["boxes"] == [(5, 5, 28, 20)] * 3
    assert [p["index"] for p in (data.PictureSet(data.EvalSet(items.source, PRE, most=3))[k] for k in (0, 1))] == [[0, 1], [2]]


class Two(NamedTuple):
    mean: torch.Tensor
    flag: torch.Tensor


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_features_of_pictures_are_made_once_and_kept(tmp_path, monkeypatch, where):
    monkeypatch.setattr(features, "BATCH", 2)
    seen, said, source = [], [], shapes.Shapes("shapes", "val", images=5)
    def encode(image):
        seen.extend(image)
        return Two(image.mean((2, 3)), image[:, 0] > 0)
    folder = str(tmp_path / "deep" / "cache") if where == "folder" else None
    cache = features.FeatureCache(source, PRE, encode, folder, "towers", said.append)
    assert len(seen) == 5 and "5 pictures, 0.00 GiB" in said[0]
    items = data.TrainSet(source, PRE, features=cache)
    batch = data.collate([items[0, n] for n in (0, 1, 6)])
    assert isinstance(batch["image"], Two) and batch["image"].flag.dtype == torch.bool and len(seen) == 5
    for k, n in enumerate((0, 1, 6)):
        want = encode(normalised(source.read(n).image, PRE)[None])
        assert torch.equal(batch["image"].mean[k], want.mean[0]) and torch.equal(batch["image"].flag[k], want.flag[0])
    assert torch.equal(batch["box"], torch.stack([data.TrainSet(source, PRE)[0, n]["box"] for n in (0, 1, 6)]))
    if folder:
        before = len(seen)
        again = features.FeatureCache(source, PRE, encode, folder, "towers", said.append)
        assert len(seen) == before + 2 and "are in" in said[-1] and torch.equal(again[3].mean, cache[3].mean)
        features.FeatureCache(source, PRE, encode, folder, "other towers", said.append)
        assert len(seen) == before + 7 and len(os.listdir(folder)) == 2
        # the same file, but the encoder gives something else: made anew
        changed = features.FeatureCache(source, PRE, lambda x: Two(x.mean((2, 3)) + 1, x[:, 0] > 0), folder, "towers", said.append)
        assert torch.equal(changed[3].mean, again[3].mean + 1) and len(os.listdir(folder)) == 2


def test_free_memory_is_what_could_be_had():
    assert 2**27 < features.free_memory() < 2**45 and features.free_space(ROOT / "none" / "deeper") > 0


def test_features_that_do_not_fit(tmp_path, monkeypatch):
    source = shapes.Shapes("shapes", "val", images=5)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda f: type("Free", (), dict(free=100)))
    monkeypatch.setattr(features, "free_memory", lambda: 100)
    for folder, said in (str(tmp_path / "x"), f"cache-features {tmp_path / 'x'}.*are free"), (None, "memory.*a folder"):
        with pytest.raises(UserError, match=said):
            features.FeatureCache(source, PRE, lambda x: Two(x.mean((2, 3)), x), folder, "", lambda s: None)
    assert not (tmp_path / "x").exists()


def make_refer(root, folder="refcoco", refs_name="refs(unc).p", splits=("train", "val", "testA", "testB")):
    """A small data set: photographs of 40 x 60 and 30 x 30, one object for each split and encoding."""
    photos = root / "images" / "mscoco" / "images" / "train2014"
    photos.mkdir(parents=True)
    (root / folder).mkdir()
    rng, images, annotations, refs, masks = np.random.default_rng(0), [], [], [], {}
    for n, split in enumerate([*splits, "train"]):
        h, w = ((40, 60), (30, 30))[n % 2]
        name = f"COCO_train2014_{n + 1:012d}.jpg"
        Image.fromarray(rng.integers(0, 255, (h, w, 3)).astype(np.uint8)).save(photos / name)
        images.append(dict(id=n + 1, file_name=name, height=h, width=w))
        polygons = [[5, 5, 20, 5, 20, 18, 5, 18], [22.5, 8, 28, 8, 25, 20.5]]
        runs = coco.merge(coco.frPyObjects(polygons, h, w))
        mask = coco.decode(runs).astype(bool)
        flat = mask.ravel(order="F").astype(int)
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff(np.r_[0, ends, len(flat)]).tolist()
        encoding = (polygons, dict(size=[h, w], counts=runs["counts"].decode()), dict(size=[h, w], counts=counts))[n % 3]
        annotations.append(dict(id=100 + n, image_id=n + 1, segmentation=encoding, category_id=1, iscrowd=0,
                                area=float(mask.sum()), bbox=[5, 5, 23, 15]))
        refs.append(dict(ref_id=n, ann_id=100 + n, image_id=n + 1, split=split, category_id=1, file_name=name,
                         sent_ids=[2 * n, 2 * n + 1],
                         sentences=[dict(sent=f"thing {n}", raw=f"Thing {n}", sent_id=2 * n, tokens=["thing"]),
                                    dict(sent=f"other {n}", raw=f"Other {n}", sent_id=2 * n + 1, tokens=["other"])]))
        masks[n] = mask
    (root / folder / refs_name).write_bytes(pickle.dumps(refs))
    (root / folder / "instances.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
    return masks


def edit(root, change, refs_name="refs(unc).p"):
    """Applies change(refs, instances) to the files."""
    refs_file, instances_file = root / "refcoco" / refs_name, root / "refcoco" / "instances.json"
    refs, instances = pickle.loads(refs_file.read_bytes()), json.loads(instances_file.read_text())
    change(refs, instances)
    refs_file.write_bytes(pickle.dumps(refs))
    instances_file.write_text(json.dumps(instances))


def test_refer_layout_and_the_three_encodings(tmp_path):
    masks = make_refer(tmp_path)
    train = data.open_dataset("refcoco", "train", str(tmp_path))
    assert len(train) == 2 and train.sentences(1) == ("thing 4", "other 4")
    for split, n in ("train", 0), ("val", 1), ("testA", 2), ("testB", 3):
        record = data.open_dataset("refcoco", split, str(tmp_path)).read(0)
        assert np.array_equal(record.mask, masks[n]) and record.ref_id == n
        assert record.image.shape[:2] == masks[n].shape and record.box == (5, 5, 28, 20)  # the annotation's
    items = data.EvalSet(train, PRE)
    assert items.sentences() == ["thing 0", "other 0", "thing 4", "other 4"] and len(items) == 4
    assert items[3]["sentence"] == "other 4" and torch.equal(items[3]["truth"], torch.from_numpy(masks[4]))


@pytest.mark.parametrize("name, folder, refs_name, splits", [
    ("refcoco+", "refcoco+", "refs(unc).p", ("train", "val", "testA", "testB")),
    ("refcocog_umd", "refcocog", "refs(umd).p", ("train", "val", "test")),
    ("refcocog_google", "refcocog", "refs(google).p", ("train", "val"))])
def test_the_other_data_sets(tmp_path, name, folder, refs_name, splits):
    make_refer(tmp_path, folder, refs_name, splits)
    assert [len(data.open_dataset(name, s, str(tmp_path))) for s in splits] == [2] + [1] * (len(splits) - 1)


@pytest.mark.parametrize("place", ["images/train2014", "train2014", "2017", "images/train2017"])
def test_other_places_for_the_photographs(tmp_path, place):
    make_refer(tmp_path)
    photos = tmp_path / "images" / "mscoco" / "images" / "train2014"
    if "2017" in place:
        for p in photos.iterdir():
            p.rename(p.with_name(p.name.removeprefix("COCO_train2014_")))
    if place != "2017":
        photos.rename(tmp_path / "moved")
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / "moved").rename(tmp_path / place)
    assert data.open_dataset("refcoco", "train", str(tmp_path)).read(0).image.shape == (40, 60, 3)


def set_(path, value):
    """A change that sets refs or instances at a path."""
    def change(refs, instances):
        at = dict(refs=refs, instances=instances)
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
    return change


@pytest.mark.parametrize("change, words", [
    (set_(("refs", 0, "ann_id"), 555), ["refs(unc).p", "ref 0", "555"]),
    (set_(("refs", 0, "image_id"), 555), ["ref 0", "555"]),
    (set_(("refs", 0, "sentences", 1, "sent"), "  "), ["ref 0", "empty"]),
    (set_(("refs", 0, "sentences"), []), ["ref 0", "empty"]),
    (set_(("refs", 0, "sentences", 0, "sent"), None), ["ref 0", "empty"]),
    (set_(("instances", "annotations", 0, "image_id"), 3), ["ref 0", "photograph is 1", "100 is 3"]),
    (set_(("instances", "images", 0, "file_name"), "..\\a.jpg"), ["no name in the folder"]),
    (set_(("refs", 0), {"ref_id": 0, "split": "train"}), ["ref 0", "incomplete", "ann_id"]),
    (set_(("refs", 0, "split"), None), ["ref 0", "split"]),
    (set_(("instances", "annotations", 0, "segmentation"), [[5, 5, 5, 5, 5, 5]]), ["annotation 100", "no pixel"]),
    (set_(("instances", "annotations", 0, "segmentation"), []), ["annotation 100"]),
    (set_(("instances", "annotations", 0, "segmentation"), {"counts": [0]}), ["annotation 100", "cannot be read"]),
    (set_(("instances", "annotations", 0, "segmentation"), {"size": [40, 60], "counts": [5]}), ["do not add up"]),
    (set_(("instances", "annotations", 0, "segmentation"), {"size": [40, 60], "counts": ""}), ["do not add up"]),
    (set_(("instances", "annotations", 0, "segmentation"), {"size": [40, 60], "counts": "04"}), ["do not add up"]),
    (set_(("instances", "annotations", 0, "segmentation"), [[1e9, 1, 5, 1e9, 3, 3]]), ["polygon"]),
    (set_(("instances", "annotations", 0, "segmentation"), [[float("nan"), 1, 5, 9, 3, 3]]), ["polygon"]),
    (set_(("instances", "annotations", 0, "segmentation"), {"size": [9, 9], "counts": "9"}), ["annotation 100"]),
    (set_(("instances", "images", 0, "file_name"), "../../etc/passwd"), ["instances.json", "no name in the folder"]),
    (set_(("instances", "images", 0, "file_name"), "none.jpg"), ["refcoco/train ref 0", "none.jpg", "no such picture"]),
    (set_(("instances", "images", 0, "width"), 61), ["60 x 40", "61 x 40"]),
    (set_(("instances", "images"), 7), ["instances.json"])])
def test_bad_records_are_named(tmp_path, change, words):
    make_refer(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError) as e:
        data.open_dataset("refcoco", "train", str(tmp_path)).read(0)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), e.value


def test_annotations_of_other_layouts_are_explained(tmp_path):
    make_refer(tmp_path)
    edit(tmp_path, lambda refs, instances: refs[0].update(ann_id=[100, 101]))
    with pytest.raises(UserError, match="ref 0: its ann_id is a list, as in gRefCOCO.*make a ref of each object"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    edit(tmp_path, lambda refs, instances: [refs[0].update(ann_id=100), instances["annotations"][0].update(
        segmentation=[5, 5, 20, 5, 20, 18])])
    with pytest.raises(UserError, match="annotation 100: .* flat list of numbers.* list of polygons"):
        data.open_dataset("refcoco", "train", str(tmp_path)).read(0)
    refs_file, instances_file = tmp_path / "refcoco" / "refs(unc).p", tmp_path / "refcoco" / "instances.json"
    whole = instances_file.read_bytes()
    for content, said in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"), (
            b"<!DOCTYPE html><html>", "web page"), (b"PK\3\4....", "zip archive"):
        instances_file.write_bytes(content)
        with pytest.raises(UserError, match=f"instances.json is not COCO's JSON.*{said}"):
            data.open_dataset("refcoco", "train", str(tmp_path))
    instances_file.write_bytes(whole)
    refs_file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(UserError, match=r"refs\(unc\).p is not a whole pickle file.*git lfs pull"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    refs_file.unlink()
    refs_file.mkdir()
    with pytest.raises(UserError, match=r"refs\(unc\).p is a folder, not a file"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    with pytest.raises(UserError, match="instances.json is a file; give the folder in which refcoco and images lie"):
        data.open_dataset("refcoco", "train", str(instances_file))


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.jpg", "a/../b.jpg", "a//b.jpg", "./a.jpg", "C:a.jpg", "C:/a.jpg",
                                  "a\\b.jpg", "a\x1b[2J.jpg", "a\nb.jpg", "a\u2028b.jpg", "", "..", "a/", 7, "\ud800.jpg"])
def test_file_names_that_leave_the_folder_are_refused(tmp_path, name):
    make_refer(tmp_path)
    edit(tmp_path, set_(("instances", "images", 0, "file_name"), name))
    with pytest.raises(UserError, match="ref 0: its photograph's file_name in .*instances.json, .* is no name in the"):
        data.open_dataset("refcoco", "train", str(tmp_path))


@pytest.mark.parametrize("name, stored", [
    ("Screenshot 2025-01-01 at 9.41.00\u202fAM.jpg", None), ("trip/day 1/a.jpg", None), ("2025-01-01T09:41:00.jpg", None),
    ("caf\u00e9.jpg", "cafe\u0301.jpg"), ("cafe\u0301.jpg", "caf\u00e9.jpg"), ("\u56fe" * 60 + ".jpg", None)])
def test_file_names_of_ones_own(tmp_path, name, stored):
    make_refer(tmp_path)
    photos = tmp_path / "images" / "mscoco" / "images" / "train2014"
    file = photos / (stored or name)
    file.parent.mkdir(parents=True, exist_ok=True)
    (photos / "COCO_train2014_000000000001.jpg").rename(file)
    edit(tmp_path, set_(("instances", "images", 0, "file_name"), name))
    assert data.open_dataset("refcoco", "train", str(tmp_path)).read(0).image.shape == (40, 60, 3)
    assert check.main(["--check", "--data-root", str(tmp_path)]) == 0
    file.unlink()
    with pytest.raises(UserError, match="no such picture"):
        data.open_dataset("refcoco", "train", str(tmp_path)).read(0)


def test_a_file_name_too_long_for_the_system(tmp_path):
    make_refer(tmp_path)
    edit(tmp_path, set_(("instances", "images", 0, "file_name"), "\u56fe" * 200))
    with pytest.raises(UserError, match="ref 0"):
        data.open_dataset("refcoco", "train", str(tmp_path)).read(0)


def test_sentences_of_refs_are_checked_as_those_of_the_command_line(tmp_path, capsys):
    make_refer(tmp_path)
    edit(tmp_path, set_(("refs", 0, "sentences", 1, "sent"), "the \ud800 dog"))
    with pytest.raises(UserError, match="ref 0: the sentence .* holds bytes that are no text"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    status, sets = found(tmp_path, capsys)
    assert status == 1 and any("no text in UTF-8" in p for p in sets["refcoco"]["problems"])


def test_text_of_python_2(tmp_path):
    """Its str holds bytes: of UTF-8, or else of latin1."""
    make_refer(tmp_path)
    file = tmp_path / "refcoco" / "refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    refs[0]["sentences"][0]["sent"], refs[0]["sentences"][1]["sent"] = "in the XXXXX", "in the YYYY"
    content = pickle.dumps(refs, protocol=2)
    for text, raw in ("in the XXXXX", "in the caf\u00e9".encode()), ("in the YYYY", "in the caf\u00e9".encode("latin1")):
        whole = pickle.dumps(text, protocol=2)[2:2 + 5 + len(text)]  # BINUNICODE, four bytes of length, the text
        assert content.count(whole) == 1
        content = content.replace(whole, b"U" + bytes([len(raw)]) + raw)  # SHORT_BINSTRING
    file.write_bytes(content)
    assert data.open_dataset("refcoco", "train", str(tmp_path)).sentences(0) == ("in the caf\u00e9",) * 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_do_not_depend_on_the_locale(tmp_path, monkeypatch, encoding):
    make_refer(tmp_path)
    file = tmp_path / "refcoco" / "instances.json"
    instances = json.loads(file.read_text()) | dict(info="caf\u00e9 \u56fe")
    file.write_bytes(json.dumps(instances, ensure_ascii=False).encode(encoding))
    monkeypatch.setattr(Path, "read_text", lambda path: path.read_bytes().decode("ascii"))  # as where LC_ALL=C
    assert len(data.open_dataset("refcoco", "train", str(tmp_path))) == 2


def test_a_user_without_a_home_folder(tmp_path, monkeypatch):
    make_refer(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor a password entry is there
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(data.open_dataset("refcoco", "train", str(tmp_path))) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_boxes_without_masks(tmp_path, capsys):
    make_refer(tmp_path)

    def change(refs, instances):
        del instances["annotations"][0]["segmentation"]
        instances["annotations"][4]["segmentation"] = []
    edit(tmp_path, change)
    boxes = data.open_dataset("refcoco", "train", str(tmp_path), task="box")
    items = data.TrainSet(boxes, Preprocess(64, pad_channel=True, augment=True))
    batch = data.collate([items[epoch, n] for epoch in range(4) for n in range(2)])
    assert batch["image"].shape == (8, 4, 64, 64) and batch["box"].shape == (8, 4) and "mask" not in batch
    pictures = data.PictureSet(data.EvalSet(boxes, PRE))
    assert pictures[0]["boxes"] == [(5, 5, 28, 20)] * 2 and boxes.read(0).mask is None
    with pytest.raises(UserError, match=r"refcoco/train ref 0 .*annotation 100 has no segmentation.*m2ist"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    assert data.open_dataset("refcoco", "val", str(tmp_path)).read(0).mask.any()
    status, sets = found(tmp_path, capsys)
    assert status == 0 and any("2 of 5 objects have a box and no mask" in n for n in sets["refcoco"]["notes"])
    edit(tmp_path, lambda refs, instances: instances["annotations"][0].pop("bbox"))
    with pytest.raises(UserError, match="ref 0: its annotation 100 has neither segmentation nor bbox"):
        data.open_dataset("refcoco", "train", str(tmp_path), task="box")


def test_a_bad_record_does_not_keep_other_splits_from_being_read(tmp_path):
    make_refer(tmp_path)
    edit(tmp_path, set_(("refs", 1, "sentences", 0, "sent"), ""))
    assert data.open_dataset("refcoco", "train", str(tmp_path)).read(0).mask.any()
    with pytest.raises(UserError, match="ref 1: a sentence is empty"):
        data.open_dataset("refcoco", "val", str(tmp_path))


def test_an_object_in_several_runs(tmp_path):
    masks = make_refer(tmp_path)
    parts = [coco.frPyObjects([[5, 5, 20, 5, 20, 18, 5, 18]], 40, 60)[0],
             coco.frPyObjects([[22.5, 8, 28, 8, 25, 20.5]], 40, 60)[0]]  # refclef stores lists of RLE
    edit(tmp_path, set_(("instances", "annotations", 0, "segmentation"),
                        [dict(size=p["size"], counts=p["counts"].decode()) for p in parts]))
    assert np.array_equal(data.open_dataset("refcoco", "train", str(tmp_path)).read(0).mask, masks[0])


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    make_refer(tmp_path)
    monkeypatch.setenv("ATTACK", str(tmp_path / "attacked"))
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Attack()]))
    with pytest.raises(UserError, match=r"refs\(unc\).p asks for posix.mkdir"):
        data.open_dataset("refcoco", "train", str(tmp_path))
    assert not (tmp_path / "attacked").exists()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([np.float64(1)]))
    with pytest.raises(UserError, match="asks for"):
        data.open_dataset("refcoco", "train", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x80\x04]", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps([1])])
def test_broken_refs_files_are_named(tmp_path, content):
    make_refer(tmp_path)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\).p is n"):
        data.open_dataset("refcoco", "train", str(tmp_path))


def test_missing_things_are_named(tmp_path):
    make_refer(tmp_path)
    root = str(tmp_path)
    for args, word in [(("refcocog", "val", root), "refcocog_umd"), (("cocoref", "val", root), "refcoco\\+"),
                       (("refcoco", "test", root), "testA"), (("refcoco", "val", None), "--data-root"),
                       (("refcoco", "val", root + "/none"), "no such folder"), (("shapes", "test"), "testB"),
                       (("refcoco+", "val", root), "refcoco\\+/refs\\(unc\\).p")]:
        with pytest.raises(UserError, match=word):
            data.open_dataset(*args)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no folder of photographs.*train2014"):
        data.open_dataset("refcoco", "val", root)
    with pytest.raises(UserError, match="empty"):
        data.check_sentence(" \t")


def test_the_index_is_cached_until_a_source_changes(tmp_path, monkeypatch):
    make_refer(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    calls = []
    index_entries = data.index_entries
    monkeypatch.setattr(data, "index_entries", lambda *a: calls.append(1) or index_entries(*a))
    for _ in range(2):
        first = data.open_dataset("refcoco", "train", str(tmp_path)).entries
    assert len(calls) == 1 and sorted(p for p in tmp_path.rglob("*")) == before  # nothing beside the user's files
    time.sleep(0.01)
    edit(tmp_path, set_(("refs", 0, "sentences", 0, "sent"), "another"))
    assert data.open_dataset("refcoco", "train", str(tmp_path)).sentences(0)[0] == "another" and len(calls) == 2
    cache = next((Path(os.environ["XDG_CACHE_HOME"]) / "refpapers").iterdir())
    cache.write_text(cache.read_text()[:50])
    assert len(data.open_dataset("refcoco", "train", str(tmp_path)).entries) == len(first) and len(calls) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # a cache that cannot be written is no error
    assert len(data.open_dataset("refcoco", "train", str(tmp_path))) == 2


def test_sentences_are_drawn_by_seed_and_epoch_alone(tmp_path):
    make_refer(tmp_path)
    items = data.TrainSet(data.open_dataset("refcoco", "train", str(tmp_path)), PRE, seed=1)
    index = [(epoch, i) for epoch in range(20) for i in range(2)]
    batches = [index[k:k + 4] for k in range(0, 40, 4)]
    drawn = [[s for batch in DataLoader(items, batch_sampler=batches, num_workers=w, collate_fn=data.collate)
              for s in batch["sentence"]] for w in (0, 2)]
    assert drawn[0] == drawn[1]
    assert {s.split()[0] for s in drawn[0]} == {"thing", "other"}
    other = data.TrainSet(items.source, PRE, seed=2)
    assert [other[k]["sentence"] for k in index] != drawn[0]
    batch = data.collate([items[0, 0], items[0, 1]])
    assert batch["image"].shape == (2, 4, 64, 64) and batch["mask"].shape == (2, 64, 64)
    assert batch["id"][0].startswith("refcoco/train ref 0 (COCO_train2014_")


def make_mixed(root):
    """RefCOCO, RefCOCO+ and G-Ref of the same photographs; the naive union of their train splits shows some of val."""
    make_refer(root)
    for folder, refs_name in ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p"):
        (root / folder).mkdir()
        for name, other in (("refs(unc).p", refs_name), ("instances.json", "instances.json")):
            (root / folder / other).write_bytes((root / "refcoco" / name).read_bytes())
    splits = {"refcoco": "train val testA testB train", "refcoco+": "val train testB train train",
              "refcocog": "train train test val train"}  # of photographs 1 to 5
    for folder, names in splits.items():
        file = next((root / folder).glob("refs*"))
        refs = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps([dict(r, split=s) for r, s in zip(refs, names.split())]))


def test_mixed_leaves_out_what_any_val_or_test_split_shows(tmp_path):
    make_mixed(tmp_path)
    held = {data.Refer(name, s, tmp_path).picture(i) for name in data.MIXED for s in data.SPLITS[name][1:]
            if s in ("val", "testA", "testB", "test") for i in [0] if data_has(name, s, tmp_path)}
    naive = {data.Refer(name, "train", tmp_path).picture(i) for name in data.MIXED
             for i in range(len(data.Refer(name, "train", tmp_path)))}
    assert naive & held == {1, 2, 4} and held == {1, 2, 3, 4}
    train = data.open_dataset("mixed", "train", str(tmp_path))
    assert {train.picture(i) for i in range(len(train))} == {5} == naive - held and len(train) == 3
    assert "5 of 8 train objects, 3 of 4 photographs, are left out" in train.note
    assert [train.describe(i).split("/")[0] for i in range(3)] == list(data.MIXED)
    record = train.read(1)
    assert record.sentences == train.sentences(1) == ("thing 4", "other 4") and train.count(1) == 2
    assert train.shape(1) == record.image.shape[:2] and train.box(1) == record.box
    val = data.open_dataset("mixed", "val", str(tmp_path))
    assert sorted(val.picture(i) for i in range(len(val))) == [1, 2, 4] and val.note == ""
    assert len(data.TrainSet(train, PRE)[0, 1]["image"]) == 4
    with pytest.raises(UserError, match="no split 'testA'"):
        data.open_dataset("mixed", "testA", str(tmp_path))
    edit(tmp_path, lambda refs, instances: refs[1]["sentences"].clear())  # in val: what it shows must be known
    with pytest.raises(UserError, match="a sentence is empty"):
        data.open_dataset("mixed", "train", str(tmp_path))


def data_has(name, split, root):
    try:
        return len(data.Refer(name, split, root)) > 0
    except UserError:
        return False


def test_a_run_on_mixed_says_and_keeps_what_was_left_out(tmp_path, capsys):
    import train
    make_mixed(tmp_path)
    train.main(["--method", "dcris", "--dataset", "mixed", "--data-root", str(tmp_path), "--backbone", "tiny", "--steps",
                "2", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--weights", "random", "--out",
                str(tmp_path / "run")])
    assert "5 of 8 train objects" in capsys.readouterr().err
    assert "5 of 8 train objects" in json.loads((tmp_path / "run" / "config.json").read_text())["note"]


def make_parquet(root, folder="refcoco"):
    """The mirror's files of a data set in REFER's layout, which are removed."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    refs = pickle.loads((root / folder / "refs(unc).p").read_bytes())
    instances = json.loads((root / folder / "instances.json").read_text())
    annotations = {a["id"]: a for a in instances["annotations"]}
    images = {i["id"]: i for i in instances["images"]}
    names = dict(train="train", val="validation", testA="test", testB="testB")
    for split, name in names.items():
        rows = [r | dict(split=name, raw_anns=json.dumps(annotations[r["ann_id"]]), captions=["no"], bbox=[0.0, 1, 2, 3],
                         raw_image_info=json.dumps(images[r["image_id"]]), image_path="coco/train2014/x.jpg")
                for r in refs if r["split"] == split]
        (root / folder / "data").mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), root / folder / "data" / f"{name}-00000-of-00001.parquet")
    (root / folder / "refs(unc).p").unlink()
    (root / folder / "instances.json").unlink()


def test_the_parquet_mirror_has_the_same_records(tmp_path, monkeypatch):
    make_refer(tmp_path)
    splits = data.SPLITS["refcoco"]
    refer = {s: data.Refer("refcoco", s, tmp_path) for s in splits}
    records = {s: [refer[s].read(i) for i in range(len(refer[s]))] for s in splits}
    make_parquet(tmp_path)
    for s in splits:
        mirror = data.Refer("refcoco", s, tmp_path)
        assert mirror.entries == refer[s].entries and len(mirror) == len(records[s])
        for i, record in enumerate(records[s]):
            other = mirror.read(i)
            assert np.array_equal(other.mask, record.mask) and np.array_equal(other.image, record.image)
            assert (other.sentences, other.box, other.ref_id) == (record.sentences, record.box, record.ref_id)
    assert check.main(["--check", "--data-root", str(tmp_path)]) == 0
    file = next((tmp_path / "refcoco").rglob("*.parquet"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="pip install pyarrow"):
            data.Refer("refcoco", "train", tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{file.name} is not a parquet file of the mirror"):
        data.Refer("refcoco", "train", tmp_path)


def found(root, capsys, *flags):
    """(exit status, what --check found of refcoco)"""
    status = check.main(["--check", "--data-root", str(root), "--json", "-", *flags])
    return status, {d["dataset"]: d for d in json.loads(capsys.readouterr().out)}


def test_check_of_a_good_set(tmp_path, capsys):
    make_refer(tmp_path)
    status, sets = found(tmp_path, capsys)
    assert status == 0 and list(sets) == ["refcoco"] and sets["refcoco"]["problems"] == []
    rows = {r["split"]: r for r in sets["refcoco"]["splits"]}
    assert rows["train"] == dict(dataset="refcoco", split="train", images=2, objects=2, sentences=4, boxes=2,
                                 published_objects=42404, published_sentences=120624)
    assert "sizes not compared" in sets["refcoco"]["notes"][0]
    assert check.main(["--check", "--data-root", str(tmp_path)]) == 0 and "0 problems" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds none of"):
        check.main(["--check", "--data-root", str(tmp_path / "nothing")])
    status, sets = found(tmp_path, capsys, "--dataset", "refcoco+")
    assert status == 1 and "refs(unc).p is missing" in sets["refcoco+"]["problems"][0]


@pytest.mark.parametrize("change, said", [
    (lambda r, i: r.append(r[0]), ["ref_id 0 is there more than once", "sent_id 0 is", "sent_id 1 is"]),
    (lambda r, i: i["images"].append(i["images"][0]), ["image id 1 is there more than once"]),
    (lambda r, i: i["annotations"].append(i["annotations"][1]), ["annotation id 101 is there more than once"]),
    (lambda r, i: i["annotations"][0].update(area=1000.0), ["train ref 0: its mask has .* its annotation says 1000"]),
    (lambda r, i: i["annotations"][2].update(bbox=[15, 5, 13, 15]), ["testA ref 2: its mask lies in"]),
    (lambda r, i: r[1].update(image_id=1) or i["annotations"][1].update(image_id=1, segmentation=[[5, 5, 20, 5, 20, 18]],
                                                                       bbox=[5, 5, 15, 13], area=98.0),
     ["train and val share 1 photographs, such as 1"]),
    (lambda r, i: r[3]["sentences"].clear(), ["ref 3: a sentence is empty"]),
    (lambda r, i: i["annotations"][3].update(segmentation=[[1, 2]]), ["testB ref 3, annotation 103: its mask has no pixel"]),
    (lambda r, i: i["images"][0].update(height=41, width=61), ["has 60 x 40 pixels, its annotations are for 61 x 41"])])
def test_check_names_what_is_wrong(tmp_path, capsys, change, said):
    make_refer(tmp_path)
    edit(tmp_path, change)
    status, sets = found(tmp_path, capsys)
    problems = sets["refcoco"]["problems"]
    assert status == 1 and len(problems) == len(said), problems
    for line, words in zip(sorted(problems), sorted(said)):
        assert re.search(words, line)


def test_check_of_photographs(tmp_path, capsys, monkeypatch):
    make_refer(tmp_path)
    photos = sorted((tmp_path / "images").rglob("*.jpg"))
    photos[0].unlink()
    photos[1].write_bytes(photos[1].read_bytes()[:300])
    status, sets = found(tmp_path, capsys)
    assert status == 1 and [p.split(":")[0] for p in sets["refcoco"]["problems"]] == ["train ref 0", "val ref 1"]
    monkeypatch.setitem(check.PUBLISHED, "refcoco", dict(train=(3, 4), val=(1, 2), testA=(1, 2), testB=(1, 2)))
    assert "train has 2 objects, the published set 3" in found(tmp_path, capsys)[1]["refcoco"]["problems"]


@pytest.mark.parametrize("n, turn, listed", [(0, 3, True), (0, 2, True), (0, 6, False), (1, 6, True), (0, 1, False)])
def test_check_lists_photographs_whose_turn_their_size_does_not_tell(tmp_path, capsys, n, turn, listed):
    make_refer(tmp_path)  # photograph 0 is 60 x 40, photograph 1 is square
    photo, exif = sorted((tmp_path / "images").rglob("*.jpg"))[n], Image.Exif()
    exif[0x0112] = turn
    Image.open(photo).save(photo, exif=exif)
    status, sets = found(tmp_path, capsys)
    notes = [note for note in sets["refcoco"]["notes"] if photo.name in note]
    assert status == 0 and len(notes) == listed and all(f"EXIF orientation {turn}" in note for note in notes)


def test_check_of_splits_that_share_photographs_by_design(tmp_path, capsys):
    make_refer(tmp_path, "refcocog", "refs(google).p", ("train", "val"))
    refs_file = tmp_path / "refcocog" / "refs(google).p"
    refs = pickle.loads(refs_file.read_bytes())
    refs_file.write_bytes(pickle.dumps([*refs, dict(refs[0], ref_id=9, split="val", sent_ids=[], sentences=[
        dict(sent="one more", sent_id=99)])]))
    status, sets = found(tmp_path, capsys)
    assert status == 0 and "train and val share 1 photographs" in sets["refcocog_google"]["notes"][1]


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample of real photographs is not beside this checkout")
def test_real_photographs():
    splits = {s: data.open_dataset("refcoco", s, str(REAL)) for s in data.SPLITS["refcoco"]}
    records = [s.read(i) for s in splits.values() for i in range(len(s))]
    assert len(records) == 30 and len({r.file for r in records}) == 5
    assert sum(len(r.sentences) for r in records) == 60
    annotations = {a["id"]: a for a in json.loads((REAL / "refcoco" / "instances.json").read_text())["annotations"]}
    kinds = set()
    for source in splits.values():
        for i, e in enumerate(source.entries):
            annotation, mask = annotations[e["ann_id"]], source.read(i).mask
            s = annotation["segmentation"]
            kinds.add("polygons" if isinstance(s, list) else type(s["counts"]).__name__)
            assert abs(mask.sum() - annotation["area"]) <= max(12, 0.03 * annotation["area"]), e["ann_id"]
            x, y, w, h = annotation["bbox"]
            assert np.abs(np.array(data.box_of(mask)) - (x, y, x + w, y + h)).max() <= 2
    assert kinds == {"polygons", "str", "list"} or kinds == {"polygons", "str"}
    for name, n in ("refcocog_umd", 30), ("refcocog_google", 30):
        sources = [data.open_dataset(name, s, str(REAL)) for s in data.SPLITS[name]]
        assert sum(len(s) for s in sources) == n and sources[0].read(0).mask.any()
