"""python -m pytest tests/test_fuzz.py

Damaged and hostile files: an error in one sentence or a result, within seconds; no code of theirs is run and no file
outside the given folders is opened. FUZZ=2000 in the environment tries so many files, FUZZ_SEED=n other ones.
"""

import copy
import json
import os
import pickle
import random
import signal
import sys
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
from toolbox import check, runs
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


@contextmanager
def guarded(folder):
    """Twenty seconds, and no file outside the folder but the libraries' own."""
    global watching

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    opened.clear()
    watching = True
    try:
        yield
    except UserError as e:
        assert "\n" not in str(e).strip() and len(str(e)) < 12_000 and str(e), e
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
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
