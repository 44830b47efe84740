"""python -m pytest tests/test_pretrain.py: what it makes, where it is kept, and that a model of any --tune takes it."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import common
import evaluate
import train
from common import METHODS, Process, UserError, load_method
from toolbox import pretrain
from toolbox.shapes import Thing, place_things
from tests.test_commands import few_pictures  # noqa: F401

TINY = [*((m, "tiny") for m in METHODS), ("etris", "tiny-vit")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of pretraining of one step a stage, by method and backbone."""
    files = {}

    def file(method, backbone="tiny"):
        if (method, backbone) not in files:
            files[method, backbone] = out = tmp_path_factory.mktemp("towers") / "towers.safetensors"
            pretrain.main(["--method", method, "--backbone", backbone, "--steps", "1", "--out", str(out)])
        return files[method, backbone]

    return file


@pytest.mark.parametrize("method, backbone", TINY)
def test_towers_are_trained_and_the_same_twice(made, method, backbone):
    c = load_method(method).config(backbone)
    towers = pretrain.read(made(method, backbone), method=method, backbone=backbone, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = pretrain.make(method, backbone, c.image_size, seed=0, steps=1)
    assert torch.equal(torch.rand(3), expected)  # others' random numbers are as if nothing had happened
    assert towers.keys() == again.keys() and all(torch.equal(towers[k], again[k]) for k in towers)
    other = pretrain.make(method, backbone, c.image_size, seed=1, steps=1)
    assert any(not torch.equal(towers[k], other[k]) for k in towers)
    assert all(v.isfinite().all() for v in towers.values())


@pytest.mark.parametrize("method, backbone, tune", [
    *((m, b, t) for m, b in TINY for t in ("method", "full")),
    *(("dcris", "tiny", t) for t in ("frozen", "lora", "coop", "compacter", "method+adapter", "bitfit")),
    ("etris", "tiny", "conv-adapter"), ("m2ist", "tiny", "lora"), ("shared_ris", "tiny", "lora")])
def test_every_tune_takes_them(made, method, backbone, tune):
    module = load_method(method)
    towers = pretrain.read(made(method, backbone))
    torch.manual_seed(0)
    model = module.Model(module.config(backbone, tune=tune), "random")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pretrain.load(model, towers)
    names, changed = pretrain.tower_names(model), model.state_dict()
    assert names.keys() == towers.keys() and all(torch.equal(changed[own], towers[k]) for k, own in names.items())
    rest = before.keys() - set(names.values())  # the head and the adapters
    assert rest and all(torch.equal(changed[k], before[k]) for k in rest)


def test_towers_fit_the_released_variant(made):
    module = load_method("etris")
    model = module.Model(module.config("tiny", "released"), "random")
    pretrain.load(model, pretrain.read(made("etris")))


def test_towers_that_do_not_fit_are_refused(made):
    module, towers = load_method("dcris"), pretrain.read(made("dcris"))
    model = module.Model(module.config("tiny"), "random")
    name = min(towers)
    for wrong in ({k: v for k, v in towers.items() if k != name}, towers | {"vision.more": torch.zeros(1)},
                  towers | {name: torch.zeros(1)}):
        with pytest.raises(UserError, match="1 tensors differ"):
            pretrain.load(model, wrong)


def test_files_of_others_are_refused(made, tmp_path):
    file = made("dcris")
    with pytest.raises(UserError, match="holds towers of method dcris, not etris"):
        pretrain.read(file, method="etris")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    damaged, cut, none = (tmp_path / f"{n}.safetensors" for n in ("damaged", "cut", "none"))
    damaged.write_bytes(data)
    cut.write_bytes(data[:1000])
    for wrong, sentence in ((damaged, "damaged"), (cut, "not a whole"), (none, "not a whole")):
        with pytest.raises(UserError, match=sentence):
            pretrain.read(wrong)


# The cache


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """(cache file of DCRIS's towers, seeds that were made so far); making takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seeds = []

    def make(method, backbone, image_size, seed):
        seeds.append(seed)
        time.sleep(0.2)
        return {"tower": torch.full((2,), float(seed))}

    monkeypatch.setattr(pretrain, "make", make)
    c = load_method("dcris").config("tiny")
    return pretrain.cache_file(pretrain.describe("dcris", c, 3)), seeds


def ask(seed=3, **flags):
    return pretrain.pretrained("dcris", load_method("dcris").config("tiny", **flags), seed)["tower"]


def test_towers_are_made_once(kept):
    file, seeds = kept
    assert torch.equal(ask(), ask()) and seeds == [3] and file.is_file()
    ask(tune="frozen", lr=1.0, words=9, decoder_layers=3)  # which do not shape them
    assert seeds == [3]
    ask(seed=4), ask(image_size=128)
    assert seeds == [3, 4, 3]


def test_a_broken_or_older_file_is_made_anew(kept, monkeypatch):
    file, seeds = kept
    ask()
    for content in file.read_bytes()[:-1], b"", b"{}":
        file.write_bytes(content)
        ask()
    assert len(seeds) == 4
    monkeypatch.setattr(pretrain, "VERSION", pretrain.VERSION + 1)
    ask()
    assert len(seeds) == 5 and ask() is not None and len(seeds) == 5


def test_two_at_once_make_it_once(kept):
    _, seeds = kept
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seeds == [3]


@pytest.mark.parametrize("where", ["file", "no home"])
def test_without_a_cache_the_run_goes_on(kept, monkeypatch, tmp_path, capfd, where):
    _, seeds = kept
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if where == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(common.os.path, "expanduser", lambda path: path)
    assert ask()[0] == 3 and ask()[0] == 3 and seeds == [3, 3]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "for this command alone" in said[0]


def test_a_full_disk_is_one_sentence(kept, monkeypatch, capfd):
    file, seeds = kept

    def full(path, towers, info):
        raise UserError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(common, "write_tensors", full)
    assert ask()[0] == 3 and seeds == [3] and not file.exists()
    assert "No space left on device. The run goes on" in capfd.readouterr().err


def test_the_others_wait_for_the_first_process(kept, monkeypatch):
    _, seeds = kept
    towers = {"tower": torch.ones(2)}
    monkeypatch.setattr(Process, "gather", lambda self, thing: [(towers, None), thing])
    c = load_method("dcris").config("tiny")
    assert pretrain.pretrained("dcris", c, 3, Process(1, 2, torch.device("cpu"))) is towers and seeds == []


# The command


def command(*words):
    return subprocess.run([sys.executable, "-m", "toolbox.pretrain", *words], capture_output=True, text=True)


def test_the_command_writes_a_file(tmp_path):
    done = command("--method", "m2ist", "--steps", "1", "--seed", "7", "--out", str(tmp_path / "a.safetensors"))
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "a.safetensors"), done.stderr
    assert pretrain.read(tmp_path / "a.safetensors", method="m2ist", seed=7)


@pytest.mark.parametrize("words, sentence", [
    (["--method", "dcris", "--backbone", "dinov2-base"], "must be one of tiny"),
    (["--method", "dcris", "--steps", "3"], "--steps needs --out"),
    (["--method", "dcris", "--seed", "-1"], "--seed must be")])
def test_mistakes_are_one_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        pretrain.main(words)


# Captions


def test_captions_are_true():
    """What a caption says of places holds; pictures of one thing have nothing beside it."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        things = place_things(rng)[:1]
        said, t = pretrain.caption(things, rng), things[0]
        assert t.shape in said and not any(w in said for w in ("left of", "right of", "above", "below", " and "))
        for words, true in (("left", t.x < 0.5), ("right", t.x > 0.5), ("top", t.y < 0.5), ("highest", t.y < 0.5),
                            ("bottom", t.y > 0.5), ("lowest", t.y > 0.5)):
            assert true or words not in said, (said, t)
    left, right = Thing("circle", "red", "small", 0.3, 0.5, 0.12), Thing("cross", "blue", "large", 0.8, 0.52, 0.2)
    said = " ".join(pretrain.caption([left, right], rng) for _ in range(200))
    assert "circle left of the" in said and "cross right of the" in said
    assert "circle right of" not in said and "cross left of" not in said


def test_a_block_of_patches_is_hidden():
    torch.manual_seed(0)
    masks = pretrain.blocks(500, 8).view(500, 8, 8)
    for mask in masks:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns) and mask.any()
        for side in rows, columns:
            first, last = side.nonzero().flatten()[[0, -1]].tolist()
            assert side[first:last + 1].all()  # neighbours
    assert masks.float().mean() == pytest.approx(0.4, abs=0.02)
    assert masks.float().mean(0).min() > 0.03  # anywhere


def test_codes_say_what_lies_at_a_patch():
    things = [Thing("circle", "red", "large", 0.25, 0.25, 0.2), Thing("cross", "blue", "small", 0.6, 0.6, 0.1)]
    codes = pretrain.codes_of(things, 4).view(4, 4)
    circle, cross = map(pretrain.class_of, things)
    nothing = len(pretrain.CLASSES)
    assert codes[:2, :2].unique().tolist() == [circle] and codes[2, 2] == cross
    assert (codes == nothing).sum() == 11


# Training on them


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_method_is_trained_on_them(made, method, tmp_path, monkeypatch):
    """Frozen towers stay as they are in the cache, the run folder has a copy, and needs the cache no more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c, run = load_method(method).config("tiny"), tmp_path / "run"
    file = pretrain.cache_file(pretrain.describe(method, c, 0))
    towers = pretrain.read(made(method))
    common.write_tensors(file, towers, pretrain.describe(method, c, 0))
    monkeypatch.setattr(pretrain, "make", None)  # nothing is pretrained here
    train.main(["--method", method, "--steps", "3", "--val-every", "3", "--batch-size", "4", "--workers", "0", "--out",
                str(run), "--device", "cpu"])
    info, trained = common.read_checkpoint(str(run))
    assert info["config"]["tune"] == "method" and info["weights"] == "pretrained" and not info["leak"]
    if method == "shared_ris":  # which trains its encoder
        assert not (run / "towers.safetensors").exists() and towers.keys() < trained.keys()
        assert any(not torch.equal(trained[k], towers[k]) for k in towers)
    else:
        assert not towers.keys() & trained.keys()
        assert all(torch.equal(v, towers[k]) for k, v in pretrain.read(run / "towers.safetensors").items())
    file.unlink()
    run.rename(tmp_path / "moved")
    model, _ = evaluate.load_run(str(tmp_path / "moved"), None, common.ALONE)
    if method != "shared_ris":
        assert all(torch.equal(v, towers[k]) for k, v in pretrain.towers_of(model).items())
        train.main(["--method", method, "--steps", "1", "--weights", str(tmp_path / "moved" / "towers.safetensors"),
                    "--batch-size", "4", "--workers", "0", "--out", str(tmp_path / "again"), "--device", "cpu"])
