"""python -m pytest tests/test_fuzz.py

Damaged and hostile files: an error in one sentence or a result, within seconds; no code of theirs is run and no file
outside the given folders is opened. FUZZ=2000 in the environment tries so many files, FUZZ_SEED=n other ones.
"""

import copy
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import evaluate
import train
from common import UserError
from toolbox import check, refer, runs
from toolbox.weights import read_weights
from tests.test_commands import SMALL, few_pictures  # noqa: F401
from tests.test_data import make_refer

FILES, SEED = int(os.environ.get("FUZZ", "240")), int(os.environ.get("FUZZ_SEED", "0"))
VALUES = [None, True, -1, 0, 3, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../../etc/passwd",
          "/etc/passwd", "..", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [1, 2, 3], {"a": 1}, b"bytes", ["a"] * 6,
          [[0.0] * 7], {"size": [10**5, 10**5], "counts": "x"}, {"size": [40, 60], "counts": [10**18]}, [{}], ()]


class Attack:
    """Would be run by a pickle that may."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return random.choice([(os.system, (f"touch {self.file}",)), (open, (self.file, "w")), (eval, (
            f"open({self.file!r}, 'w')",)), (Path.touch, (Path(self.file),))])


opened, watching = [], False
LIBRARIES = tuple(os.path.realpath(p) for p in {sys.prefix, sys.base_prefix, *sys.path} if p and os.path.isdir(p))


def watch(event, args):
    if watching and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append(os.path.realpath(os.fsdecode(args[0])))


sys.addaudithook(watch)


def peak():
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def guarded(folder):
    """Twenty seconds, a gigabyte, and no file outside the folder but the libraries' own."""
    global watching

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    opened.clear()
    watching, most = True, peak() + 1024
    try:
        yield
    except UserError as e:
        assert "\n" not in str(e).strip() and len(str(e)) < 12_000 and str(e), e
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak() < most
    fine = (os.path.realpath(folder), "/proc/", "/dev/", *LIBRARIES)
    assert [f for f in opened if not f.startswith(fine)] == []


def broken_bytes(whole, rng):
    """Cut off, with some bits flipped, bytes taken out or put in, or the start of it twice."""
    data = bytearray(whole)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(len(data))
        if kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            data[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        if len(data) < 2:
            break
    return bytes(data)


def broken_values(value, rng):
    """The same with other values, or without some, at some places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 4])):
        at, key, place = value, None, None
        while isinstance(at, (list, dict)) and at and (place is None or rng.random() < 0.85):
            place, key = at, rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            at = place[key]
        if place is not None and rng.random() < 0.15:
            del place[key]
        elif place is not None:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def read_everything(root):
    """As a user would: open the splits, read all, check; each may say what is wrong."""
    for split in data.SPLITS["refcoco"]:
        with guarded(root.parent):
            source = data.open_dataset("refcoco", split, str(root))
            for i in range(len(source)):
                record = source.read(i)
                assert record.mask.any() and record.image.shape[:2] == record.mask.shape
                item = data.TrainSet(source, common.Preprocess(32, augment=True))[0, i]
                assert torch.isfinite(item["image"]).all() and torch.isfinite(item["box"]).all()
    with guarded(root.parent):
        check.main(["--check", "--data-root", str(root), "--json", str(root / "found.json")])


@pytest.mark.parametrize("what", ["refs", "instances", "photographs"])
def test_damaged_data_sets(tmp_path, monkeypatch, what):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    make_refer(root)
    canary = tmp_path / "canary"
    files = dict(refs=[root / "refcoco" / "refs(unc).p"], instances=[root / "refcoco" / "instances.json"],
                 photographs=sorted((root / "images").rglob("*.jpg")))[what]
    rng, whole = random.Random(f"{SEED} {what}"), {f: f.read_bytes() for f in files}
    random.seed(SEED)
    for n in range(FILES // 4):
        file = rng.choice(files)
        if what == "photographs" or n % 3 == 0:
            broken = broken_bytes(whole[file], rng)
        elif what == "refs":
            refs = broken_values(pickle.loads(whole[file]), rng)
            if n % 5 == 0 and refs and isinstance(refs[0], dict):
                refs[0][rng.choice(["sentences", "split", "ref_id", "more"])] = Attack(canary)
            broken = pickle.dumps(refs, protocol=rng.randrange(5))
        else:
            broken = json.dumps(broken_values(json.loads(whole[file]), rng), default=repr).encode("utf-8", "replace")
        file.write_bytes(broken)
        read_everything(root)
        assert not canary.exists()
        file.write_bytes(whole[file])
    read_everything(root)


GREEDY = {  # pickles that ask for more than they have
    "LONG_BINPUT": b"\x80\x02]r" + struct.pack("<I", 1_268_016_352) + b".",
    "PUT": b"(lp1268016352\n.",
    "BINUNICODE": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2**34) + b"].",
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2**34) + b"a.",
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"a.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"a."}


@pytest.mark.parametrize("name", GREEDY)
def test_a_refs_file_gets_memory_in_proportion_to_its_size(tmp_path, name):
    file, before, start = tmp_path / "refs(unc).p", peak(), time.perf_counter()
    file.write_bytes(GREEDY[name])
    with pytest.raises(UserError, match=r"refs\(unc\).p is not a whole pickle file: its byte \d+ asks for"):
        refer.read_refs(file)
    assert peak() < before + 50 and time.perf_counter() - start < 2


def test_what_pickle_writes_is_no_greed(tmp_path):
    words = [[f"word {n}" for n in range(300)], b"x" * 300, 1.5, -2**70, {"a": None, "b": (1, True)}, "caf\u00e9" * 99]
    refs = [dict(split=w, again=words) for w in words]
    for protocol in range(6):
        (tmp_path / "refs").write_bytes(pickle.dumps(refs, protocol))
        if protocol < 3:  # bytes are then made by a function
            refs = [dict(split=w, again=words[2:]) for w in (words[0], *words[2:])]
            (tmp_path / "refs").write_bytes(pickle.dumps(refs, protocol))
        assert refer.read_refs(tmp_path / "refs") == refs


def test_nested_json(tmp_path):
    for content in b"[" * 10**6, b'{"images":' * 10**5, b'{"images": [' + b"9" * 10**6 + b'], "annotations": []}':
        (tmp_path / "instances.json").write_bytes(content)
        (tmp_path / "refs").write_bytes(pickle.dumps([]))
        with pytest.raises(UserError, match="instances.json is not COCO's JSON"):
            refer.read_annotations([tmp_path / "refs", tmp_path / "instances.json"], ())


ENTRY = dict(height=40, width=60)


@pytest.mark.parametrize("counts", ["", "0", "04", "9", "X", "o", "PPPo3", "0oooo?", "P" * 50 + "0", "o" * 10**6,
                                    "\xff\xff", "\0", " ", "_" + "X" * 9, [2400, 0, -1, 1], [2399.5, 0.5], [10**18],
                                    ["2400"], [True] * 2400 + [-1, 1]])
def test_runs_that_do_not_fill_the_photograph(counts):
    """None is read beyond its end, and none leaves a pixel unset."""
    with guarded("/nowhere"):
        with pytest.raises(UserError, match="segmentation cannot be read"):
            data.decode_mask(ENTRY | dict(segmentation=dict(size=[40, 60], counts=counts)), "it")


def test_runs_at_random_are_pycocotools_own_or_refused():
    """Every whole RLE gives pycocotools' mask; cut off, continued or changed it is refused, or a mask of 0 and 1."""
    from pycocotools import mask as coco
    rng, refused = np.random.default_rng(SEED), 0
    for n in range(FILES):
        mask = rng.random((40, 60)) < rng.choice([0.01, 0.2, 0.9])
        if n % 3 == 0:
            mask = np.sort(mask, axis=n % 2)  # long runs
        mask[n % 40, n % 60] = True
        text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        zeros = f"0{text}" if text[0] == "0" and n % 2 else text  # a run of nothing
        assert np.array_equal(data.decode_mask(ENTRY | dict(segmentation=dict(size=[40, 60], counts=text)), "it"), mask)
        at = int(rng.integers(len(text)))
        for broken in text[:at], text[:at] + chr(rng.integers(48, 112)) + text[at + 1:], text + "o", text + "04", zeros:
            try:
                found = data.decode_mask(ENTRY | dict(segmentation=dict(size=[40, 60], counts=broken)), "it")
                assert found.dtype == bool and found.shape == (40, 60) and found.any()
            except UserError:
                refused += 1
    assert refused > FILES


@pytest.mark.parametrize("segmentation", [
    [[-290.0, -290, 290, 290] * 50_000], [[0, 0, 0, 290] * 10**5], [[1e308, 1, 2, 3, 4, 5]], [[float("inf")] * 6],
    [["a"] * 6], [[[1, 2], [3, 4], [5, 6]]], [[1, 2, 3, 4, 5]], [[]], [None], "x", [[10**400] * 6]])
def test_polygons_that_fit_no_photograph(segmentation):
    before = peak()
    with guarded("/nowhere"):
        try:
            assert data.decode_mask(ENTRY | dict(segmentation=segmentation), "it").any()
        except UserError as e:
            assert "it: its" in str(e)
    assert peak() < before + 50


def test_pictures_whose_header_asks_for_much(tmp_path):
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    for side in 13_000, 100_000, 2**31 - 1:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)))
        with guarded(tmp_path), pytest.raises(UserError, match="cannot be read|is not a picture"):
            data.read_image(tmp_path / "a.png")
        with guarded(tmp_path), pytest.raises(UserError, match="its annotations are for|cannot be read|is not a picture"):
            data.read_image(tmp_path / "a.png", (40, 60))


def test_a_parquet_file_that_is_larger_than_it_is(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = dict(ref_id=1, ann_id=1, image_id=1, split="train", sentences=[dict(sent="a")], raw_image_info='{"id": 1}',
               raw_anns=json.dumps(dict(id=1, segmentation="x" * 10**6)))
    kept = pa.Table.from_pylist([row])
    once = [c.combine_chunks() for c in kept.columns]
    parquet.write_table(pa.Table.from_arrays([
        pa.DictionaryArray.from_arrays(pa.array([0] * 3000), c) if pa.types.is_string(c.type) else
        pa.concat_arrays([c] * 3000) for c in once], names=kept.column_names), tmp_path / "a.parquet")
    before = peak()
    with guarded(tmp_path):
        assert len(refer.read_parquet([tmp_path / "a.parquet"], ())[0]) == 3000
    assert peak() < before + 500
    nothing = pa.Table.from_pydict({c: pa.nulls(10**7, kept.schema.field(c).type) for c in kept.column_names})
    parquet.write_table(nothing, tmp_path / "b.parquet")
    with guarded(tmp_path), pytest.raises(UserError, match="10,000,000 rows, more than bytes"):
        refer.read_parquet([tmp_path / "b.parquet"], ())


def test_damaged_checkpoints_and_weights(tmp_path):
    run, photo = tmp_path / "run", tmp_path / "a.png"
    train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(run)])
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(photo)
    canary, weights = tmp_path / "canary", tmp_path / "weights.pth"
    torch.save({"model": {"a.weight": torch.zeros(3)}, "args": 1}, weights)
    rng, process = random.Random(f"{SEED} checkpoints"), common.start(device="cpu")
    random.seed(SEED)
    whole = {f: f.read_bytes() for f in (run / "model.safetensors", run / "resume.pt", weights)}
    info, state = common.read_checkpoint(str(run))

    def ask():
        evaluate.predict(evaluate.parse(["--ckpt", str(run), "--image", str(photo), "--text", "left", "--out",
                                         str(tmp_path / "out.png"), "--json", str(tmp_path / "out.json")]), process)

    for n in range(FILES // 4):
        file = rng.choice(list(whole))
        broken = broken_bytes(whole[file], rng)
        if n % 4 == 0 and file == run / "model.safetensors":  # a whole file that says other things
            other = json.loads(json.dumps(broken_values(info, rng), default=repr))
            if isinstance(other, dict):
                other["sha256"] = common.checksum(other, state) if n % 8 == 0 else rng.choice(VALUES[:22])
                broken = common.save(state, {"refpapers": json.dumps(other)})
        elif n % 4 == 0:
            broken = pickle.dumps({"model": Attack(canary), "state_dict": [Attack(canary)]})
            if n % 8 == 0:
                torch.save({"model": Attack(canary)}, file)
                broken = file.read_bytes()
        file.write_bytes(broken)
        with guarded(tmp_path):
            if file.name == "model.safetensors":
                ask()
            elif file.name == "resume.pt":
                runs.load_resume(file)
            else:
                read_weights(str(file))
        assert not canary.exists()
        file.write_bytes(whole[file])
    ask()
